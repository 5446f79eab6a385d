"""Public checks."""

from mdgraft._comparison import Comparison as Comparison
from mdgraft._comparison import HostFunctions as HostFunctions
from mdgraft._comparison import Progress as Progress
from mdgraft._comparison import Tolerances as Tolerances
from mdgraft._comparison import compare_with_host as compare_with_host
from mdgraft._differences import Difference as Difference
from mdgraft._differences import finite_difference as finite_difference
