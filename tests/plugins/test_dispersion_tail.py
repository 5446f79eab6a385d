"""The long-range correction against its definition, a sum over all pairs and an integral."""

import math

import pytest
import torch
from mdgraft.potentials import dispersion_tail
from mdgraft.potentials.dispersion_tail import DispersionTail
from scipy import integrate

CUTOFF = 0.9


def particles(n=7):
    generator = torch.Generator().manual_seed(n)
    sigma = 0.25 + 0.1 * torch.rand(n, generator=generator, dtype=torch.float64)
    epsilon = 0.2 + torch.rand(n, generator=generator, dtype=torch.float64)
    epsilon[2] = 0.0
    return sigma.requires_grad_(), epsilon.requires_grad_()


def by_definition(sigma, epsilon, start):
    """2 pi N^2 times the mean over pairs i <= j of the integral of what is cut off."""
    n, total = len(sigma), 0.0

    def removed(r):
        t = max(0.0, (r - start) / (CUTOFF - start)) if start is not None else 0.0
        return t**3 * (10 - 15 * t + 6 * t**2)

    for i in range(n):
        for j in range(i, n):
            s, e = 0.5 * float(sigma[i] + sigma[j]), math.sqrt(float(epsilon[i] * epsilon[j]))

            def pair(r, s=s, e=e):
                return 4 * e * ((s / r) ** 12 - (s / r) ** 6) * r * r

            beyond = integrate.quad(pair, CUTOFF, math.inf, epsabs=0, epsrel=1e-10)[0]
            if start is not None:
                within = integrate.quad(lambda r, p=pair: p(r) * removed(r), start, CUTOFF)[0]
                beyond += within
            total += beyond
    return 2 * math.pi * n**2 * total / (n * (n + 1) / 2)


@pytest.mark.parametrize("start", [None, 0.7])
def test_it_is_its_definition(start):
    sigma, epsilon = particles()
    switching = None if start is None else torch.tensor(start, dtype=torch.float64)
    found = DispersionTail(CUTOFF)(sigma, epsilon, switching)
    expected = by_definition(sigma.detach(), epsilon.detach(), start)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_both_ways_to_the_sums_are_one():
    """Values, and derivatives up to the second; a GPU takes another way than a CPU."""
    sigma, epsilon = particles(40)
    results = []
    for sums in (dispersion_tail._one_by_one, dispersion_tail._on_a_device):
        moments, own = sums(sigma, dispersion_tail.root_epsilon(epsilon))
        total = (moments * torch.arange(1, 14)).sum() + own @ torch.tensor([3.0, -7.0]).double()
        first = torch.autograd.grad(total, [sigma, epsilon], create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [sigma, epsilon])
        results.append([moments, own, *first, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_derivatives_are_those_of_finite_differences():
    sigma, epsilon = particles()
    tail = DispersionTail(CUTOFF)
    kept = torch.arange(7) != 2
    start = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def energy(s, e, start):
        full = torch.zeros(7, dtype=torch.float64).masked_scatter(kept, e)
        return tail(s, full, start)

    inputs = (sigma, epsilon.detach()[kept].requires_grad_(), start)
    assert torch.autograd.gradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(energy, inputs)
