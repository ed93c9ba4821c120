"""Imports point down only: every module of the package has a layer, and uses none above its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import mpicdsgd

ROOT = Path(mpicdsgd.__file__).parent

# Bottom up. A module may import from its own layer (without a circle) and from those below. One
# that is not here fails: decide where it belongs. The package itself only re-exports: no layer.
LAYERS: list[tuple[str, set[str]]] = [
    ("maths: no MPI, no torch", {"errors", "graph", "topology", "matrix", "mixing", "cycle",
                                "schedule", "theory", "bounds", "fastestmixing",
                                "extremes", "estimates", "verdicts", "course", "elastic"}),
    ("users' files and names", {"userfiles", "_read_hdf5", "graphfiles", "matrixfiles", "specs",
                                "plugins", "stopsignals", "remaining", "network"}),
    ("machinery", {"native", "native.reference", "native.dispatch", "native._native", "shutdown",
                   "agreement", "family", "agents", "arena", "exchange", "exchange.errors",
                   "exchange.header", "exchange.helper", "exchange.memory", "exchange.messages",
                   "exchange.neighbor", "exchange.carrier", "exchange.engine",
                   "exchange.tokens", "exchange.shared", "exchange.hosting", "exchange.device",
                   "exchange.direct", "exchange.staged", "exchange.routing", "exchange.probe",
                   "gpu", "gpu.cuda", "gpu.choose", "gpu.kernels", "gpu.layouts", "gpu.update",
                   "links", "links.waiting", "links.signals", "links.link", "links.sums",
                   "links.gradients", "links.averaging", "links.centre", "links.pairs",
                   "links.push", "links.rules", "links.server", "links.served",
                   "update", "stepper"}),
    ("algorithms", {"optim", "optimstate", "algorithms", "algorithms.cdsgd", "algorithms.cdmsgd",
                    "algorithms.mixed", "algorithms.sgd", "algorithms.fedavg",
                    "algorithms.easgd", "algorithms.gossip", "algorithms.downpour",
                    "algorithms.checks", "algorithms.forms", "algorithms.settings",
                    "algorithms.choose"}),
    ("data and models", {"data", "data.cifar", "data.custom", "data.digits", "data.files",
                         "data.hdf5", "data.loading", "data.mnist", "data.partition",
                         "data.samples", "data.shuffle", "data.source", "data.feed",
                         "data.synthetic", "data.together", "models", "evaluate",
                         "objective", "curvature", "gradientnoise", "minimum"}),
    ("the run", {"config", "runfolder", "identity", "owner", "manifest", "rankfile", "inspection",
                 "checkpoint", "state",
                 "snapshot", "memoryroom", "writerprocess", "background", "exporting",
                 "record", "comparison", "figures", "graphplot", "graphreport",
                 "graphsuggest", "graphtable", "plots", "progress", "measure",
                 "runconfig", "trace", "minibatch", "marker", "stop", "runstart", "standing", "run",
                 "survival", "job", "stacked", "tryout", "population", "onebyone",
                 "stackedmeasure", "simulationstart", "simulation", "rebuilt", "constants",
                 "theorycase", "theorybounds", "theoryreport", "theorytable", "theoryplot"}),
    ("command line", {"launch", "info", "submit", "ending", "looking",
                      "running", "cli", "__main__"}),
]  # fmt: skip
LAYER = {module: i for i, (_, modules) in enumerate(LAYERS) for module in modules}


def sources() -> dict[str, Path]:
    """Every module of the source tree, by its name without the package's."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    del found[""]
    return found


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
                is_module = full.removeprefix("mpicdsgd.") in LAYER
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


SOURCES = sources()


def test_every_module_has_one_layer() -> None:
    assert set(SOURCES) - set(LAYER) == set(), "place new modules in LAYERS"
    assert set(LAYER) - set(SOURCES) - {"native._native"} == set(), "no such modules"
    assert sum(len(modules) for _, modules in LAYERS) == len(LAYER)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_down(name: str) -> None:
    above = {other for other in own_imports(SOURCES[name]) if LAYER[other] > LAYER[name]}
    assert above == set()


def test_imports_make_no_circle() -> None:
    G = nx.DiGraph()
    for name, path in SOURCES.items():
        G.add_edges_from((name, other) for other in own_imports(path))
    assert [part for part in nx.strongly_connected_components(G) if len(part) > 1] == []


def test_the_checker_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import os\ndef f():\n    from mpicdsgd.run import Run\n    import torch.nn\n")
    assert imports(path) == {"os", "mpicdsgd.run", "torch.nn"}
    assert own_imports(path) == {"run"}
    path.write_text("from mpicdsgd import native\nfrom mpicdsgd.native import reference\n")
    assert own_imports(path) == {"native", "native.reference"}
    path.write_text("from mpicdsgd import Agents\n")
    with pytest.raises(AssertionError, match="the package itself"):
        own_imports(path)


@pytest.mark.parametrize("name", sorted(m for m in LAYERS[0][1]))
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
    assert loaded_after("import mpicdsgd, mpicdsgd.errors", heavy) == []


def test_maths_load_neither_mpi_nor_torch() -> None:
    names = sorted(LAYERS[0][1] | LAYERS[1][1])
    code = "import " + ", ".join(f"mpicdsgd.{name}" for name in names if name != "_read_hdf5")
    assert loaded_after(f"{code}\nmpicdsgd.ring(3)", ("mpi4py.MPI", "torch")) == []


def test_what_needs_no_mpi_does_not_start_it() -> None:
    """Graphs, plots, inspect, data and models: also used by spawned workers and on login nodes."""
    names = ["graphplot", "plots", "inspection", "data", "models", "record", "cli", "arena"]
    names += ["graphreport", "graphsuggest", "graphtable"]
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
