"""The paper's experiments as named configurations: what is trained, at which scale.

A setup is a list of settings of `mpicdsgd train jobs/mnist.toml`; an experiment is the setups of
one figure. The paper's own settings are those of every experiment but *algorithms*: step size 0.01
for all, momentum 0.95 (Nesterov), the complete graph with uniform weights. *SGD, one machine* is
the paper's baseline, minibatches of the same size from all the data, so N times as many steps in
an epoch as N agents take; *SGD, Allreduce* takes as many as they.

At one step size methods with and without momentum do not stand on equal footing: mu = 0.95 makes
it 20 times as large. *algorithms* therefore gives each method a rate that suits it: those that
reach 0.975 with this MLP on the whole of MNIST.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SAME = "agents.topology=complete agents.mixing=uniform"
ALPHA = "optim.lr=0.01"
CDSGD = f"optim.name=cdsgd {ALPHA} {SAME}"
CDMSGD = f"optim.name=cdmsgd {ALPHA} optim.momentum=0.95"
_FEDAVG = f"optim.name=fedavg optim.local_epochs=1 {SAME}"
FEDAVG = f"{_FEDAVG} optim.fraction=1.0"
TITLES = {
    "1a": "Fig. 1(a): CDSGD against SGD",
    "1b": "Fig. 1(b): CDMSGD against FedAvg and SGD",
    "2a": "Fig. 2(a): number of agents",
    "2b": "Fig. 2(b): topology",
    "steps": "Fixed and diminishing step sizes",
    "partition": "Data that are not IID",
    "fraction": "FedAvg with fewer clients: C = 1, 0.6, 0.2",
    "algorithms": "All algorithms, each at a rate that suits it",
    "cnn": "The authors' CNN",
}
DATA_TITLES = {
    "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits",
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One line of a figure, which is run once for each seed.

    Args:
        label: its name there; the same settings may have another one elsewhere.
        agents: ranks, without a server's.
        settings: as on the command line, without data, seed and run folder.
        cost: of an epoch, as a multiple of the scale's.
    """

    label: str
    agents: int
    settings: str
    cost: float = 1.0


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        common: settings of all runs.
        data: by data set, its settings and experiments.
        seeds: how many.
        asked: by data set, experiments that are run only where `--only` names them.
        rate: factor on the rates of *algorithms* without momentum.
        epoch_s: by data set, seconds of an epoch on the CPU: of all agents' gradients, and more
            for each agent. Rough, for `--dry-run`.
        start_s: seconds until the first step, of any run and more for each rank.
    """

    common: str
    data: dict[str, tuple[str, tuple[str, ...]]]
    seeds: int
    asked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rate: float = 1.0
    epoch_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    start_s: tuple[float, float] = (2.0, 2.1)


_ALL = ("1a", "1b", "2a", "2b", "steps", "partition", "fraction", "algorithms")
_SMALL_CIFAR = ("run.epochs=15", ("1a", "1b", "2a", "2b"))
_MLP = "model.name=mlp model.args.hidden=[128]"
_CNN = "model.name=cnn model.args={} run.epochs=8 run.checkpoint_every='1 epoch'"
CNN_COST = 40.0  # a tenth of a second of two cores for each step of five agents
SCALES = {
    # The authors' model, batch and epochs, on whole data sets: hours, on a GPU.
    "full": Scale(
        "model.name=cnn run.epochs=30 data.batch_size=128 run.checkpoint_every='2 epochs'",
        {"mnist": ("", _ALL), "cifar10": ("", _ALL), "cifar100": ("", _ALL)},
        seeds=3,
        rate=0.5,  # the CNN's, whose first steps are the larger ones
        epoch_s=dict.fromkeys(("mnist", "cifar10", "cifar100"), (2.0, 0.5)),
    ),
    # A sixth of the data at a quarter of the batch: 63 steps in an epoch, where the paper has 79.
    "cpu": Scale(
        f"{_MLP} run.epochs=30 data.batch_size=32 data.limit=10000 data.test_limit=2000 "
        "run.checkpoint_every='10 epochs'",
        {"mnist": ("", _ALL), "cifar10": _SMALL_CIFAR, "cifar100": _SMALL_CIFAR},
        seeds=3,
        asked={"mnist": ("cnn",)},
        epoch_s={"mnist": (0.38, 0.033), "cifar10": (1.4, 0.1), "cifar100": (1.4, 0.1)},
    ),
    "quick": Scale(
        "model.name=mlp model.args.hidden=[16] run.epochs=2 data.batch_size=64 "
        "run.checkpoint_every=never",
        {"digits": ("", ("1a", "algorithms"))},
        seeds=1,
        epoch_s={"digits": (0.1, 0.1)},
    ),
}


def setups(experiment: str, scale_name: str) -> list[Setup]:
    """The setups of an experiment, in the order of the figure."""
    if scale_name == "quick":
        return _quick(experiment)
    rate = SCALES[scale_name].rate
    made = {
        "1a": _one_a(),
        "1b": [
            Setup("CDMSGD", 5, f"{CDMSGD} {SAME}"),
            Setup("FedAvg", 5, f"{FEDAVG} {ALPHA}"),
            Setup("CDSGD", 5, CDSGD),
            Setup("SGD, one machine", 1, f"optim.name=sgd {ALPHA} {SAME}"),
            Setup("MSGD, one machine", 1, f"optim.name=msgd {ALPHA} optim.momentum=0.95 {SAME}"),
            Setup("MSGD, Allreduce", 5, f"optim.name=msgd {ALPHA} optim.momentum=0.95 {SAME}"),
        ],
        "2a": [Setup(f"N = {n}", n, f"{CDMSGD} {SAME}") for n in (2, 8, 16)],
        "2b": [
            Setup("complete", 8, f"{CDMSGD} {SAME}"),
            Setup("hypercube", 8, f"{CDMSGD} agents.topology=hypercube agents.mixing=uniform"),
            Setup("ring", 8, f"{CDMSGD} agents.topology=ring agents.mixing=uniform"),
            # No uniform matrix: its agents differ in degree.
            Setup("chain", 8, f"{CDMSGD} agents.topology=chain agents.mixing=metropolis"),
        ],
        "steps": [
            Setup("CDSGD, 0.01", 5, CDSGD),
            Setup("CDSGD, 0.1", 5, f"optim.name=cdsgd optim.lr=0.1 {SAME}"),
            Setup("CDSGD, 1/(k+1)^0.6", 5,
                  f"optim.name=cdsgd optim.lr=1.0 optim.schedule=diminishing:0.6 {SAME}"),
            Setup("CDMSGD, 0.01", 5, f"{CDMSGD} {SAME}"),
            Setup("CDMSGD, 0.05/(k+1)^0.6", 5,
                  f"optim.name=cdmsgd optim.lr=0.05 optim.momentum=0.95 "
                  f"optim.schedule=diminishing:0.6 {SAME}"),
        ],
        "partition": [
            Setup("IID", 5, f"{CDMSGD} {SAME}"),
            *(Setup(f"Dirichlet {a}", 5, f"{CDMSGD} {SAME} data.partition=dirichlet:{a}")
              for a in ("10", "1", "0.1")),
            Setup("by class", 5, f"{CDMSGD} {SAME} data.partition=by-class"),
        ],
        "fraction": [
            Setup(f"C = {c}, {name}", 5, f"{_FEDAVG} optim.fraction={c} {lr}")
            for name, lr in (("0.01", ALPHA), ("own rate", f"optim.lr={_rounded(0.2 * rate)}"))
            for c in ("1.0", "0.6", "0.2")
        ],
        "algorithms": _algorithms(rate),
        "cnn": [
            Setup("CDSGD", 5, f"{CDSGD} {_CNN}", CNN_COST),
            Setup("CDMSGD", 5, f"{CDMSGD} {SAME} {_CNN}", CNN_COST),
        ],
    }  # fmt: skip
    return made[experiment]


def _one_a() -> list[Setup]:
    return [
        Setup("SGD, one machine", 1, f"optim.name=sgd {ALPHA} {SAME}"),
        Setup("SGD, Allreduce", 5, f"optim.name=sgd {ALPHA} {SAME}"),
        Setup("CDSGD", 5, CDSGD),
    ]


def _rounded(rate: float) -> str:
    return f"{round(rate, 6):g}"


def _algorithms(rate: float) -> list[Setup]:
    def plain(name: str, lr: float, more: str = "") -> str:
        return f"optim.name={name} optim.lr={_rounded(lr * rate)} {SAME} {more}".rstrip()

    def heavy(name: str) -> str:
        return f"optim.name={name} {ALPHA} optim.momentum=0.95 {SAME}"

    ring = plain("cdsgd", 0.2).replace("complete", "ring")
    return [
        Setup("SGD, one machine", 1, plain("sgd", 0.2)),
        Setup("SGD, Allreduce", 5, plain("sgd", 0.2)),
        Setup("MSGD, Allreduce", 5, heavy("msgd")),
        Setup("CDSGD", 5, plain("cdsgd", 0.2)),
        # On the complete graph all rounds but one change nothing.
        Setup("CDSGD, ring", 5, ring),
        Setup("i-CDSGD, ring", 5, ring.replace("cdsgd", "icdsgd") + " optim.rounds=2"),
        Setup("CDMSGD", 5, heavy("cdmsgd")),
        Setup("FedAvg", 5, plain("fedavg", 0.2, "optim.local_epochs=1 optim.fraction=1.0")),
        Setup("EASGD", 5, plain("easgd", 0.3, "optim.period=4")),
        Setup("EASGD, server", 5, plain("easgd", 0.3, "optim.period=4 optim.asynchronous=true")),
        Setup("EAMSGD", 5, heavy("eamsgd") + " optim.period=4"),
        Setup("Downpour", 5, plain("downpour", 0.05)),
        Setup("Downpour, Adagrad", 5, plain("downpour", 0.01, "optim.adagrad=true")),
        Setup("Gossip SGD", 5, plain("gossip", 0.2, "optim.probability=0.5")),
        Setup("GoSGD", 5, plain("gosgd", 0.3, "optim.probability=0.5")),
    ]


def _quick(experiment: str) -> list[Setup]:
    one = Setup("SGD, one machine", 1, f"optim.name=sgd optim.lr=0.2 {SAME}")
    two = Setup("CDSGD", 2, f"optim.name=cdsgd optim.lr=0.2 {SAME}")
    return {"1a": [one, two], "algorithms": [two, one]}[experiment]
