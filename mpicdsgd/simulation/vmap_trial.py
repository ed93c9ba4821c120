"""Whether a model can be mapped over agents, tried out before a simulation begins."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from mpicdsgd.kernels.arena import Arena
from mpicdsgd.simulation.minibatches import Group
from mpicdsgd.simulation.stacked_views import stacked_views

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Gradients: TypeAlias = tuple[Tensor | None, ...]

# Of a gradient's norm: float32 sums in another order are far below, a wrong result is above.
_CLOSE = 1e-3


class Trial(NamedTuple):
    """What was found.

    Attributes:
        why_not: the reason why agents must go one by one, "" where they need not.
        has_gradient: of each parameter, whether it gets one.
        sample_bytes: twice what autograd keeps of a forward pass, per sample.
        batch: samples of a minibatch.
    """

    why_not: str
    has_gradient: tuple[bool, ...] = ()
    sample_bytes: int = 0
    batch: int = 0


def loss_of(model: nn.Module, loss_fn: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    """(parameters, other parameters, inputs, targets) to (loss, outputs), for torch.func."""

    def loss(
        wanted: dict[str, Tensor], others: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = functional_call(model, {**wanted, **others}, (inputs,))
        return loss_fn(outputs, targets), outputs

    return loss


def try_out(
    model: nn.Module, loss_fn: Loss, layout: Arena, rows: Tensor, groups: list[Group]
) -> Trial:
    """Compare a few agents' losses and gradients, as torch gives them singly and mapped. Local.

    torch's generator and the parameters are afterwards as they were.

    Args:
        model: its parameters are in ``layout``.
        rows: parameters of all agents, shape (N, D).
        groups: minibatches of the few.
    """
    if any(True for _ in model.buffers()):
        return Trial("the model has buffers")
    kept = layout.flat.clone()
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            singly: list[list[tuple[Tensor, Gradients]]] = []
            for group in groups:
                singly.append([])
                for j, inputs, targets in zip(*group, strict=True):
                    layout.flat.copy_(rows[int(j)])
                    singly[-1].append(_plain(model, loss_fn, inputs, targets))
            saved_bytes = _saved_bytes(model, loss_fn, groups[0].inputs[0], groups[0].targets[0])
            given = {tuple(g is not None for g in found) for made in singly for _, found in made}
            if len(given) > 1:
                return Trial("which parameters get a gradient differs")
            (has_gradient,) = given
            why_not = next(
                filter(None, (_differs(model, loss_fn, layout, rows, group, has_gradient, made)
                              for group, made in zip(groups, singly, strict=True))),
                "",
            )  # fmt: skip
    finally:
        layout.flat.copy_(kept)
        layout.written()
    batch = groups[0].targets.shape[1]
    return Trial(why_not, has_gradient, 2 * saved_bytes // batch + 1, batch)


def _plain(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Gradients]:
    loss = loss_fn(model(inputs), targets)
    parameters = list(model.parameters())
    wanted = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return loss.detach(), tuple(next(found) if p.requires_grad else None for p in parameters)


def _saved_bytes(model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> int:
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_fn(model(inputs), targets)
    return total


def _differs(
    model: nn.Module,
    loss_fn: Loss,
    layout: Arena,
    rows: Tensor,
    group: Group,
    has_gradient: tuple[bool, ...],
    singly: list[tuple[Tensor, Gradients]],
) -> str:
    """Why the mapped model will not do, or ""."""
    names = [name for name, _ in model.named_parameters()]
    views = stacked_views(layout, rows)
    of_group = [view[torch.from_numpy(group.agents)] for view in views]
    pairs = list(zip(names, of_group, has_gradient, strict=True))
    wanted = {name: view for name, view, given in pairs if given}
    others = {name: view for name, view, given in pairs if not given}
    mapped = vmap(grad_and_value(loss_of(model, loss_fn), has_aux=True), randomness="error")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batching rule")  # a loop within torch
            made, (losses, outputs) = mapped(wanted, others, group.inputs, group.targets)
    except Exception as error:  # whatever torch.func or the model's own code has against it
        return f"torch cannot map it ({textwrap.shorten(str(error), 90, placeholder=' ...')})"
    if not isinstance(outputs, Tensor):
        return "its output is not one tensor"
    for i, (loss, found) in enumerate(singly):
        plain = torch.cat([g.reshape(-1) for g in found if g is not None]).double()
        ours = torch.cat([made[name][i].reshape(-1) for name in wanted]).double()
        far = float((plain - ours).norm()) > _CLOSE * float(plain.norm())
        if far or abs(float(losses[i] - loss)) > _CLOSE * abs(float(loss)):
            return "mapped, its loss or gradient is another one"
    return ""
