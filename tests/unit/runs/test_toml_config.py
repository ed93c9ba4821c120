"""Config files and overrides: filled by field and type, every mistake one line that names it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.runs import toml_config
from mpicdsgd.runs.config import Config, RunConfig, differences, load_config


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    momentum: float = 0.9
    steps: int = 3
    name: str = "a"
    fast: bool = False
    kind: bool | str = True
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    optim: Inner = field(default_factory=Inner)
    run: Inner = field(default_factory=Inner)


@contextlib.contextmanager
def refused(text: str) -> Iterator[None]:
    """A block that raises a UserError of one line with ``text`` in it."""
    with pytest.raises(UserError) as error:
        yield
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def fill(**values: Any) -> Inner:
    return toml_config.fill(Outer, {"optim": values}).optim


def test_missing_keys_keep_their_defaults() -> None:
    assert toml_config.fill(Outer, {}) == Outer()
    assert fill(steps=4) == Inner(steps=4)


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("lr", 1, 1.0),
        ("lr", 0.5, 0.5),
        ("lr", math.inf, math.inf),
        ("steps", 0, 0),
        ("name", "b", "b"),
        ("name", 2026, "2026"),
        ("name", 0.5, "0.5"),
        ("fast", True, True),
        ("kind", "look-ahead", "look-ahead"),
        ("kind", False, False),
        ("args", {"a": {"b": [1, "c"]}}, {"a": {"b": [1, "c"]}}),
    ],
)
def test_values_that_fit(key: str, value: object, read: object) -> None:
    found = getattr(fill(**{key: value}), key)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("lr", "fast", "a number"),
        ("lr", True, "a number"),
        ("lr", [0.1], "a number"),
        ("steps", 1.0, "an integer"),
        ("steps", True, "an integer"),
        ("steps", "3", "an integer"),
        ("name", True, "a string"),
        ("name", ["a"], "a string"),
        ("fast", 1, "true or false"),
        ("fast", "yes", "true or false"),
        ("kind", 1, "true or false or a string"),
        ("args", [1], "a table"),
    ],
)
def test_values_of_another_type(key: str, value: object, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        fill(**{key: value})
    assert str(error.value) == f"config key optim.{key} must be {wanted}, got {value!r}"


def test_numbers_that_no_computer_word_holds() -> None:
    for key in ("steps", "lr", "name"):
        with refused(f"config key optim.{key}: integers have at most 64 bits"):
            fill(**{key: 10**400})
    with refused("config key optim.args.a[1]: integers have at most 64 bits"):
        fill(args={"a": [1, -(2**63) - 1]})
    assert fill(steps=2**63 - 1).steps == 2**63 - 1


def test_values_without_end() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = {"a": deep}
    with refused("is nested deeper than 20 levels"):
        fill(args=deep)
    with refused("must be a section, got a int too large to be shown"):
        toml_config.fill(Outer, {"optim": 2**100_000})


def test_dates_are_no_values() -> None:
    with refused("config key optim.args.since must not be a date or time"):
        fill(args=toml_config.tomllib.loads("since = 1979-05-27"))


def test_an_unknown_key_names_the_nearest() -> None:
    with refused("unknown config key optim.momentun: did you mean optim.momentum?"):
        fill(momentun=1)
    with refused("unknown config key rum: did you mean run?"):
        toml_config.fill(Outer, {"rum": {}})
    with refused("unknown config key zzz: known are optim, run"):
        toml_config.fill(Outer, {"zzz": {}})
    with refused("config key optim must be a section, got 3"):
        toml_config.fill(Outer, {"optim": 3})


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optim.name=b", "b"),
        ("optim.name= b c ", "b c"),
        ('optim.name="b"', "b"),
        ("optim.name=file:a=b.csv", "file:a=b.csv"),
        ("optim.name=", ""),
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=-1", -1),
        ("optim.fast=true", True),
        ("optim.args={a = 1}", {"a": 1}),
        ("optim.args=[1, 2]", [1, 2]),
        ("optim.name=2 epochs", "2 epochs"),
        ("optim.name=1\nx = 2", "1\nx = 2"),
        ("optim.name=" + "9" * 5000, "9" * 5000),
        ("optim.name=" + "[" * 5000, "[" * 5000),
    ],
)
def test_overrides(assignment: str, value: object) -> None:
    tables: dict[str, Any] = {"optim": {"steps": 3}}
    toml_config.override(tables, [assignment])
    key = assignment.partition("=")[0].partition(".")[2]
    assert tables == {"optim": {"steps": 3, key: value}}


def test_overrides_go_deep_and_the_last_one_holds() -> None:
    tables: dict[str, Any] = {}
    toml_config.override(tables, ["a.b.c=1", "a.b.c=2", "a.b.d=x"])
    assert tables == {"a": {"b": {"c": 2, "d": "x"}}}


@pytest.mark.parametrize("bad", ["lr=1", "optim.lr", "=1", ".lr=1", "optim.=1", "a..b=1", ""])
def test_overrides_of_another_form(bad: str) -> None:
    with refused("is not of the form section.key=value"):
        toml_config.override({}, [bad])


def test_an_override_below_a_value() -> None:
    with refused('"optim.lr.x=1": lr is a value and has no keys'):
        toml_config.override({"optim": {"lr": 1}}, ["optim.lr.x=1"])


def test_the_run_folder_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mnist.toml"
    path.write_text("")
    assert load_config(path).run.dir == "runs/mnist"
    assert load_config(path, ["run.dir=2026"]).run.dir == "2026"


def test_what_is_written_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[model]\nname = "mlp"\nargs = { hidden = [3, 4], x = "å\\n" }\n')
    first = load_config(path, ["optim.nesterov=look-ahead", "optim.lr=3", "run.dir=a b"])
    toml_config.write_toml(first, tmp_path / "again.toml", {"torch": "2\nrun = 3", "hosts": "a, b"})
    text = (tmp_path / "again.toml").read_text()
    assert text.startswith("# torch: 2 run = 3\n# hosts: a, b\n")
    assert load_config(tmp_path / "again.toml") == first


@pytest.mark.parametrize(
    "data",
    [
        b"[run",
        b"a = 1\na = 2",
        b"\xff\xfe",
        bytes(range(256)),
        b"run = " + b"[" * 100_000,
        b"run.epochs = 1__0",
        b"run.epochs = " + b"9" * 5000,
        b"x = 9999-99-99",
        b"[run]\nepochs = 3\n[run]",
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(data)
    with refused("r.toml is not valid TOML: "):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with refused("Is a directory"):
        load_config(tmp_path)
    with refused("No such file or directory"):
        load_config(tmp_path / "none.toml")
    with refused("cannot read the config"):
        load_config(Path("a\0b.toml"))


def read_any(data: bytes, overrides: list[str]) -> Config | None:
    """The config, or None after a one-line UserError; anything else fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r.toml")
        path.write_bytes(data)
        try:
            return load_config(path, overrides)
        except UserError as error:
            said = str(error)
    assert "\n" not in said
    return None


toml_like = st.text(st.sampled_from("[]{}=.,#\"\n 019-:eTZ\\'_+aruno"), max_size=60)
scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.datetimes()
    | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config)}
keys = st.sampled_from(
    [
        (name, key.name)
        for name, make in SECTIONS.items()
        for key in dataclasses.fields(make())  # type: ignore[operator,type-var]
    ]
)
some = settings(max_examples=100, deadline=None)


@some
@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda t: t.encode(errors="ignore")))
def test_any_bytes(data: bytes) -> None:
    read_any(data, [])


@some
@given(toml_like, st.lists(toml_like, max_size=2))
def test_anything_like_toml(text: str, overrides: list[str]) -> None:
    read_any(text.encode(), overrides)


@some
@given(keys, values)
def test_any_value_at_any_key(place: tuple[str, str], value: Any) -> None:
    section, key = place
    found = read_any(tomli_w.dumps({section: {key: value}}).encode(), [])
    if found is not None:
        again = read_any(tomli_w.dumps(dataclasses.asdict(found)).encode(), [])
        assert repr(again) == repr(found), "repr: NaN is itself"
        assert not differences(dataclasses.asdict(found), dataclasses.asdict(found))


def test_every_section_has_its_dataclass() -> None:
    assert list(SECTIONS) == ["run", "agents", "model", "data", "optim", "exchange", "resume"]
    assert Config().run == RunConfig()
