"""Recorded evaluations: replayed on a GPU, emulated on CPUs, always as good as new ones."""

import copy
import pickle

import mdgraft
import pytest
import torch
from device_cases import ALL, DEVICE, N, boxes, nonbonded, on_the_device, places
from mdgraft import Potential
from mdgraft.kernels.device.recording import Recording
from mdgraft.potentials.nonbonded import Method

pytestmark = pytest.mark.usefixtures("interpreter")

SYSTEMS = {
    "bonded": ["bonds", "torsions", "external"],
    "GB": ["custom GB"],
    # Interpreting takes its time.
    "PME": ["PME, offsets", "angles"],
    "cutoff": ["cutoff", "bonds"],
    "open": ["open"],
    "periodic": ["periodic, switched", "angles"],
    "LJPME": ["LJPME", "RB torsions"],
    "custom": ["symmetric", "powers"],
    "implicit": ["OBC", "open"],
}
ALSO_INTERPRETED = ("bonded", "GB")
EVERY = [
    pytest.param(name, marks=() if name in ALSO_INTERPRETED else pytest.mark.gpu)
    for name in SYSTEMS
]
#: Evaluations until the next one is replayed.
FIRST = 3


def potential_of(name, dtype=torch.float64):
    terms = {f"T{k}": ALL[term]() for k, term in enumerate(SYSTEMS[name])}
    shared = {"k": torch.tensor(0.7).double(), "l": torch.tensor(1.3).double()}
    potential = Potential(terms, n_particles=N, global_parameters=shared)
    return potential.to(device=DEVICE, dtype=dtype)


def configuration(step=0, size=0.002, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = places()[0] + size * (2 * torch.rand(N, 3, generator=generator).double() - 1)
    return (scale * x).to(DEVICE, dtype), (scale * boxes()[0]).to(DEVICE, dtype)


def first(potential, x, h):
    """Energy, and its derivatives by all that they depend on, times a factor."""
    x, h = x.detach().clone().requires_grad_(), h.detach().clone().requires_grad_()
    box = h if potential.periodic else None
    energy = potential(x, box)
    inputs = [x, *([h] if potential.periodic else []), *potential.parameters()]
    return [energy, *torch.autograd.grad(1.7 * energy, inputs)]


def second(potential, x, h):
    """Derivatives of products with forces and parameter gradients."""
    x, h = x.detach().clone().requires_grad_(), h.detach().clone().requires_grad_()
    box = h if potential.periodic else None
    inputs = [x, *potential.parameters()]
    energy = potential(x, box)
    slopes = torch.autograd.grad(0.7 * energy, inputs, create_graph=True)
    total = sum((s * s).sum() for s in slopes)
    found = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    forces = potential.forces(x, box)
    return [*found, *torch.autograd.grad((forces * torch.sin(x.detach())).sum(), [x])]


@pytest.fixture
def replays(monkeypatch):
    """Recordings as they are replayed."""
    done, replay = [], Recording.__call__

    def counted(self, inputs, check):
        done.append(self)
        return replay(self, inputs, check)

    monkeypatch.setattr(Recording, "__call__", counted)
    return done


def recorded(potential):
    return len(potential._replays.kept)


def assert_same(one, other, rtol=1e-9):
    for a, b in zip(one, other, strict=True):
        a, b = a.detach(), b.detach()
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


def check(potential, ask, *args):
    with on_the_device():
        one = ask(potential, *args)
    with mdgraft.plain_kernels():
        assert_same(one, ask(potential, *args))


def record(potential, *asked):
    for _ in range(FIRST):
        for ask in asked:
            with on_the_device():
                ask(potential, *configuration())
    kept = recorded(potential)
    assert kept >= len(asked)
    return kept


@pytest.mark.parametrize("name", EVERY)
def test_replays_find_the_same_for_other_numbers(name, replays):
    potential = potential_of(name)
    kept = record(potential, first, second)
    for ask, fewest in ((first, 1), (second, 4)):
        replays.clear()
        check(potential, ask, *configuration(1))
        # All of it: energies with slopes, and products with them.
        assert len(replays) >= fewest
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.01)
    check(potential, first, *configuration(3))
    check(potential, second, *configuration(3))
    assert recorded(potential) >= kept


@pytest.mark.parametrize("name", EVERY[1:6])
def test_lists_are_renewed_in_place(name):
    potential = potential_of(name)
    kept = record(potential, first)
    recordings = potential._replays.kept
    # Twice by more than half a skin, and back.
    for step, size in ((1, 0.12), (2, 0.12), (0, 0.002)):
        check(potential, first, *configuration(step, size))
    assert recorded(potential) == kept
    assert potential._replays.kept == recordings


@pytest.mark.parametrize("name", [EVERY[0], *EVERY[2:7]])
def test_the_box_may_change(name):
    potential = potential_of(name)
    kept = record(potential, first)
    for scale in (1.01, 1.02, 1.0):
        check(potential, first, *configuration(1, scale=scale))
    assert recorded(potential) == kept


def test_what_lies_far_away_is_found():
    """Whole boxes away, which no list knows of."""
    potential = potential_of("periodic")
    record(potential, first)
    x, h = configuration(1)
    moved = x + h[2] - 2 * h[0]
    check(potential, first, moved, h)
    with on_the_device():
        energies = potential(moved, h), potential(x, h)
    torch.testing.assert_close(*energies)


def test_bad_inputs_raise_as_ever():
    potential = potential_of("periodic")
    record(potential, first)
    x, h = configuration(1)
    lost = x.clone()
    lost[3, 1] = torch.nan
    with on_the_device():
        with pytest.raises(mdgraft.InvalidInputError, match="NaN or infinity at particle 3"):
            potential(lost, h)
        with pytest.raises(mdgraft.InvalidInputError, match="reduced form"):
            potential(x, h.T.contiguous())
        with pytest.raises(mdgraft.BoxTooSmallError, match=r"needs at least 1\.1 nm"):
            potential(0.5 * x, 0.5 * h)
    check(potential, first, x, h)


def test_without_a_graph():
    potential = potential_of("bonded")

    def ask(potential, x, h):
        with torch.no_grad():
            return [potential(x, h), potential.forces(x, h)]

    record(potential, ask)
    with on_the_device():
        energy, forces = ask(potential, *configuration(1))
    assert not energy.requires_grad
    assert not forces.requires_grad
    check(potential, ask, *configuration(2))


def test_third_derivatives_and_transforms_take_other_ways():
    potential = potential_of("bonded")
    record(potential, first, second)
    x, h = configuration(1)

    def third(potential, x, h):
        x = x.detach().clone().requires_grad_()
        total = potential(x, h)
        for _ in range(2):
            (slope,) = torch.autograd.grad(total, x, create_graph=True)
            total = (slope * torch.sin(x.detach())).sum()
        return torch.autograd.grad(total, [x, *potential.parameters()], allow_unused=True)[:2]

    def transforms(potential, x, h):
        gradient = torch.func.grad(lambda x: potential(x, h))
        _, turned = torch.func.jvp(gradient, (x,), (torch.ones_like(x),))
        every = torch.vmap(gradient)(torch.stack([x, 1.001 * x]))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(potential(dual, h)).tangent
        return [turned, every, tangent, potential(torch.stack([x, x]), torch.stack([h, h]))]

    check(potential, third, x, h)
    check(potential, transforms, x, h)


def test_other_parameters_by_a_functional_call():
    potential = potential_of("bonded")
    record(potential, first)

    def ask(potential, x, h):
        scale = torch.tensor(1.02, dtype=x.dtype, device=x.device, requires_grad=True)
        other = {name: scale * p.detach() for name, p in potential.named_parameters()}
        energy = torch.func.functional_call(potential, other, (x, h))
        return [energy, *torch.autograd.grad(energy, scale)]

    for _ in range(FIRST + 1):
        check(potential, ask, *configuration(1))


def test_other_exceptions_are_recorded_anew():
    potential = potential_of("cutoff")
    record(potential, first)
    before = first(potential, *configuration(1))[0]
    potential.term("T0").exceptions[0] = torch.tensor([9, 15], device=DEVICE)
    for _ in range(FIRST + 1):
        check(potential, first, *configuration(1))
    with on_the_device():
        assert abs(first(potential, *configuration(1))[0] - before) > 1e-6


def test_copies_record_for_themselves():
    potential = potential_of("bonded")
    record(potential, first)
    for other in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert recorded(other) == 0
        record(other, first)
        check(other, first, *configuration(1))


def test_training_by_replays():
    """Force matching in which every step is a replay follows one in which none is."""

    def trained():
        potential = potential_of("bonded")
        x, h = configuration(1)
        with torch.no_grad(), mdgraft.plain_kernels():
            target = 0.9 * potential.forces(x, h)
        optimizer = torch.optim.SGD(potential.parameters(), lr=1e-5)
        losses = []
        for step in range(6):
            optimizer.zero_grad()
            x, h = configuration(step % 2)
            loss = ((potential.forces(x, h) - target) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in potential.parameters())]

    with on_the_device():
        one = trained()
    with mdgraft.plain_kernels():
        assert_same(one, trained())


def test_terms_with_a_state_of_their_own_are_not_recorded():
    class Drifting(mdgraft.potentials.term.AbstractTerm):
        factor = 1.0

        def forward(self, positions, box, values, global_values):
            return self.factor * (positions**2).sum(dim=(1, 2))

    term = Drifting()
    potential = Potential({"D": term, "N": nonbonded(Method.NO_CUTOFF)}, n_particles=N).to(DEVICE)
    x, _ = configuration()
    for _ in range(FIRST + 1):
        with on_the_device():
            potential(x)
    assert recorded(potential) == 0
