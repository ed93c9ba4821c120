"""Models out of checkpoints: what torch users get is what the run evaluated."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mpicdsgd.checkpoints.export import export
from mpicdsgd.common.errors import UserError
from mpicdsgd.runs.config import load_config
from mpicdsgd.runs.run import Run


class Model(nn.Module):
    """Channels last, tied weights, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.one = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight
        self.last = nn.Linear(4, 10)
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv(x)).relu().mean(dim=(2, 3))
        return self.last(self.tied(self.one(hidden)))  # type: ignore[no-any-return]


CONFIG = """
[run]
dir = "r"
epochs = 1
[model]
name = "test_export:Model"
[data]
name = "digits"
batch_size = 100
limit = 1000
[optim]
nesterov = "look-ahead"
"""


@pytest.fixture
def folder(shared_folder: Path) -> Path:
    return shared_folder


@pytest.mark.parametrize("buffers", ["local", "mixed"])
def test_it_is_the_model_that_was_evaluated(
    comm: MPI.Intracomm, folder: Path, buffers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == 0:
        Path("r.toml").write_text(CONFIG)
    comm.barrier()
    run = Run(load_config(Path("r.toml"), [f"model.buffers={buffers}"]), comm)
    run.train()
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        export(Path("r"), folder / f"{comm.rank}.pt")
    out = folder / f"{comm.rank}.safetensors"
    with pytest.raises(UserError, match=f"agents 0 to {comm.size - 1}"):
        export(Path("r"), out, agent=comm.size)
    with monkeypatch.context() as read_only:

        def unlink(path: Path, missing_ok: bool = False) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        read_only.setattr(Path, "unlink", unlink)
        with pytest.raises(UserError, match=r"^cannot write /proc/nowhere\.safetensors: "):
            export(Path("r"), Path("/proc/nowhere.safetensors"))
    done = export(Path("r"), out, agent=comm.rank)
    assert (done["agents"], done["skipped"]) == (comm.size, [])
    # After `train` the model of an agent with look-ahead holds x + mu v: its x is what counts.
    mine = Model()
    mine.load_state_dict(load_file(out))
    expected = dict(run.model.state_dict())
    for name, view in zip(
        [n for n, _ in run.model.named_parameters()],
        run.optimizer.arena.views_of(torch.from_numpy(run.optimizer.x.copy())),
        strict=False,
    ):
        expected[name] = view
    expected["tied.weight"] = expected["one.weight"]
    assert mine.state_dict().keys() == expected.keys()
    assert "passing" not in expected
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    export(Path("r"), out)
    with safe_open(out, "np") as file:
        assert file.metadata()["model"] == "average"
        for name in file.keys():  # noqa: SIM118, it is no dict
            everyone = comm.allgather(expected[name].numpy())
            mean = np.mean(np.stack(everyone).astype(np.float64), axis=0)
            whole = expected[name].dtype == torch.int64
            wanted = everyone[0] if whole else mean
            np.testing.assert_allclose(file.get_tensor(name), wanted, rtol=1e-6, atol=1e-7)


def test_damage_is_passed_over(comm: MPI.Intracomm, folder: Path) -> None:
    if comm.rank == 0:
        Path("r.toml").write_text(CONFIG)
    comm.barrier()
    Run(load_config(Path("r.toml"), ["run.checkpoint_every=3 steps", "run.epochs=4"]), comm).train()
    comm.barrier()
    newest = max(Path("r/checkpoints").iterdir())
    if comm.rank == 0:
        with (newest / f"rank-{comm.size - 1:04d}.g0001.h5").open("r+b") as file:
            file.seek(4000)
            file.write(b"\1\2\3\4")
    comm.barrier()
    done = export(Path("r"), folder / f"{comm.rank}.safetensors")
    assert f"{done['step']:08d}" < newest.name.removeprefix("step-")
    (why,) = done["skipped"]
    assert "checksum" in why
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        export(newest, folder / "none.safetensors")
    with pytest.raises(UserError, match="holds no checkpoint"):
        export(folder / "nowhere", folder / "none.safetensors")
