"""A term of a potential around the module that a force runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from mdgraft import InvalidInputError, Potential, UnsupportedDerivativeError, UnsupportedForceError
from mdgraft.potentials import AbstractTerm
from torch import Tensor, nn

from mdgraft_openmm._converter import global_key
from mdgraft_openmm.export.energy import EnergyFunction


class TorchTerm(AbstractTerm):
    """The energy of a torch module, differentiable as the module itself is.

    Its parameters are those of a copy of the module in the potential's precision, named
    ``module.<name>``; their units are the module's own business. Frames are evaluated one by one,
    except by a `Potential`.

    Parameters
    ----------
    function
        The energy.
    particles
        Those that the module gets; empty for all.

    Raises
    ------
    UnsupportedForceError
        If the module cannot be copied or takes no other values for its parameters.
    """

    particles: Tensor
    precision: Tensor

    def __init__(self, function: EnergyFunction, particles: Sequence[int]) -> None:
        super().__init__(periodic=function.periodic)
        module = function.module
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedForceError("module: TorchScript takes no other parameters")
        own = module
        if isinstance(module, nn.Module):
            try:
                own = copy.deepcopy(module).to(device="cpu", dtype=torch.float64)
            except Exception as error:
                raise UnsupportedForceError(f"module: cannot be copied ({error})") from error
        self.general_cell = own.general_cell if isinstance(own, Potential) else True
        self.globals = {name: global_key(name) for name in function.defaults}
        if isinstance(own, Potential):
            # The outer potential has these.
            for key in self.globals.values():
                own.get_submodule("globals")._parameters.pop(key)
            self.units |= {f"module.{key}": unit for key, unit in own.units.items()}
        self.function = EnergyFunction(
            own,
            periodic=function.periodic,
            defaults=function.defaults,
            dtype=function.dtype,
            device=function.device,
        )
        if isinstance(own, nn.Module):
            self.module = own
            for key, _ in own.named_parameters():
                self.units.setdefault(f"module.{key}", "")
        self.register_buffer(
            "particles", torch.tensor(list(particles), dtype=torch.long, device="cpu")
        )
        # A term without parameters still has a dtype and a device.
        like = torch.zeros((), dtype=torch.float64, device="cpu")
        self.register_buffer("precision", like, persistent=False)

    def parameter_values(self) -> dict[str, Tensor]:
        """Parameters of the module, as ``module.<name>``."""
        if "module" not in self._modules:
            return {}
        return {f"module.{key}": value for key, value in self.module.named_parameters()}

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol].

        Raises
        ------
        UnsupportedDerivativeError
            If the module returns forces: what its energy depends on nobody knows.
        """
        chosen = positions[:, self.particles] if len(self.particles) else positions
        own = {k.removeprefix("module."): v for k, v in values.items()}
        shared = {name: global_values[key] for name, key in self.globals.items()}
        module = self.function.module
        if isinstance(module, Potential):
            replaced = module.values(own)
            replaced |= {f"globals.{self.globals[name]}": v for name, v in shared.items()}
            found = module.energy_by_term(chosen, box, values=replaced)
            return torch.stack(list(found.values())).sum(dim=0)
        frames = range(len(chosen))
        energies = [
            self._of_frame(chosen[f], None if box is None else box[f], own, shared) for f in frames
        ]
        return torch.stack(energies)

    def _of_frame(
        self,
        positions: Tensor,
        box: Tensor | None,
        own: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> Tensor:
        module = self.function.module
        arguments = (positions, box) if self.function.takes_box else (positions,)
        if isinstance(module, nn.Module):
            result = torch.func.functional_call(module, dict(own), arguments, dict(shared))
        else:
            result = module(*arguments, **shared)
        if isinstance(result, tuple):
            raise UnsupportedDerivativeError(
                "module: returns forces beside the energy, whose derivatives then mean nothing; "
                "graft its force with route='host', which takes its forces"
            )
        if result.numel() != 1:
            raise InvalidInputError(
                f"module: returned a tensor of shape {tuple(result.shape)} for one frame, wanted "
                "one energy"
            )
        energy: Tensor = result.reshape(())
        return energy


def module_parameters(function: EnergyFunction) -> dict[str, Tensor]:
    """What a term of this energy has as parameters, without making one."""
    module = function.module
    if not isinstance(module, nn.Module):
        return {}
    shared = set()
    if isinstance(module, Potential):
        shared = {f"globals.{global_key(name)}" for name in function.defaults}
    return {f"module.{k}": v for k, v in module.named_parameters() if k not in shared}
