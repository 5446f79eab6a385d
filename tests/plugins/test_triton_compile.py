"""Programs for GPUs are compiled to machine code here, by Triton, without a GPU."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

#: What runs in a process of its own, in which nothing is interpreted.
SCRIPT = """
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdgraft.kernels.device import item_program, mesh_programs, pair_program, programs
from mdgraft.kernels.fused.functions import _FUNCTIONS, _OF_ANGLES
from mdgraft.kernels.fused.geometry import dot
from mdgraft.kernels.fused.lepton import describe
from mdgraft.kernels.fused.pair_formulas import Task
from mdgraft.kernels.fused.tuples import TupleFormula
from mdgraft.lepton import ContinuousTable, DiscreteTable, Expression
from mdgraft.potentials.bonded_formulas import PERIODIC_TORSION
from mdgraft.potentials.custom.pair_formula import expression_formula
from mdgraft.potentials.nonbonded_formula import nonbonded_formula
from mdgraft.potentials.obc_formulas import DESCREENING, SOLVATION

FIRST = Task(positions=True, particle=True, shared=True, tables=True)
SECOND = Task(positions=True, particle=True, shared=True, tables=True, second=True)
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = dict(rows="*i32", segments="*i64", image="*i32", columns="*i32", mask="*i32")
INTEGERS |= dict(masks="*i32", particles="*i32", starts="*i64", entries="*i64", meshes="*i64")
DOUBLES = {"images", "sums", "totals", "reciprocals", "turns", "scales"}
DOUBLES |= {"waves", "shares", "pairs", "factors", "decay"}


def compiled(function, double, warps, arch, constants=None, turns=True):
    kind = "*fp64" if double else "*fp32"
    signature = {}
    for name in function.arg_names:
        if name in (constants or {}):
            signature[name] = "constexpr"
        elif name.startswith("n_") or name in ("n", "nx", "ny", "nz"):
            signature[name] = "i32"
        elif name in DOUBLES and not (name == "turns" and turns):
            signature[name] = "*fp64"
        else:
            signature[name] = INTEGERS.get(name, kind)
    source = ASTSource(fn=function, signature=signature, constexprs=constants or {})
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert made.asm["cubin"]
    if not TOOL.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\\d+) STACK:(\\d+)", text.stdout)
    return found and (int(found[1]), int(found[2]))


def show(label, usage):
    print(label, *(usage or ("-", "-")), sep="\\t", flush=True)


def pairs(formula, task, double):
    program = pair_program.pair_program(formula, task, double)
    return programs.program("pairs", program.text), program.warps


def everything(graph, edges, of):
    x = dot(edges[0], edges[0])
    total = graph.apply("atan2", x, of["a"]) + graph.apply("pow", x, of["a"])
    for name in (*_FUNCTIONS, *_OF_ANGLES, "sqrt", "rsqrt", "abs", "floor", "ceil"):
        if name not in ("atan2", "pow"):
            total = total + graph.select(x < of["a"], graph.apply(name, of["a"] * x), x)
    return total


arch = int(sys.argv[1])
functions = TupleFormula(n_particles=2, edges=((0, 1),), item=("a",), energy=everything)
ewald = nonbonded_formula(
    electrostatics="ewald", switched=False, dispersion=False, degree=14, dispersion_degree=None
)
ljpme = nonbonded_formula(
    electrostatics="ewald", switched=False, dispersion=True, degree=None, dispersion_degree=None
)
tables = {"a": DiscreteTable((27, 27)), "c": ContinuousTable((300,), ((0.1, 1.2),))}
looked_up = describe(
    Expression(
        "a(t1, t2)/r^12-c(r)*a(t2, t1)",
        variables={"r", "t1", "t2"},
        functions={name: table.arguments for name, table in tables.items()},
        where="energy",
    ).program,
    {"r": "r", "t1": "0_1", "t2": "0_2"},
    tables,
)
by_type = expression_formula(
    looked_up,
    n_particle=1,
    n_shared=0,
    ordered="higher",
    switched=True,
    sizes=(27**2, 300, 300),
    n_kinds=3,
)
for double, second in itertools.product((False, True), repeat=2):
    name = f"{'double' if double else 'single'} {'second' if second else 'first'}"
    task = SECOND if second else FIRST
    for label, formula in dict(ewald=ewald, ljpme=ljpme, gb=SOLVATION, tables=by_type).items():
        function, warps = pairs(formula, task, double)
        show(f"{label} {name}", compiled(function, double, warps, arch))
    text = item_program.item_program(PERIODIC_TORSION, task, double, True).text
    show(f"torsions {name}", compiled(programs.program("items_of", text), double, 2, arch))
    text = item_program.item_program(functions, task, double, False).text
    show(f"functions {name}", compiled(programs.program("items_of", text), double, 2, arch))
    if second:
        function, warps = pairs(DESCREENING, task, double)
        show(f"descreening {name}", compiled(function, double, warps, arch))
        continue
    text = item_program.gathering(5, double)
    show(f"gathered {name}", compiled(programs.program("gathered", text), double, 2, arch))
    for label in ("spread", "gather", "spread_tangent", "gather_tangent", "modulate"):
        function, modes = getattr(mesh_programs, label), label == "modulate"
        constants = {"SIZE": mesh_programs.MODES if modes else mesh_programs.BLOCK}
        warps = 8 if double and not modes else 4
        show(f"{label} {name}", compiled(function, double, warps, arch, constants, turns=False))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_programs_compile_and_fit_into_registers(architecture, tmp_path):
    """For the A100 and the H100; single precision must not spill in the main programs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Compiled anew, even if somebody did so before.
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(architecture)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    usage = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert len(usage) == 38
    for label in ("ewald single first", "ewald single second", "torsions single first"):
        registers, stack = usage[label].split("\t")
        # What spills has taken all 255 registers. Some versions of Triton reduce huge angles in an
        # array of 32 bytes, which the stack has then all the same.
        allowed = 32 if label.startswith("torsions") else 0
        assert registers == "-" or (int(registers) < 255 and int(stack) <= allowed), label
