"""Bad input to ``mpicdsgd train``: on every rank exit code 2, one line from rank 0, and no hang."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpicdsgd.checkpoints.inspect import inspect
from mpicdsgd.cli import parser
from mpicdsgd.comm import shutdown

if MPI.COMM_WORLD.size in (2, 5):
    pytest.skip("one rank and four say it all", allow_module_level=True)

CONFIG = """
[run]
epochs = 2
evaluate_every = "never"
checkpoint_every = "3 steps"
[agents]
topology = "{topology}"
[model]
name = "mlp"
args = {{ hidden = [8] }}
[data]
name = "test_bad_input:pictures"
limit = {limit}
batch_size = 8
[optim]
lr = 0.05
"""

Train = Callable[..., None]


@pytest.fixture
def folder(comm: MPI.Intracomm, shared_folder: Path) -> Path:
    """A folder that all ranks see, with a config, and in which they are."""
    if comm.rank == 0:
        topology = "ring" if comm.size > 1 else "complete"
        (shared_folder / "r.toml").write_text(
            CONFIG.format(topology=topology, limit=32 * comm.size)
        )
    comm.barrier()
    return shared_folder


class Trainer:
    """`cli.main(["train", ...])` on all ranks."""

    def __init__(
        self, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
    ) -> None:
        self.comm, self._capfd, self._patch = comm, capfd, patch

    def train(self, *arguments: str, config: str = "r.toml") -> tuple[int, str]:
        """The exit code and what was said on stderr, after a barrier: files may be changed."""
        aborts: list[int] = []
        self._capfd.readouterr()
        with self._patch.context() as patch:
            # One rank that ends the job alone would end the tests.
            patch.setattr(shutdown, "abort", aborts.append)
            code = parser.main(["train", config, *arguments])
        assert aborts == [], self._capfd.readouterr().err
        self.comm.barrier()
        return code, self._capfd.readouterr().err

    def refuses(self, text: str, *arguments: str, config: str = "r.toml") -> None:
        """All ranks return 2, rank 0 says one line, which contains ``text``."""
        code, err = self.train(*arguments, config=config)
        assert code == 2, err
        said = [line for line in err.splitlines() if line.startswith("mpicdsgd: ")]
        if self.comm.rank == 0:
            assert len(said) == 1, err
            assert text in said[0]
            assert err.splitlines()[-1] == said[0], "and nothing after it"
        else:
            assert err == ""
        assert "Traceback" not in err

    def succeeds(self, *arguments: str) -> None:
        code, err = self.train(*arguments)
        assert code == 0, err


@pytest.fixture
def job(
    comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    return Trainer(comm, capfd, monkeypatch)


def by_one(comm: MPI.Intracomm, action: Callable[[], object]) -> None:
    """Rank 0 acts, then all go on."""
    if comm.rank == 0:
        action()
    comm.barrier()


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("optim.momentun=0.9", "unknown config key optim.momentun: did you mean optim.momentum?"),
        ("optmi.lr=0.9", "unknown config key optmi: did you mean optim?"),
        ("zzz.lr=1", "unknown config key zzz: known are run, agents, model, data, optim, exchange"),
        ("lr=1", '"lr=1" is not of the form section.key=value'),
        ("optim.lr=fast", "config key optim.lr must be a number, got 'fast'"),
        ("run.epochs=1.5", "config key run.epochs must be an integer, got 1.5"),
        ("data.drop_last=1", "config key data.drop_last must be true or false, got 1"),
        ("model.args=[1]", "config key model.args must be a table"),
        ("optim=3", '"optim=3" is not of the form'),
        ("run.epochs=0", "run.epochs must be at least 1"),
        ("run.seed=-1", "run.seed = -1: it must not be negative"),
        ("run.keep=0", "run.keep must be at least 1, got 0"),
        ("run.resume=maybe", 'run.resume must be "auto" or "never", got "maybe"'),
        ("run.evaluate_every=often", 'run.evaluate_every must be like "1 epoch", "50 steps"'),
        ("run.evaluate_every=0 steps", "run.evaluate_every must be like"),
        ("run.checkpoint_every=-3 steps", "run.checkpoint_every must be like"),
        ("run.checkpoint_every=5", "run.checkpoint_every must be like"),
        ("agents.topology=torus:7x3", "torus"),
        ("agents.topology=rnig", "unknown topology 'rnig' (did you mean \"ring\"?)"),
        ("agents.topology=file:absent.edges", "absent.edges"),
        ("agents.mixing=metropolos", 'did you mean "metropolis"?'),
        ("agents.mixing=file:absent.csv", "absent.csv"),
        ("agents.init=random", 'agents.init must be "broadcast" or "local", got "random"'),
        ("agents.device=tpu", 'device must be "auto", "cpu", "cuda" or "cuda:K", got "tpu"'),
        ("exchange.transport=staged", 'exchange.transport = "staged" is for GPUs'),
        ("exchange.prefetch=often", "exchange.prefetch must be one of auto, always, never"),
        ("agents.threads=-1", "agents.threads"),
        ("model.name=cnnn", 'model.name = "cnnn" is not known: did you mean cnn?'),
        ("model.name=absent.module:f", 'model.name = "absent.module:f": no module absent'),
        ("model.name=math:pi", "is a float, which cannot be called"),
        ("model.name=big_cnn", "did you mean big-cnn?"),
        ("model.args.hiden=[3]", "model.args: mlp has no argument hiden: did you mean hidden?"),
        ("model.args.hidden=[0]", "model.args.hidden = [0]: it must be a list of positive"),
        ("model.args.outputs=3", "model.args.outputs = 3: it must be an integer >= 10"),
        ("model.loss=crossentropy", "did you mean cross_entropy?"),
        ("model.buffers=global", 'model.buffers = "global": it must be local or mixed'),
        ("data.name=minst", 'data.name = "minst" is not known: did you mean mnist?'),
        ("data.partition=by_class", "did you mean by-class?"),
        ("data.partition=dirichlet:x", "dirichlet needs a number from 1e-6 to 1e6"),
        ("data.batch_size=0", "data.batch_size = 0: it must be at least 1"),
        ("data.batch_size=33", "data.batch_size = 33 is larger than the share of agent 0"),
        ("data.limit=-1", "data.limit = -1: it must not be negative"),
        ("data.args.class=3", "data.args: pictures has no argument class; it takes none"),
        ("optim.name=cdmsdg", 'unknown optim.name "cdmsdg": did you mean cdmsgd'),
        ("optim.name=torch.optim:Adamm", "torch.optim:Adamm"),
        ("optim.name=torch:zeros", "optim.name = torch:zeros"),
        ("optim.args={betas=1}", "optim.args is for torch optimizers"),
        ("optim.lr=-0.1", "optim.lr must be a finite number >= 0, got -0.1"),
        ("optim.lr=nan", "optim.lr must be a finite number >= 0, got nan"),
        ("optim.momentum=1", "optim.momentum must be in [0, 1), got 1"),
        ("optim.weight_decay=-1", "optim.weight_decay must be a finite number >= 0"),
        (
            "optim.nesterov=maybe",
            "optim.nesterov must be true, false or \"look-ahead\", got 'maybe'",
        ),
        ("optim.rounds=0", "optim.rounds (tau) must be at least 1, got 0"),
        ("optim.clip_norm=-1", "optim.clip_norm"),
        ("optim.schedule=linear", "unknown schedule 'linear': allowed are fixed"),
        ("optim.schedule=diminishing:2", "schedule diminishing needs an exponent in (0.5, 1]"),
        ("optim.schedule=torch.optim.lr_scheduler:StepLR", "optim.schedule_args"),
        ("optim.schedule=torch:zeros", "optim.schedule = torch:zeros"),
        ("exchange.transport=pigeon", "exchange.transport must be one of auto, direct"),
        ("exchange.wire=float8", "exchange.wire must be one of float32"),
        ("exchange.timeout_s=0", "exchange.timeout_s must be positive"),
        ("exchange.timeout_s=nan", "exchange.timeout_s must be positive"),
    ],
)
def test_a_bad_value(job: Trainer, folder: Path, argument: str, text: str) -> None:
    job.refuses(text, argument)
    assert not (folder / "runs" / "r" / "checkpoints").exists()


def test_several_bad_values_of_a_torch_optimizer(job: Trainer, folder: Path) -> None:
    adamw = "optim.name=torch.optim:AdamW"
    job.refuses("optim.args", adamw, "optim.args={beta=1}")
    job.refuses("optim.args", adamw, "optim.args={betas=[2.0, 2.0]}")
    job.refuses("optim.rounds = 2 is for cdsgd, icdsgd and cdmsgd only", adamw, "optim.rounds=2")
    job.refuses("Invalid learning rate", adamw, "optim.lr=-1")
    job.refuses("optim.args.lr: set optim.lr instead", adamw, "optim.args={lr=0.1}")
    rprop = "optim.name=torch.optim:Rprop"
    job.refuses("torch.optim:Rprop does not take one", rprop, "optim.weight_decay=0.1")
    job.refuses("makes no torch optimizer", "optim.name=test_bad_input:no_optimizer")


def test_a_config_that_cannot_be_read(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    def write() -> None:
        Path("broken.toml").write_text("[run\nepochs = 3")
        Path("binary.toml").write_bytes(bytes(range(256)))
        Path("twice.toml").write_text("[run]\nepochs = 3\nepochs = 4\n")
        Path("value.toml").write_text("run = 3\n")
        Path("folder.toml").mkdir()

    by_one(comm, write)
    job.refuses("cannot read the config absent.toml: No such file", config="absent.toml")
    job.refuses("cannot read the config folder.toml: Is a directory", config="folder.toml")
    job.refuses("broken.toml is not valid TOML", config="broken.toml")
    job.refuses("binary.toml is not valid TOML", config="binary.toml")
    job.refuses("twice.toml is not valid TOML", config="twice.toml")
    job.refuses("config key run must be a section, got 3", config="value.toml")
    mine = "r.toml" if comm.rank < comm.size - 1 else "absent.toml"
    job.refuses("cannot read the config absent.toml", config=mine)


def test_a_config_that_differs_on_a_rank(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    if comm.size > 1:
        last = comm.size - 1
        epochs = 2 if comm.rank < last else 3
        job.refuses(
            f"the config must be the same on all ranks, but differs on rank {last}",
            f"run.epochs={epochs}",
        )


def test_another_number_of_agents_than_ranks(
    job: Trainer, comm: MPI.Intracomm, folder: Path
) -> None:
    if comm.size > 1:  # one rank may have no launcher, and would start one
        more = comm.size + 1
        job.refuses(f"--agents {more}, but the launcher started", "--agents", str(more))


def test_graph_files(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    def write() -> None:
        Path("parts.edges").write_text("".join(f"{i} {i}\n" for i in range(comm.size)))
        Path("beyond.edges").write_text("0 1\n1 99\n")
        Path("words.edges").write_text("zero one\n")
        Path("broken.json").write_text('{"edges": [[0, 1')
        Path("binary.edges").write_bytes(bytes(range(256)))

    by_one(comm, write)
    if comm.size > 1:
        job.refuses("is not connected: its", "agents.topology=file:parts.edges")
    job.refuses("agents", "agents.topology=file:beyond.edges")
    job.refuses("words.edges", "agents.topology=file:words.edges")
    job.refuses("broken.json", "agents.topology=file:broken.json")
    job.refuses("binary.edges", "agents.topology=file:binary.edges")
    if comm.size == 4:
        job.refuses("regular", "agents.topology=regular:5")


def test_mixing_matrices(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    n = comm.size
    right = np.full((n, n), 1 / n)
    sums, skew, short = right.copy(), right.copy(), right[:, 1:]
    sums[0, 0] -= 0.1
    skew[0, -1], skew[0, 0] = skew[0, -1] + 0.1, skew[0, 0] - 0.1

    def write() -> None:
        for name, matrix in (("right", right), ("sums", sums), ("skew", skew), ("short", short)):
            np.savetxt(f"{name}.csv", matrix, delimiter=",")
        np.savetxt("nan.csv", right * np.nan, delimiter=",")
        np.save("right.npy", right)
        np.save("objects.npy", np.array([[{}] * n] * n, dtype=object), allow_pickle=True)
        whole = Path("right.npy").read_bytes()
        Path("cut.npy").write_bytes(whole[:-3])
        Path("cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))

    by_one(comm, write)
    complete = "agents.topology=complete"
    job.refuses("row 0 sums to 0.9", complete, "agents.mixing=file:sums.csv")
    job.refuses(f"expected {n}", complete, "agents.mixing=file:short.csv")
    job.refuses("every weight must be finite", complete, "agents.mixing=file:nan.csv")
    job.refuses("objects.npy", complete, "agents.mixing=file:objects.npy")
    job.refuses("cut.npy", complete, "agents.mixing=file:cut.npy")
    job.refuses("cut.h5", complete, "agents.mixing=file:cut.h5")
    if n > 1:
        job.refuses("is not symmetric: Pi[0, ", complete, "agents.mixing=file:skew.csv")
    if n > 3:
        job.refuses("Pi[0, 2] = ", "agents.topology=ring", "agents.mixing=file:right.csv")


def test_a_matrix_that_differs_on_a_rank(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    if comm.size == 1:
        return
    n, odd = comm.size, 1 if comm.size == 2 else comm.size - 2
    own = np.full((n, n), 1 / n)
    if comm.rank == odd:
        own = (own + np.eye(n)) / 2
    np.savetxt(f"pi-{comm.rank}.csv", own, delimiter=",")
    job.refuses(
        f"the mixing matrix Pi must be the same on all ranks, but differs on rank {odd}",
        "agents.topology=complete",
        f"agents.mixing=file:pi-{comm.rank}.csv",
    )


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_mnist_files(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    def write(name: str, labels: int = 10, cut: int = 0, without: str = "") -> None:
        where = Path(name)
        where.mkdir()
        for split, count in (("train", 60), ("t10k", 20)):
            files = {
                f"{split}-images-idx3-ubyte": np.zeros((count, 4, 4), np.uint8),
                f"{split}-labels-idx1-ubyte": (np.arange(count) % labels).astype(np.uint8),
            }
            for file, array in files.items():
                if file != without:
                    data = idx(array)
                    (where / file).write_bytes(data[: len(data) - cut])

    def write_all() -> None:
        write("cut", cut=5)
        write("labels", labels=11)
        write("missing", without="t10k-labels-idx1-ubyte")

    by_one(comm, write_all)
    mnist = "data.name=mnist"
    job.refuses("data.path is empty: name MNIST's folder", mnist)
    job.refuses('data.path = "absent": no such folder', mnist, "data.path=absent")
    job.refuses('data.path = "r.toml" is not a folder', mnist, "data.path=r.toml")
    job.refuses("cut/train-images-idx3-ubyte is truncated", mnist, "data.path=cut")
    job.refuses("label 10 of sample 10 is not in 0 .. 9", mnist, "data.path=labels")
    job.refuses("missing has no t10k-labels-idx1-ubyte", mnist, "data.path=missing")


def test_cifar_files(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

    def write() -> None:
        for name, label, cut in (("labels", 10, 0), ("cut", 1, 7), ("record", 1, 3073)):
            Path(name).mkdir()
            for file in names:
                data = bytes([label, *bytes(3072)]) * 4
                keep = len(data) - (cut if file == names[-1] else 0)
                Path(name, file).write_bytes(data[:keep])

    by_one(comm, write)
    cifar = "data.name=cifar10"
    job.refuses("label 10 of sample 0 is not in 0 .. 9", cifar, "data.path=labels")
    job.refuses("test_batch.bin is truncated or not CIFAR-10", cifar, "data.path=cut")
    job.refuses("one of them is truncated", cifar, "data.path=record")
    job.refuses(". has no test_batch.bin", cifar, "data.path=.")


def test_hdf5_data(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    def write() -> None:
        for name in ("right", "nan", "missing"):
            with h5py.File(f"{name}.h5", "w") as file:
                for split, count in (("train", 60), ("test", 20)):
                    x = np.ones((count, 6), np.float32)
                    if name == "nan":
                        x[-1] = np.nan  # only the agent whose row it is can see it
                    file[f"{split}/x"] = x
                    if (name, split) != ("missing", "test"):
                        file[f"{split}/y"] = np.arange(count) % 3
        whole = Path("right.h5").read_bytes()
        Path("cut.h5").write_bytes(whole[: len(whole) // 2])
        Path("text.h5").write_text("no HDF5")

    by_one(comm, write)
    hdf5 = "data.name=hdf5"
    job.refuses("no such file", hdf5, "data.path=absent.h5")
    job.refuses("cut.h5 cannot be read as HDF5", hdf5, "data.path=cut.h5")
    job.refuses("text.h5 cannot be read as HDF5", hdf5, "data.path=text.h5")
    job.refuses("missing.h5 has no dataset test/y", hdf5, "data.path=missing.h5")
    job.refuses("that is not a finite float32", hdf5, "data.path=nan.h5")
    job.refuses("label 2 of sample 2", hdf5, "data.path=right.h5", "data.args.classes=2")


def test_too_few_samples(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    if comm.size > 1:
        n = comm.size
        job.refuses(
            f"{n - 1} training samples are too few for {n} agents",
            f"data.limit={n - 1}",
            "data.batch_size=1",
        )
        job.refuses(
            "data.batch_size = 32 is larger than the share of agent 1, 31 samples",
            "data.batch_size=32",
            f"data.limit={32 * n - n + 1}",
        )


def test_a_run_folder_that_cannot_be_written(
    job: Trainer, comm: MPI.Intracomm, folder: Path
) -> None:
    def write() -> None:
        Path("file").write_text("in the way")
        Path("blocked").mkdir()
        Path("blocked", "checkpoints").write_text("in the way")

    by_one(comm, write)
    job.refuses("Not a directory): set run.dir to another folder", "run.dir=file")
    job.refuses("Not a directory): set run.dir to another folder", "run.dir=file/below")
    job.refuses("set run.dir to a folder that you may write", "run.dir=/proc/run")
    job.refuses("blocked", "run.dir=blocked")
    job.refuses("run.dir", "run.dir=a\0b")


def checkpoints() -> list[Path]:
    return sorted(Path("runs/r/checkpoints").iterdir())


def test_damaged_checkpoints(
    job: Trainer, comm: MPI.Intracomm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job.succeeds("run.epochs=1")
    assert len(checkpoints()) >= 2
    last, before = checkpoints()[-1], checkpoints()[-2]
    rank_file = last / f"rank-{comm.size - 1:04d}.g0001.h5"

    def flip() -> None:
        data = bytearray(rank_file.read_bytes())
        data[len(data) // 2] ^= 1
        rank_file.write_bytes(data)

    by_one(comm, flip)
    caplog.set_level(logging.INFO, "mpicdsgd")
    caplog.clear()
    job.succeeds("run.epochs=2")
    if comm.rank == 0:
        said = [record.getMessage() for record in caplog.records]
        step = int(before.name.removeprefix("step-"))
        assert any(rank_file.name in text and "is not intact" in text for text in said)
        assert any(text.startswith(f"going on from step {step} in ") for text in said)

    def cut() -> None:
        for manifest in Path("runs/r/checkpoints").glob("*/manifest*"):
            manifest.write_bytes(manifest.read_bytes()[:-10])

    by_one(comm, cut)
    job.refuses("checkpoints in runs/r is intact (")


def test_checkpoints_of_something_else(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    job.succeeds("run.epochs=1")
    remedy = 'set run.dir to another folder, or run.resume = "never" to begin anew in this one'
    job.refuses(
        f"of another model, model.args.hidden = [9] (was [8]): {remedy}", "model.args.hidden=[9]"
    )
    job.refuses(
        "of another model, model.name = 'logistic' (was 'mlp'): ",
        "model.name=logistic",
        "model.args={}",
    )
    job.refuses(
        "has epochs of 4 steps, not 8, data.batch_size = 4 (was 8): set resume.elastic = true "
        f"to go on all the same; else {remedy}",
        "data.batch_size=4",
    )
    job.refuses("of another algorithm than optim.name", "optim.name=cdsgd")
    job.refuses("of another algorithm than optim.name", "optim.nesterov=look-ahead")

    def pretend() -> None:
        """A run of one agent more: its manifest is whole, the job has another size."""
        for path in Path("runs/r/checkpoints").glob("*/manifest*"):
            from mpicdsgd.checkpoints import manifest

            place = manifest.places_in(path.parent)[0]
            found = manifest.read_manifest(place)
            extra = manifest.FileEntry(place.rank_file(comm.size).name, 0, "")
            files = (*found.files[:-1], extra, found.files[-1])
            more = dataclasses.replace(found, agents=found.agents + 1, files=files)
            manifest.write_manifest(place, more)

    by_one(comm, pretend)
    job.refuses(f"is of {comm.size + 1} agents, the job has {comm.size} ranks")
    job.succeeds("run.resume=never", "run.epochs=1")


_calls = 0


def nan_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NaN in the fifth step of the last agent."""
    global _calls
    _calls += outputs.requires_grad
    loss = torch.nn.functional.cross_entropy(outputs, targets)
    last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
    return loss * torch.nan if _calls == 5 and last else loss


def nan_gradient(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is NaN in the fifth step of the last agent."""
    global _calls
    _calls += outputs.requires_grad
    loss = torch.nn.functional.cross_entropy(outputs, targets)
    if outputs.requires_grad and _calls == 5 and MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        loss = loss + (outputs[0, 0] * 0).sqrt()
    return loss


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ("nan_loss", "step 5: the loss is NaN or infinite"),
        ("nan_gradient", "step 5: parameters became NaN or infinite"),
    ],
)
def test_nan(job: Trainer, comm: MPI.Intracomm, folder: Path, loss: str, text: str) -> None:
    global _calls
    _calls = 0
    every = ("run.checkpoint_every=3 steps", f"model.loss=test_bad_input:{loss}")
    job.refuses(f"agent {comm.size - 1}, {text}", *every)
    assert [path.name for path in checkpoints()] == ["step-00000003"], "it is kept, none after it"
    found = inspect(Path("runs/r"))["checkpoints"]
    assert found[0]["intact"]
    comm.barrier()
    job.succeeds(*every)  # the counter has gone on: no NaN any more
    assert checkpoints()[-1].name != "step-00000003"


def test_a_checkpoint_that_was_not_written_is_not_said_to_be_kept(
    job: Trainer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    global _calls
    _calls = 0
    # A full disk, say.
    monkeypatch.setattr(
        "mpicdsgd.checkpoints.background_writer.Background.save", lambda *arguments: None
    )
    job.refuses(
        "there is no checkpoint yet in runs/r",
        "run.checkpoint_every=3 steps",
        "model.loss=test_bad_input:nan_loss",
    )


def test_a_nan_in_the_very_step_of_a_checkpoint(
    job: Trainer, comm: MPI.Intracomm, folder: Path
) -> None:
    global _calls
    _calls = 0
    job.refuses(
        f"agent {comm.size - 1}, step 5: the loss is NaN or infinite: try a smaller lr, or check "
        "the data; there is no checkpoint yet in runs/r",
        "run.checkpoint_every=5 steps",
        "model.loss=test_bad_input:nan_loss",
    )
    assert not Path("runs/r/checkpoints").exists()


def test_divergence(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    job.refuses("try a smaller lr", "optim.lr=1e30")


NUMBERS = ("data.name=test_bad_input:numbers", "model.args.outputs=1")


def test_a_metrics_line_is_strict_json_where_the_loss_overflows(
    job: Trainer, comm: MPI.Intracomm, folder: Path
) -> None:
    job.succeeds("run.epochs=1", "model.loss=mse", *NUMBERS)
    if comm.rank == 0:
        text = Path("runs/r/metrics.jsonl").read_text()
        line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        assert line["test_accuracy"]["mean"] == "NaN", "regression has no accuracy"


def no_optimizer(parameters: object, lr: float) -> str:
    return "an optimizer"


def pictures(path: str, seed: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(200, 1, 8, 8)).astype(np.float32), random.integers(0, 10, 200)
    y[:10] = np.arange(10)
    return (x, y), (x[:40], y[:40])


def numbers(path: str, seed: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    x = np.random.default_rng(0).normal(size=(160, 3)).astype(np.float32)
    return (x, x.sum(1, keepdims=True)), (x[:20], x[:20].sum(1, keepdims=True))


def test_data_of_the_users_own(job: Trainer, comm: MPI.Intracomm, folder: Path) -> None:
    job.refuses(
        "the data have no classes: set model.args.outputs", "data.name=test_bad_input:numbers"
    )
    job.refuses("needs class labels", "data.name=test_bad_input:numbers", "model.args.outputs=2")
    job.refuses("must return (train, test), got a int", "data.name=test_bad_input:no_data")
    assert os.getcwd() == str(folder)


def no_data(path: str, seed: int) -> int:
    return 3
