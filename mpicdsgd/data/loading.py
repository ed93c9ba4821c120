"""From the config's [data] section to this agent's samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import nearest
from mpicdsgd.data.cifar import CIFAR10, CIFAR100, cifar
from mpicdsgd.data.custom import custom
from mpicdsgd.data.digits import digits
from mpicdsgd.data.hdf5 import hdf5
from mpicdsgd.data.mnist import mnist
from mpicdsgd.data.partition import partition
from mpicdsgd.data.samples import Indices, Samples
from mpicdsgd.data.source import Source
from mpicdsgd.data.synthetic import SYNTHETIC, synthetic

KNOWN = ("mnist", "cifar10", "cifar100", "digits", "hdf5", *SYNTHETIC)


@dataclass(frozen=True)
class DataConfig:
    """The config's [data] section."""

    #: mnist, cifar10, cifar100, digits, hdf5; made up: gaussians, linear, points; or a function
    #: "package.module:function", called with (path, seed, **args), that returns (train, test)
    name: str = "mnist"
    #: folder of the data set in its original format (hdf5: the file)
    path: str = ""
    #: iid (shuffled), contiguous, by-class, dirichlet:ALPHA
    partition: str = "iid"
    #: samples per agent and step
    batch_size: int = 128
    #: use the first so many training samples only; 0: all
    limit: int = 0
    #: use the first so many test samples only; 0: all
    test_limit: int = 0
    #: subtract the training set's mean and divide by its deviation (mnist, cifar10, cifar100)
    normalize: bool = True
    #: processes per agent that load a torch dataset ahead; 0: none
    workers: int = 0
    #: leave out an epoch's last batch if it is not full
    drop_last: bool = False
    #: for hdf5: classes, mean, std; for made-up data: see `synthetic`; for a function of one's own:
    #: its keyword arguments
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What one agent has of the data.

    Args:
        train: this agent's share of the training set.
        test: the whole test set.
        shares: sizes of all agents' shares, in agent order.
        classes: number of classes; None: the targets are no class labels, or it is not known.
        input_shape: of one sample; images (channels, height, width).
    """

    train: Samples
    test: Samples
    shares: tuple[int, ...]
    classes: int | None
    input_shape: tuple[int, ...]


def load(config: DataConfig, seed: int, rank: int, size: int) -> Data:
    """Read the data set and return the part of agent ``rank`` of ``size``. Not collective.

    Everything that agents must agree on (shares, classes, shapes) follows from the files, the
    config and the seed, so it is the same on all of them; a file may still fail on one alone.

    Raises:
        UserError: a bad config, missing or damaged files, fewer samples than agents.
    """
    assert 0 <= rank < size
    source, shares = _divided(config, seed, size)
    return Data(
        train=source.train(shares[rank]),
        test=_test(source, config),
        shares=tuple(len(share) for share in shares),
        classes=source.classes,
        input_shape=source.input_shape,
    )


@dataclass(frozen=True)
class Everyone:
    """What all agents have of the data, in one process.

    Args:
        train: the training set as far as it is used.
        indices: the samples of it that are each agent's share, int64, in agent order.
        share: makes an agent's share, as `load` does.
        test, classes, input_shape: as of `Data`.
    """

    train: Samples
    indices: tuple[Indices, ...]
    share: Callable[[int], Samples]
    test: Samples
    classes: int | None
    input_shape: tuple[int, ...]


def load_everyone(config: DataConfig, seed: int, size: int) -> Everyone:
    """Read the data set once and return the parts of all ``size`` agents, as `load` divides it.

    Raises:
        UserError: as `load`.
    """
    source, shares = _divided(config, seed, size)
    count = sum(len(share) for share in shares)
    return Everyone(
        train=source.train(np.arange(count)),
        indices=tuple(shares),
        share=lambda agent: source.train(shares[agent]),
        test=_test(source, config),
        classes=source.classes,
        input_shape=source.input_shape,
    )


def _divided(config: DataConfig, seed: int, size: int) -> tuple[Source, list[Indices]]:
    """The data set, and the indices of each agent's share of it."""
    _check(config, seed)
    source = _source(config, seed, size)
    count = min(config.limit or source.train_count, source.train_count)
    labels = count if source.labels is None else source.labels[:count]
    shares = partition(config.partition, labels, size, source.classes, seed)
    return source, [share.astype(np.int64) for share in shares]


def _test(source: Source, config: DataConfig) -> Samples:
    return source.test(min(config.test_limit or source.test_count, source.test_count))


def _check(config: DataConfig, seed: int) -> None:
    if seed < 0:
        raise UserError(f"run.seed = {seed}: it must not be negative")
    if config.batch_size < 1:
        raise UserError(f"data.batch_size = {config.batch_size}: it must be at least 1")
    for key in ("limit", "test_limit", "workers"):
        if getattr(config, key) < 0:
            raise UserError(f"data.{key} = {getattr(config, key)}: it must not be negative")


def _source(config: DataConfig, seed: int, size: int) -> Source:
    name, path, args = config.name, config.path, config.args
    if ":" in name:
        return custom(name, path, seed, args, config.workers)
    if name == "hdf5":
        _allow(args, ("classes", "mean", "std"), name)
        return hdf5(path, args)
    if name not in KNOWN:
        raise UserError(
            f'data.name = "{name}" is not known{nearest(name, KNOWN)} '
            f'({", ".join(KNOWN)} or "package.module:function")'
        )
    if name in SYNTHETIC:
        return synthetic(name, size, seed, args, in_order=config.partition == "contiguous",
                         whole=config.limit == 0)  # fmt: skip
    _allow(args, (), name)
    if name == "mnist":
        return mnist(path, config.normalize)
    if name == "digits":
        return digits()
    return cifar(CIFAR10 if name == "cifar10" else CIFAR100, path, config.normalize)


def _allow(args: Mapping[str, Any], allowed: tuple[str, ...], name: str) -> None:
    for key in args:
        if key not in allowed:
            takes = f"takes {', '.join(allowed)}" if allowed else "takes no data.args"
            raise UserError(f'data.args.{key}: data.name = "{name}" {takes}{nearest(key, allowed)}')
