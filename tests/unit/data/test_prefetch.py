"""Batches on a GPU, one ahead: their order, and page-locked memory that is not written too early.

The GPU here is one that puts every copy off for as long as CUDA would allow.
"""

import numpy as np
import pytest
import torch
from test_samples import PARTS, Augmented, equal, global_states

from mpicdsgd.data.prefetch import CudaCopies, one_ahead, to_device
from mpicdsgd.data.samples import ArraySamples, DatasetSamples

CPU = torch.device("cpu")
SIZES = [4, 4, 7, 2, 7, 7, 1]


class LateCopies:
    """Copies happen, in order, when the host waits for one, or when the test lets the GPU run."""

    def __init__(self):
        self.log, self.pinned_elements = [], []
        self._copies, self._done = [], 0

    def pinned(self, count, dtype):
        self.pinned_elements.append(count)
        return torch.empty(count, dtype=dtype)

    def start(self, hosts):
        tensors = [torch.zeros_like(host) for host in hosts]
        self.log.append(("start", len(self._copies)))
        self._copies.append((tensors, hosts))
        return tensors, len(self._copies) - 1

    def wait(self, event):
        self.run(event + 1)

    def hand_over(self, tensors, event):
        assert all(a is b for a, b in zip(tensors, self._copies[event][0], strict=True))
        self.log.append(("hand over", event))

    def run(self, end=None):
        for tensors, hosts in self._copies[self._done : end]:
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host)
        self._done = len(self._copies) if end is None else max(end, self._done)


class HastyCopies(LateCopies):
    """Does not wait where it should."""

    def wait(self, event):
        pass


def made(sizes=SIZES):
    random = np.random.default_rng(0)
    for size in sizes:
        inputs = random.normal(size=(size, 3, 2)).astype(np.float32)
        yield torch.from_numpy(inputs), torch.from_numpy(random.integers(0, 9, size))


def test_on_the_host_batches_are_handed_on_as_they_are():
    batches = list(made())
    found = list(to_device(iter(batches), CPU))
    assert all(a is b for a, b in zip(found, batches, strict=True))


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:2], SIZES[:1], [], [0, 3, 0]])
def test_all_batches_come_in_order_however_late_the_gpu(sizes):
    copies = LateCopies()
    found = list(one_ahead(made(sizes), copies))
    copies.run()
    assert equal(found, made(sizes))


def test_the_test_sees_memory_written_too_early():
    copies = HastyCopies()
    found = list(one_ahead(made(), copies))
    copies.run()
    assert not equal(found, made())


def test_the_next_copy_is_begun_before_a_batch_is_handed_over():
    copies = LateCopies()
    for i, _ in enumerate(one_ahead(made(), copies)):
        assert copies.log[-1] == ("hand over", i)
        assert copies.log.count(("start", min(i + 1, len(SIZES) - 1))) == 1
        assert ("start", i + 2) not in copies.log
    assert len(copies.log) == 2 * len(SIZES)


def test_page_locked_memory_is_kept_and_grows_only():
    copies = LateCopies()
    list(one_ahead(made([4, 4, 3, 4, 6, 2, 6, 4]), copies))
    # Inputs of 6 elements each and targets, in two slots: for 4, then one for 6.
    assert copies.pinned_elements == [24, 4, 24, 4, 36, 6]


def test_targets_of_another_kind():
    batches = [(x, y if i % 4 < 2 else y.float()) for i, (x, y) in enumerate(made())]
    copies = LateCopies()
    found = list(one_ahead(iter(batches), copies))
    copies.run()
    assert equal(found, batches)
    assert [y.dtype for _, y in found] == [y.dtype for _, y in batches]


def test_inputs_in_another_order_in_memory():
    batches = [(x.transpose(1, 2), y[::1]) for x, y in made()]
    copies = LateCopies()
    found = list(one_ahead(iter(batches), copies))
    copies.run()
    assert equal(found, batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_ahead_changes_no_batch_and_no_random_state(workers):
    """And going on in the middle of an epoch gives the rest of it."""
    items = np.arange(20)
    expected = [DatasetSamples(Augmented(), items, seed=1).batch(part) for part in PARTS]
    samples = DatasetSamples(Augmented(), items, seed=1, workers=workers)
    before = global_states()
    for begin in range(len(PARTS)):
        copies = LateCopies()
        found = []
        for batch in one_ahead(samples.batches(PARTS[begin:]), copies):
            assert global_states() == before
            found.append(batch)
        copies.run()
        assert equal(found, expected[begin:])


@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_when_it_is_left(workers):
    ended = []

    def batches():
        try:
            yield from DatasetSamples(Augmented(), np.arange(20), workers=workers).batches(PARTS)
        finally:
            ended.append(True)

    ahead = one_ahead(batches(), LateCopies())
    next(ahead)
    assert not ended
    ahead.close()
    assert ended


def test_an_error_of_the_data_is_raised():
    def batches():
        yield from made([2, 2])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(one_ahead(batches(), LateCopies()))


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
needs_gpu = pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=gpu)])


def states_with_cuda():
    return (*global_states(), torch.cuda.get_rng_state().tolist())


@needs_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_gpu_batches(device, workers):
    device = torch.device(device)
    samples = DatasetSamples(Augmented(), np.arange(20), seed=1, workers=workers)
    expected = [samples.batch(part) for part in PARTS]
    torch.cuda.init()
    before = states_with_cuda()
    found = list(to_device(samples.batches(PARTS), device))
    assert all(tensor.device == device for batch in found for tensor in batch)
    assert equal([(x.cpu(), y.cpu()) for x, y in found], expected)
    assert states_with_cuda() == before


@needs_gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_gpu_batches_used_late(device, own_stream):
    """The host runs far ahead of the GPU, and of the batches only what was made of them is kept."""
    device = torch.device(device)
    x = np.random.default_rng(0).normal(size=(4096, 3000)).astype(np.float32)
    samples = ArraySamples(x, np.arange(4096))
    parts = [np.arange(i % 64, 4096 - 61 * (i % 7)) for i in range(40)]
    stream = torch.cuda.Stream(device) if own_stream else torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        work = torch.randn(4096, 4096, device=device)
        sums = []
        for inputs, targets in to_device(samples.batches(parts), device):
            for _ in range(5):
                work = work @ work * 1e-4
            sums.append((inputs[:, 1].clone(), targets.clone()))
            del inputs, targets
    stream.synchronize()
    for (inputs, targets), part in zip(sums, parts, strict=True):
        np.testing.assert_array_equal(inputs.cpu().numpy(), x[part, 1])
        np.testing.assert_array_equal(targets.cpu().numpy(), part)


@needs_gpu
def test_gpu_copies_do_not_hold_up_the_host(device):
    device = torch.device(device)
    copies = CudaCopies(device)
    assert copies.pinned(3, torch.int64).is_pinned()
    busy = torch.cuda.Event()
    work = torch.randn(8192, 8192, device=device)
    batches = to_device(made([5] * 4), device)
    next(batches)[0].sum()  # then memory is there, and the kernels are loaded
    work @ work
    torch.cuda.synchronize()
    for _ in range(20):
        work @ work
    busy.record()
    inputs, _ = next(batches)
    total = inputs.sum()
    assert not busy.query(), "handed over while the GPU was still at work"
    assert total.item() == pytest.approx(inputs.cpu().sum().item(), abs=1e-5)
