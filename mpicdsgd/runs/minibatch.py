"""One minibatch: loss, gradient, and the optimizer's exchange and update."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.models.evaluate import is_classification


def minibatch_step(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: AgentOptimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    clip_norm: float = 0.0,
    deferred: bool = False,
) -> tuple[float | Tensor, int | Tensor | None]:
    """Take one step on a minibatch, which is on the model's device. Collective.

    An agent whose loss is not finite leaves its gradient out (x <- mix) and has all agents raise
    `AgentFault` a little later.

    Args:
        model: put into training mode.
        loss_fn: (outputs, targets) to the mean over the batch, shape ().
        optimizer: of the model's parameters.
        inputs, targets: the minibatch.
        clip_norm: clip the gradient's norm to this; 0: do not.
        deferred: leave the question whether the loss is finite to the device, and the results on
            it, so that the host need not wait for a GPU.

    Returns:
        The mean loss and the number of right answers (None where accuracy has no meaning);
        ``deferred``: as tensors, float64 and int64, shape ().
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    outputs = model(inputs)
    loss = loss_fn(outputs, targets)

    def backward() -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)

    value: float | Tensor
    if deferred:
        value = loss.detach().double().reshape(())
        backward()  # of a NaN, too: the pass then ignores what it gives
        _step_unless(optimizer, ~value.isfinite())
    else:
        value = float(loss.detach())
        if math.isfinite(value):
            backward()
            optimizer.step()
        else:
            optimizer.report(Reason.NON_FINITE_LOSS)
            optimizer.mix()
    right: int | Tensor | None = None
    if is_classification(outputs, targets):
        right = (outputs.detach().argmax(1) == targets).sum()
        right = right if deferred else int(right)
    return value, right


def _step_unless(optimizer: AgentOptimizer, bad: Tensor) -> None:
    """``optimizer.step()``, but without the gradient and with a fault where ``bad`` is true.

    By the attributes through which `torch.amp.GradScaler` says that it found an overflow.
    """
    optimizer.skipped_means_fault = True
    optimizer.found_inf = bad.to(optimizer.agents.device, torch.float32).reshape(())
    optimizer.grad_scale = None
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale
