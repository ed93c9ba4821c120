"""What an algorithm declares, and the step that it makes.

An optimizer is composed of three parts: a *local step* (the fused kernel, or any torch optimizer),
a *communication* (over a graph's edges, sums over all agents, a server), and an *algorithm*, which
says in a few lines what is published, received and updated, and when. An algorithm is one file; all
that a config, a checkpoint, the documentation, the simulator and the theory must know of it stands
in its class. `docs/extending.md` writes one from zero.

Nothing here needs torch or MPI: a step is written in the verbs of its context.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.algorithms.received import Received
from mpicdsgd.graphs.mixing_matrix import COLUMN as COLUMN
from mpicdsgd.graphs.mixing_matrix import DOUBLY as DOUBLY

if TYPE_CHECKING:
    import torch

GRAPH, SUMS, GRADIENTS, PAIRS, MAIL, SERVER = (
    "graph", "sums", "gradients", "pairs", "mail", "server",
)  # fmt: skip
KINDS = {
    GRAPH: "what is published goes along the graph's edges, by the mixing matrix",
    SUMS: "sums over all agents (Allreduce)",
    GRADIENTS: "the mean of all agents' gradients (Allreduce), summed during backward",
    PAIRS: "an agent and one of its neighbours show each other their parameters",
    MAIL: "an agent sends to one of its neighbours, and nobody waits",
    SERVER: "the last rank of the job answers, one agent at a time",
}


def setting(default: Any, help: str, *, per_group: bool = False) -> Any:
    """A field of an algorithm's settings: a key of ``[optim]``, with its documentation.

    Args:
        per_group: a hyperparameter that each parameter group may have another value of, and that
            schedules change.
    """
    return dataclasses.field(default=default, metadata={"help": help, "per_group": per_group})


@dataclass(frozen=True)
class Admits:
    """Which graphs and matrices an algorithm runs on.

    Attributes:
        directed, changing: whether it does on directed graphs, and on cycles of matrices.
        matrix: DOUBLY or COLUMN (column-stochastic ones, and so doubly stochastic ones too).
        undirected_because: why not on directed ones; instead: what else serves there.
    """

    directed: bool = True
    changing: bool = True
    matrix: str = DOUBLY
    undirected_because: str = ""
    instead: str = ""


@dataclass(frozen=True)
class Circumstances:
    """What an algorithm must know of its run.

    Attributes:
        steps_per_epoch, shift: of the run's `runs.epochs.Course`.
        samples: of each agent of this process, int64, shape (n,).
        seed: of the run.
        agents: N.
    """

    steps_per_epoch: int = 1
    samples: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.ones(1, np.int64))
    seed: int = 0
    agents: int = 1
    shift: int = 0


class LocalStep(Protocol):
    """What an algorithm's settings say of the gradient's part; see `local_steps`."""

    @property
    def has_momentum(self) -> bool:
        """Whether there is a v, kept by the kernel."""

    @property
    def look_ahead(self) -> bool:
        """Whether the model holds y = x + mu v, and x lies elsewhere."""

    def coefficients(self, group: dict[str, Any]) -> Any:
        """The kernel's coefficients for a parameter group. Raises UserError: out of range."""

    def check(self) -> None:
        """Raise a UserError for a setting out of range."""


class Context(Protocol):
    """The agents of a process at a step, and the verbs that a step is written in.

    In a job a process is one agent, n = 1; in a simulation it is all of them, n = N. Vectors are
    float32 of shape (n, D), a row for each agent, and numbers float64 of shape (n,), so one text
    serves both: what is written row by row means the same.

    Attributes:
        step: steps completed before this one.
        neighbours, readers: of each of the N agents: whom it reads, and who reads it.
        ranks: of the agents of this process, int64, shape (n,).
        size: N.
        server: the `algorithms.server.client.Client`, over a server.
        parameters_end: where in a row the parameters end and mixed buffers begin.
    """

    neighbours: tuple[tuple[int, ...], ...]
    readers: tuple[tuple[int, ...], ...]
    ranks: NDArray[np.int64]
    size: int
    parameters_end: int
    server: Any

    @property
    def step(self) -> int: ...

    def __getitem__(self, name: str) -> torch.Tensor:
        """The vector ``name``, shape (n, D): x, or one that the algorithm declares. A view."""

    def number(self, name: str) -> NDArray[np.float64]:
        """The number ``name`` that the algorithm declares, shape (n,). A view."""

    def column(self, numbers: NDArray[np.float64]) -> torch.Tensor:
        """``numbers``, shape (n,), as float32 of shape (n, 1): to multiply rows by."""

    def everyones(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """A number of each agent, shape (n,), from all agents: shape (N,). Collective."""

    def publish(self, **numbers: NDArray[np.float64]) -> None:
        """Show the neighbours what is to be sent, and ``numbers`` beside. Over a graph.

        At the end of a step it is under way while the next gradient is computed.
        """

    def received(self) -> Received:
        """What the neighbours have published. Waits for them. Over a graph."""

    def update(
        self,
        out: str = "x",
        *,
        start: str = "",
        mix: Received | torch.Tensor | None = None,
        weight: float | NDArray[np.float64] = 1.0,
        gradient: bool | str = False,
        factor: NDArray[np.float64] | float = 1.0,
        publish: bool = True,
        moved: bool = False,
        of: str = "",
    ) -> None:
        """One fused pass: out <- start + sum_l w_l (received_l - own) - alpha gradient.

        Args:
            out: the vector to write; start: where to begin, out itself by default.
            mix: what was received, times ``weight`` (a number); or a vector, to be mixed in with
                ``weight`` (one for all agents, or one for each, of which 0 leaves a row alone).
            gradient: True: the local step with this minibatch's gradient, once in a step; a
                vector's name: alpha times that vector.
            factor: of the step size, one for each agent.
            publish: False where ``out`` will have changed before it is published.
            moved: whether ``start`` has changed since it was published: then what was published is
                what the neighbours' values are compared with.
            of: which of the vectors in `Algorithm.sends` ``mix`` means, where it is not ``out``:
                the neighbours' and the own one as they were published.
        """

    def take_gradient(self, into: str) -> None:
        """into <- g + lambda x of this minibatch, kept where there is none. Once a step."""

    def replace(self, values: torch.Tensor) -> None:
        """x <- values, shape (n, D)."""

    def start_sum(self, values: torch.Tensor) -> None:
        """Begin the sum over all agents of ``values``, shape (n, D). Over sums."""

    def summed(self) -> torch.Tensor:
        """The sum that was begun, the same in every row. Waits for it."""

    def broadcast(self, values: torch.Tensor) -> None:
        """values <- agent 0's, in every row."""

    def swap(self, partners: NDArray[np.int64]) -> torch.Tensor:
        """The parameters of each agent's partner (-1: none), shape (n, D). Over pairs. Waits."""

    def require_alike(self, name: str, what: str) -> None:
        """Raise a RuntimeError unless the vector is the same on all agents. Collective."""

    # Of asynchronous algorithms, which are not simulated: n = 1.

    def add_gradient(self, into: str) -> None:
        """into <- into + g + lambda x, beside `update`; nothing where there is no gradient."""

    def step_sizes(self) -> list[float]:
        """alpha of each parameter."""

    def read_mail(self) -> None:
        """Have `Algorithm.mail` called for all that has come. Over mail."""

    def wait_for_mail_room(self) -> None:
        """Wait until this agent's last message has gone; meanwhile mail is read."""

    def send_mail(self, to: int, weight: float) -> None:
        """Send x and ``weight`` to agent ``to``."""


class Algorithm:
    """Base of the algorithms: what is declared, with defaults for the commonest.

    Attributes:
        settings: of this class's ``Settings``, a frozen dataclass whose fields are made by
            `setting`; it is a `LocalStep`, too (inherit from `local_steps.Plain` or `Momentum`).
        vectors: names of the float32 vectors that it keeps, 0 at first. They are in checkpoints,
            ``state_dict``, elastic restarts, `add_param_group` and the simulation by themselves.
        numbers: float64 numbers that each agent keeps, and their first values; likewise.
        anew: which of these begin anew where the number of agents has changed (an elastic restart),
            as what they add up to held of the agents before; else newcomers take a mix.
        sends: which vectors a publication holds, in this order.
        posts: publications of a step.
        fixed: settings of its local step that it has in one way only.
        over: what it communicates over, one of KINDS.
        admits: which graphs and matrices; None: it uses no matrix.
        order: when it waits for others, for the documentation.
        synchronous: whether a step waits for all that it hears of: such a one can be simulated.
        counts: whether agents or a server count what was sent, so that N must not change.
        signals: steps between two signals of a stop or a fault, where no graph carries them.
        mixes_buffers: whether buffers (BatchNorm's statistics) can be mixed as parameters are.
        any_local_step: whether a torch optimizer can be the local step.
        server_rule: what a server does with what it is sent, see `server.rules`.
        descends: whether a step is one of gradient descent on V, arXiv 1706.07880 eq. (7).
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    over: ClassVar[str] = GRAPH
    admits: ClassVar[Admits | None] = Admits()
    order: ClassVar[str] = "combine, then adapt: hidden behind the gradient"
    synchronous: ClassVar[bool] = True
    counts: ClassVar[bool] = False
    signals: ClassVar[int] = 8
    mixes_buffers: ClassVar[bool] = True
    any_local_step: ClassVar[bool] = True
    descends: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type[Any]]

    sends: tuple[str, ...] = ("x",)
    vectors: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()
    posts: int = 1
    server_rule: int = -1

    def __init__(self, settings: Any, run: Circumstances) -> None:
        self.settings, self.run = settings, run
        self.numbers: dict[str, float] = {}

    @classmethod
    def of(cls, settings: Any) -> type[Algorithm]:
        """The class that makes the step with these settings: this one, or a variant of it."""
        return cls

    def check(self, agents: int) -> None:
        """Raise a UserError for settings that do not fit so many agents. Local."""
        self.settings.check()

    def begin(self, ctx: Context, is_new: bool) -> None:
        """Parameters were given from outside: make ready for a step. Collective, at rest.

        Args:
            is_new: whether what agents share begins with them; else a checkpoint gave it.
        """
        if self.over == GRAPH:
            ctx.publish()

    def step(self, ctx: Context) -> None:
        """One step. Collective, but for asynchronous ones."""
        raise NotImplementedError

    def takes_part(self, step: int, rank: int) -> bool:
        """Whether agent ``rank`` computes a gradient for the step after ``step``."""
        return True

    def centre(self, ctx: Context) -> torch.Tensor | None:
        """The model beside the agents' own, shape (D,), if there is one. Collective, at rest."""
        return None

    def rest(self, ctx: Context) -> None:
        """All is at rest: check what must hold then. Collective."""

    def mail(self, ctx: Context, x: torch.Tensor, weight: float) -> None:
        """x, shape (1, D), and a weight have come by mail. Local."""
