"""Which Force classes that run torch work here, found out before one is made."""

from __future__ import annotations

import functools
import importlib
import re
from importlib.metadata import version
from typing import Any

import openmm

from mdgraft_openmm._openmm_torch import defines, is_released_wheel, plugin_version
from mdgraft_openmm._trials import (
    PYTHON_TORCH_FORCE,
    TORCH_FORCE,
    TORCH_FORCE_COPIED,
    run_trial,
)

#: Instead of a platform: OpenMM copies forces inside others, by writing and reading them.
COPIES = "copies"


def registered_platforms() -> list[str]:
    """Platforms that a Context may choose in this process."""
    count = openmm.Platform.getNumPlatforms()
    return [openmm.Platform.getPlatform(i).getName() for i in range(count)]


def python_force_fault() -> str | None:
    """Why there is no ``PythonForce``, or None."""
    if hasattr(openmm, "PythonForce"):
        return None
    return f"PythonForce came with OpenMM 8.5, this is {openmm.__version__}"


def torch_force_fault(platform: str) -> str | None:
    """Why a ``TorchForce`` does not work on a platform, or for `COPIES`; None if it does."""
    versions = _versions()
    if isinstance(versions, str):
        return versions
    known = _measured(*versions, platform) if is_released_wheel() else None
    if known is not None:
        return known or None
    return _tried("TorchForce", platform)


def python_torch_force_fault(platform: str) -> str | None:
    """Why a ``PythonTorchForce`` does not work on a platform; None if it does."""
    versions = _versions()
    if isinstance(versions, str):
        return versions
    if not defines("PythonTorchForce"):
        return f"openmm-torch {versions[0]} has no PythonTorchForce yet"
    return _tried("PythonTorchForce", platform)


def load_openmm_torch() -> Any:
    """Import openmm-torch, and load what OpenMM could not load of it for want of torch.

    A user may have imported OpenMM before torch. Only libraries of platforms that work are loaded:
    without its library a platform raises where it would end the process with it.
    """
    module = importlib.import_module("openmmtorch")
    for failure in openmm.Platform.getPluginLoadFailures():
        found = re.search(r"(\S*OpenMMTorch(\w+)\.(?:so|dylib|dll)\b)", failure)
        if found and found[1] not in _LOADED and torch_force_fault(found[2]) is None:
            openmm.Platform.loadPluginLibrary(found[1])
            _LOADED.add(found[1])
    return module


#: Libraries that were loaded late; OpenMM goes on listing them as failures.
_LOADED: set[str] = set()


def _versions() -> tuple[str, str, str] | str:
    """Versions of openmm-torch, torch and OpenMM, without importing the first."""
    plugin = plugin_version()
    if plugin is None:
        return "openmm-torch is not installed"
    return plugin, version("torch"), openmm.__version__


def _measured(plugin: str, torch_version: str, openmm_version: str, platform: str) -> str | None:
    """What is known of the combination: a fault, ``""`` if it works, None if nothing is known.

    As measured with the wheel openmmtorch 1.5, which was built for torch 2.9 and OpenMM 8.4.
    """
    torch_numbers, openmm_numbers = _numbers(torch_version), _numbers(openmm_version)
    if _numbers(plugin) != (1, 5) or not (8, 4) <= openmm_numbers < (8, 7):
        return None
    combination = f"openmm-torch {plugin} with torch {torch_version} and OpenMM {openmm_version}"
    if torch_numbers != (2, 9):
        kind = "fails in every evaluation" if torch_numbers > (2, 9) else "ends the process"
        return f"{combination} {kind}; install torch 2.9.1"
    if platform in ("Reference", "CPU"):
        return ""
    if platform in ("OpenCL", "CUDA"):
        if openmm_numbers >= (8, 5):
            return (
                f"{combination} ends the process on the {platform} platform; use OpenMM 8.4, or "
                "the CPU platform"
            )
        return "" if platform == "OpenCL" else None
    if platform == COPIES:
        if openmm_numbers >= (8, 6):
            return (
                f"{combination} ends the process where a TorchForce is copied or read from a "
                "file; use OpenMM 8.5"
            )
        return ""
    return None


def _numbers(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0)


@functools.cache
def _tried(kind: str, platform: str) -> str | None:
    """Fault in a trial, made once in each process."""
    if kind == "PythonTorchForce":
        code = PYTHON_TORCH_FORCE
    else:
        code = TORCH_FORCE_COPIED if platform == COPIES else TORCH_FORCE
    name = "Reference" if platform == COPIES else platform
    trial = run_trial(f"NAME = {name!r}\n{code}")
    where = "where it is copied" if platform == COPIES else f"on the {platform} platform"
    return None if trial.ok else f"{kind} does not work {where}: {trial.error}"
