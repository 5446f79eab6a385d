"""One configuration: energy with all first derivatives, and Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import systems
from engine import Engine, disagreement, platform_of
from grafted import Graft
from systems import Case
from timing import Moves, Result, Settings, alternate, described

_WORK = "E, F, all dE/dp, virial"

#: By name: how to build it, and the ratio aimed at in float32.
CASES: dict[str, tuple[Callable[[Settings], Case], float]] = {
    "lj-10k": (lambda s: systems.lennard_jones(12 if s.quick else 22), 1.1),
    "lj-100k": (lambda s: systems.lennard_jones(22 if s.quick else 46), 1.1),
    "water-3k": (lambda s: systems.water_3k(), 1.5),
    "dhfr": (lambda s: systems.protein(s.quick, s.output, s.protein_file), 1.5),
}

#: Float64 moves twice the bytes; this much more time is accepted.
_DOUBLE = 1.5


def first_derivatives(name: str, settings: Settings) -> Iterator[Result]:
    """Energy with all first derivatives beside OpenMM's energy and forces."""
    build, target = CASES[name]
    case = build(settings)
    engine = Engine(case, platform_of(settings), settings.threads)
    graft = Graft(engine, case, settings)
    for kind in Moves.kinds:
        moves = Moves(case.positions, kind)

        def prepare(count: int, moves: Moves = moves) -> None:
            positions = moves(count)
            engine.place(positions)
            graft.place(positions)

        prepare(0)
        note = disagreement(graft.everything(), engine.energy())
        found = alternate(
            prepare,
            {"theirs": engine.energy_forces, "ours": graft.everything},
            settings.repeats,
        )
        yield Result(
            row=name,
            work=_WORK,
            beside=f"OpenMM {platform_of(settings)}: E, F",
            atoms=case.n_atoms,
            moves=kind,
            ours=found["ours"],
            theirs=found["theirs"],
            target=target * (_DOUBLE if settings.dtype == "float64" else 1.0),
            note=note,
            **described(settings),
        )


def hessian_vector(settings: Settings) -> Iterator[Result]:
    """Hessian-vector products of every case beside both sides' energy and forces."""
    for name, (build, _) in CASES.items():
        if settings.quick and name in ("lj-100k", "dhfr"):
            continue
        case = build(settings)
        engine = Engine(case, platform_of(settings), settings.threads)
        graft = Graft(engine, case, settings)
        moves = Moves(case.positions, "step")

        def prepare(
            count: int, moves: Moves = moves, engine: Engine = engine, graft: Graft = graft
        ) -> None:
            positions = moves(count)
            engine.place(positions)
            graft.place(positions)

        found = alternate(
            prepare,
            {
                "host": engine.energy_forces,
                "ours": graft.hessian_vector,
                "own": graft.energy_forces,
            },
            settings.repeats,
        )
        for key, beside, target in (
            ("host", f"OpenMM {platform_of(settings)}: E, F", 3.0),
            ("own", "mdgraft: E, F", None),
        ):
            yield Result(
                row=f"hvp {name}",
                work="Hessian-vector product",
                beside=beside,
                atoms=case.n_atoms,
                moves="step",
                ours=found["ours"],
                theirs=found[key],
                target=target,
                **described(settings),
            )
