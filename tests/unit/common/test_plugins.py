"""Loading the user's own functions."""

import sys

import pytest

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import check_arguments, load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Be in an empty folder; forget what is imported from it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_loads_from_the_current_directory(here):
    (here / "users_pack").mkdir()
    (here / "users_pack" / "__init__.py").touch()
    (here / "users_pack" / "inner.py").write_text(
        "class K:\n    @staticmethod\n    def f(): return 7\ndef g(): return 8\n"
    )
    assert load_function("users_pack.inner:g", "model.name")() == 8
    assert load_function("users_pack.inner:K.f", "model.name")() == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("users_module", "not of the form"),
        ("users_module:", "not of the form"),
        (":make", "not of the form"),
        ("a:b:c", "not of the form"),
        ("../users_module:make", "not of the form"),
        ("users_modul:make", "no module users_modul in "),
        ("users_pack.sub:make", "no module users_pack in "),
        ("users_module.sub:make", "no module users_module.sub in "),
        ("users_module:maek", "users_module has no maek: did you mean make?"),
        ("users_module:make.x", "users_module:make has no x"),
        ("users_module:number", "is a int, which cannot be called"),
        ("users_needs:make", "users_needs imports not_installed_here, which is not installed"),
    ],
)
def test_says_what_is_missing(here, spec, message):
    (here / "users_module.py").write_text("number = 3\ndef make(): pass\n")
    (here / "users_needs.py").write_text("import not_installed_here\n")
    with pytest.raises(UserError, match=message) as caught:
        load_function(spec, "model.name")
    assert str(caught.value).startswith(f'model.name = "{spec}"')


def test_what_the_module_raises_goes_through(here):
    (here / "users_broken.py").write_text("raise ZeroDivisionError('mine')\n")
    with pytest.raises(ZeroDivisionError, match="mine"):
        load_function("users_broken:f", "model.name")


def function(path, seed, width, *, depth=3):
    """Stand in for a user's."""


def open_ended(**rest):
    """Stand in for a user's."""


def test_arguments_that_fit():
    check_arguments(function, {"width": 1}, "data.args", given=2)
    check_arguments(function, {"path": 0, "seed": 0, "width": 1, "depth": 2}, "model.args")
    check_arguments(function, {"seed": 1, "width": 1}, "x", given=2, optional=("seed",))
    check_arguments(open_ended, {"anything": 1}, "model.args")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"widht": 1},
            "x.args: function has no argument widht: did you mean width.; it takes width, depth",
        ),
        ({"depth": 1}, "function also needs width; it takes width, depth"),
        ({"seed": 1, "width": 1}, "no argument seed"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(UserError, match=message):
        check_arguments(function, args, "x.args", given=2)
