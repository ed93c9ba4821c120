"""The random generators of a rank: seeded by agent, saved and set."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, *stream: int) -> None:
    """Seed torch's, NumPy's and Python's generators: a run's ``seed``, and which use of it. Local.

    Stream 0 is for the parameters that all agents begin with, j + 1 for agent j's own draws; with
    the run's generation behind it, for those of an agent that came then.
    """
    word = int(np.random.SeedSequence([seed, *stream]).generate_state(1)[0])
    torch.manual_seed(word)
    np.random.seed(word)
    random.seed(word)


def capture_random() -> dict[str, Any]:
    """The parts of the generators' states that are no arrays, as JSON. Local."""
    legacy: Any = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "numpy": [legacy[0], int(legacy[2]), int(legacy[3]), float(legacy[4])],
        "python": [version, list(words), gauss],
    }


def random_states() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_states(states: tuple[Tensor, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
