"""The command line: exit codes, what is printed where, bad usage and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mdgraft
import openmm
import pytest
from mdgraft import ConfigurationError, MDGraftError, cli, fitting


@pytest.fixture
def system(tmp_path: Path) -> Path:
    made = openmm.System()
    bonds = openmm.HarmonicBondForce()
    bonds.setName("[bold]bonds")  # markup in a name is not to be interpreted
    for i in range(4):
        made.addParticle(12.0)
        if i:
            bonds.addBond(i - 1, i, 0.15, 1000.0)
    made.addForce(bonds)
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(made))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mdgraft.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_as_a_process(system: Path) -> None:
    good = run("check", str(system), "--gradients", "--json")
    assert good.returncode == 0
    found = json.loads(good.stdout)
    assert found["command"] == "check"
    assert found["agrees"] is True
    assert "energies and forces" in good.stderr
    bad = run("check", str(system) + ".nothing")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("mdgraft: system: ")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mdgraft {mdgraft.__version__}\n"
    for arguments in (["--help"], ["check", "--help"], ["fit", "--help"], ["doctor", "--help"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        assert "exit codes:" in text
        assert "did not converge" in text or "without convergence" in text


BAD_USAGE = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["improve"], "invalid choice: 'improve'"),
    "no system": (["check"], "required: SYSTEM.xml"),
    "unknown option": (["doctor", "--now"], "unrecognized arguments: --now"),
    "tolerance that is no number": (
        ["check", "x.xml", "--tolerance", "small"],
        "got 'small', wanted a positive number",
    ),
    "negative tolerance": (["check", "x.xml", "--tolerance=-1"], "wanted a positive number"),
    "NaN": (["check", "x.xml", "--gradient-tolerance", "nan"], "wanted a positive number"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_USAGE.values(), ids=BAD_USAGE)
def test_bad_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_check_prints_a_table(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(system), "--gradients"]) == 0
    captured = capsys.readouterr()
    assert "[bold]bonds" in captured.out
    assert "length, random direction" in captured.out
    assert "generated" in captured.out
    assert "the graft agrees with OpenMM" in captured.out
    assert "Traceback" not in captured.err


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    import mdgraft_openmm.check as module

    original = mdgraft.graft

    def wrong(host: Any, **options: Any) -> mdgraft.Potential:
        potential = original(host, **options)
        for parameter in potential.parameters():
            parameter.data.mul_(factor)
        return potential

    monkeypatch.setattr(module.mdgraft, "graft", wrong)


def test_a_wrong_graft_makes_exit_code_1(
    system: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1.001)
    assert cli.main(["check", str(system)]) == 1
    assert "THE GRAFT DIFFERS FROM OPENMM" in capsys.readouterr().out
    assert cli.main(["check", str(system), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is False
    assert {row["status"] for row in found["comparisons"]} == {"differs"}


def test_tolerances_are_those_asked_for(
    system: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1 + 1e-7)
    assert cli.main(["check", str(system), "--json"]) == 1
    capsys.readouterr()
    options = ["--tolerance", "1e-4", "--gradient-tolerance", "1e-5"]
    assert cli.main(["check", str(system), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tolerances"] == {
        "energy": 1e-4,
        "forces": 1e-4,
        "box": 1e-5,
        "parameters": 1e-5,
    }


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    path = tmp_path / "broken.xml"
    path.write_text("<System")
    arguments = ["check", str(path), *(["--json"] if as_json else [])]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "not well-formed XML" in captured.err
    if as_json:
        found = json.loads(captured.out)
        assert found["error"] == "InvalidInputError"
        assert "not well-formed XML" in found["message"]
    else:
        assert captured.out == ""


def test_code_in_files_needs_trust(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system.write_text(system.read_text().replace('"HarmonicBondForce"', '"PythonForce"'))
    assert cli.main(["check", str(system)]) == 2
    assert "--trust" in capsys.readouterr().err


class FakeResult(SimpleNamespace):
    def to_json(self) -> dict[str, Any]:
        return {"converged": self.converged}

    def summary(self) -> str:
        return "fitted [k]"


@pytest.mark.parametrize(("converged", "code"), [(True, 0), (False, 3)])
def test_fit_hands_over_its_arguments(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    converged: bool,
    code: int,
) -> None:
    seen: dict[str, Any] = {}

    def fake(config: str, **options: Any) -> FakeResult:
        seen.update(options, config=config)
        options["progress"]("sampling", 1, 2)
        return FakeResult(converged=converged)

    monkeypatch.setattr(fitting, "run", fake)
    arguments = ["fit", "c.toml", "--output", "out", "--resume", "--trust"]
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert "fitted [k]" in captured.out
    assert "fit: sampling (1/2)" in captured.err
    del seen["progress"]
    assert seen == {"config": "c.toml", "output": "out", "resume": True, "trust": True}
    assert cli.main([*arguments, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["converged"] is converged


FAILURES = {
    "typed": (
        ConfigurationError("systems: missing\nadd one"),
        2,
        "mdgraft: systems: missing add one",
    ),
    "base": (MDGraftError("no"), 2, "mdgraft: no"),
    "no file": (FileNotFoundError(2, "No such file or directory", "c.toml"), 2, "c.toml: No such"),
    "full disk": (OSError(28, "No space left on device"), 2, "mdgraft: No space left"),
    "read-only": (OSError(30, "Read-only file system", "out"), 2, "mdgraft: out: Read-only"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize(("error", "code", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_of_a_fit(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(fitting, "run", fail)
    assert cli.main(["fit", "c.toml"]) == code
    assert message in capsys.readouterr().err


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(fitting, "run", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["fit", "c.toml"])


def test_a_missing_configuration_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", str(tmp_path / "nothing.toml")]) == 2
    assert "nothing.toml" in capsys.readouterr().err


def fake_doctor(healthy: bool) -> Any:
    finding = SimpleNamespace(name="[x]", status="works", detail="1.0", remedy="")
    content = {"healthy": healthy, "findings": [vars(finding)]}
    return SimpleNamespace(healthy=healthy, findings=[finding], to_json=lambda: content)


@pytest.mark.parametrize(("healthy", "code"), [(True, 0), (False, 1)])
def test_doctor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, healthy: bool, code: int
) -> None:
    monkeypatch.setattr(cli, "service", lambda host, name: lambda: fake_doctor(healthy))
    assert cli.main(["doctor"]) == code
    out = capsys.readouterr().out
    assert "[x]" in out
    assert ("CANNOT" in out) == (not healthy)
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["healthy"] is healthy


def test_doctor_without_openmm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(host: str, name: str) -> Any:
        raise ImportError("libOpenMM.so: not found")

    monkeypatch.setattr(cli, "service", fail)
    assert cli.main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    assert "pip install openmm" in captured.err
    assert json.loads(captured.out)["healthy"] is False
