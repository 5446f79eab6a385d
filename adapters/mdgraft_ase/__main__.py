"""The ``ase`` command with mdgraft among its calculators: ``python -m mdgraft_ase run mdgraft``."""

# ASE's functions have no annotations.
# mypy: allow-untyped-calls

from __future__ import annotations

from ase.cli.main import main

# Importing it makes its name known to ASE.
import mdgraft_ase.calculator  # noqa: F401

if __name__ == "__main__":
    main(prog="python -m mdgraft_ase")
