"""What a gradient estimator is."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

from torch import Tensor

from mdgraft.estimate import BiasClass, Estimate
from mdgraft.montecarlo._counts import checked_count
from mdgraft.montecarlo.gradients._assembly import assemble, chain_error
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.samples import Update


class AbstractGradient(abc.ABC):
    """A way to estimate the derivative of an average over a Markov chain.

    An estimator is a choice of method and of its settings. It drives a sampler, which is left at
    the end of what it ran, so that another estimate goes on from there.
    """

    @abc.abstractmethod
    def estimate(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        n_samples: int,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> Estimate:
        """Average an observable and its derivatives over the samples to come.

        Parameters
        ----------
        sampler
            The chains; C of them.
        observable
            Maps the state of C chains to ``(C, *S)``.
        n_samples
            Number of samples T of each chain.
        stride
            Steps from one sample to the next.
        parameters
            Names or shell-style patterns of parameters of the energy, and names of parameters of
            the distribution, ``temperature``, ``pressure``, ``log_activity`` or
            ``chemical_potential``; by default all trainable ones of the energy. Some estimators
            know the scales of moves too, as ``<move>.scale``.

        Returns
        -------
        Estimate
            With gradients of shapes ``(*S, *parameter.shape)``; ``n_frames`` is ``T C``.

        Raises
        ------
        InvalidInputError
            For an unknown parameter, a count below one, or an observable that returns a wrong
            shape or NaN.
        UnsupportedDerivativeError
            For a combination of moves and parameters that the method does not differentiate.
        """


def steps(
    sampler: Metropolis, n_samples: int, stride: int
) -> Iterator[tuple[tuple[Update, ...], bool]]:
    """Step the chains; yield the updates of each step and whether a sample is taken after it."""
    # Arguments are checked at once, steps are taken as they are asked for.
    total = checked_count("n_samples", n_samples) * checked_count("stride", stride)
    return ((sampler.step(), (k + 1) % stride == 0) for k in range(total))


def from_series(
    values: Tensor, gradients: Tensor, conjugates: Conjugates, *, method: str, bias: BiasClass
) -> Estimate:
    """The estimate that averages values ``(T, C, *S)`` and gradients ``(T, C, *S, P)``."""
    mean, gradient = values.mean(dim=(0, 1)), gradients.mean(dim=(0, 1))
    error, inefficiency = chain_error(gradients)
    return assemble(
        value=mean,
        value_influence=values - mean,
        gradient=conjugates.split(gradient),
        gradient_error=conjugates.split(error),
        gradient_inefficiency=conjugates.split(inefficiency),
        method=method,
        bias=bias,
    )
