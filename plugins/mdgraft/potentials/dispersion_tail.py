"""The long-range correction of a cut-off Lennard-Jones fluid."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from mdgraft.potentials.pair_forms import root_epsilon, switch

#: Powers of attraction and repulsion.
_POWERS = (6, 12)


class DispersionTail(nn.Module):
    """Long-range correction of a switched or truncated Lennard-Jones fluid, times the volume.

    Shirts et al., J. Phys. Chem. B 111, 13052 (2007), averaged over all pairs i <= j, self pairs
    included, as OpenMM does. The sum over pairs of ((s_i + s_j)/2)^n sqrt(e_i e_j) is expanded
    binomially, so the cost is linear in particles and every derivative is exact.

    Parameters
    ----------
    cutoff
        [nm].
    """

    binomial: Tensor
    beyond: Tensor
    nodes: Tensor
    weights: Tensor

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        largest = max(_POWERS)
        binomial = np.zeros((len(_POWERS), largest + 1, largest + 1))
        for of_power, power in zip(binomial, _POWERS, strict=True):
            for k in range(power + 1):
                of_power[k, power - k] = math.comb(power, k) / 2**power
        nodes, weights = np.polynomial.legendre.leggauss(96)
        # Buffers are there on every device without being copied to it again and again.
        for name, numbers in {
            "binomial": binomial,
            "beyond": np.array([cutoff ** (3 - power) / (power - 3) for power in _POWERS]),
            "nodes": 0.5 * (nodes + 1),
            "weights": 0.5 * weights,
        }.items():
            self.register_buffer(name, torch.from_numpy(numbers), persistent=False)

    def forward(self, sigma: Tensor, epsilon: Tensor, switching_distance: Tensor | None) -> Tensor:
        """The correction.

        Parameters
        ----------
        sigma, epsilon
            ``(N,)`` [nm], [kJ/mol].
        switching_distance
            ``()`` [nm], or None without switching.

        Returns
        -------
        Tensor
            ``()`` [kJ/mol nm^3].
        """
        terms = self._averages(sigma, epsilon) * self._integrals(switching_distance)
        attraction, repulsion = terms.unbind()
        n = sigma.shape[0]
        return 8 * math.pi * n / (n + 1) * (repulsion - attraction).to(sigma.dtype)

    def _averages(self, sigma: Tensor, epsilon: Tensor) -> Tensor:
        """Sums of ((s_i + s_j)/2)^power sqrt(e_i e_j) over pairs, twice each, by power."""
        root = root_epsilon(epsilon)
        moments, own = (_on_a_device if sigma.is_cuda else _one_by_one)(sigma, root)
        cross = ((moments @ self.binomial.double()) * moments).sum(dim=-1)
        return cross + own

    def _integrals(self, switching_distance: Tensor | None) -> Tensor:
        """Integrals of r^(2 - power) times what the switch removes, from r_switch to infinity."""
        beyond = self.beyond.double()
        if switching_distance is None:
            return beyond
        start = switching_distance.double()
        width = self.cutoff - start
        r = start + width * self.nodes.double()
        removed = self.weights.double() * (1 - switch(r, start, self.cutoff))
        decays = torch.stack([r ** (2 - power) for power in _POWERS])
        return beyond + width * (decays * removed).sum(dim=-1)


def _one_by_one(sigma: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of root s^k for all k up to the largest power, and of (root s^k) root for `_POWERS`."""
    # Products one after the other: general powers take far longer, and tables of them miss caches.
    weighted, moments, own = root, [root.sum()], []
    for power in range(1, max(_POWERS) + 1):
        weighted = weighted * sigma
        moments.append(weighted.sum())
        if power in _POWERS:
            own.append((weighted * root).sum())
    return torch.stack(moments).double(), torch.stack(own).double()


def _on_a_device(sigma: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The same in few operations, each of which takes longer to start than to run."""
    s, root = sigma.double(), root.double()
    powers = torch.stack([torch.ones_like(s), s])
    square = s * s
    for _ in range(2):
        powers = torch.cat([powers, powers * square])
        square = square * square
    powers = torch.cat([powers, powers[: max(_POWERS) - 7] * square])
    moments, own = (powers @ torch.stack([root, root * root], dim=1)).unbind(dim=1)
    return moments, torch.stack([own[power] for power in _POWERS])
