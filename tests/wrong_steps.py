"""Algorithms that somebody might write: what is wrong with them, or what they compute.

X, Pi    as in the oracles; a: step size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import GRADIENTS, PAIRS, SUMS, Algorithm, Circumstances
from mpicdsgd.algorithms.local_steps import Plain
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.simulation.gradients import Part
from mpicdsgd.simulation.rows import Rows

Array = NDArray[np.float64]
Step = Callable[[Any, Any], None]
Formula = Callable[[Array, Array, float, int, Callable[[int, Array], Array]], Array]


def own(**body: Any) -> type[Algorithm]:
    """An algorithm called Own with these attributes."""
    admits = {"admits": None} if body.get("over", "graph") != "graph" else {}
    return type("Own", (Algorithm,), {"Settings": Plain, **admits, **body})


def made(kind: type[Algorithm], n: int, **settings: Any) -> Algorithm:
    return kind(kind.Settings(**settings), Circumstances(agents=n, samples=np.ones(n, np.int64)))


class SmallRows:
    """`Rows` of one vector for each agent, with gradients as a function gives them."""

    def __init__(
        self,
        start: NDArray[np.float32],
        mixing: Mixing,
        algorithm: Algorithm,
        gradient: Callable[[int, Any], Any],
    ) -> None:
        n, size = start.shape
        self.layout, self.gradient = Arena([torch.nn.Parameter(torch.zeros(size))]), gradient
        self.group = vars(algorithm.settings)
        flat = torch.zeros(n, self.layout.size)
        flat[:, :size] = torch.from_numpy(start)
        self.rows, self.end = Rows(self.layout, flat, mixing, algorithm), size
        self.rows.begin()

    def run(self, steps: int) -> NDArray[np.float32]:
        rows, layout = self.rows, self.layout
        for _ in range(steps):
            at = rows.flat.numpy()[:, : self.end].copy()
            G = np.ascontiguousarray(self.gradient(rows.step, at), np.float32)
            coefficients = rows.algorithm.settings.coefficients(self.group)
            layout.fill_segments([coefficients])
            here = [j for j in range(len(G)) if rows.algorithm.takes_part(rows.step, j)]
            segments = [layout.segments.copy() for _ in here]
            for j, one in zip(here, segments, strict=True):
                one["grad"] = G[j].ctypes.data
            loss = np.zeros(len(here))
            right = np.zeros(len(here), np.int64)
            rows.advance([Part(np.array(here), loss, right, 1, segments)], coefficients)
        found: NDArray[np.float32] = rows.x.numpy()[:, : self.end].copy()
        return found


def usual(self: Any, ctx: Any) -> None:
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.publish()


def nothing(self: Any, ctx: Any, is_new: bool = True) -> None:
    pass


def _never_publishes(self: Any, ctx: Any) -> None:
    ctx.update(mix=ctx.received(), gradient=True)


def _publishes_twice(self: Any, ctx: Any) -> None:
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.publish()
    ctx.publish()


def _publishes_before_it_receives(self: Any, ctx: Any) -> None:
    ctx.publish()
    ctx.update(mix=ctx.received(), gradient=True)


def _receives_twice(self: Any, ctx: Any) -> None:
    ctx.received()
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.publish()


def _posts_more_than_declared(self: Any, ctx: Any) -> None:
    ctx.update(mix=ctx.received())
    ctx.publish()
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.publish()


def _publishes_in_some_steps(self: Any, ctx: Any) -> None:
    if ctx.step == 0:
        ctx.update(mix=ctx.received(), gradient=True)
        ctx.publish()
    else:
        ctx.update(gradient=True)


def _keeps_what_it_received(self: Any, ctx: Any) -> None:
    self.kept = getattr(self, "kept", None) or ctx.received()
    if ctx.step:
        ctx.received()
    ctx.update(mix=self.kept, gradient=True)
    ctx.publish()


def _uses_the_gradient_twice(self: Any, ctx: Any) -> None:
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.update(gradient=True)
    ctx.publish()


def _takes_the_gradient_twice(self: Any, ctx: Any) -> None:
    ctx.take_gradient("s")
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.publish()


def _verb(call: Callable[[Any], Any]) -> Step:
    def step(self: Any, ctx: Any) -> None:
        call(ctx)
        usual(self, ctx)

    return step


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "never publishes": (
        {"step": _never_publishes}, r"Own: the step published 0 times, but posts = 1"
    ),
    "publishes twice": ({"step": _publishes_twice}, r"Own: publish\(\) again, but what was"),
    "publishes before it receives": (
        {"step": _publishes_before_it_receives}, r"Own: publish\(\) again, but what was"
    ),
    "receives twice": ({"step": _receives_twice}, r"Own: received\(\) needs a publish\(\)"),
    "never published": (
        {"step": usual, "begin": nothing}, r"Own: received\(\) needs a publish\(\) before it"
    ),
    "posts more": (
        {"step": _posts_more_than_declared}, r"Own: the step published 2 times, but posts = 1"
    ),
    "posts fewer": ({"step": usual, "posts": 2}, r"the step published 1 times, but posts = 2"),
    "some steps": ({"step": _publishes_in_some_steps}, r"the step published 0 times"),
    "what is gone": (
        {"step": _keeps_what_it_received}, r"takes what was received last, which is gone now"
    ),
    "gradient twice": (
        {"step": _uses_the_gradient_twice}, r"Own: the minibatch's gradient serves one"
    ),
    "gradient taken twice": (
        {"step": _takes_the_gradient_twice, "vectors": ("s",)}, r"the minibatch's gradient serves"
    ),
    "unknown vector": (
        {"step": _verb(lambda ctx: ctx["t"]), "vectors": ("s",)}, "Own: there is no t: it has x, s$"
    ),
    "unknown number": ({"step": _verb(lambda ctx: ctx.number("n"))}, "there is no n: it has x$"),
    "update of an unknown vector": (
        {"step": _verb(lambda ctx: ctx.update("t"))}, "Own: there is no t: it has x$"
    ),
    "update from an unknown vector": (
        {"step": _verb(lambda ctx: ctx.update(start="t"))}, "Own: there is no t: it has x$"
    ),
    "update by an unknown vector": (
        {"step": _verb(lambda ctx: ctx.update(gradient="t"))}, "Own: there is no t: it has x$"
    ),
    "update of the momentum": ({"step": _verb(lambda ctx: ctx.update("v"))}, "there is no v"),
    "gradient into an unknown vector": (
        {"step": _verb(lambda ctx: ctx.take_gradient("t"))}, "Own: there is no t: it has x$"
    ),
    "mixing what is not sent": (
        {"step": _verb(lambda ctx: ctx.update("s", mix=ctx.received())), "vectors": ("s",)},
        r"Own: update\(\"s\", mix=received\) needs what is mixed to be sent",
    ),
    "three numbers": (
        {"step": _verb(lambda ctx: (ctx.received(), ctx.publish(a=1.0, b=2.0, c=3.0)))},
        r"Own: publish\(\) takes 2 numbers, got a, b, c",
    ),
    "no number": (
        {"step": _verb(lambda ctx: (ctx.received(), ctx.publish(a="one")))},
        r"Own: publish\(\) takes a number of each agent for a",
    ),
    "number that was not published": (
        {"step": _verb(lambda ctx: ctx.received().mixed("w"))}, "no number w was published beside"
    ),
    "sum over a graph": (
        {"step": _verb(lambda ctx: ctx.start_sum(ctx["x"]))},
        r'Own: start_sum\(\) is for over = "sums", not "graph"',
    ),
    "everyone's over a graph": (
        {"step": _verb(lambda ctx: ctx.everyones(ctx.ranks))},
        r'Own: everyones\(\) is not for over = "graph"',
    ),
    "broadcast over a graph": (
        {"step": _verb(lambda ctx: ctx.broadcast(ctx["x"]))}, r"broadcast\(\) is not for over"
    ),
    "pairs over a graph": (
        {"step": _verb(lambda ctx: ctx.swap(ctx.ranks))}, r'swap\(\) is for over = "pairs"'
    ),
    "publishing over sums": ({"step": usual, "over": SUMS}, r'received\(\) is for over = "graph"'),
    "publishing in pairs": (
        {"step": lambda self, ctx: ctx.publish(), "over": PAIRS}, r"publish\(\) is for over"
    ),
    "sum that was not begun": (
        {"step": lambda self, ctx: ctx.summed(), "over": SUMS},
        r"Own: start_sum\(\) and summed\(\) take turns",
    ),
    "two sums": (
        {"step": lambda self, ctx: ctx.start_sum(ctx["x"]), "over": SUMS},
        r"Own: start_sum\(\) and summed\(\) take turns",
    ),
    "sum over gradients": (
        {"step": lambda self, ctx: ctx.summed(), "over": GRADIENTS}, r"summed\(\) is for over"
    ),
}  # fmt: skip


def _init(**numbers: float) -> Callable[..., None]:
    def init(self: Any, settings: Any, run: Any) -> None:
        Algorithm.__init__(self, settings, run)
        self.numbers = numbers

    return init


WRONG_DECLARATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"vectors": ("x",)}, "Own: 'x' cannot be a vector's or number's name"),
    "v": ({"vectors": ("v",)}, "'v' cannot be"),
    "mixed": ({"vectors": ("mixed",), "posts": 2}, "'mixed' cannot be"),
    "at": ({"vectors": ("at",)}, "'at' cannot be"),
    "empty": ({"vectors": ("",)}, "'' cannot be"),
    "a slash at the end": ({"vectors": ("s/",)}, "'s/' cannot be"),
    "a slash at the beginning": ({"vectors": ("/s",)}, "'/s' cannot be"),
    "dots": ({"vectors": ("../s",)}, "cannot be"),
    "twice": ({"vectors": ("s", "s")}, "Own: s is declared twice"),
    "vector and number": ({"vectors": ("s",), "__init__": _init(s=1.0)}, "s is declared twice"),
    "below another": ({"vectors": ("s", "s/t")}, "s/t cannot lie below s"),
    "a string": ({"vectors": "ss"}, "s is declared twice"),
    "sent and unknown": ({"sends": ("x", "t")}, r"sends = \('x', 't'\), but it has some of x"),
    "sent twice": ({"sends": ("x", "x")}, "each once"),
    "nothing sent": ({"sends": ()}, "each once"),
    "no publication": ({"posts": 0}, "posts = 0"),
    "no such kind": ({"over": "air"}, "over = 'air', but it is one of graph, sums"),
}


def _adapts_before_it_receives(self: Any, ctx: Any) -> None:
    """What is under way must not be written."""
    ctx.update(gradient=True)
    ctx.update(mix=ctx.received(), moved=True)
    ctx.publish()


def _consensus(Pi: Array, X: Array, a: float, steps: int, g: Any) -> Array:
    for k in range(steps):
        X = Pi @ X - a * g(k, X)
    return X


def _relaxed(self: Any, ctx: Any) -> None:
    """With numbers as plain numbers."""
    ctx.update(mix=ctx.received(), weight=0.25, gradient=True, factor=0.5)
    ctx.publish()


def _relaxed_formula(Pi: Array, X: Array, a: float, steps: int, g: Any) -> Array:
    for k in range(steps):
        X = X + 0.25 * (Pi @ X - X) - 0.5 * a * g(k, X)
    return X


def _writes_after_the_pass(self: Any, ctx: Any) -> None:
    """x is changed by hand between the pass and its publication."""
    ctx.update(mix=ctx.received(), gradient=True)
    ctx["x"].mul_(0.5)
    ctx.publish()


def _halved(Pi: Array, X: Array, a: float, steps: int, g: Any) -> Array:
    for k in range(steps):
        X = (Pi @ X - a * g(k, X)) / 2
    return X


def _replaces(self: Any, ctx: Any) -> None:
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.replace(ctx["x"] / 2)
    ctx.publish()


def _unpublished_pass(self: Any, ctx: Any) -> None:
    """The second pass writes x, but not what was made ready for the neighbours."""
    ctx.update(mix=ctx.received(), gradient=True)
    ctx.update(mix=ctx["x"] * 0, weight=0.5, publish=False)
    ctx.publish()


def _mixes_elsewhere(self: Any, ctx: Any) -> None:
    """s <- Pi x, of x as it was sent; then x from there."""
    ctx.update("s", start="x", mix=ctx.received())
    ctx.update(start="s", gradient=True)
    ctx.publish()


def _extra(self: Any, ctx: Any) -> None:
    """EXTRA (arXiv 1404.6264): x <- Pi x - a g - s; s <- s + (x - Pi x) / 2."""
    ctx.update("mean", start="x", mix=ctx.received())
    apart = (ctx["x"] - ctx["mean"]) / 2
    ctx["mean"].sub_(ctx["s"])
    ctx["s"].add_(apart)
    ctx.update(start="mean", gradient=True)
    ctx.publish()


def _extra_formula(Pi: Array, X: Array, a: float, steps: int, g: Any) -> Array:
    S = np.zeros_like(X)
    for k in range(steps):
        X, S = Pi @ X - a * g(k, X) - S, S + (X - Pi @ X) / 2
    return X


RIGHT: dict[str, tuple[dict[str, Any], Formula]] = {
    "usual": ({"step": usual}, _consensus),
    "adapts first": ({"step": _adapts_before_it_receives}, _consensus),
    "relaxed": ({"step": _relaxed}, _relaxed_formula),
    "written by hand": ({"step": _writes_after_the_pass}, _halved),
    "replaced": ({"step": _replaces}, _halved),
    "unpublished": ({"step": _unpublished_pass}, _halved),
    "mixed elsewhere": ({"step": _mixes_elsewhere, "vectors": ("s",)}, _consensus),
    "two vectors": (
        {"step": _mixes_elsewhere, "vectors": ("s", "t"), "sends": ("t", "x")}, _consensus
    ),
    "EXTRA": ({"step": _extra, "vectors": ("s", "mean")}, _extra_formula),
}  # fmt: skip
