"""Chunks of work on threads, for loops that release the interpreter's lock."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


def run_chunks(function: Callable[[int], object], n_chunks: int) -> None:
    """Call ``function(0)`` to ``function(n_chunks - 1)``, side by side, and wait for all.

    The calling thread takes the first chunk, so one chunk costs no more than the call. Must not be
    called from within a chunk.

    Parameters
    ----------
    function
        Does one chunk; its result is dropped.
    n_chunks
        Number of chunks.

    Raises
    ------
    Exception
        What the first chunk that failed raised, after all have ended.
    """
    if n_chunks <= 1:
        if n_chunks == 1:
            function(0)
        return
    pool = _pool(os.getpid())
    others: list[Future[object]] = []
    mine = [0]
    for chunk in range(1, n_chunks):
        try:
            others.append(pool.submit(function, chunk))
        except RuntimeError:
            # The interpreter is shutting down: threads take no more work.
            mine.append(chunk)
    try:
        for chunk in mine:
            function(chunk)
    finally:
        # Nobody may go on writing into arrays that the caller has given up.
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


# By process, since threads do not live on in the child of a fork. Without a lock of its own, that
# a fork could leave locked: two threads at once may make two pools, and one is dropped.
@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mdgraft")
