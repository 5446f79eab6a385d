"""The documentation says what is true: its code runs, its lists are complete, its links lead on."""

from __future__ import annotations

import importlib
import inspect
import re
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
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        # Blank lines in front make line numbers in a traceback those of the page.
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


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
    targets = [found.partition("#")[0] for found in re.findall(r"\]\(([^)\s]+)\)", prose)]
    broken = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert broken == []


@pytest.mark.parametrize("package", ["mdgraft", "mdgraft_openmm", "mdgraft.ensembles"])
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

    page = (ROOT / "docs/forces.md").read_text(encoding="utf-8")
    assert [cls.__name__ for cls in CONVERTERS if f"## {cls.__name__}\n" not in page] == []
