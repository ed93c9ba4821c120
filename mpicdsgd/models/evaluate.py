"""Loss and accuracy of a model on a set of samples."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mpicdsgd.data.prefetch import to_device
from mpicdsgd.data.samples import Indices, Samples


def evaluate(
    model: nn.Module,
    samples: Samples,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
    indices: Indices | None = None,
) -> tuple[float, int, int]:
    """Return ``(loss_sum, correct, count)`` of ``model`` on ``samples``. Not collective.

    The model runs in eval mode without gradients, on the device of its parameters; afterwards
    every module has its own training flag back and torch's random state is as it was.

    Args:
        model: any module; its outputs are class logits where they are floating, shape (B, K).
        samples: the set; its batches are moved to the model's device.
        loss_fn: (outputs, targets) to the mean over the batch, shape ().
        batch_size: samples at a time.
        indices: evaluate these only, shape (n,); None: all.

    Returns:
        The sum over samples of the loss (float64 accumulation), the number of samples whose
        largest logit is their class, the number of samples. ``correct`` is -1 where accuracy has
        no meaning: targets that are no class labels, or outputs that are not (B, K >= 2). Sums
        of parts of a set add up (no samples at all: ``(0.0, 0, 0)``).
    """
    if indices is None:
        indices = np.arange(len(samples))
    count = len(indices)
    if count == 0:
        return 0.0, 0, 0
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    counted = True
    flags = [(module, module.training) for module in model.modules()]
    cuda = [device] if device.type == "cuda" else []
    parts = [indices[i : i + batch_size] for i in range(0, count, batch_size)]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            for inputs, targets in to_device(samples.batches(parts), device):
                outputs = model(inputs)
                loss_sum += loss_fn(outputs, targets).double() * len(targets)
                counted = counted and is_classification(outputs, targets)
                if counted:
                    correct += (outputs.argmax(dim=1) == targets).sum()
    finally:
        for module, training in flags:
            module.training = training
    return loss_sum.item(), int(correct.item()) if counted else -1, count


def is_classification(outputs: Tensor, targets: Tensor) -> bool:
    """Whether accuracy has a meaning: floating outputs (B, K >= 2), int64 targets (B,)."""
    return (
        isinstance(outputs, Tensor)
        and outputs.is_floating_point()
        and outputs.dim() == 2
        and outputs.shape[1] >= 2
        and targets.dtype == torch.int64
        and targets.shape == outputs.shape[:1]
    )
