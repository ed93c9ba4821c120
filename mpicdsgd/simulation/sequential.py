"""Losses and gradients of the agents one after the other, each with a model of its own.

A step of an agent is what `minibatch.minibatch_step` makes of it in a job, with that agent's own
buffers and random generators, so dropout draws what it draws there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpicdsgd.data import Samples
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.models.evaluate import evaluate, is_classification
from mpicdsgd.runs.rng import random_states, seed_generators, set_random_states
from mpicdsgd.simulation.gradients import Part
from mpicdsgd.simulation.minibatches import Together
from mpicdsgd.simulation.rows import Rows
from mpicdsgd.simulation.vmap_trial import Loss
from mpicdsgd.simulation.vmapped import Sums, Take, no_sums


class OneByOne:
    """See the module; the methods are those of `simulation.vmapped.ManyAtATime`.

    Args:
        models: of each agent; their parameters, and ``mixed`` buffers, become views into `stack`.
        average: a model to hold the averaged one, whose parameters are elsewhere.
        mixed: names of the buffers that are mixed as parameters are.
        seed: the run's; agent j's generators begin as in a job.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        average: nn.Module,
        loss_fn: Loss,
        stack: Rows,
        mixed: frozenset[str],
        clip_norm: float,
        seed: int,
    ) -> None:
        self._models, self._average, self._loss_fn = models, average, loss_fn
        self._stack, self._mixed, self._clip_norm = stack, mixed, clip_norm
        self._arenas = [
            Arena(list(model.parameters()), _buffers(model, mixed), flat=row)
            for model, row in zip(models, stack.flat, strict=True)
        ]
        self._generators = []
        before = random_states()
        for j in range(len(models)):
            seed_generators(seed, j + 1)
            self._generators.append(random_states())
        set_random_states(before)

    def parts(
        self, take: Take, coefficients: Coefficients, taking_part: NDArray[np.bool_]
    ) -> Iterator[Part]:
        """See `vmapped.ManyAtATime.parts`; an agent's gradient lives until its next one."""
        before = random_states()
        try:
            for j, (model, arena) in enumerate(zip(self._models, self._arenas, strict=True)):
                if not taking_part[j]:
                    continue
                (group,) = take(range(j, j + 1))
                set_random_states(self._generators[j])
                yield self._part(j, model, arena, group.inputs[0], group.targets[0], coefficients)
        finally:
            set_random_states(before)

    def _part(
        self,
        j: int,
        model: nn.Module,
        arena: Arena,
        inputs: Tensor,
        targets: Tensor,
        coefficients: Coefficients,
    ) -> Part:
        model.train()
        model.zero_grad(set_to_none=True)
        outputs = model(inputs)
        loss = self._loss_fn(outputs, targets)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            if self._clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), self._clip_norm)
        right = -1
        if is_classification(outputs, targets):
            right = int((outputs.detach().argmax(1) == targets).sum())
        self._generators[j] = random_states()
        arena.fill_segments([coefficients] * len(arena.parameters))
        return Part(
            np.array([j]), np.array([value]), np.array([right]), len(targets), [arena.segments]
        )

    def evaluate(self, samples: Samples, batch_size: int) -> Sums:
        """See `simulation.vmapped.ManyAtATime.evaluate`."""
        sums = no_sums(len(self._models))
        for j in range(len(self._models)):
            self._evaluate(sums, j, samples, batch_size)
        return sums

    def evaluate_shares(self, together: Together, batch_size: int) -> Sums:
        """See `simulation.vmapped.ManyAtATime.evaluate_shares`."""
        sums = no_sums(len(self._models))
        for j in range(len(self._models)):
            self._evaluate(sums, j, together.share(j), batch_size)
        return sums

    def _evaluate(self, sums: Sums, j: int, samples: Samples, batch_size: int) -> None:
        row, x = self._stack.flat[j], self._stack.x[j]
        kept = row.clone()
        row.copy_(x)  # with look-ahead the model holds x + mu v
        for part, value in zip(
            sums, evaluate(self._models[j], samples, self._loss_fn, batch_size), strict=True
        ):
            part[j] = value
        row.copy_(kept)

    @torch.no_grad()
    def mean_buffers(self) -> None:
        """Give the averaged model the mean of buffers that are not mixed, agent 0's integers."""
        everyone = [dict(model.named_buffers()) for model in self._models]
        for name, buffer in self._average.named_buffers():
            if name in self._mixed:
                continue
            of_agents = [buffers[name] for buffers in everyone]
            if buffer.is_floating_point():
                buffer.copy_(torch.stack(of_agents).double().mean(dim=0))
            else:
                buffer.copy_(of_agents[0])


def _buffers(model: nn.Module, names: frozenset[str]) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name in names]
