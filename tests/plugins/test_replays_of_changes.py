"""What a recorded evaluation depends on beside numbers is noticed, whenever it changes."""

import threading

import mdgraft
import pytest
import torch
from device_cases import ALL, DEVICE, N, nine, on_the_device, rows
from mdgraft import Potential
from mdgraft.kernels.device import guard, recording, replay
from mdgraft.kernels.device.recording import NotRecordableError, Recorder, _recorded_by
from mdgraft.potentials.bonded import HarmonicBond
from test_replays import FIRST, assert_same, check, configuration, first, potential_of, recorded
from test_replays import record as recorded_first
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("interpreter")


def again(potential, ask, n=FIRST + 1):
    """As good as ever, however often it is asked."""
    for step in range(n):
        check(potential, ask, *configuration(step))


class Scaled(HarmonicBond):
    """A user's term that makes something else of one of ours."""

    factor = 1.0

    def forward(self, *arguments):
        return self.factor * super().forward(*arguments)


class Stated(Scaled):
    replays = True


class Shifted(torch.nn.Module):
    """A user's rule for virtual sites."""

    periodic = False
    shift = 0.0

    def forward(self, positions, box):
        return positions + self.shift * torch.sin(positions)


def bonds(kind):
    return kind(rows(2), nine(0.3, 0.5), nine(10, 90), periodic=True)


# What is not recorded ---------------------------------------------------------------------------


def test_what_users_derive_is_not_recorded_unless_it_says_so():
    potential = Potential({"A": bonds(Scaled)}, n_particles=N).to(DEVICE)
    again(potential, first)
    potential.term("A").factor = 2.0
    again(potential, first, 1)
    assert not recorded(potential)


def test_attributes_are_noticed():
    potential = Potential({"A": bonds(Stated)}, n_particles=N).to(DEVICE)
    recorded_first(potential, first)
    potential.term("A").factor = 2.0
    again(potential, first)
    assert recorded(potential) == 2


def test_sites_and_potentials_of_users_are_not_recorded():
    class Doubled(Potential):
        factor = 1.0

        def energy_by_term(self, *args, **options):
            found = super().energy_by_term(*args, **options)
            return {name: self.factor * energy for name, energy in found.items()}

    sites = Potential({"A": ALL["bonds"]()}, n_particles=N, sites=Shifted()).to(DEVICE)
    again(sites, first)
    sites._modules["sites"].shift = 0.1
    again(sites, first, 1)
    doubled = Doubled({"A": ALL["bonds"]()}, n_particles=N).to(DEVICE)
    again(doubled, first)
    doubled.factor = 2.0
    again(doubled, first, 1)
    assert not recorded(sites)
    assert not recorded(doubled)


def test_hooks_of_terms_are_called_every_time():
    potential = potential_of("bonded")
    recorded_first(potential, first)
    calls = []

    def double(module, arguments, energy):
        calls.append(module)
        return 2 * energy

    handle = potential.term("T0").register_forward_hook(double)
    again(potential, first)
    assert len(calls) == 2 * (FIRST + 1)
    handle.remove()
    again(potential, first, 1)


def test_potentials_made_in_inference_mode():
    with torch.inference_mode():
        potential = potential_of("bonded")
    with torch.no_grad():
        again(potential, lambda p, x, h: [p(x, h)])
    assert not recorded(potential)


def test_checkpoints():
    """The second forward pass must save what the first one did."""
    potential = potential_of("bonded")

    def ask(potential, x, h):
        x = x.clone().requires_grad_()
        energy = checkpoint(lambda x: potential(x, h), x, use_reentrant=False)
        return [energy, *torch.autograd.grad(energy, x)]

    again(potential, ask)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autograd.detect_anomaly(check_nan=True),
        lambda: torch.autocast(DEVICE, dtype=torch.bfloat16),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_modes_that_look_inside(mode):
    potential = potential_of("bonded")
    recorded_first(potential, first)
    kept = recorded(potential)
    for step in range(FIRST + 1):
        with on_the_device(), mode():
            x, h = configuration(step)
            potential(x.requires_grad_(), h).backward()
    assert recorded(potential) == kept


def test_second_derivatives_in_another_context():
    """Nothing is recorded of plain operations."""
    potential = potential_of("bonded")
    recorded_first(potential, first)
    for step in range(FIRST + 1):
        x, h = configuration(step)
        x.requires_grad_(), h.requires_grad_()
        with on_the_device():
            (slope,) = torch.autograd.grad(potential(x, h), x, create_graph=True)
            with mdgraft.plain_kernels():
                torch.autograd.grad((slope**2).sum(), x)
    assert recorded(potential) == 1


# Parts, parameters and buffers ------------------------------------------------------------------


def test_parts_and_ties():
    potential = potential_of("bonded")
    recorded_first(potential, first)
    part = potential.only("T0")
    again(part, first)
    assert recorded(potential) == recorded(part) == 1
    potential.tie("k", {"T0.k": [0, 1]}, value=50.0)
    again(potential, first)
    again(potential.only("T0"), first)
    again(part, first, 1)


def test_parameters_that_become_the_same_one():
    potential = Potential({name: bonds(HarmonicBond) for name in "ABC"}, n_particles=N).to(DEVICE)
    a, b, c = (potential.term(name) for name in "ABC")
    with torch.no_grad():
        for factor, term in enumerate((a, b, c)):
            term.k.mul_(1 + factor)
    one, two = a.k, c.k
    b._parameters["k"] = one
    again(potential, first)
    b._parameters["k"] = two
    again(potential, first)


def test_buffers_in_the_same_places():
    """A new tensor may have the address of one that is gone."""
    potential = potential_of("bonded")
    term = potential.term("T0")
    base = term.particles.clone()
    for turn in range(5):
        changed = base.clone()
        changed[0] = torch.tensor([turn, turn + 9])
        term.particles = changed
        del changed
        again(potential, lambda p, x, h: [p(x, h)])


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(replay, "_KINDS", 8)
    potential = potential_of("bonded")
    particles = potential.term("T0").particles
    with on_the_device(), torch.no_grad():
        for _ in range(replay._KINDS + 5):
            particles[0, 0] = particles[0, 0].clone()
            potential(*configuration())
    assert len(potential._replays._kinds) == replay._KINDS


def test_more_kinds_than_are_kept(monkeypatch):
    """What had to make room is not recorded anew in every evaluation."""
    potential = potential_of("bonded")
    made, parameters = [], list(potential.parameters())

    class Counted(replay.Recording):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(replay, "Recording", Counted)
    monkeypatch.setattr(replay, "_MOST", 2)
    turns, kinds = 12, replay._MOST + 1
    for _ in range(turns):
        for kind in range(kinds):
            for k, parameter in enumerate(parameters):
                parameter.requires_grad_(k == kind)
            with on_the_device():
                potential(*configuration())
    assert recorded(potential) <= replay._MOST
    assert len(made) < 0.4 * turns * kinds


# Derivatives ------------------------------------------------------------------------------------


def test_batches_of_weights():
    """Of the older vmap behind ``is_grads_batched``, at every order."""
    potential = potential_of("bonded")

    def ask(potential, x, h):
        x = x.clone().requires_grad_()
        weights = torch.tensor([1.0, -2.0], dtype=x.dtype, device=x.device)
        energy = potential(x, h)
        options = {"is_grads_batched": True, "retain_graph": True}
        slopes = torch.autograd.grad(energy, x, weights, **options)
        (curved,) = torch.autograd.grad(energy, x, weights, **options, create_graph=True)
        second = torch.autograd.grad((curved * torch.sin(curved)).sum(), x, retain_graph=True)
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        some = torch.eye(x.numel(), dtype=x.dtype, device=x.device)[:3].reshape(3, *x.shape)
        return [*slopes, *second, *torch.autograd.grad(slope, x, some, is_grads_batched=True)]

    again(potential, ask)
    assert recorded(potential)


def test_third_derivatives_in_parameters_that_depend_on_each_other():
    potential = potential_of("bonded")

    def ask(potential, x, h):
        scale = torch.tensor(1.01, dtype=x.dtype, device=x.device, requires_grad=True)
        k = scale * potential.term("T0").k.detach()
        length = potential.term("T0").length.detach() + 1e-3 * k
        other = {"T0.k": k, "T0.length": length}
        total = torch.func.functional_call(potential, other, (x, h))
        for _ in range(2):
            (slope,) = torch.autograd.grad(total, scale, create_graph=True)
            total = slope * slope
        return [total, *torch.autograd.grad(total, scale)]

    again(potential, ask)
    assert recorded(potential)


# Lists ------------------------------------------------------------------------------------------


def test_other_evaluations_in_between():
    """Lists of batches are not those of recordings, nor the other way round."""
    potential = potential_of("open")
    recorded_first(potential, first)
    kept = potential._replays.kept
    for step in range(3):
        x, h = configuration(step, 0.12)
        check(potential, lambda p, x, h: [p(torch.stack([x, x + 0.01]))], x, h)
        check(potential, first, x, h)
    assert potential._replays.kept == kept


def test_lists_of_another_precision():
    potential = potential_of("cutoff")
    x, h = configuration()
    with on_the_device():
        potential.float()(x.float(), h.float())
    potential.double()
    check(potential, first, x, h)


def test_threads():
    """Each has its own numbers, though all share recordings and lists."""
    potential = potential_of("bonded")
    recorded_first(potential, first)
    cases = [configuration(step, 0.12) for step in range(4)]
    with mdgraft.plain_kernels():
        expected = [first(potential, *case) for case in cases]
    errors = []

    def work(start):
        try:
            with on_the_device():
                for k in range(len(cases)):
                    turn = (k + start) % len(cases)
                    assert_same(first(potential, *cases[turn]), expected[turn])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(2 * k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_kernels_are_not_given_up_while_they_are_recorded(monkeypatch):
    """Comparing waits for the device, which says nothing about a kernel."""
    monkeypatch.setattr(guard, "_COMPARED", set())
    monkeypatch.setattr(guard, "_FAILED", set())

    class Waiting:
        label, fused, framed = ("waiting",), True, ()
        reference = staticmethod(lambda x, h: x.sum(dim=(1, 2)))

        def energies(self, inputs):
            raise NotRecordableError("waits")

    kernel = guard.Guarded(Waiting(), devices=("cpu",))
    inputs = [torch.ones(1, 3, 3), torch.zeros(1, 0, 3)]
    with (
        _recorded_by(Recorder(None, inputs[1])),
        pytest.raises(NotRecordableError, match="compared"),
    ):
        kernel.energies(inputs)
    assert not guard._FAILED


def test_errors_leave_nothing_behind():
    """Also those that stop a program."""

    def failing(inputs):
        raise KeyboardInterrupt

    inputs = [torch.ones(1, 3, 3, device=DEVICE), torch.ones(1, 3, 3, device=DEVICE)]
    with on_the_device(), pytest.raises(KeyboardInterrupt):
        replay.Recording(failing, inputs)
    assert recording.recorder(inputs[0]) is None
    potential = potential_of("bonded")
    recorded_first(potential, first)


def test_nobody_waits_for_a_recording():
    """It may itself wait for the thread of backward passes."""
    potential, reached, done = potential_of("bonded"), threading.Event(), threading.Event()

    def busy():
        with recording._LOCK:
            reached.set()
            done.wait(60)

    thread = threading.Thread(target=busy)
    thread.start()
    reached.wait(60)
    try:
        with on_the_device():
            for step in range(FIRST + 1):
                first(potential, *configuration(step))
        assert not recorded(potential)
    finally:
        done.set()
        thread.join()
    with on_the_device():
        for step in range(3 * FIRST):
            first(potential, *configuration(step))
    assert recorded(potential) == 1
