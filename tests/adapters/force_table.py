"""The table of Force classes in the documentation; run to bring the page up to date."""

import ast
import re
from pathlib import Path

import mdgraft
import openmm
from force_examples import EXAMPLES, example
from mdgraft_openmm.forces import WITHOUT_ENERGY

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/forces").glob("*.md"))
INDEX = ROOT / "docs/forces/index.md"
TABLE = re.compile(r"(<!-- table: .*? -->\n).*?(?=<!-- end of table -->)", flags=re.S)


def force_classes():
    """Every Force class of this OpenMM that adds energy."""
    classes = [c for c in vars(openmm).values() if isinstance(c, type)]
    forces = {c for c in classes if issubclass(c, openmm.Force)} - {openmm.Force}
    return sorted((c for c in forces if c.__name__ not in WITHOUT_ENERGY), key=lambda c: c.__name__)


def section(name):
    """Page and anchor of the section about a class, or None."""
    for page in PAGES:
        if f"\n## {name}\n" in page.read_text(encoding="utf-8"):
            return f"{page.name}#{name.lower()}"
    return None


def files_about(name):
    """Test files whose docstring names the class."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if re.search(rf"\b{name}\b", about):
            found.append(path.name)
    return found


def row(force_class):
    """One line of the table."""
    name = force_class.__name__
    potential = mdgraft.graft(example(force_class)[0])
    term = potential.term_names[-1]
    own = [f"`{key}`" for key in potential.term(term).parameter_values()]
    shared = [key for key, _ in potential.named_parameters() if key.startswith("globals.")]
    parameters = ", ".join([*own, *(f"`{key}`" for key in shared)]) or "none"
    link = f"[{name}]({section(name) or 'host.md'})"
    files = ", ".join(f"`{file}`" for file in files_about(name))
    return f"| {link} | {potential.routes[term]} | {parameters} | {files} |"


def rows():
    """The lines of the classes that this OpenMM has."""
    return [row(c) for c in force_classes() if c in EXAMPLES]


def table():
    """The whole table."""
    head = ["| Force | Route | Parameters | Tests |", "|---|---|---|---|"]
    body = rows()
    native = sum("| native |" in line for line in body)
    return "\n".join([*head, *body, "", f"{native} of {len(body)} have a native form.", ""])


def updated(page):
    """The page with the table as it should be."""
    return TABLE.sub(lambda found: f"{found[1]}{table()}", page)


if __name__ == "__main__":
    INDEX.write_text(updated(INDEX.read_text(encoding="utf-8")), encoding="utf-8")
