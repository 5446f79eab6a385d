"""TorchScript of an energy, without anything in it that one frame has fixed."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mdgraft import InvalidInputError, MDGraftError, UnavailableBackendError
from torch import Tensor, nn

from mdgraft_openmm.export.energy import EnergyFunction
from mdgraft_openmm.export.evaluator import Evaluator

#: Has types for little of what it holds.
_jit: Any = torch.jit
Frame = tuple[Tensor, Tensor | None]

#: Relative difference to the module itself that rounding explains, by precision.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}


def scripted(
    function: EnergyFunction,
    particles: Sequence[int] | None,
    frames: Sequence[Frame],
    slopes: Sequence[str] = (),
) -> tuple[torch.jit.ScriptModule, bool]:
    """What a ``TorchForce`` runs, and whether it returns forces too.

    A module that TorchScript compiles is compiled. Otherwise it is traced, and the trace is
    compared with the module on frames that are far from the traced one, so that a list of
    neighbours or another constant that was recorded is found out.

    Parameters
    ----------
    function
        The energy.
    particles
        Those that it gets; None for all.
    frames
        Positions ``(n, 3)`` [nm] and box ``(3, 3)`` [nm] to trace and compare with.
    slopes
        Global parameters whose derivatives are wanted.

    Raises
    ------
    UnavailableBackendError
        If the module can be neither compiled nor traced faithfully.
    """
    with warnings.catch_warnings():
        # TorchScript is deprecated by torch, which is said in our documentation.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", ".*deprecated.*", category=FutureWarning)
        faults = []
        if isinstance(function.module, nn.Module):
            try:
                inner = _jit.script(function.module)
                _check_slopes(inner, slopes)
                return _checked(inner, function, particles, frames, by_name=True)
            except Exception as error:
                faults.append(f"it cannot be scripted ({_first_line(error)})")
        if not frames:
            faults.append("tracing it needs a frame, which the argument example can give")
        else:
            try:
                inner = _traced(function, frames[0])
                return _checked(inner, function, particles, frames, by_name=False)
            except Exception as error:
                faults.append(f"it cannot be traced ({_first_line(error)})")
    raise UnavailableBackendError(
        f"backend: TorchForce needs a module in TorchScript, but {' and '.join(faults)}; use the "
        "backend PythonForce, which runs any module"
    )


def _check_slopes(inner: Any, slopes: Sequence[str]) -> None:
    """Raise if an argument is a plain number, through which no derivative passes."""
    for argument in inner.forward.schema.arguments:
        if argument.name in slopes and argument.type.kind() != "TensorType":
            raise MDGraftError(
                f"its argument {argument.name} is of type {argument.type}, which has no derivative"
            )


class _Holder(nn.Module):
    """Gets its forward as text, since the number of arguments differs."""

    def __init__(self, inner: Any, particles: Sequence[int] | None, device: torch.device) -> None:
        super().__init__()
        self.inner = inner
        chosen = torch.tensor(particles or [], dtype=torch.long, device=device)
        self.register_buffer("particles", chosen)


def _checked(
    inner: Any,
    function: EnergyFunction,
    particles: Sequence[int] | None,
    frames: Sequence[Frame],
    *,
    by_name: bool,
) -> tuple[torch.jit.ScriptModule, bool]:
    """Wrap the module in what a ``TorchForce`` calls and compare it with the original."""
    returned = inner.forward.schema.returns[0].type.kind()
    forces = returned == "TupleType"
    # A class of its own, since instances of one class would share the forward that is defined.
    holder = type("Energy", (_Holder,), {})
    made = _jit.script(holder(inner, particles, function.device))
    # A trace knows one number of particles, and may have unrolled a loop over them.
    count = None if by_name or particles is not None else len(frames[0][0])
    made.define(_text(function, particles is not None, by_name, forces, count))
    buffer = io.BytesIO()
    # What refers to Python can be made but not saved.
    _jit.save(made, buffer)
    buffer.seek(0)
    made = _jit.load(buffer)
    if frames:
        _compare(made, forces, function, particles, frames, traced=not by_name)
    return made, forces


def _text(
    function: EnergyFunction, subset: bool, by_name: bool, forces: bool, count: int | None
) -> str:
    """The forward of the wrapper: arguments as OpenMM passes them, in the module's precision."""
    names = list(function.defaults)
    if len({f"global_{name}" for name in names if name.isidentifier()}) != len(names):
        raise InvalidInputError(
            f"global_parameters: {names} cannot all be names of arguments in TorchScript"
        )
    dtype = str(function.dtype)
    arguments = ["positions"] + ["box"] * function.periodic + [f"global_{n}" for n in names]
    passed = ["x"]
    if function.periodic:
        passed.append(f"box.to({dtype})")
    elif function.takes_box and by_name:
        passed.append("None")
    for name in names:
        value = f"global_{name}.to({dtype})"
        passed.append(f"{name}={value}" if by_name else value)
    call = f"self.inner({', '.join(passed)})"
    chosen = "positions.index_select(0, self.particles)" if subset else "positions"
    lines = [f"def forward(self, {', '.join(arguments)}):"]
    if count is not None:
        complaint = f"the System has not the {count} particles of the example"
        lines.append(f"    assert positions.shape[0] == {count}, {complaint!r}")
    lines.append(f"    x = {chosen}.to({dtype})")
    if not forces:
        lines.append(f"    energy = {call}")
        # One more step in the graph, which most need not take.
        lines.append("    return energy if energy.dim() == 0 else energy.reshape([])")
    else:
        lines.append(f"    energy, forces = {call}")
        spread = "forces.to(positions.dtype)"
        if subset:
            spread = f"torch.zeros_like(positions).index_copy(0, self.particles, {spread})"
        # OpenMM reads their memory from end to end.
        lines.append(f"    return energy.reshape([]), {spread}.detach().contiguous()")
    return "\n".join(lines) + "\n"


class _Positional(nn.Module):
    def __init__(self, function: EnergyFunction) -> None:
        super().__init__()
        self.function = function
        # Parameters that a trace does not know as such cannot be saved.
        self.module = function.module if isinstance(function.module, nn.Module) else None

    def forward(self, positions: Tensor, *others: Tensor) -> Any:
        box = others[0] if self.function.periodic else None
        rest = others[self.function.periodic :]
        values = dict(zip(self.function.defaults, rest, strict=True))
        # Without checks, which a trace would record or warn of.
        return self.function.call(positions, box, values)


def _traced(function: EnergyFunction, frame: Frame) -> Any:
    inputs = [t.to(function.device, function.dtype) for t in frame if t is not None]
    inputs += [_scalar(function, value) for value in function.defaults.values()]
    inputs[0] = inputs[0].clone().requires_grad_()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", _jit.TracerWarning)
        made = _jit.trace(_Positional(function), tuple(inputs), check_trace=False)
    for warning in told:
        # What it warns of may be a constant that should not be one.
        if issubclass(warning.category, _jit.TracerWarning):
            raise UnavailableBackendError(
                f"something in it depends on the frame: {warning.message}"
            )
    return made


def _scalar(function: EnergyFunction, value: float) -> Tensor:
    return torch.tensor(value, dtype=function.dtype, device=function.device)


def _compare(
    made: Any,
    forces: bool,
    function: EnergyFunction,
    particles: Sequence[int] | None,
    frames: Sequence[Frame],
    *,
    traced: bool,
) -> None:
    """Raise unless TorchScript and the module agree on the frames and far from them."""
    evaluator = Evaluator(function, slopes=(), check=False)
    rtol = _AGREEMENT[function.dtype]
    values = dict(function.defaults)
    compared = 0
    for count, (x, h) in enumerate([*frames, *_far_from(frames)]):
        if count:
            values = {n: 1.1 * v + 0.1 for n, v in function.defaults.items()}
        try:
            truth = evaluator.evaluate(x, h, values)
        except Exception:
            # Not every frame is one that the module accepts.
            if count < len(frames):
                raise
            continue
        energy, force = _of_script(made, forces, function, particles, x, h, values)
        wanted = truth.forces.to(force)
        if not (bool(torch.isfinite(wanted).all()) and bool(torch.isfinite(truth.energy))):
            continue
        compared += count >= len(frames)
        apart = (force - wanted).norm() > rtol * wanted.norm().clamp(min=1.0)
        size = max(1.0, float(truth.energy.abs()))
        if bool(apart) or abs(energy - float(truth.energy)) > rtol * size:
            raise MDGraftError(
                f"its energy differs from the module's on another frame: {energy:.9g} instead of "
                f"{float(truth.energy):.9g} kJ/mol; something in it depends on the frame"
            )
    if traced and compared < 3:
        raise MDGraftError("the module accepts too few frames to compare the trace with")


def _of_script(
    made: Any,
    outputs_forces: bool,
    function: EnergyFunction,
    particles: Sequence[int] | None,
    x: Tensor,
    h: Tensor | None,
    values: Mapping[str, float],
) -> tuple[float, Tensor]:
    """Energy and forces of the particles, by way of a frame of all of them."""
    like: dict[str, Any] = {"dtype": torch.float64, "device": function.device}
    chosen = list(range(len(x))) if particles is None else list(particles)
    everything = torch.zeros(max(chosen) + 1, 3, **like)
    everything[chosen] = x.to(**like)
    inputs = [everything.requires_grad_()] + ([] if h is None else [h.to(**like)])
    inputs += [torch.tensor(v, **like) for v in values.values()]
    with torch.inference_mode(False), torch.enable_grad():
        result = made(*inputs)
        if outputs_forces:
            energy, force = result
        else:
            energy = result
            force = torch.zeros_like(everything)
            if energy.requires_grad:
                (slope,) = torch.autograd.grad(energy, inputs[0], allow_unused=True)
                force = force if slope is None else -slope
    return float(energy.detach()), force.detach()[chosen]


def _far_from(frames: Sequence[Frame]) -> list[Frame]:
    """Frames with other neighbours: denser, thinner, in another order, and at random."""
    found: list[Frame] = []
    random = torch.Generator("cpu").manual_seed(7)
    like: Any = {"generator": random, "device": "cpu"}
    for x, h in frames[:2]:
        x = x.to("cpu", torch.float64)
        centre = x.mean(dim=0)
        size = float((x - centre).norm(dim=-1).max().clamp(min=0.1))
        noise = torch.randn(x.shape, dtype=torch.float64, **like)
        order = torch.randperm(len(x), **like)
        for moved in (
            centre + 0.6 * (x - centre),
            centre + 1.7 * (x - centre),
            x[order],
            x + 0.05 * noise,
            centre + 0.5 * size * noise,
        ):
            found.append((moved, h))
        if h is not None:
            found.append((1.3 * x, 1.3 * h))
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
