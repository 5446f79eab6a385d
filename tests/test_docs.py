"""The documentation says what is true: its code runs, its lists are complete, its links lead on."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of a page with the line on which each begins."""
    text = path.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start()) + 1, found[1])
        for found in re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
        if not found[1].startswith("--8<--")
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        # Blank lines in front make line numbers in a traceback those of the page.
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=name)
def test_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=name)
def test_configurations_are_accepted(page: Path, tmp_path: Path) -> None:
    from mdgraft.fitting.config import load_config

    text = "\n".join(block for _, block in blocks(page, "toml"))
    (tmp_path / "page.toml").write_text(text, encoding="utf-8")
    assert (
        load_config(tmp_path / "page.toml").targets.keys() == tomllib.loads(text)["targets"].keys()
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [*re.findall(r"\]\(([^)\s]+)\)", prose), *re.findall(r'src="([^"]+)"', prose)]
    targets = [link.partition("#")[0] for link in found]
    broken = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert broken == []


@pytest.mark.parametrize(
    "package",
    [
        "mdgraft",
        "mdgraft_ase",
        "mdgraft_openmm",
        "mdgraft.constraints",
        "mdgraft.dynamics",
        "mdgraft.ensembles",
        "mdgraft.fitting",
        "mdgraft.lepton",
        "mdgraft.montecarlo",
        "mdgraft.montecarlo.gradients",
        "mdgraft.neural",
        "mdgraft.testsystems",
    ],
)
def test_api_reference_is_complete(package: str) -> None:
    page = ROOT / "docs/api" / f"{package.partition('.')[0]}.md"
    listed = set(re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.M))
    public = {
        f"{package}.{key}"
        for key, value in vars(importlib.import_module(package)).items()
        if not key.startswith("_") and not inspect.ismodule(value)
    }
    assert public - listed == set()


def test_every_example_is_rendered() -> None:
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    examples = [p for p in sorted((ROOT / "examples").iterdir()) if p.suffix in (".py", ".toml")]
    assert examples
    assert [p.name for p in examples if f'--8<-- "examples/{p.name}"' not in page] == []
    assert [p.name for p in examples if not re.match(r"\d\d_\w+\.", p.name)] == []


def test_every_force_is_described() -> None:
    from mdgraft_openmm.forces import CONVERTERS

    pages = sorted((ROOT / "docs/forces").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [cls.__name__ for cls in CONVERTERS if text.count(f"\n## {cls.__name__}\n") != 1] == []


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("`[systems.NAME]`", "SystemConfig"),
        ("`[parameters.NAME]`", "ParameterConfig"),
        ("Selections", "SelectionConfig"),
        ("`[targets.NAME]`", "TargetConfig"),
        ("`[optimizer]`", "OptimizerConfig"),
        ("`[convergence]`", "ConvergenceConfig"),
        ("`[reweighting]`", "ReweightingConfig"),
    ],
)
def test_every_key_of_a_fit_is_described(heading: str, model: str) -> None:
    from mdgraft.fitting import config

    page = (ROOT / "docs/fitting.md").read_text(encoding="utf-8")
    section = page.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    described = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, flags=re.M))
    fields = getattr(config, model).model_fields
    assert described.keys() == fields.keys()
    for key, field in fields.items():
        assert (described[key] == "required") == field.is_required(), key
        if described[key].startswith("`"):
            assert tomllib.loads(f"x = {described[key].strip('`')}")["x"] == field.get_default(
                call_default_factory=True
            ), key
        else:
            default = field.get_default(call_default_factory=not field.is_required())
            assert field.is_required() or default in (None, "", (-math.inf, math.inf)), key


def test_every_option_and_exit_code_is_described() -> None:
    from mdgraft import cli

    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        assert f"## {command}\n" in page
        for action in parser._actions:
            for option in action.option_strings:
                assert option == "-h" or f"`{option}" in page, f"{command} {option}"
    codes = {cli.OK, cli.DIFFERS, cli.BAD_INPUT, cli.NOT_CONVERGED, cli.INTERRUPTED}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.M)} == codes
