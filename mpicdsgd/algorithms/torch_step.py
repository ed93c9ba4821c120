"""Any torch optimizer as the local step: its own state stays local, only parameters are mixed.

    x_j <- step(x_j, g_j(x_j)) + sum_l Pi[j,l] (x_l - x_j)           all x on the right: before it

It is made before the algorithm's step, while the exchange is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.measured import Beside
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients

NOTHING = Coefficients(alpha=0.0, c_g=0.0)


class TorchStep:
    """See the module. All methods are local.

    Args:
        optimizer: over float32 parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def apply(
        self,
        arena: Arena,
        closure: Callable[[], Any] | None,
        scale: torch.Tensor | None,
        overflow: torch.Tensor | None,
    ) -> Any:
        """The optimizer's own step; nothing after an overflow. Returns the closure's loss.

        Whether there was one a fused optimizer finds out on the GPU; for others the host waits, as
        with torch.
        """
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and overflow is not None:
            inner: Any = self.optimizer
            inner.grad_scale, inner.found_inf = scale, overflow
            inner.step()
            del inner.grad_scale, inner.found_inf
        elif overflow is None or not bool(overflow):
            if scale is not None:
                gradients = [p.grad for p in arena.parameters if p.grad is not None]
                torch._foreach_mul_(gradients, 1 / float(scale))
            with torch.enable_grad():
                return self.optimizer.step(closure)
        return None

    def beside(self, arena: Arena, penalty: torch.Tensor) -> Beside:
        """What is measured of the step: |g|^2 of what the optimizer was given, and ``penalty``.

        Its own weight decay is not known here.
        """
        gradients = [p.grad.to_dense() for p in arena.parameters if p.grad is not None]
        squared = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        return Beside(squared, penalty)

    def penalty(self, arena: Arena) -> torch.Tensor:
        """P_j of `measured.Measured`, as the parameters are; of a decoupled decay too."""
        total = torch.zeros((), dtype=torch.float64, device=arena.flat.device)
        for group in self.optimizer.param_groups:
            held = [p for p in group["params"] if p.requires_grad and p.numel()]
            if held and (decay := float(group.get("weight_decay", 0.0))):
                total += (
                    0.5 * decay * torch.stack(torch._foreach_norm(held)).double().square().sum()
                )
        return total

    def arrays(self, arena: Arena) -> dict[str, NDArray[Any]]:
        """The optimizer's own state under ``optimizer/<parameter>/<name>``; views.

        Raises:
            TypeError: if that state holds more than tensors and numbers.
        """
        arrays = {}
        for i, parameter in enumerate(arena.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor | int | float):
                    raise TypeError(
                        f"{type(self.optimizer).__name__} keeps a {type(value).__name__} as "
                        f"{name}: its state cannot be checkpointed"
                    )
                arrays[f"optimizer/{i}/{name}"] = torch.as_tensor(value).detach().cpu().numpy()
        return arrays

    def load(self, arena: Arena, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave."""
        for key, array in arrays.items():
            kind, _, rest = key.partition("/")
            if kind != "optimizer":
                continue
            index, _, name = rest.partition("/")
            parameter = arena.parameters[int(index)]
            values = torch.from_numpy(np.array(array))
            # As torch keeps them: the count of steps on the host, for most optimizers.
            if name != "step" or self._counts_on_device(parameter):
                values = values.to(parameter.device)
                if values.shape == parameter.shape:  # in its memory format, as torch has it
                    like = torch.empty_like(parameter, dtype=values.dtype)
                    values = like.copy_(values)
            self.optimizer.state[parameter][name] = values

    def _counts_on_device(self, parameter: torch.Tensor) -> bool:
        groups = self.optimizer.param_groups
        group = next(g for g in groups if any(p is parameter for p in g["params"]))
        return bool(group.get("capturable") or group.get("fused"))
