"""Configurations: what a good one means, and what each bad one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from mdgraft import ConfigurationError
from mdgraft.fitting import load_config
from mdgraft.fitting.optimizers import make_optimizer

GOOD = """
[systems.liquid]
files = { system = "system.xml", positions = "state.xml" }
temperature = 300.0
pressure = 1.0

[systems.gas]
files = { system = "gas.xml", positions = "gas.pdb" }
temperature = 300.0
rigid = true

[parameters.sigma]
select = "NonbondedForce.sigma"
initial = 0.3
bounds = [0.2, 0.4]

[parameters.epsilon]
select = [{ parameter = "NonbondedForce.epsilon", element = "O", systems = ["liquid"] }]

[targets.density]
value = 1.0
uncertainty = 0.01
unit = "g/cm3"

[targets.heat_of_vaporization]
value = 10.5
uncertainty = 0.1
unit = "kcal/mol"
gas = "gas"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "fit.toml"
    path.write_text(text)
    return path


def test_good_configuration(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.targets["density"].observable == "density"
    assert config.targets["density"].system == "liquid"
    assert config.targets["density"].factor() == pytest.approx(1000.0)
    assert config.targets["heat_of_vaporization"].factor() == pytest.approx(4.184)
    assert config.parameters["sigma"].select[0].parameter == "NonbondedForce.sigma"
    assert config.parameters["epsilon"].select[0].element == ["O"]
    assert config.systems["liquid"].interval == "auto"


def test_digest_ignores_only_the_iteration_limit(tmp_path: Path) -> None:
    base = load_config(write(tmp_path, GOOD)).digest()
    longer = GOOD + "\n[convergence]\nmax_iterations = 99\n"
    stricter = GOOD + "\n[convergence]\nstandard_errors = 0.5\n"
    assert load_config(write(tmp_path, longer)).digest() == base
    assert load_config(write(tmp_path, stricter)).digest() != base


BAD: dict[str, tuple[str, str, str]] = {
    "not toml": ("[systems.liquid]", "[systems.liquid", "is not valid TOML"),
    "missing key": (
        "temperature = 300.0\npressure",
        "pressure",
        r"liquid\.temperature: is missing",
    ),
    "unknown key": ("pressure = 1.0", "presure = 1.0", r"liquid\.presure: is not a known key"),
    "negative": (
        "temperature = 300.0\npressure",
        "temperature = -3\npressure",
        r"temperature: got -3; .*greater than 0",
    ),
    "text": ("pressure = 1.0", 'pressure = "high"', r"pressure: got 'high'; .*valid number"),
    "infinite": ("pressure = 1.0", "pressure = inf", r"pressure: got inf; .*finite"),
    "one frame": ("rigid = true", "frames = 1", r"frames: got 1; .*greater than or equal to 2"),
    "interval": ("rigid = true", 'interval = "often"', r"interval.*: got 'often'"),
    "seed": ("rigid = true", "seed = -1", r"seed: got -1"),
    "bounds": ("[0.2, 0.4]", "[0.4, 0.2]", "wanted the lower one first"),
    "initial": ("initial = 0.3", "initial = 0.5", "outside the bounds"),
    "empty selection": ('"NonbondedForce.sigma"', "[]", r"parameters\.sigma\.select: got \[\]"),
    "system of a selection": ('["liquid"]', '["ice"]', "no system 'ice'; there are"),
    "uncertainty": ("uncertainty = 0.01", "uncertainty = 0", r"uncertainty: got 0; .*greater than"),
    "no uncertainty": ("uncertainty = 0.01\n", "", r"targets\.density\.uncertainty: is missing"),
    "unit": ('"g/cm3"', '"stone/pint"', "unit: got 'stone/pint', wanted one of kg/m3"),
    "observable": ("targets.density", "targets.colour", "observable: got 'colour', wanted one of"),
    "no gas": ('gas = "gas"\n', "", "needs either gas .* or gas_energy"),
    "unknown gas": ('gas = "gas"', 'gas = "vapour"', "no system 'vapour'"),
    "liquid as gas": ('gas = "gas"', 'gas = "liquid"', "the liquid itself"),
    "two gases": ('gas = "gas"', 'gas = "gas"\ngas_energy = 0.0', "needs either gas"),
    "stray gas": ('unit = "g/cm3"', "gas_energy = 0.0", "belong to a heat_of_vaporization only"),
    "gas temperature": ("temperature = 300.0\nrigid", "temperature = 310.0\nrigid", "is at 310 K"),
    "rigid density": ('unit = "g/cm3"', 'system = "gas"', "is rigid and not sampled"),
    "rigid energy": (
        '[targets.density]\nvalue = 1.0\nuncertainty = 0.01\nunit = "g/cm3"',
        '[targets.energy]\nobservable = "potential_energy"\nsystem = "gas"\n'
        "value = 1.0\nuncertainty = 1.0",
        "set convergence.target_uncertainty",
    ),
    "name": ("[parameters.sigma]", '[parameters."a b"]', "letters, digits and underscores"),
    "same name": ("[parameters.sigma]", "[parameters.density]", "name both a parameter and a"),
    "no systems": (GOOD[: GOOD.index("[parameters.sigma]")], "", "systems: is missing"),
    "not a table": (GOOD[GOOD.index("[targets.density]") :], "[targets]\ndensity = 3", "got 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case: str, tmp_path: Path) -> None:
    old, new, message = BAD[case]
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_config(path)
    assert "fit.toml" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such file"):
        load_config(tmp_path / "none.toml")


def test_every_error_is_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("uncertainty = 0.01\n", "").replace("pressure = 1.0", "presure = 1.0")
    with pytest.raises(ConfigurationError, match="presure") as caught:
        load_config(write(tmp_path, text))
    assert "uncertainty: is missing" in str(caught.value)


OPTIMIZERS: dict[str, tuple[str, str]] = {
    "unknown": ('method = "annealing"', "got 'annealing', wanted gauss_newton"),
    "scipy": ('method = "scipy.Newton"', "got 'scipy.Newton'"),
    "torch": ('method = "torch.Adamant"', "torch.optim has no optimiser 'Adamant'"),
    "not an optimiser": ('method = "torch.lr_scheduler"', "no optimiser 'lr_scheduler'"),
    "torch option": ('method = "torch.Adam"\noptions = { speed = 1 }', "torch.Adam: .*speed"),
    "torch value": ('method = "torch.Adam"\noptions = { lr = -1.0 }', "Invalid learning rate"),
    "gauss option": ("options = { speed = 1 }", r"\['speed'\] are unknown to gauss_newton"),
    "gauss value": ("options = { max_step = 0 }", "max_step: got 0, wanted a positive number"),
    "least squares": (
        'method = "scipy.least_squares"\noptions = { speed = 1 }',
        r"\['speed'\] are unknown to scipy.least_squares",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_bad_optimizers(case: str, tmp_path: Path) -> None:
    text, message = OPTIMIZERS[case]
    config = load_config(write(tmp_path, GOOD + "\n[optimizer]\n" + text))
    with pytest.raises(ConfigurationError, match=message):
        make_optimizer(config.optimizer)
