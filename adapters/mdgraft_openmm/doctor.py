"""Finding out which hosts, plug-ins and platforms work on this machine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from mdgraft_openmm._openmm_torch import defines
from mdgraft_openmm._trials import (
    ENERGY,
    PYTHON_TORCH_FORCE,
    SYSTEM,
    TIMEOUT,
    TORCH_FORCE,
    TORCH_FORCE_COPIED,
    Trial,
    run_trial,
)

WORKS, BROKEN, MISSING = "works", "broken", "missing"

_KNOWN_PLATFORMS = ("Reference", "CPU", "OpenCL", "CUDA", "HIP")
_PLATFORM_REMEDIES = {
    "OpenCL": "install the OpenCL driver of the GPU",
    "CUDA": 'pip install "openmm[cuda12]" beside an NVIDIA driver',
    "HIP": 'pip install "openmm[hip6]" beside an AMD ROCm driver',
}
_OPTIONAL = {
    "ase": ("ASE", "ase", "mdgraft_ase needs it"),
    "MDAnalysis": ("MDAnalysis", "MDAnalysis", "optional"),
    "pymbar": ("pymbar", "pymbar", "optional"),
}
_TORCHFORCE = 'pip install "mdgraft[openmmtorch]" in an environment of its own'

# Probes print one line of JSON last; whatever libraries say before it is ignored.
_TORCH = """
import json, torch
x = torch.ones(3, dtype=torch.float64, requires_grad=True)
(x ** 3).sum().backward()
assert x.grad.tolist() == [3.0] * 3
cuda = torch.version.cuda
if torch.cuda.is_available():
    y = torch.ones(3, device="cuda") * 2
    assert y.sum().item() == 6.0
    cuda += " on " + torch.cuda.get_device_name()
elif cuda:
    cuda += ", no device found"
print(json.dumps({"version": torch.__version__, "cuda": cuda}))
"""
_KERNELS = """
import json, llvmlite, mdgraft, openmm, torch
from mdgraft.kernels.fused import jit
system, force = openmm.System(), openmm.NonbondedForce()
system.addForce(force)
for charge in (1.0, -1.0):
    system.addParticle(1.0)
    force.addParticle(charge, 0.3, 0.5)
force.setNonbondedMethod(openmm.NonbondedForce.PME)
system.setDefaultPeriodicBoxVectors([3, 0, 0], [0, 3, 0], [0, 0, 3])
potential = mdgraft.graft(system).requires_grad_(False)
x = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.1, 0.0]], dtype=torch.float64)
forces = potential.forces(x, 3 * torch.eye(3, dtype=x.dtype))
with mdgraft.plain_kernels():
    plain = potential.forces(x, 3 * torch.eye(3, dtype=x.dtype))
assert torch.allclose(forces, plain, rtol=1e-9), (forces, plain)
folder = jit.cache_folder()
print(json.dumps({"llvmlite": llvmlite.__version__, "lanes": jit.lanes(4), "folder": str(folder)}))
"""
_OPENMM = """
import json, openmm
names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
failures = list(openmm.Platform.getPluginLoadFailures())
found = {"version": openmm.__version__, "platforms": names, "failures": failures}
print(json.dumps(found | {"python_force": hasattr(openmm, "PythonForce")}))
"""
_PLATFORM = (
    SYSTEM
    + """
bond = openmm.HarmonicBondForce()
bond.addBond(0, 1, 0.3, 100.0)
system.addForce(bond)
ENERGY, FORCE = 2.0, 12.0
"""
    + ENERGY
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found about one package, platform or plug-in.

    Attributes
    ----------
    name
        Such as ``"OpenMM platform CUDA"``.
    status
        ``"works"``, ``"broken"`` or ``"missing"``.
    detail
        Version, or what went wrong.
    remedy
        What to install or do; empty if nothing.
    essential
        Whether mdgraft needs it.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""
    essential: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What `doctor` found.

    Attributes
    ----------
    findings
        One for each package, platform and plug-in.
    """

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether everything that mdgraft needs works."""
        return all(f.status == WORKS for f in self.findings if f.essential)

    def status(self, name: str) -> str:
        """Return the status of one finding."""
        return next(f.status for f in self.findings if f.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold."""
        return {"healthy": self.healthy, **dataclasses.asdict(self)}


def doctor(*, timeout: float = TIMEOUT) -> DoctorReport:
    """Try every host, plug-in and platform, each in a process of its own.

    Broken combinations can kill the process that they run in, so none runs in this one.

    Parameters
    ----------
    timeout
        How long each trial may take [s].

    Returns
    -------
    DoctorReport
    """
    findings = [_python()]
    # Few at a time: each trial loads large libraries.
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        torch = pool.submit(run_trial, _TORCH, timeout)
        openmm = pool.submit(run_trial, _OPENMM, timeout)
        optional = {name: pool.submit(_optional, name, timeout) for name in _OPTIONAL}
        findings.append(_torch(torch.result()))
        findings.append(_openmm(openmm.result()))
        findings.append(_kernels(pool.submit(run_trial, _KERNELS, timeout).result()))
        offered = openmm.result().answer.get("platforms", [])
        failures = openmm.result().answer.get("failures", [])
        names = [*_KNOWN_PLATFORMS, *(n for n in offered if n not in _KNOWN_PLATFORMS)]
        platforms = {
            name: pool.submit(run_trial, f"NAME = {name!r}\n{_PLATFORM}", timeout)
            for name in names
            if name in offered
        }
        findings += [_platform(name, platforms.get(name), failures) for name in names]
        findings.append(_python_force(openmm.result()))
        plugin = _version("openmmtorch")
        if plugin is None:
            findings.append(
                Finding(
                    name="openmm-torch",
                    status=MISSING,
                    detail="only TorchForce needs it",
                    remedy=_TORCHFORCE,
                )
            )
        else:
            findings.append(Finding(name="openmm-torch", status=WORKS, detail=plugin))
            trials = {
                name: pool.submit(run_trial, f"NAME = {name!r}\n{TORCH_FORCE}", timeout)
                for name in platforms
                if platforms[name].result().ok
            }
            copied = pool.submit(run_trial, f"NAME = 'Reference'\n{TORCH_FORCE_COPIED}", timeout)
            with_tensors = {
                name: pool.submit(run_trial, f"NAME = {name!r}\n{PYTHON_TORCH_FORCE}", timeout)
                for name in trials
                if defines("PythonTorchForce")
            }
            forces = [_torch_force(f"on {name}", t.result()) for name, t in trials.items()]
            if all(f.status != WORKS for f in forces):
                findings[-1] = dataclasses.replace(findings[-1], status=BROKEN, remedy=_TORCHFORCE)
            findings += [*forces, _torch_force("inside another force", copied.result())]
            findings += [
                _torch_force(f"on {name}", t.result(), "PythonTorchForce")
                for name, t in with_tensors.items()
            ]
        findings += [future.result() for future in optional.values()]
    return DoctorReport(findings=findings)


def _python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Finding(
        name="Python",
        status=WORKS if supported else BROKEN,
        detail=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        remedy="" if supported else "use Python 3.11, 3.12 or 3.13",
        essential=True,
    )


def _torch(trial: Trial) -> Finding:
    if not trial.ok:
        return _failed("PyTorch", "torch", trial, "pip install torch", essential=True)
    cuda = trial.answer["cuda"]
    return Finding(
        name="PyTorch",
        status=WORKS,
        detail=f"{trial.answer['version']}, {f'CUDA {cuda}' if cuda else 'no CUDA'}",
        essential=True,
    )


def _openmm(trial: Trial) -> Finding:
    if not trial.ok:
        return _failed("OpenMM", "openmm", trial, "pip install openmm", essential=True)
    detail = str(trial.answer["version"])
    # Those of platforms are told with the platform; openmm-torch loads only after torch.
    elsewhere = (*_PLATFORM_REMEDIES, "OpenMMTorch")
    others = [f for f in trial.answer["failures"] if not any(p in f for p in elsewhere)]
    if others:
        detail += f"; plug-ins that did not load: {'; '.join(others)}"
    return Finding(
        name="OpenMM", status=WORKS, detail=textwrap.shorten(detail, 400), essential=True
    )


def _platform(
    name: str, trial: concurrent.futures.Future[Trial] | None, failures: Sequence[str]
) -> Finding:
    label = f"OpenMM platform {name}"
    # The Reference platform is the yardstick of every check.
    essential = name == "Reference"
    remedy = _PLATFORM_REMEDIES.get(name, "pip install --force-reinstall openmm")
    if trial is None:
        return Finding(
            name=label,
            status=MISSING,
            detail=_reason(name, failures),
            remedy=remedy,
            essential=essential,
        )
    result = trial.result()
    if result.ok:
        detail = "energy and forces of a test system are right"
        return Finding(name=label, status=WORKS, detail=detail, essential=essential)
    return Finding(
        name=label, status=BROKEN, detail=result.error, remedy=remedy, essential=essential
    )


def _reason(name: str, failures: Sequence[str]) -> str:
    """Why a platform is not offered."""
    for failure in failures:
        if f"OpenMM{name}." in failure:
            # "Error loading library <path>: <reason>"
            return f"did not load: {failure.rpartition(f'OpenMM{name}.')[2].partition(': ')[2]}"
    return "not part of this OpenMM"


def _kernels(trial: Trial) -> Finding:
    name = "compiled kernels"
    if not trial.ok:
        remedy = "install numba again, or set MDGRAFT_KERNELS=plain to do without"
        return Finding(name=name, status=BROKEN, detail=trial.error, remedy=remedy)
    detail = "llvmlite {llvmlite}, vectors of {lanes} float32, kept in {folder}"
    return Finding(name=name, status=WORKS, detail=detail.format(**trial.answer))


def _python_force(trial: Trial) -> Finding:
    name = "PythonForce"
    if trial.answer.get("python_force"):
        return Finding(name=name, status=WORKS, detail="runs any torch module on every platform")
    detail = "runs torch modules; came with OpenMM 8.5" if trial.ok else "OpenMM does not start"
    return Finding(name=name, status=MISSING, detail=detail, remedy='pip install "openmm>=8.5"')


def _torch_force(where: str, trial: Trial, kind: str = "TorchForce") -> Finding:
    label = f"{kind} {where}"
    if trial.ok:
        return Finding(name=label, status=WORKS, detail="energy and forces are right")
    remedy = _TORCHFORCE
    if "process dies" in trial.error:
        # Nothing can be caught there, so that a force must not come so far.
        remedy = "use the backend PythonForce, or OpenMM 8.4 with torch 2.9.1"
    return Finding(name=label, status=BROKEN, detail=trial.error, remedy=remedy)


def _optional(module: str, timeout: float) -> Finding:
    name, distribution, use = _OPTIONAL[module]
    install = f"pip install {distribution}"
    if _version(distribution) is None:
        return Finding(name=name, status=MISSING, detail=use, remedy=install)
    trial = run_trial(f"import {module}, json\nprint(json.dumps({{}}))", timeout)
    if not trial.ok:
        return _failed(name, distribution, trial, install, essential=False)
    adapters = {entry.name for entry in entry_points(group="mdgraft.adapters")}
    has_adapter = "" if module in adapters else "; mdgraft has no adapter for it yet"
    return Finding(name=name, status=WORKS, detail=f"{_version(distribution)}{has_adapter}")


def _failed(name: str, distribution: str, trial: Trial, remedy: str, *, essential: bool) -> Finding:
    installed = _version(distribution)
    return Finding(
        name=name,
        status=MISSING if installed is None else BROKEN,
        detail=trial.error if installed is None else f"{installed}: {trial.error}",
        remedy=remedy,
        essential=essential,
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
