"""Imports point down only: a module may use its own package and those before it in the order."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import mpicdsgd

ROOT = Path(mpicdsgd.__file__).parent

# Bottom up; docs/architecture.md says what each is for. The package itself only re-exports.
ORDER = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["mpicdsgd"]["packages"]
MATHS = {  # no MPI, no torch, no files
    "common.errors", "common.text", "graphs.graph", "graphs.topologies", "graphs.mixing_matrix",
    "graphs.mixing_rules", "graphs.mixing_cycle", "graphs.fastest_mixing", "graphs.survivors",
    "algorithms.schedules", "checkpoints.elastic", "runs.epochs", "theory.formulas",
    "theory.bounds", "theory.lanczos", "theory.estimates", "theory.verdicts",
}  # fmt: skip


MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60
LONG = {  # files and functions that are longer, and why
    "kernels/native/dispatch.py: update": "40 lines say what is computed, and on what",
}


def sources() -> dict[str, Path]:
    """Every module of the source tree, by its name without the package's."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    del found[""]
    return found


SOURCES = sources()


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports anywhere, also in functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("mpicdsgd.") in SOURCES
                version = full == "mpicdsgd.__version__"
                names.add(full if is_module or version else str(node.module))
    return names


def own_imports(path: Path) -> set[str]:
    """Those of the package itself, without its name."""
    own = {name for name in imports(path) if name.partition(".")[0] == "mpicdsgd"}
    own.discard("mpicdsgd.__version__")
    # The package's own names are for users; a module takes them from where they are made.
    assert "mpicdsgd" not in own, f"{path} imports from the package itself"
    return {name.removeprefix("mpicdsgd.") for name in own}


def test_every_package_has_its_place() -> None:
    assert {name.partition(".")[0] for name in SOURCES} == {*ORDER, "__main__"}
    assert len(ORDER) == len(set(ORDER))


def test_the_top_is_small() -> None:
    entries = {path.name for path in ROOT.iterdir()} - {"__pycache__"}
    assert entries == {*ORDER, "__init__.py", "__main__.py", "py.typed"}


def long_ones(path: Path, name: str) -> Iterator[str]:
    """``name`` if the file is too long, and its functions that are, the docstring counted."""
    text = path.read_text()
    if text.count("\n") > MOST_LINES_OF_A_FILE:
        yield name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION:
                yield f"{name}: {node.name}"


def test_files_and_functions_are_short() -> None:
    found = [
        one
        for path in SOURCES.values()
        for one in long_ones(path, path.relative_to(ROOT).as_posix())
    ]
    assert sorted(found) == sorted(LONG), "too long; or short by now, and to be taken out of LONG"


def test_what_is_long_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    inside = "    x = 1\n" * (MOST_LINES_OF_A_FUNCTION - 1)
    path.write_text(f"class A:\n  def f():\n{inside}")
    assert list(long_ones(path, "m.py")) == []
    path.write_text(f"class A:\n  def f():\n{inside}    return x\n" + "\n" * MOST_LINES_OF_A_FILE)
    assert list(long_ones(path, "m.py")) == ["m.py", "m.py: f"]


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down(package: str) -> None:
    above = ORDER[ORDER.index(package) + 1 :]
    of_package = [name for name in SOURCES if name.partition(".")[0] == package]
    for name in of_package:
        used = {other.partition(".")[0] for other in own_imports(SOURCES[name])}
        assert used & set(above) == set(), f"{name} imports what stands above it"


def test_imports_make_no_circle() -> None:
    G = nx.DiGraph()
    for name, path in SOURCES.items():
        G.add_edges_from((name, other) for other in own_imports(path))
    assert [part for part in nx.strongly_connected_components(G) if len(part) > 1] == []


def test_the_checker_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import os\ndef f():\n    from mpicdsgd.runs.run import Run\n    import json.tool"
    )
    assert imports(path) == {"os", "mpicdsgd.runs.run", "json.tool"}
    assert own_imports(path) == {"runs.run"}
    path.write_text("from mpicdsgd.data import files\nfrom mpicdsgd.kernels.native import update")
    assert own_imports(path) == {"data.files", "kernels.native"}
    path.write_text("from mpicdsgd import Agents\n")
    with pytest.raises(AssertionError, match="the package itself"):
        own_imports(path)


@pytest.mark.parametrize("name", sorted(MATHS))
def test_maths_import_neither_mpi_nor_torch_nor_files(name: str) -> None:
    roots = {module.partition(".")[0] for module in imports(SOURCES[name])}
    assert roots & {"mpi4py", "torch", "h5py", "pathlib", "io", "os"} == set()


def loaded_after(code: str, modules: tuple[str, ...]) -> list[str]:
    """Which of ``modules`` a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport sys\nprint([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, timeout=120, cwd=ROOT.parent,
    )  # fmt: skip
    result = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert isinstance(result, list)
    return result


def test_the_package_alone_loads_nothing_heavy() -> None:
    heavy = ("mpi4py.MPI", "torch", "h5py", "matplotlib", "networkx")
    assert loaded_after("import mpicdsgd, mpicdsgd.common.errors", heavy) == []


def test_packages_re_export_nothing_that_starts_mpi() -> None:
    code = "import " + ", ".join(f"mpicdsgd.{name}" for name in ORDER)
    assert loaded_after(code, ("mpi4py.MPI",)) == []


def test_maths_load_neither_mpi_nor_torch() -> None:
    code = "import " + ", ".join(f"mpicdsgd.{name}" for name in sorted(MATHS))
    code += ", mpicdsgd.graphs.specs, mpicdsgd.graphs.graph_files, mpicdsgd.graphs.matrix_files"
    assert loaded_after(f"{code}\nmpicdsgd.ring(3)", ("mpi4py.MPI", "torch")) == []


def test_what_needs_no_mpi_does_not_start_it() -> None:
    """Graphs, plots, inspect, data and models: also used by spawned workers and on login nodes."""
    names = ["graphs.graph_plot", "runs.plot", "checkpoints.inspect", "data", "models.build"]
    names += ["runs.metrics_file", "cli.parser", "kernels.arena", "cli.graph_report"]
    names += ["cli.graph_suggest", "cli.graph_table", "checkpoints.background_writer"]
    code = "import " + ", ".join(f"mpicdsgd.{name}" for name in names)
    assert loaded_after(code, ("mpi4py.MPI",)) == []


def test_a_start_loads_no_compiler_and_no_toolbox(tmp_path: Path) -> None:
    """Of thousands of ranks each would read as many files again as torch has."""
    settings = ["data.name=digits", "run.epochs=1", f"run.dir={tmp_path}/run"]
    (tmp_path / "run.toml").write_text('[model]\nname = "mlp"\n')
    code = f"from mpicdsgd.cli import main\nmain(['train', '{tmp_path}/run.toml', *{settings!r}])"
    assert loaded_after(code, ("torch._dynamo", "sympy", "sklearn", "matplotlib", "pandas")) == []
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_module_that_starts_mpi_is_seen() -> None:
    """The check above can fail."""
    assert loaded_after("import mpi4py.MPI", ("mpi4py.MPI", "torch")) == ["mpi4py.MPI"]


def test_names_that_were_promised_still_work() -> None:
    code = (
        "import mpicdsgd.trace, mpicdsgd.bounds, mpicdsgd.theory\n"
        "from mpicdsgd import bounds, theory, trace\n"
        "from mpicdsgd.runs import trace as moved\n"
        "assert mpicdsgd.trace is trace is moved and moved.__spec__.name == 'mpicdsgd.runs.trace'\n"
        "assert callable(trace.read) and callable(bounds.consensus_bound)\n"
        "assert callable(theory.consensus_radius) and callable(mpicdsgd.theory.Constants)"
    )
    assert loaded_after(code, ("mpi4py.MPI",)) == []
