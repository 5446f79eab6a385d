"""Wrappers of models from elsewhere, around stand-ins that keep those packages' conventions.

Each stand-in computes the same pair energies from what its package would be given, so that a wrong
sign, order, unit or missing image shows. Where a package is installed, its own models are wrapped.
"""

import types

import numpy as np
import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.neural import (
    AtomicModel,
    CHGNetModel,
    MACEModel,
    MatGLModel,
    ModelUnits,
    NequIPModel,
    SchNetPackModel,
    SevenNetModel,
    TorchANIModel,
    TorchMDNetModel,
    neural_potential,
)
from mdgraft.testing import check_model, check_potential
from torch import nn

NUMBERS = [8, 1, 1, 6, 1]
KNOWN = [1, 6, 8]
CUTOFF = 4.0
SMALL = [[0.35, 0, 0], [0.1, 0.4, 0], [0.0, 0.1, 0.38]]
WIDE = [[0.85, 0, 0], [0.1, 0.9, 0], [0.0, 0.1, 0.88]]


def springs(z1, z2, r):
    """Energy of a pair; not symmetric, so that the order of atoms in an edge counts."""
    z1, z2 = z1.to(r.dtype), z2.to(r.dtype)
    inside = (1 - (r / CUTOFF) ** 2).clamp(min=0) ** 4
    return torch.where(r < CUTOFF, (z1 + 0.1 * z1 * z2) * inside, 0.0)


class Plain(AtomicModel):
    """The truth."""

    def __init__(self, energy="eV"):
        super().__init__(cutoff=CUTOFF, units=ModelUnits("angstrom", energy))
        self.k = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, inputs):
        r = inputs.displacements.norm(dim=-1)
        z = inputs.atomic_numbers
        energies = self.k * springs(z[inputs.first], z[inputs.second], r)
        return torch.zeros(inputs.n_atoms, dtype=r.dtype).index_add(0, inputs.first, energies)


def _sum(values, index, size):
    return values.new_zeros(size).index_add_(0, index, values)


class StandIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))


class MACE(StandIn):
    """``data -> {"energy": (graphs,)}``, with vectors ``x[receiver] - x[sender] + shifts``."""

    heads = ("default", "other")

    def __init__(self):
        super().__init__()
        self.register_buffer("r_max", torch.tensor(CUTOFF, dtype=torch.float64))
        self.register_buffer("atomic_numbers", torch.tensor(KNOWN))

    def forward(self, data, training=False, compute_force=True):
        assert not compute_force
        data["positions"].requires_grad_(True)
        sender, receiver = data["edge_index"]
        x, batch, n_graphs = data["positions"], data["batch"], len(data["ptr"]) - 1
        assert (data["ptr"][1:] - data["ptr"][:-1]).tolist() == [len(x) // n_graphs] * n_graphs
        cell = data["cell"].reshape(-1, 3, 3)[batch[sender]]
        shifts = torch.einsum("ei,eij->ej", data["unit_shifts"], cell)
        assert torch.allclose(shifts, data["shifts"])
        r = (x[receiver] - x[sender] + data["shifts"]).norm(dim=-1)
        z = self.atomic_numbers[data["node_attrs"].argmax(dim=1)]
        energies = self.k * springs(z[sender], z[receiver], r) * (1 + data["head"][batch[sender]])
        return {"energy": _sum(energies, batch[sender], n_graphs), "forces": None}


class ANI(StandIn):
    """Half lists, with vectors ``x[0] - x[1] + shifts``; energies of atoms of one molecule."""

    cutoff = CUTOFF
    periodic_table_index = True

    def __init__(self):
        super().__init__()
        self.register_buffer("atomic_numbers", torch.tensor(KNOWN))

    def compute_from_external_neighbors(
        self, species, coords, neighbor_idxs, shifts, charge=0, atomic=False
    ):
        assert atomic and species.shape[0] == 1 and charge == 0
        i, j = neighbor_idxs
        x, z = coords[0], species[0]
        vectors = x[i] - x[j]
        vectors += shifts
        r = vectors.norm(dim=-1)
        atoms = _sum(self.k * springs(z[i], z[j], r), i, len(x))
        atoms = atoms + _sum(self.k * springs(z[j], z[i], r), j, len(x))
        return (atoms[None],)


class _Inner(StandIn):
    """What a ``GraphModel`` of NequIP holds."""

    def forward(self, data):
        first, second = data["edge_index"]
        vectors = data["pos"][second] - data["pos"][first]
        if "cell" in data:
            cell = data["cell"].view(-1, 3, 3)[data["batch"][first]]
            vectors = torch.baddbmm(
                vectors.unsqueeze(1), data["edge_cell_shift"].unsqueeze(1), cell
            ).squeeze(1)
        z = torch.tensor(KNOWN)[data["atom_types"]]
        energies = self.k * springs(z[first], z[second], vectors.norm(dim=-1))
        assert int(data["num_atoms"].sum()) == len(data["pos"])
        return {"atomic_energy": _sum(energies, first, len(data["pos"])).unsqueeze(-1)}


class ForceOutput(nn.Module):
    """Its layer that finds forces, in evaluation mode: the graph of the energy is gone."""

    def __init__(self):
        super().__init__()
        self.func = _Inner()

    def forward(self, data):
        raise AssertionError("forces are not asked for")


class GraphModel(nn.Module):
    metadata = types.MappingProxyType({"r_max": str(CUTOFF), "type_names": "H C O"})

    def __init__(self):
        super().__init__()
        self.model = ForceOutput()


class Distances(nn.Module):
    def forward(self, inputs):
        x = inputs["_positions"]
        vectors = x[inputs["_idx_j"]] - x[inputs["_idx_i"]] + inputs["_offsets"]
        return {**inputs, "_Rij": vectors}


class Representation(StandIn):
    cutoff = torch.tensor(CUTOFF)

    def forward(self, inputs):
        z, i, j = inputs["_atomic_numbers"], inputs["_idx_i"], inputs["_idx_j"]
        energies = self.k * springs(z[i], z[j], inputs["_Rij"].norm(dim=-1))
        return {**inputs, "scalar_representation": _sum(energies, i, len(z))}


class Atomwise(nn.Module):
    def forward(self, inputs):
        n = int(inputs["_idx_m"][-1]) + 1
        assert inputs["_cell"].shape == (n, 3, 3) and inputs["_pbc"].shape == (3 * n,)
        return {**inputs, "energy": _sum(inputs["scalar_representation"], inputs["_idx_m"], n)}


class Forces(nn.Module):
    def forward(self, inputs):
        raise AssertionError("forces are not asked for")


class SchNetPack(nn.Module):
    """A ``NeuralNetworkPotential``."""

    model_outputs = ("energy", "forces")

    def __init__(self):
        super().__init__()
        self.input_modules = nn.ModuleList([Distances()])
        self.representation = Representation()
        self.output_modules = nn.ModuleList([Atomwise(), Forces()])

    def postprocess(self, inputs):
        return {**inputs, "energy": inputs["energy"] + 0.0}


class TorchMDNet(StandIn):
    """``(z, pos, batch, box, q) -> (energy, forces)``, by the minimum image in one box."""

    derivative = False

    def __init__(self):
        super().__init__()
        self.representation_model = types.SimpleNamespace(cutoff_upper=CUTOFF)

    def forward(self, z, pos, batch=None, box=None, q=None):
        i, j = (~torch.eye(len(z), dtype=torch.bool)).nonzero().T
        i, j = i[batch[i] == batch[j]], j[batch[i] == batch[j]]
        vectors = pos[j] - pos[i]
        if box is not None:
            for axis in (2, 1, 0):
                n = torch.round(vectors.detach()[:, axis] / box.detach()[axis, axis])
                vectors = vectors - n[:, None] * box[axis]
        energies = self.k * springs(z[i], z[j], vectors.norm(dim=-1))
        return _sum(energies, batch[i], int(batch[-1]) + 1)[:, None], torch.empty(0)


class CHGNet(StandIn):
    """``graph -> {"e": (graphs,)}``, averages over atoms; angles do not count here."""

    is_intensive = True
    composition_model = None

    def __init__(self):
        super().__init__()
        self.graph_converter = types.SimpleNamespace(
            atom_graph_cutoff=CUTOFF, bond_graph_cutoff=2.5
        )
        self.atom_embedding = types.SimpleNamespace(embedding=nn.Embedding(94, 1))
        distances = types.SimpleNamespace(
            rbf_expansion_ag=lambda r: r[:, None], rbf_expansion_bg=lambda r: r[:, None]
        )
        self.bond_basis_expansion = distances
        self.angle_basis_expansion = lambda left, right: (left * right).sum(dim=1, keepdim=True)
        self.graphs = None

    def _compute(self, graph):
        if self.graphs is not None:
            self.graphs.append(graph)
        first, second = graph.batched_atom_graph.T
        r = graph.bond_bases_ag[graph.directed2undirected, 0]
        energies = self.k * springs(graph.atomic_numbers[first], graph.atomic_numbers[second], r)
        counts = torch.bincount(graph.atom_owners)
        return {"e": _sum(energies, graph.atom_owners[first], len(counts)) / counts}


class _MatGLInner(StandIn):
    cutoff = CUTOFF
    element_types = ("H", "C", "O")
    include_state = False
    is_intensive = False

    def forward(self, g, state_attr, l_g):
        first, second = g.edge_index
        assert (first.diff() >= 0).all() and state_attr is None and l_g is None
        vectors = g.pos[second] + g.pbc_offshift - g.pos[first]
        z = torch.tensor(KNOWN)[g.node_type]
        energies = self.k * springs(z[first], z[second], vectors.norm(dim=-1))
        self.feature_dict = {"energies": energies}
        return _sum(energies, g.batch[first], g.num_graphs).squeeze()


class MatGL(nn.Module):
    """A ``Potential``: scale, shift and energies of elements around a model."""

    calc_repuls = False

    def __init__(self, scale=1.0, shift=0.0, references=None, **attributes):
        super().__init__()
        self.model = _MatGLInner()
        self.register_buffer("data_std", torch.tensor(scale, dtype=torch.float64))
        self.register_buffer("data_mean", torch.tensor(shift, dtype=torch.float64))
        self.element_refs = references
        for name, value in attributes.items():
            setattr(self.model if hasattr(self.model, name) else self, name, value)


class OnehotEmbedding(nn.Module):
    """In single precision, as that of SevenNet."""

    def forward(self, data):
        return {**data, "x": nn.functional.one_hot(data["x"], len(KNOWN)).float()}


class Convolution(StandIn):
    _is_batch_data = False

    def forward(self, data):
        assert self._is_batch_data and data["x"].dtype == data["edge_vec"].dtype
        first, second = data["edge_index"]
        z = torch.tensor(KNOWN)[data["x"].argmax(dim=1)]
        energies = self.k * springs(z[first], z[second], data["edge_vec"].norm(dim=-1))
        if "modal_type" in data:
            energies = energies * (1 + data["modal_type"][data["batch"][first]])
        return {**data, "atomic_energy": _sum(energies, first, len(z)).unsqueeze(-1)}


class ForceStressOutputFromEdge(nn.Module):
    def forward(self, data):
        raise AssertionError("forces are not asked for")


class SevenNet(nn.Sequential):
    """An ``AtomGraphSequential``."""

    cutoff = CUTOFF
    type_map = types.MappingProxyType({8: 2, 1: 0, 6: 1})
    modal_map = None
    is_batch_data = False

    def __init__(self):
        super().__init__(OnehotEmbedding(), Convolution(), ForceStressOutputFromEdge())

    def set_is_batch_data(self, flag):
        self.is_batch_data = self[1]._is_batch_data = flag


def several_modals():
    model = SevenNet()
    model.modal_map = {"one": 0, "two": 1}
    return model


WRAPPERS = {
    "chgnet": (lambda: CHGNetModel(CHGNet()), "eV"),
    "matgl": (lambda: MatGLModel(MatGL(), KNOWN), "eV"),
    "sevennet": (lambda: SevenNetModel(SevenNet()), "eV"),
    "mace": (lambda: MACEModel(MACE()), "eV"),
    "torchani": (lambda: TorchANIModel(ANI()), "hartree"),
    "nequip": (lambda: NequIPModel(GraphModel(), KNOWN), "eV"),
    "schnetpack": (
        lambda: SchNetPackModel(SchNetPack(), units=ModelUnits("angstrom", "kcal/mol")),
        "kcal/mol",
    ),
    "torchmdnet": (lambda: TorchMDNetModel(TorchMDNet()), "eV"),
}


def atoms(seed=0):
    random = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double()[:5]
    return 0.15 * places + 0.04 * torch.rand(5, 3, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("box", [None, SMALL, WIDE], ids=["open", "small", "wide"])
def test_energies_and_derivatives(name, box):
    make, energy = WRAPPERS[name]
    if name == "torchmdnet" and box is SMALL:
        pytest.skip("TorchMD-Net takes the nearest image alone")
    periodic = box is not None
    potential = neural_potential(make(), NUMBERS, pbc=periodic)
    truth = neural_potential(Plain(energy), NUMBERS, pbc=periodic)
    frames = torch.stack([atoms(seed) for seed in range(3)])
    h = None if box is None else torch.tensor(box, dtype=torch.float64)
    torch.testing.assert_close(potential(frames, h), truth(frames, h))
    torch.testing.assert_close(potential.forces(frames, h), truth.forces(frames, h))
    check_potential(potential, frames[0], h)


@pytest.mark.parametrize("name", WRAPPERS)
def test_physics(name):
    make, _ = WRAPPERS[name]
    check_model(make(), atoms(), None, NUMBERS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_in_weights(name):
    make, _ = WRAPPERS[name]
    potential = neural_potential(make(), NUMBERS)
    parameters = dict(potential.named_parameters())
    ((parameter, value),) = ((n, p) for n, p in parameters.items() if n.endswith(".k"))
    assert parameter.startswith("neural.model.module.")
    found = potential(atoms())
    (slope,) = torch.autograd.grad(found, value)
    torch.testing.assert_close(slope, found.detach())


def test_heads_of_mace():
    first, second = (neural_potential(MACEModel(MACE(), head=h), NUMBERS) for h in (0, "other"))
    torch.testing.assert_close(second(atoms()), 2 * first(atoms()))
    for head in ("third", 2, -1):
        with pytest.raises(InvalidInputError, match="head"):
            MACEModel(MACE(), head=head)


def test_modals_of_sevennet():
    model = several_modals()
    first, second = (
        neural_potential(SevenNetModel(model, modal=name), NUMBERS) for name in ("one", "two")
    )
    torch.testing.assert_close(second(atoms()), 2 * first(atoms()))
    assert not model.is_batch_data
    for one, modal in ((model, None), (model, "three"), (SevenNet(), "one")):
        with pytest.raises(InvalidInputError, match="modal"):
            SevenNetModel(one, modal=modal)


def test_what_surrounds_a_model_of_matgl():
    references = types.SimpleNamespace(
        property_offset=torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    )
    around = neural_potential(MatGLModel(MatGL(3.0, 0.25, references), KNOWN), NUMBERS)
    alone = neural_potential(MatGLModel(MatGL(), KNOWN), NUMBERS)
    frames = torch.stack([atoms(seed) for seed in range(3)])
    shift = 96.48533212331 * (0.25 + 7.0 + 3 * 0.5 + 2.0)
    torch.testing.assert_close(around(frames), 3 * alone(frames) + shift)


@pytest.mark.parametrize("box", [None, SMALL, WIDE], ids=["open", "small", "wide"])
def test_bonds_and_angles_of_chgnet(box):
    """A bond is two opposite edges; an angle two different short edges from one atom."""
    model = CHGNet()
    potential = neural_potential(CHGNetModel(model), NUMBERS, pbc=box is not None)
    frames = torch.stack([atoms(seed) for seed in range(2)])
    h = None if box is None else torch.tensor(box, dtype=torch.float64)
    inputs = potential.neural.inputs(frames, None if h is None else h.expand(2, 3, 3))
    model.graphs = []
    potential(frames, h)
    (graph,) = model.graphs
    bond, edges = graph.directed2undirected, range(len(inputs.first))
    assert torch.bincount(bond).tolist() == [2] * (len(inputs.first) // 2)
    rows = torch.cat([torch.stack([inputs.first, inputs.second], 1), inputs.shifts], 1)
    for pair in (
        (bond[None] == torch.arange(len(rows) // 2)[:, None]).nonzero()[:, 1].reshape(-1, 2)
    ):
        one, other = rows[pair].tolist()
        assert other == [one[1], one[0], *(-s for s in one[2:])]
    torch.testing.assert_close(
        graph.bond_bases_ag[bond, 0], inputs.displacements.norm(dim=-1), rtol=1e-12, atol=0.0
    )
    short = (inputs.displacements.norm(dim=-1) < 2.5).tolist()
    along = nn.functional.normalize(inputs.displacements, dim=-1)
    wanted = sorted(
        (int(inputs.first[i]), int(bond[i]), int(bond[j]), round(float(along[i] @ along[j]), 9))
        for i in edges
        for j in edges
        if i != j and short[i] and short[j] and inputs.first[i] == inputs.first[j]
    )
    cosines = graph.angle_bases[:, 0].tolist()
    found = [
        (*row, round(c, 9))
        for row, c in zip(graph.batched_bond_graph.tolist(), cosines, strict=True)
    ]
    assert wanted and len(found) == len(wanted)
    np.testing.assert_allclose(sorted(found), wanted, atol=2e-9)


def test_small_cells_of_torchmdnet():
    potential = neural_potential(TorchMDNetModel(TorchMDNet()), NUMBERS, pbc=True)
    with pytest.raises(InvalidInputError, match="at least 8 on the diagonal"):
        potential(atoms(), 0.7 * torch.eye(3))


def _with_derivative():
    model = TorchMDNet()
    model.derivative = True
    return model


def _with_own_indices():
    model = ANI()
    model.periodic_table_index = False
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MACEModel(nn.Linear(1, 1)), "r_max"),
        (lambda: TorchANIModel(nn.Linear(1, 1)), "compute_from_external_neighbors"),
        (lambda: TorchANIModel(_with_own_indices()), "periodic_table_index"),
        (lambda: NequIPModel(_Inner(), KNOWN), "cutoff"),
        (lambda: SchNetPackModel(nn.Linear(1, 1), units=ModelUnits()), "representation"),
        (lambda: CHGNetModel(nn.Linear(1, 1)), "no bond_basis_expansion, .*CHGNet.load"),
        (lambda: MatGLModel(nn.Linear(1, 1), KNOWN), "Potential"),
        (lambda: MatGLModel(MatGL(), KNOWN[:2]), "elements: got 2, .* 3 element_types"),
        (lambda: MatGLModel(MatGL(include_state=True), KNOWN), "depends on a state"),
        (lambda: MatGLModel(MatGL(is_intensive=True), KNOWN), "is intensive"),
        (lambda: MatGLModel(MatGL(calc_charge=True), KNOWN), "calc_charge=False"),
        (lambda: SevenNetModel(nn.Linear(1, 1)), "AtomGraphSequential"),
        (lambda: TorchMDNetModel(nn.Linear(1, 1)), "cutoff_upper"),
        (lambda: TorchMDNetModel(_with_derivative()), "derivative=False"),
    ],
)
def test_other_things_are_refused(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()


def test_energy_models_of_nequip_need_no_layer():
    inner = NequIPModel(_Inner(), KNOWN, cutoff=CUTOFF)
    whole = NequIPModel(GraphModel(), KNOWN)
    x = atoms()
    torch.testing.assert_close(
        neural_potential(inner, NUMBERS)(x), neural_potential(whole, NUMBERS)(x)
    )


def test_a_missing_energy_of_schnetpack():
    model = SchNetPackModel(SchNetPack(), units=ModelUnits(), energy="enthalpy")
    with pytest.raises(InvalidInputError, match="enthalpy"):
        neural_potential(model, NUMBERS)(atoms())


# The packages themselves ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_torchani():
    arch = pytest.importorskip("torchani.arch", reason="torchani is not installed")
    torch.manual_seed(0)
    model = arch.simple_ani(("H", "C", "O"), lot="wb97x-631gd", repulsion=False).double()
    x, h = atoms(), torch.diag(torch.tensor([1.2, 1.25, 1.3], dtype=torch.float64))
    z = torch.tensor([NUMBERS])
    for box in (None, h):
        cell = {} if box is None else {"cell": 10 * box, "pbc": torch.tensor([True] * 3)}
        wanted = model((z, 10 * x[None]), **cell).energies[0] * 2625.4996394799
        potential = neural_potential(TorchANIModel(model), NUMBERS, pbc=box is not None)
        torch.testing.assert_close(potential(x, box), wanted, rtol=1e-12, atol=0.0)
    check_model(TorchANIModel(model), x, SMALL, NUMBERS)


@pytest.mark.filterwarnings("ignore")
def test_mace():
    modules = pytest.importorskip("mace.modules", reason="mace-torch is not installed")
    from ase import Atoms
    from e3nn import o3
    from mace.calculators import MACECalculator

    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        model = modules.ScaleShiftMACE(
            r_max=CUTOFF,
            num_bessel=4,
            num_polynomial_cutoff=6,
            max_ell=1,
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps("4x0e+4x1o"),
            MLP_irreps=o3.Irreps("4x0e"),
            atomic_energies=np.array([-1.0, -2.0, -3.0]),
            avg_num_neighbors=8,
            atomic_numbers=KNOWN,
            correlation=2,
            gate=nn.functional.silu,
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
        x = atoms()
        host = Atoms(numbers=NUMBERS, positions=10 * x.numpy(), cell=10 * np.array(SMALL), pbc=True)
        host.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
        potential = neural_potential(MACEModel(model), NUMBERS, pbc=True)
        found = potential(x, torch.tensor(SMALL)).item()
        assert found == pytest.approx(host.get_potential_energy() * 96.48533212331, rel=1e-10)
        check_model(MACEModel(model), x, SMALL, NUMBERS)
    finally:
        torch.set_default_dtype(previous)
