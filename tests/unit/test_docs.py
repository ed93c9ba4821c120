"""What stands on the documentation's pages is so: code runs, files exist, lists are complete.

What needs several ranks is in tests/jobs/test_docs.py.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, commands, write_files

from mpicdsgd.cli import main
from mpicdsgd.runs.config import load_config

EXTENDING = ROOT / "docs" / "extending.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that one is in, and that modules are found in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def do(words: list[str], folder: Path) -> None:
    """A command of the page, in this process."""
    match words:
        case ["mpicdsgd", *arguments]:
            assert main(arguments) == 0
        case ["python", "-m", "pytest", file]:
            tests = vars(importlib.import_module(file.removesuffix(".py")))
            made = {name: test for name, test in tests.items() if name.startswith("test_")}
            assert made
            for name, test in made.items():
                test(folder / name)
        case ["python", file]:
            runpy.run_path(file, run_name="__main__")
        case _:
            raise AssertionError(f"what is {words}?")


def test_extending_runs_as_it_stands(folder: Path) -> None:
    files = write_files(EXTENDING, folder)
    alone = [words for words in commands(EXTENDING) if not is_a_job(words)]
    for words in alone:
        do(words, folder)
    said = " ".join(word for words in commands(EXTENDING) for word in words)
    modules = " ".join(blocks(EXTENDING, "toml"))
    unused = [n for n in files if n not in said and f'"{n.removesuffix(".py")}:' not in modules]
    assert not unused, "on the page, but neither run nor used"


def is_a_job(words: list[str]) -> bool:
    return words[0] == "mpiexec" or words[:2] == ["mpicdsgd", "train"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_can_be_read(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)
    for text in blocks(page, "toml"):
        if "mine:" in text or "own:" in text:
            continue  # run above
        path = tmp_path / "page.toml"
        path.write_text(text)
        load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths of code, also shortened to their end."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`(?:\w+ )?([\w./-]+\.(?:py|sh|h|cu|cpp|sbatch))\b[^`]*`", text))
    of_users = {"mine.py", "train.py", "mpicdsgd/algorithms/extra.py", "RUN_DIR/job.sbatch"}
    there = [
        f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.*") if ".venv" not in path.parts
    ]
    missing = [n for n in named - of_users if not any(path.endswith(f"/{n}") for path in there)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_architecture_lists_the_packages_in_their_order() -> None:
    order = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mpicdsgd"]["packages"]
    section = ARCHITECTURE.read_text().partition("## The packages")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == order
