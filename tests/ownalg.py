"""What a user writes in a file of their own: EXTRA (arXiv 1404.6264), and some mistakes.

x <- Pi x - a g - s;      s <- s + k (x - Pi x) / 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mpicdsgd.algorithms import (
    Admits,
    Algorithm,
    Circumstances,
    Context,
    Plain,
    algorithm,
    setting,
)
from mpicdsgd.common.errors import UserError


@dataclass(frozen=True)
class ExtraSettings(Plain):
    strength: float = setting(1.0, "k in [0, 1], of the correction")
    warm: int = setting(3, "steps before it begins")

    def check(self) -> None:
        super().check()
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength (k) must be in [0, 1], got {self.strength}")


@algorithm("extra", "EXTRA", source="arXiv 1404.6264")
class Extra(Algorithm):
    Settings: ClassVar[type[Any]] = ExtraSettings
    settings: ExtraSettings
    admits = Admits(directed=False, changing=False)
    vectors: tuple[str, ...] = ("s", "kept/mean")
    anew = ("s",)

    def __init__(self, settings: ExtraSettings, run: Circumstances) -> None:
        super().__init__(settings, run)
        self.numbers = {"age": 0.0}

    def begin(self, ctx: Context, is_new: bool) -> None:
        ctx.publish(age=ctx.number("age"))

    def step(self, ctx: Context) -> None:
        near = ctx.received()
        age = ctx.number("age")
        age[:] = near.mixed("age") + 1
        ctx.update("kept/mean", start="x", mix=near)
        apart = (ctx["x"] - ctx["kept/mean"]) * (self.settings.strength / 2)
        ctx["kept/mean"].sub_(ctx["s"])
        if ctx.step >= self.settings.warm:
            ctx["s"].add_(apart)
        ctx.update(start="kept/mean", gradient=True)
        ctx.publish(age=age)


class Bare(Algorithm):
    """Without settings."""


@dataclass(frozen=True)
class Clashing(Plain):
    schedule: float = setting(1.0, "a name that is taken")


class Taken(Extra):
    Settings = Clashing


class Wrong(Extra):
    vectors = ("x",)


class Fails(Extra):
    def step(self, ctx: Context) -> None:
        if ctx.step == 4 and 1 in ctx.ranks:
            raise ZeroDivisionError("my own mistake")
        super().step(ctx)
