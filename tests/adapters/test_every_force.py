"""Every Force class that has energy, by each route."""

import re

import mdgraft
import openmm
import pytest
import torch
from force_examples import EXAMPLES, example
from force_table import INDEX, files_about, force_classes, rows, section, updated


def by_class(cls):
    return cls.__name__


def test_every_class_has_an_example_a_section_and_tests():
    assert {c.__name__ for c in force_classes()} <= {c.__name__ for c in EXAMPLES}
    names = [c.__name__ for c in EXAMPLES if c.__name__ != "PythonForce"]
    assert [name for name in names if section(name) is None] == []
    assert [name for name in names if not files_about(name)] == []


def test_table_is_up_to_date():
    page = INDEX.read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]", page, flags=re.MULTILINE)
    if not all(hasattr(openmm, name) for name in listed):
        # An older OpenMM has only some of the lines.
        assert set(rows()) <= set(page.splitlines()), "run force_table.py with the newest OpenMM"
    else:
        assert updated(page) == page, "run python tests/adapters/force_table.py"


@pytest.mark.parametrize("force_class", EXAMPLES, ids=by_class)
def test_is_native(force_class):
    """All but those that run the user's own code."""
    system, _, _ = example(force_class)
    routes = set(mdgraft.graft(system).routes.values())
    assert routes == {"host" if force_class.__name__ == "PythonForce" else "native"}


@pytest.mark.parametrize("force_class", EXAMPLES, ids=by_class)
def test_routes_agree(force_class):
    """Energy, all first derivatives and a product with each second one, natively and by OpenMM."""
    system, positions, box = example(force_class)
    random = torch.Generator().manual_seed(2)
    along = torch.randn(positions.shape, generator=random, dtype=torch.float64)
    answers = []
    for route in ("auto", "host"):
        potential = mdgraft.graft(system, route=route)
        if force_class is openmm.GayBerneForce:
            # Spheres must stay spheres, so that OpenMM refuses differences of one diameter.
            potential.freeze("GayBerneForce.[se][xyz]")
        if any(name.endswith(".quadrupole") for name, _ in potential.named_parameters()):
            # They must stay traceless to 1e-5, and differences with smaller steps are noise.
            potential.freeze("*.quadrupole")
        x = torch.tensor(positions, requires_grad=True)
        h = torch.tensor(box, requires_grad=True)
        trainable = {k: v for k, v in potential.named_parameters() if v.requires_grad}
        inputs = {"positions": x, **trainable}
        if potential.periodic:
            inputs["box"] = h
        energy = potential(x, h)
        first = torch.autograd.grad(
            energy, list(inputs.values()), create_graph=True, materialize_grads=True
        )
        second = torch.autograd.grad(
            (first[0] * along).sum() + 0 * energy, list(inputs.values()), materialize_grads=True
        )
        answers.append(
            (energy, dict(zip(inputs, first, strict=True)), dict(zip(inputs, second, strict=True)))
        )
    (energy, *native), (other, *host) = answers
    assert other.item() == pytest.approx(energy.item(), rel=1e-9)
    for order, rtol in ((0, 1e-7), (1, 1e-6)):
        assert native[order].keys() == host[order].keys()
        for name, truth in native[order].items():
            # A reduced box has six entries; the host knows no others.
            truth = truth.tril() if name == "box" else truth
            scale = max(truth.abs().max().item(), 0.01 * abs(energy.item()))
            torch.testing.assert_close(
                host[order][name],
                truth,
                rtol=0,
                atol=rtol * scale,
                msg=f"{name}, order {order + 1}",
            )
