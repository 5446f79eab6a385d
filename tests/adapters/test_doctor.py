"""Finding out what works on a machine."""

from __future__ import annotations

import json
from importlib.metadata import version

import mdgraft_openmm.doctor as module
import openmm
import pytest
from mdgraft_openmm._trials import run_trial
from mdgraft_openmm.doctor import DoctorReport, Finding, doctor
from mdgraft_openmm.export import availability

PLATFORMS = {
    openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())
}


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return doctor()


def test_essentials_work_here(report: DoctorReport) -> None:
    assert report.healthy
    for name in ("Python", "PyTorch", "OpenMM", "OpenMM platform Reference"):
        assert report.status(name) == "works"
    details = {finding.name: finding.detail for finding in report.findings}
    assert version("torch") in details["PyTorch"]
    assert openmm.__version__ in details["OpenMM"]
    assert report.status("compiled kernels") == "works"


def test_every_platform_is_told_about(report: DoctorReport) -> None:
    for name in ("Reference", "CPU", "OpenCL", "CUDA", "HIP"):
        status = report.status(f"OpenMM platform {name}")
        assert (status == "missing") == (name not in PLATFORMS)


def test_what_does_not_work_has_a_remedy(report: DoctorReport) -> None:
    for finding in report.findings:
        assert finding.status in ("works", "broken", "missing")
        assert finding.detail
        assert bool(finding.remedy) == (finding.status != "works")


def test_the_report_is_json(report: DoctorReport) -> None:
    found = json.loads(json.dumps(report.to_json()))
    assert found["healthy"] is True
    assert {row["name"] for row in found["findings"]} >= {"Python", "openmm-torch", "pymbar"}


def test_without_openmm_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._version
    monkeypatch.setattr(
        module, "_version", lambda name: None if name == "openmmtorch" else original(name)
    )
    monkeypatch.setattr(module, "_OPTIONAL", {})
    found = {finding.name: finding for finding in doctor().findings}
    assert found["openmm-torch"].status == "missing"
    assert 'pip install "mdgraft[openmmtorch]"' in found["openmm-torch"].remedy
    assert "TorchForce on Reference" not in found


def test_python_force_is_told_about(report: DoctorReport) -> None:
    assert (report.status("PythonForce") == "works") == hasattr(openmm, "PythonForce")


@pytest.mark.openmmtorch
def test_torch_force_is_told_about_as_it_is(report: DoctorReport) -> None:
    """What the table of measured combinations says agrees with what a trial finds."""
    statuses = {f.name: f.status for f in report.findings}
    for platform in PLATFORMS:
        fault = availability.torch_force_fault(platform)
        assert (statuses[f"TorchForce on {platform}"] == "works") == (fault is None), fault
    fault = availability.torch_force_fault(availability.COPIES)
    assert (statuses["TorchForce inside another force"] == "works") == (fault is None), fault


@pytest.mark.openmmtorch
def test_torch_force_works_on_reference_and_cpu(report: DoctorReport) -> None:
    assert report.status("openmm-torch") == "works"
    assert report.status("TorchForce on Reference") == "works"
    assert report.status("TorchForce on CPU") == "works"


TRIALS = {
    "an exception": ("raise RuntimeError('no such device')", "no such device"),
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "an abort": ("import os; os.abort()", "SIGABRT"),
    "silence": ("pass", "ended without an answer"),
    "a hang": ("import time; time.sleep(60)", "no answer within 0.5 s"),
}


@pytest.mark.parametrize(("code", "error"), TRIALS.values(), ids=TRIALS)
def test_a_trial_may_end_in_any_way(code: str, error: str) -> None:
    trial = run_trial(code, 0.5 if "sleep" in code else 60.0)
    assert not trial.ok
    assert error in trial.error


def test_noise_before_the_answer_is_ignored() -> None:
    trial = run_trial("print('hello'); print('{\"a\": 1}')", 60.0)
    assert trial.ok
    assert trial.answer == {"a": 1}


@pytest.mark.parametrize(
    ("probe", "name"), [("_TORCH", "PyTorch"), ("_OPENMM", "OpenMM"), ("_PLATFORM", "Reference")]
)
def test_broken_essentials_are_unhealthy(
    monkeypatch: pytest.MonkeyPatch, probe: str, name: str
) -> None:
    monkeypatch.setattr(module, probe, "import os; os.abort()")
    monkeypatch.setattr(module, "_OPTIONAL", {})
    found = doctor()
    assert not found.healthy
    broken = next(f for f in found.findings if f.name.endswith(name))
    # Nothing can be said about platforms unless OpenMM starts.
    assert broken.status == "broken"
    assert "SIGABRT" in broken.detail


def test_broken_kernels_have_a_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KERNELS", "raise ImportError('no llvmlite')")
    monkeypatch.setattr(module, "_OPTIONAL", {})
    found = doctor()
    assert found.healthy
    (broken,) = [f for f in found.findings if f.name == "compiled kernels"]
    assert broken.status == "broken" and "MDGRAFT_KERNELS=plain" in broken.remedy


def test_optional_parts_do_not_matter_for_health() -> None:
    good = Finding(name="a", status="works", detail="1", essential=True)
    bad = Finding(name="b", status="broken", detail="2")
    assert DoctorReport(findings=[good, bad]).healthy
    worse = Finding(name="b", status="missing", detail="2", essential=True)
    assert not DoctorReport(findings=[good, worse]).healthy
