"""The table of calculators that have a torch form."""

from __future__ import annotations

from typing import Any

from ase.calculators.acn import ACN
from ase.calculators.counterions import AtomicCounterIon
from ase.calculators.eam import EAM
from ase.calculators.emt import EMT
from ase.calculators.ff import ForceField
from ase.calculators.harmonic import HarmonicCalculator, SpringCalculator
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.calculators.tip3p import TIP3P
from ase.calculators.tip4p import TIP4P

from mdgraft_ase.forms.eam import EAMForm
from mdgraft_ase.forms.emt import EMTForm
from mdgraft_ase.forms.force_field import ForceFieldForm
from mdgraft_ase.forms.form import AbstractForm
from mdgraft_ase.forms.harmonic import HarmonicForm, SpringForm
from mdgraft_ase.forms.lennard_jones import LennardJonesForm
from mdgraft_ase.forms.molecular import ACNForm, CounterIonForm, TIP3PForm, TIP4PForm
from mdgraft_ase.forms.morse import MorseForm
from mdgraft_ase.forms.tersoff import TersoffForm

FORMS: dict[type, AbstractForm] = {
    LennardJones: LennardJonesForm(),
    MorsePotential: MorseForm(),
    EMT: EMTForm(),
    EAM: EAMForm(),
    ForceField: ForceFieldForm(),
    HarmonicCalculator: HarmonicForm(),
    SpringCalculator: SpringForm(),
    TIP3P: TIP3PForm(),
    TIP4P: TIP4PForm(),
    ACN: ACNForm(),
    AtomicCounterIon: CounterIonForm(),
}
try:
    from ase.calculators.tersoff import Tersoff
except ImportError:
    # It came with ASE 3.25.
    pass
else:
    FORMS[Tersoff] = TersoffForm()


def form_of(calculator: Any) -> AbstractForm | None:
    """How to read a calculator, or None if its class has no torch form.

    A subclass counts as long as it does not replace what defines the energy.
    """
    for cls in type(calculator).__mro__:
        form = FORMS.get(cls)
        if form is not None:
            return form if form.applies(calculator, cls) else None
    return None
