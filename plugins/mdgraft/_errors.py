"""Every error and warning that mdgraft raises of its own accord."""

from __future__ import annotations


class MDGraftError(Exception):
    """Base of all errors raised by mdgraft."""


class InvalidInputError(MDGraftError, ValueError):
    """An argument has the wrong shape, type, value or unit."""


class MissingBoxError(InvalidInputError):
    """A periodic potential was evaluated without box vectors."""


class BoxTooSmallError(InvalidInputError):
    """The periodic box is smaller than twice the cutoff."""


class UnsupportedHostError(MDGraftError, TypeError):
    """No adapter is registered for this object, or more than one is."""


class UnsupportedForceError(MDGraftError, NotImplementedError):
    """A System holds forces that have no native torch form."""


class UnsupportedDerivativeError(MDGraftError, NotImplementedError):
    """A derivative of an order that a host-evaluated term does not have."""


class ParameterMismatchError(MDGraftError, ValueError):
    """Parameters cannot be written into this host object."""


class InsufficientOverlapError(MDGraftError):
    """The sampled frames say too little about the parameters asked for."""


class WrongEnsembleError(MDGraftError, ValueError):
    """The frames were not sampled from the distribution that an estimator assumes."""


class ConfigurationError(MDGraftError, ValueError):
    """A configuration file is incomplete or contradictory."""


class SimulationError(MDGraftError, RuntimeError):
    """A simulation blew up, or the host could not run it."""


class ConstraintError(MDGraftError, RuntimeError):
    """Constraints cannot be met, depend on each other, or are not met closely enough."""


class UnavailableBackendError(MDGraftError, RuntimeError):
    """A way to run a model in the host that does not work here, or not for this model."""


class UntrustedInputError(MDGraftError):
    """An input file would run code when it is loaded."""


class MDGraftWarning(UserWarning):
    """Base of all warnings issued by mdgraft."""


class NonConservativeForceWarning(MDGraftWarning):
    """Forces are not the gradient of the energy that they come with."""


class DeviceKernelWarning(MDGraftWarning):
    """A kernel for GPUs is not used, or could not be checked."""
