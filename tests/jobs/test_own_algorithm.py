"""An algorithm of one's own, in a file outside the package: named in a config, and all is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from job import Ended, Job
from samerun import checkpoints, metrics, same_run, same_trace
from test_resume import kill_there, train

pytestmark = pytest.mark.slow

CONFIG = """
[run]
epochs = 3
evaluate_every = "7 steps"
checkpoint_every = "5 steps"
keep = 2
theory = true
[agents]
topology = "ring"
[model]
name = "victim:model"
loss = "victim:loss"
[data]
name = "victim:data"
batch_size = 30
[optim]
name = "ownfile:Extra"
lr = 0.02
schedule = "cosine"
args = { strength = 0.75 }
"""
AGENTS = 4
SAVE = """
import sys
from pathlib import Path
import numpy as np
from mpicdsgd.runs.config import load_config
from mpicdsgd.simulation.simulation import Simulation
made = Simulation(load_config(Path("r.toml"), ["run.dir=simulated"]), 4, one_by_one=True)
made.run()
np.savez("simulated.npz", **{k.replace("/", "|"): v.numpy() for k, v in made.stack.flats.items()})
"""
SCRIPT = """
import sys
import numpy as np
import torch
from mpi4py import MPI
import mpicdsgd
comm = MPI.COMM_WORLD
agents = mpicdsgd.Agents(comm, mpicdsgd.metropolis(mpicdsgd.ring(comm.size)), device="cpu")
x = torch.nn.Parameter(torch.zeros(5))
b = torch.arange(5.0) * comm.rank
opt = mpicdsgd.optimizer("ownfile:Extra", [x], agents=agents, lr=0.3, warm=0)
for _ in range(400):
    x.grad = (1 + comm.rank) * (x.detach() - b)
    opt.step()
assert abs(opt.arrays()["link/age"][0] - 400) < 1e-9, opt.arrays()
weights = 1 + np.arange(comm.size)
optimum = np.arange(5) * (weights * np.arange(comm.size)).sum() / weights.sum()
assert np.abs(x.detach().numpy() - optimum).max() < 1e-5, x
opt.close()
for wrong in ({"warmth": 1}, {"strength": 2.0}):
    try:
        mpicdsgd.optimizer("ownfile:Extra", [x], agents=agents, **wrong)
    except mpicdsgd.UserError as error:
        print(error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(Path(__file__).parents[1] / "ownalg.py", tmp_path / "ownfile.py")
    (tmp_path / "r.toml").write_text(CONFIG)
    return tmp_path


def arrays(run_dir: Path, name: str) -> np.ndarray:
    """Of the last checkpoint, a row for each agent."""
    paths = sorted(checkpoints(run_dir)[-1].parent.glob("rank-*.h5"))
    rows = []
    for path in paths:
        with h5py.File(path) as file:
            rows.append(file["arrays"][name][()])
    return np.array(rows)


def test_a_whole_run(start: Callable[..., Job], folder: Path) -> None:
    """Killed, simulated, and gone on with by fewer agents, without another line of code."""
    whole = train(start, folder, AGENTS, "whole", None).wait()
    assert whole.code == 0, whole.err
    s = arrays(folder / "whole", "link/s")
    assert np.abs(s).max() > 1e-5
    assert np.abs(s.sum(axis=0)).max() <= 1e-6
    np.testing.assert_allclose(arrays(folder / "whole", "link/age"), 36.0, rtol=1e-12)

    kill_there(start, folder, AGENTS, {"rank": 1, "step": 17})
    again = train(start, folder, AGENTS, "killed", None).wait()
    assert again.code == 0, again.err
    assert "going on from step 1" in again.err
    same_run(folder / "whole", folder / "killed", AGENTS)
    same_trace(folder / "whole", folder / "killed")

    simulated = start(0, "-c", SAVE).wait()
    assert simulated.code == 0, simulated.err
    with np.load(folder / "simulated.npz") as found:
        assert {"x", "link|s", "link|kept|mean", "link|age"} == set(found)
        for name in found:
            expected = arrays(folder / "whole", name.replace("|", "/"))
            np.testing.assert_array_equal(found[name], expected, err_msg=name)
    command = ("simulate", "r.toml", "--agents", "4", "--one-by-one", "run.dir=by_hand")
    simulated = start(0, "-m", "mpicdsgd", *command).wait()
    assert simulated.code == 0, simulated.err
    theirs, ours = metrics(folder / "whole")[-1], metrics(folder / "by_hand")[-1]
    assert ours["test_loss"]["agents"] == pytest.approx(theirs["test_loss"]["agents"], rel=1e-6)
    for key in ("max", "rms"):
        assert ours["consensus"][key] == pytest.approx(theirs["consensus"][key], rel=1e-5)

    more = ("run.epochs=5", "resume.elastic=true", "run.theory=false", "run.dir=whole")
    fewer = start(3, "-m", "mpicdsgd", "train", "r.toml", *more).wait()
    assert fewer.code == 0, fewer.err
    assert "3 agents instead of 4" in fewer.err
    s = arrays(folder / "whole", "link/s")[:3]
    assert np.abs(s.sum(axis=0)).max() <= 1e-6, "it began anew, or its sum would not be 0"
    assert metrics(folder / "whole")[-1]["test_loss"]["mean"] < theirs["test_loss"]["mean"]


def test_a_job_refuses_it_on_all_ranks(run: Callable[..., Ended], folder: Path) -> None:
    ended = run(3, "-m", "mpicdsgd", "train", "r.toml", "optim.name=ownfile:Wrong")
    assert ended.code == 2, ended.err
    (line,) = ended.lines("mpicdsgd: ")
    assert "'x' cannot be a vector's or number's name" in line


def test_its_own_mistake_on_one_rank_ends_the_job(run: Callable[..., Ended], folder: Path) -> None:
    ended = run(3, "-m", "mpicdsgd", "train", "r.toml", "optim.name=ownfile:Fails", timeout_s=60)
    assert ended.code not in (0, 2), ended.err
    assert "ZeroDivisionError: my own mistake" in ended.err


def test_in_a_script(run: Callable[..., Ended], folder: Path) -> None:
    ended = run(4, "-c", SCRIPT)
    assert ended.code == 0, ended.err
    assert ended.out.count("extra has no setting warmth") == 4
    assert ended.out.count("strength (k) must be in [0, 1], got 2.0") == 4
