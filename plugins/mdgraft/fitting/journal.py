"""The append-only record of a fit, from which an interrupted one is continued."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdgraft._errors import ConfigurationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All averages at one point of parameter space; one row of the history.

    Attributes
    ----------
    iteration
        Number of the evaluation, from 0.
    parameters
        Values by name.
    resampled
        Whether the frames were sampled at these parameters, and not reweighted to them.
    samples
        Number of the set of frames that was used, by system; rigid systems have none.
    frames
        Number of frames, by system.
    values, standard_errors
        Averages and their standard errors by target, in the target's unit.
    gradients, gradient_standard_errors
        Derivatives ``{target: {parameter: number}}`` and their standard errors.
    effective_sample_sizes, entropy_sample_sizes
        Kish's and the entropic sample size, by system.
    """

    iteration: int
    parameters: dict[str, float]
    resampled: bool
    samples: dict[str, int]
    frames: dict[str, int]
    values: dict[str, float]
    standard_errors: dict[str, float]
    gradients: dict[str, dict[str, float]]
    gradient_standard_errors: dict[str, dict[str, float]]
    effective_sample_sizes: dict[str, float]
    entropy_sample_sizes: dict[str, float]


class Journal:
    """Evaluations as lines of JSON, each on disk before anything depends on it.

    Parameters
    ----------
    path
        The file.
    header
        What the run depends on; an existing journal must have the same.

    Raises
    ------
    ConfigurationError
        If the file belongs to another run, or is damaged other than at its end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.evaluations: list[Evaluation] = []
        if path.exists() and self._read(header):
            return
        self._append({"header": dict(header)}, create=True)

    def append(self, evaluation: Evaluation) -> None:
        """Record one evaluation for good."""
        self._append({"evaluation": dataclasses.asdict(evaluation)})
        self.evaluations.append(evaluation)

    def _append(self, record: Mapping[str, Any], *, create: bool = False) -> None:
        with open(self.path, "wb" if create else "ab") as stream:
            stream.write(json.dumps(record).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, header: Mapping[str, Any]) -> bool:
        """Load the records; False if not even the header was complete."""
        content = self.path.read_bytes()
        # A process killed while writing leaves a last line without its end.
        complete = content[: content.rfind(b"\n") + 1]
        if not complete:
            return False
        if len(complete) != len(content):
            with open(self.path, "r+b") as stream:
                stream.truncate(len(complete))
                os.fsync(stream.fileno())
        try:
            records = [json.loads(line) for line in complete.decode().splitlines()]
            found = records[0]["header"]
            self.evaluations = [Evaluation(**record["evaluation"]) for record in records[1:]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigurationError(
                f"{self.path}: is damaged ({error}); start again without --resume"
            ) from error
        for key, wanted in header.items():
            if found.get(key) != wanted:
                raise ConfigurationError(
                    f"{self.path.parent}: was made with {_other(key)} (then {found.get(key)!r}, "
                    f"now {wanted!r}); undo that change, or start again without --resume"
                )
        return True


def _other(key: str) -> str:
    return f"other {key}" if key.endswith("s") else f"another {key}"
