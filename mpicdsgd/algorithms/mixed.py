"""Any torch optimizer, made decentralised: its own step, then the mixing.

    x_j <- step(x_j, g_j(x_j)) + sum_l Pi[j,l] (x_l - x_j)           all x on the right: before it

For `torch.optim.SGD` without momentum this is CDSGD. Only parameters are mixed; the optimizer's
own state (AdamW's moments, say) stays local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.stepper import Beside
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.kernels.arena import Coefficients


class Mixed(AgentOptimizer):
    """``optimizer`` with the agents' mixing after each of its steps. Collective over ``agents``.

    It shares ``optimizer``'s parameter groups, so schedulers and changes of lr act on both.

    Args:
        optimizer: a torch optimizer over float32 parameters; step only through `Mixed`.
        agents, buffers, exchange, debug: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        agents: Agents,
        *,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        self.optimizer = optimizer
        super().__init__(
            [{"params": group["params"]} for group in optimizer.param_groups],
            dict(optimizer.defaults),
            agents,
            buffers=buffers,
            exchange=exchange,
            debug=debug,
        )
        self.param_groups = optimizer.param_groups

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return Coefficients(alpha=0.0, c_g=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's own step, then the mixing. Collective, as `AgentOptimizer.step`.

        After an overflow that `torch.amp.GradScaler` found, the mixing alone. Whether there was
        one a fused optimizer finds out on the GPU; for others the host waits, as with torch.
        """
        self._begin()
        loss = None
        penalty = self._penalty() if self.stepper.measuring else None
        scale, overflow = self._from_scaler()
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and overflow is not None:
            inner: Any = self.optimizer
            inner.grad_scale, inner.found_inf = scale, overflow
            inner.step()
            del inner.grad_scale, inner.found_inf
        elif overflow is None or not bool(overflow):
            if scale is not None:
                gradients = [p.grad for p in self.arena.parameters if p.grad is not None]
                torch._foreach_mul_(gradients, 1 / float(scale))
            with torch.enable_grad():
                loss = self.optimizer.step(closure)
        self.arena.require_fresh_gradients()
        beside = None if penalty is None else Beside(self._squared_gradient(), penalty)
        self.stepper.advance(self._segments(), overflow=overflow, beside=beside)
        return loss

    @torch.no_grad()
    def mix(self) -> None:
        """The mixing without a step of the optimizer. Collective; raises as `step`."""
        self._begin()
        self.stepper.advance(self._segments())

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, with ``agents.steps`` beside. Local."""
        return {**self.optimizer.state_dict(), "agents": {"steps": self.steps}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` and publish the parameters as they are. Collective."""
        self._require_open()
        self.optimizer.load_state_dict(state_dict)
        self.exchange.wait(self.steps)
        self.param_groups = self.optimizer.param_groups
        self.arena.repair()
        self.stepper.steps = int(state_dict.get("agents", {}).get("steps", 0))
        self.stepper.publish()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """x, and the optimizer's own state under ``optimizer/<parameter>/<name>``; views. Local.

        Raises:
            TypeError: if that state holds more than tensors and numbers.
        """
        arrays = super().arrays()
        for i, parameter in enumerate(self.arena.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor | int | float):
                    raise TypeError(
                        f"{type(self.optimizer).__name__} keeps a {type(value).__name__} as "
                        f"{name}: its state cannot be checkpointed"
                    )
                arrays[f"optimizer/{i}/{name}"] = torch.as_tensor(value).detach().cpu().numpy()
        return arrays

    @torch.no_grad()
    def load_arrays(self, steps: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave after ``steps`` steps, and publish it. Collective."""
        for key, array in arrays.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                index, _, name = rest.partition("/")
                parameter = self.arena.parameters[int(index)]
                values = torch.from_numpy(np.array(array))
                # As torch keeps them: the count of steps on the host, for most optimizers.
                if name != "step" or self._counts_on_device(parameter):
                    values = values.to(parameter.device)
                    if values.shape == parameter.shape:  # in its memory format, as torch has it
                        like = torch.empty_like(parameter, dtype=values.dtype)
                        values = like.copy_(values)
                self.optimizer.state[parameter][name] = values
        super().load_arrays(steps, arrays)

    def _squared_gradient(self) -> torch.Tensor:
        """|g|^2 of what the optimizer was given; its own weight decay is not known here."""
        gradients = [p.grad.to_dense() for p in self.arena.parameters if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    def _penalty(self) -> torch.Tensor:
        """P_j of `algorithms.stepper.Measured`, as the parameters are; of a decoupled decay too."""
        total = torch.zeros((), dtype=torch.float64, device=self.arena.flat.device)
        for group in self.param_groups:
            held = [p for p in group["params"] if p.requires_grad and p.numel()]
            if held and (decay := float(group.get("weight_decay", 0.0))):
                total += (
                    0.5 * decay * torch.stack(torch._foreach_norm(held)).double().square().sum()
                )
        return total

    def _counts_on_device(self, parameter: torch.Tensor) -> bool:
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        return bool(group.get("capturable") or group.get("fused"))

    def _segments(self) -> NDArray[np.void]:
        # own = 1: the difference to neighbours is taken from what was published, the old x.
        segments = self.arena.mix_only_segments()
        segments["own"] = 1
        return segments
