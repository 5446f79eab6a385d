"""mdgraft: graft gradients onto the molecular-dynamics engine you already use."""

from mdgraft._errors import BoxTooSmallError as BoxTooSmallError
from mdgraft._errors import ConfigurationError as ConfigurationError
from mdgraft._errors import ConstraintError as ConstraintError
from mdgraft._errors import DeviceKernelWarning as DeviceKernelWarning
from mdgraft._errors import InsufficientOverlapError as InsufficientOverlapError
from mdgraft._errors import InvalidInputError as InvalidInputError
from mdgraft._errors import MDGraftError as MDGraftError
from mdgraft._errors import MDGraftWarning as MDGraftWarning
from mdgraft._errors import MissingBoxError as MissingBoxError
from mdgraft._errors import NonConservativeForceWarning as NonConservativeForceWarning
from mdgraft._errors import ParameterMismatchError as ParameterMismatchError
from mdgraft._errors import SimulationError as SimulationError
from mdgraft._errors import UnavailableBackendError as UnavailableBackendError
from mdgraft._errors import UnsupportedDerivativeError as UnsupportedDerivativeError
from mdgraft._errors import UnsupportedForceError as UnsupportedForceError
from mdgraft._errors import UnsupportedHostError as UnsupportedHostError
from mdgraft._errors import UntrustedInputError as UntrustedInputError
from mdgraft._errors import WrongEnsembleError as WrongEnsembleError
from mdgraft._graft import graft as graft
from mdgraft.estimate import Estimate as Estimate
from mdgraft.frames import Frames as Frames
from mdgraft.kernels.switch import plain_kernels as plain_kernels
from mdgraft.potentials import Potential as Potential

__version__ = "0.1.0"
