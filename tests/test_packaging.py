"""What the distribution promises: layout, metadata, import rules, recipe."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rattler_build

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [Path(p) for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
HOSTS = (
    "openmm",
    "openmmtorch",
    "openmmml",
    "simtk",
    "ase",
    "MDAnalysis",
    "parmed",
    "pymbar",
    "pyscf",
)

# From the ground up; a floor imports itself and the floors below.
FLOORS = (
    ("_errors", "_units", "_types", "frames", "_services", "_differences"),
    ("lepton",),
    ("kernels",),
    ("potentials",),
    ("constraints",),
    ("neural",),
    (
        "_graft",
        "_comparison",
        "_model_checks",
        "_model_subject",
        "estimate",
        "ensembles",
        "dynamics",
        "montecarlo",
        "relaxation",
    ),
    ("biasing", "fitting", "testing", "testsystems"),
    ("_console", "cli", "__main__"),
)


def modules(folder: Path) -> list[Path]:
    """Python files below a folder of the checkout."""
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, at any depth of its code."""
    package = list(path.relative_to(ROOT).parts[1:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.partition(".")[0]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Layout ---------------------------------------------------------------------------------------


def test_wheel_lists_every_typed_package() -> None:
    typed = {
        p.parent.relative_to(ROOT)
        for r in ("plugins", "adapters")
        for p in (ROOT / r).glob("*/py.typed")
    }
    with_code = {
        p.parent.relative_to(ROOT)
        for r in ("plugins", "adapters")
        for p in (ROOT / r).glob("*/*.py")
    }
    assert set(PACKAGES) == typed == with_code
    assert all(Path("plugins") in p.parents for p in PACKAGES if p.name == "mdgraft")


def test_every_folder_of_code_is_a_package() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in modules(package)}:
            assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_top_level() -> None:
    wanted = {"pyproject.toml", "README.md", "LICENSE", "mkdocs.yml"}
    wanted |= {"plugins", "adapters", "tests", "examples", "docs", "conda-recipe"}
    assert wanted <= {path.name for path in ROOT.iterdir()}
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return
    tracked = {line.partition("/")[0] for line in run("git", "ls-files").splitlines()}
    assert {name for name in tracked if not name.startswith(".")} <= wanted


@pytest.mark.parametrize("folder", ["plugins", "adapters", "tests", "examples", "docs"])
def test_files_are_short(folder: str) -> None:
    lengths = {
        str(p.relative_to(ROOT)): p.read_text(encoding="utf-8").count("\n")
        for p in modules(Path(folder))
    }
    assert {name: n for name, n in lengths.items() if n > 650} == {}


def test_readme_has_exactly_two_setup_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert [line for line in lines if "pip " in line] == [
        "pip install -e . && mdgraft fit examples/01_liquid_bromine.toml",
        'pip install -e ".[test]" && pytest',
    ]
    assert text.count("pip install -e") == 2


# Metadata -------------------------------------------------------------------------------------


def test_installed_metadata_are_those_of_the_checkout() -> None:
    # Entry points are frozen at installation.
    project, installed = PROJECT["project"], importlib.metadata.distribution("mdgraft")
    assert installed.version == project["version"]
    declared = dict(project["entry-points"], console_scripts=project["scripts"])
    found = {(e.group, e.name, e.value) for e in installed.entry_points if e.group in declared}
    wanted = {(g, name, value) for g, table in declared.items() for name, value in table.items()}
    assert found == wanted, "entry points changed: run pip install -e . again"


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group, table in (
            *PROJECT["project"]["entry-points"].items(),
            ("console_scripts", PROJECT["project"]["scripts"]),
        )
        for name in table
    ],
)
def test_entry_points_load(group: str, name: str) -> None:
    (entry,) = (e for e in importlib.metadata.entry_points(group=group) if e.name == name)
    assert callable(entry.load())


def test_versions_agree() -> None:
    import mdgraft

    recipe = (ROOT / "conda-recipe/recipe.yaml").read_text(encoding="utf-8")
    found = re.search(r'^  version: "([^"]+)"$', recipe, flags=re.M)
    assert found is not None
    assert mdgraft.__version__ == PROJECT["project"]["version"] == found[1]
    assert mdgraft.__version__ in (ROOT / "docs/changelog.md").read_text(encoding="utf-8")


def test_only_one_extra_touches_torch() -> None:
    # The second set-up command must not replace what the first one installed.
    extras = PROJECT["project"]["optional-dependencies"]
    pinning = [n for n, deps in extras.items() if any(re.match(r"torch\b", d) for d in deps)]
    assert pinning == ["openmmtorch"]
    assert "torch==2.9.1" in extras["openmmtorch"]


# Imports --------------------------------------------------------------------------------------


def test_import_loads_no_host() -> None:
    code = "import json, sys, mdgraft, mdgraft.cli; print(json.dumps(sorted(sys.modules)))"
    loaded = {top(name) for name in json.loads(run(sys.executable, "-c", code))}
    assert loaded & {*HOSTS, *(p.name for p in PACKAGES if p.name != "mdgraft")} == set()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_init_is_the_contract_and_nothing_else(package: Path) -> None:
    source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 80
    docstring, *body = ast.parse(source).body
    assert isinstance(docstring, ast.Expr)
    declared = set()
    for node in body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)
            declared |= {alias.name for alias in node.names}
        else:
            assert ast.unparse(node).startswith("__version__ = "), ast.unparse(node)
    module = importlib.import_module(package.name)
    public = {
        n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)
    }
    assert public == declared


def test_plugins_import_no_host_and_no_adapter() -> None:
    adapters = {p.name for p in PACKAGES if p.parts[0] == "adapters"}
    for path in modules(Path("plugins")):
        found = {top(name) for name in imports(path)} & {*HOSTS, *adapters}
        assert found == set(), f"{path} imports {sorted(found)}"


def test_no_adapter_imports_another() -> None:
    adapters = {p.name for p in PACKAGES if p.parts[0] == "adapters"}
    for path in modules(Path("adapters")):
        own = path.relative_to(ROOT).parts[1]
        found = {top(name) for name in imports(path)} & (adapters - {own})
        assert found == set(), f"{path} imports {sorted(found)}"


def test_floors() -> None:
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for path in modules(Path("plugins/mdgraft")):
        own = path.relative_to(ROOT / "plugins/mdgraft").with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in level, f"{path}: say in FLOORS to which floor {own!r} belongs"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "mdgraft":
                continue
            # "from mdgraft import x" means the whole house, unless x is the version or a module.
            if len(parts) > 1 and parts[1] == "__version__":
                continue
            assert len(parts) > 1 and parts[1] in level, f"{path} imports {name}, the whole package"
            assert level[parts[1]] <= level[own], f"{path} ({own}) imports {name}, a floor above"


def public_objects() -> Iterator[tuple[str, Any]]:
    for package in PACKAGES:
        for path in modules(package):
            parts = path.relative_to(ROOT / package.parent).with_suffix("").parts
            if any(part.startswith("_") for part in parts if part != "__init__"):
                continue
            name = ".".join(parts).removesuffix(".__init__")
            module = importlib.import_module(name)
            yield name, module
            for key, value in vars(module).items():
                if key.startswith("_") or not getattr(value, "__module__", "").startswith(
                    "mdgraft"
                ):
                    continue
                if not (inspect.isclass(value) or inspect.isfunction(value)):
                    continue
                yield f"{name}.{key}", value
                if inspect.isclass(value):
                    for member, function in vars(value).items():
                        if not member.startswith("_") and inspect.isfunction(function):
                            yield f"{name}.{key}.{member}", function


def test_every_public_name_has_a_docstring() -> None:
    # inspect.getdoc also finds what a method inherits from the interface that it implements.
    assert [
        name for name, item in public_objects() if not (inspect.getdoc(item) or "").strip()
    ] == []


# Recipe ---------------------------------------------------------------------------------------

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def conda(requirement: str) -> str:
    """A requirement of pyproject.toml as conda spells it."""
    found = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement)
    assert found is not None
    return f"{CONDA_NAMES.get(found[1], found[1])} {found[2]}".strip()


def test_recipe_is_accepted_and_mirrors_the_project() -> None:
    recipe = rattler_build.Stage0Recipe.from_file(ROOT / "conda-recipe/recipe.yaml")
    (variant,) = recipe.render(rattler_build.VariantConfig())
    rendered, project = variant.recipe.to_dict(), PROJECT["project"]
    assert rendered["package"] == {"name": project["name"], "version": project["version"]}
    assert rendered["build"]["noarch"] == "python"
    assert rendered["build"]["python"]["entry_points"] == [
        f"{name} = {value}" for name, value in project["scripts"].items()
    ]
    python, *run_requirements = rendered["requirements"]["run"]
    assert python == f"python {project['requires-python']}"
    assert sorted(run_requirements) == sorted(conda(d) for d in project["dependencies"])
    assert set(PROJECT["build-system"]["requires"]) < set(rendered["requirements"]["host"])
    tests: dict[str, Any] = {k: v for test in rendered["tests"] for k, v in test.items()}
    assert {p.name for p in PACKAGES} <= set(tests["python"]["imports"])
    assert "mdgraft doctor" in tests["script"]
    assert rendered["about"]["license"] == project["license"]
    for name in tests["python"]["imports"]:
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("noarch: python", "noarch: pyton", "noarch"),
        ("pip_check", "pip_chek", "unknown field"),
        ("- pip\n", "- pip >>1\n", "version spec"),
    ],
)
def test_a_broken_recipe_is_refused(right: str, wrong: str, message: str) -> None:
    text = (ROOT / "conda-recipe/recipe.yaml").read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(rattler_build.RattlerBuildError, match=message):
        rattler_build.Stage0Recipe.from_yaml(text.replace(right, wrong)).render(
            rattler_build.VariantConfig()
        )
