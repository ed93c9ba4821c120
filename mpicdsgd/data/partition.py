"""Who gets which training samples."""

import math

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import nearest

KNOWN = ("iid", "contiguous", "by-class", "dirichlet")
DIRICHLET_TRIES = 100

Share = NDArray[np.int64]


def partition(
    spec: str, labels: NDArray[np.int64] | int, n_agents: int, classes: int | None, seed: int
) -> list[Share]:
    """Divide the samples 0 .. n-1 among the agents; every sample goes to exactly one.

    ``iid``: shuffled, then cut into runs whose lengths differ by one at most.
    ``contiguous``: cut in the order of the file, lengths as above.
    ``by-class``: the authors' non-IID: agent j gets the floor(classes / N) consecutive classes
    from ``j * floor(classes / N)`` on. Where N does not divide the classes, the remaining (last)
    classes go one each to agents 0, 1, ...; more agents than classes is an error.
    ``dirichlet:a``: each class is divided in proportions drawn from a symmetric Dirichlet
    distribution with parameter a (small a: each agent sees few classes; large: nearly IID), drawn
    again, up to 100 times, until no agent is left without samples.

    Args:
        spec: one of the above.
        labels: class of each sample, int64, shape (n,), in 0 .. classes-1; where there are none,
            the number of samples.
        n_agents: N.
        classes: number of classes; None where there are none.
        seed: not negative. Same arguments, same shares, on every agent.

    Returns:
        For each agent its samples' indices, int64, ascending, not empty.

    Raises:
        UserError: unknown spec, no labels where they are needed, an agent left without samples.

    Source: by-class: the authors' released code; dirichlet: Hsu, Qi, Brown 2019, arXiv 1909.06335.
    """
    n = labels if isinstance(labels, int) else len(labels)
    name, _, argument = spec.partition(":")
    if name not in KNOWN:
        raise UserError(
            f'data.partition = "{spec}"{nearest(name, KNOWN)} '
            "(iid, contiguous, by-class or dirichlet:ALPHA)"
        )
    if name != "dirichlet" and ":" in spec:
        raise UserError(f'data.partition = "{spec}": {name} takes no argument')
    if n < n_agents:
        raise UserError(f"{n} training samples are too few for {n_agents} agents")
    # A spawn key, so that these draws have nothing in common with Shuffler's.
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1,))))
    if name == "iid":
        return [np.sort(part) for part in np.array_split(random.permutation(n), n_agents)]
    if name == "contiguous":
        return np.array_split(np.arange(n), n_agents)
    if isinstance(labels, int) or classes is None:
        raise UserError(
            f'data.partition = "{spec}" needs class labels, which these data do not have: '
            "use iid or contiguous"
        )
    if name == "by-class":
        return _by_class(labels, n_agents, classes)
    return _dirichlet(spec, argument, labels, n_agents, classes, random)


def _by_class(labels: NDArray[np.int64], n_agents: int, classes: int) -> list[Share]:
    if n_agents > classes:
        raise UserError(
            f'data.partition = "by-class" needs at most as many agents as classes ({classes}), '
            f"got {n_agents} agents: use dirichlet:0.1 or fewer agents"
        )
    each = classes // n_agents
    owner = np.arange(classes) // each
    owner[each * n_agents :] = np.arange(classes - each * n_agents)
    shares = [np.flatnonzero(owner[labels] == j) for j in range(n_agents)]
    for j, share in enumerate(shares):
        if len(share) == 0:
            own = ", ".join(map(str, np.flatnonzero(owner == j)))
            raise UserError(
                f'data.partition = "by-class" leaves agent {j} without samples: '
                f"none are of class {own}"
            )
    return shares


def _dirichlet(
    spec: str,
    argument: str,
    labels: NDArray[np.int64],
    n_agents: int,
    classes: int,
    random: np.random.Generator,
) -> list[Share]:
    try:
        alpha = float(argument)
    except ValueError:
        alpha = math.nan
    if not 1e-6 <= alpha <= 1e6:
        raise UserError(
            f'data.partition = "{spec}": dirichlet needs a number from 1e-6 to 1e6, '
            "for instance dirichlet:0.1"
        )
    by_class = [np.flatnonzero(labels == c) for c in range(classes)]
    for _ in range(DIRICHLET_TRIES):
        parts: list[list[Share]] = [[] for _ in range(n_agents)]
        for members in by_class:
            shares_of_class = random.dirichlet(np.full(n_agents, alpha))
            cuts = np.floor(np.cumsum(shares_of_class)[:-1] * len(members)).astype(np.int64)
            pieces = np.split(random.permutation(members), cuts.clip(0, len(members)))
            for part, piece in zip(parts, pieces, strict=True):
                part.append(piece)
        shares = [np.sort(np.concatenate(part)) for part in parts]
        if all(len(share) for share in shares):
            return shares
    raise UserError(
        f'data.partition = "{spec}" left an agent without samples in {DIRICHLET_TRIES} draws '
        f"({len(labels)} samples, {n_agents} agents): use a larger number or fewer agents"
    )
