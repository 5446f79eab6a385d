"""The main job: liquid bromine against plain OpenMM and a published study."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import openmm
import pytest
from mdgraft import graft
from mdgraft.fitting import run

ROOT = Path(__file__).parents[2]


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path) as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_liquid_bromine(tmp_path: Path) -> None:
    result = run(ROOT / "examples" / "01_liquid_bromine.toml", output=tmp_path / "out")
    assert result.converged
    rows = rows_of(result.history)
    first, last = rows[0], rows[-1]
    # Within 4 standard errors of another estimate: 400 frames in 200 ps of plain OpenMM, with
    # 2919.6 +- 4.7 kg/m^3 and 37.60 kJ/mol at the start.
    assert first["density"] == pytest.approx(
        2919.6, abs=4 * math.hypot(first["density_standard_error"], 4.7)
    )
    assert first["heat_of_vaporization"] == pytest.approx(
        37.6, abs=4 * math.hypot(first["heat_of_vaporization_standard_error"], 0.07)
    )
    # Published: near -1.7e4 kg/m^3/nm, without a stated error.
    assert first["d_density_d_sigma"] == pytest.approx(-1.7e4, rel=0.5)
    for name, target in (("density", 3102.8), ("heat_of_vaporization", 29.96)):
        assert abs(last[name] - target) <= last[f"{name}_standard_error"]
    assert last["density_standard_error"] < 10.0
    assert last["heat_of_vaporization_standard_error"] < 0.2
    assert last["sigma"] == pytest.approx(0.3504, abs=0.002)
    assert last["epsilon"] == pytest.approx(2.165, abs=0.1)
    graft(openmm.XmlSerializer.deserialize(result.systems["liquid"].read_text()))
