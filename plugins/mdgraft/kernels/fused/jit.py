"""Compiling code for this processor, and keeping it on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

_LOCK = threading.Lock()
#: Engines own the memory of their code, and live as long as the process.
_ENGINES: list[Any] = []


def cache_folder() -> Path | None:
    """Where compiled code is kept; None if it is not.

    ``MDGRAFT_CACHE_DIR`` names another folder than ``~/.cache/mdgraft``; empty, it turns the cache
    off.
    """
    named = os.environ.get("MDGRAFT_CACHE_DIR")
    if named is not None:
        return Path(named) if named else None
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "mdgraft"
    except RuntimeError:
        # Nobody's home.
        return None


@functools.cache
def _target() -> tuple[Any, str]:
    """The machine to compile for, and a text that identifies it."""
    # Newer versions do this by themselves, and refuse.
    with contextlib.suppress(RuntimeError):
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    # The compiler prefers short vectors on machines that have long ones.
    options = {"cpu": llvm.get_host_cpu_name(), "features": features.flatten()}
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(opt=3, jit=True, codemodel="jitdefault", **options)
    mark = "|".join((llvmlite.__version__, machine.triple, *options.values()))
    return machine, mark


def lanes(bytes_per_number: int) -> int:
    """How many numbers one vector register of this processor holds."""
    features = llvm.get_host_cpu_features()
    if platform.machine().lower() in ("x86_64", "amd64"):
        width = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
    else:
        width = 16
    return width // bytes_per_number


def compiled(name: str, code: str, argument_types: Sequence[Any]) -> Any:
    """The function ``name`` of a module in LLVM's language, to be called without Python's lock.

    Parameters
    ----------
    name
        Of a function that returns nothing.
    code
        The module.
    argument_types
        Types of `ctypes`.
    """
    with _LOCK:
        machine, mark = _target()
        key = hashlib.sha256(f"{mark}\n{code}".encode()).hexdigest()
        object_code = _load(key)
        module = llvm.parse_assembly(code if object_code is None else "")
        engine = llvm.create_mcjit_compiler(module, _target_machine())
        if object_code is None:
            _optimize(module, machine)
            object_code = machine.emit_object(module)
            _store(key, object_code)
            engine.remove_module(module)
        engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
        engine.finalize_object()
        _ENGINES.append(engine)
        address = engine.get_function_address(name)
    return ctypes.CFUNCTYPE(None, *argument_types)(address)


def _target_machine() -> Any:
    # An engine takes its machine away, so each gets a new one.
    return llvm.Target.from_default_triple().create_target_machine(
        opt=3,
        jit=True,
        codemodel="jitdefault",
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
    )


def _optimize(module: Any, machine: Any) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False
    options.slp_vectorization = False
    options.loop_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


def _load(key: str) -> bytes | None:
    folder = cache_folder()
    if folder is None:
        return None
    try:
        stored = (folder / f"{key}.o").read_bytes()
    except OSError:
        return None
    # A file that was cut short must not be run.
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _store(key: str, code: bytes) -> None:
    folder = cache_folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as stream:
            stream.write(hashlib.sha256(code).digest() + code)
        try:
            os.replace(stream.name, folder / f"{key}.o")
        except OSError:
            os.unlink(stream.name)
    except OSError:
        # A read-only home is no reason to fail.
        return
