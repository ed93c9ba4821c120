"""The arena: tensors become views into one aligned buffer, and come back when they leave it."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np
import pytest
import torch

from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.kernels.native import SEGMENT


def parameter(*shape: int) -> Any:
    return torch.nn.Parameter(torch.randn(*shape))


def kinds() -> list[Any]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(5, 3),
        torch.randn(5, 3).t(),
        torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(10, 7)[::2, 1::3],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(1, 17, 1),
        torch.randn(33),
    ]
    return [torch.nn.Parameter(t) for t in tensors]


def gradient_of(arena: Arena, i: int) -> Any:
    """What the kernel will read for tensor i, in the order of the arena's memory."""
    row = arena.segments[i]
    memory = (ctypes.c_float * int(row["length"])).from_address(int(row["grad"]))
    return np.ctypeslib.as_array(memory)


def in_memory_order(arena: Arena, i: int, values: torch.Tensor) -> Any:
    """``values`` laid out as tensor i stands in the arena."""
    view = arena.views[i]
    out = torch.empty_strided(view.shape, view.stride()).copy_(values)
    return out.as_strided((view.numel(),), (1,)).numpy()


def test_every_tensor_is_an_aligned_view_with_its_values() -> None:
    parameters = kinds()
    before = [p.detach().clone() for p in parameters]
    arena = Arena(parameters)
    assert arena.flat.data_ptr() % 64 == 0
    assert arena.size % 16 == 0
    assert arena.flat.dtype == torch.float32
    for p, kept, row in zip(parameters, before, arena.segments, strict=True):
        assert torch.equal(p, kept)
        assert row["offset"] % 16 == 0
        assert row["length"] == p.numel()
        if p.numel():
            assert p.data_ptr() == arena.flat.data_ptr() + 4 * row["offset"]
            assert p.data_ptr() % 64 == 0
    arena.flat.fill_(7.0)
    assert all((p == 7).all() for p in parameters)


def test_segments_do_not_overlap_and_padding_is_zero() -> None:
    arena = Arena(kinds())
    taken = np.zeros(arena.size, dtype=int)
    for row in arena.segments:
        taken[row["offset"] : row["offset"] + row["length"]] += 1
    assert taken.max() == 1
    assert (arena.numpy[taken == 0] == 0).all()
    assert arena.segments.dtype == SEGMENT


def test_dense_strides_are_kept_and_gaps_closed() -> None:
    parameters = kinds()
    strides = [p.stride() for p in parameters]
    Arena(parameters)
    for i, p in enumerate(parameters):
        if i in (5, 6):  # with gaps, and one expanded
            assert p.is_contiguous()
        else:
            assert p.stride() == strides[i]
    assert parameters[4].is_contiguous(memory_format=torch.channels_last)


def test_views_of_another_buffer_have_the_same_layout() -> None:
    arena = Arena(kinds())
    v = torch.arange(arena.size, dtype=torch.float32)
    for view, p in zip(arena.views_of(v), arena.parameters, strict=True):
        assert (view.shape, view.stride()) == (p.shape, p.stride())
    views = arena.views_of(arena.flat)
    assert all(torch.equal(a, b) for a, b in zip(views, arena.parameters, strict=True))


def test_buffers_come_after_the_parameters() -> None:
    statistics = torch.ones(3)
    arena = Arena([parameter(2, 2), parameter(5)], [statistics])
    assert arena.parameters_end == 32
    assert arena.segments["own"].tolist() == [0, 0, 1]
    assert statistics.data_ptr() == arena.flat.data_ptr() + 4 * 32
    checksum = arena.checksum()
    statistics += 1
    assert not arena.changed()  # a forward pass writes them
    assert arena.checksum() == checksum
    assert Arena([parameter(2)]).parameters_end == 16


def test_nothing_at_all() -> None:
    arena = Arena([])
    assert arena.size == 0
    arena.fill_segments([])
    assert arena.fresh_gradients() == 0
    assert not arena.repair()


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(3, dtype=torch.float64), r"tensor 1 \(3,\) is torch\.float64.*\.float\(\)"),
        (torch.zeros(3, dtype=torch.bfloat16), r"bfloat16"),
        (torch.zeros(3, dtype=torch.int64), r"int64"),
        (torch.zeros(3, dtype=torch.complex64), r"complex64"),
        (torch.zeros(3).to_sparse(), r"sparse_coo on cpu: parameters must be dense"),
        (torch.zeros(3, device="meta"), r"on meta"),
    ],
)
def test_other_tensors_are_refused_before_anything_is_moved(
    tensor: torch.Tensor, match: str
) -> None:
    first = parameter(3)
    pointer = first.data_ptr()
    with pytest.raises(UserError, match=match):
        Arena([first, tensor])
    assert first.data_ptr() == pointer


def test_shared_memory_is_refused() -> None:
    p = parameter(4, 4)
    for other in (p, torch.nn.Parameter(p.data), p.detach()[2:], p.detach()[:1]):
        with pytest.raises(UserError, match="tensors 0 and 1 share memory"):
            Arena([p, other])
    whole = torch.zeros(8)
    Arena([torch.nn.Parameter(whole[:4]), torch.nn.Parameter(whole[4:])])  # side by side


def test_repair_takes_values_back() -> None:
    p, q = parameter(4, 3, 2, 2), parameter(5)
    arena = Arena([p, q])
    assert not arena.repair()
    p.data = p.data.to(memory_format=torch.channels_last)
    q.data = q.data.clone()
    assert not arena.repair()  # moved, but the values are the same
    assert p.is_contiguous()
    assert q.data_ptr() == arena.views[1].data_ptr()
    q.data = q.data + 1
    expected = q.detach().clone()
    assert arena.repair()
    assert torch.equal(q, expected)
    assert torch.equal(arena.views[1], expected)
    assert not arena.repair()


def test_repair_says_so(caplog: pytest.LogCaptureFixture) -> None:
    p = parameter(5)
    arena = Arena([p])
    p.data = p.data.clone()
    with caplog.at_level(logging.WARNING, "mpicdsgd"):
        arena.repair()
    assert "1 parameters had left the optimizer's memory" in caplog.text


def test_repair_refuses_what_does_not_fit() -> None:
    p, q = parameter(4), parameter(2, 3)
    arena = Arena([p, q])
    p.data = p.data.double()
    with pytest.raises(UserError, match=r"parameter 0 of shape \(4,\) is torch\.float64"):
        arena.repair()
    p.data = p.data.float()
    q.data = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"parameter 1 of shape \(2, 3\) now has shape \(3, 3\)"):
        arena.repair()


@pytest.mark.parametrize("shape", [(3, 3), (2, 3)])
def test_a_view_of_the_arena_itself_is_no_way_out(shape: tuple[int, int]) -> None:
    """Transposed in place: the same address, but another order."""
    p = parameter(*shape)
    arena = Arena([p])
    p.data = p.data.t()
    if shape == (3, 3):
        expected = p.detach().clone()
        assert arena.repair()
        assert torch.equal(p, expected)
        assert torch.equal(arena.views[0], expected)
    else:
        with pytest.raises(UserError, match=r"now has shape \(3, 2\)"):
            arena.repair()


def test_changed_sees_every_write_that_autograd_sees() -> None:
    p, q = parameter(4), parameter(3)
    arena = Arena([p, q])
    assert not arena.changed()
    with torch.no_grad():
        q[0] = 5.0
    assert arena.changed()
    arena.accept()
    assert not arena.changed()
    arena.written()
    assert not arena.changed()
    with torch.no_grad():
        arena.flat[0] += 1  # the flat buffer is ours; who writes it says so by `written`
    p.data[0] += 1.0
    assert not arena.changed()


def test_checksum_sees_every_write() -> None:
    p, q = parameter(4), parameter(3)
    arena = Arena([p, q])
    checksum = arena.checksum()
    q.data[2] += 1.0
    assert arena.checksum() != checksum
    q.data[2] -= 1.0
    kept = arena.checksum()
    p.data[0] = -p.data[0]
    assert arena.checksum() != kept


def test_written_tells_autograd() -> None:
    p = parameter(4)
    arena = Arena([p])
    loss = (p * p).sum()
    arena.written()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_read_where_they_are() -> None:
    parameters = kinds()
    arena = Arena(parameters)
    for p in parameters:
        p.grad = torch.empty_strided(p.shape, p.stride()).copy_(torch.randn(p.shape))
    arena.fill_segments([Coefficients(alpha=0.1)] * len(parameters))
    assert np.count_nonzero(arena.segments["grad"]) == len(parameters) - 1  # one is empty
    for i, p in enumerate(parameters):
        if p.numel():
            assert arena.segments["grad"][i] == p.grad.data_ptr()


def test_gradients_of_other_strides_come_in_the_parameters_order() -> None:
    parameters = kinds()
    arena = Arena(parameters)
    gradients = [torch.randn(tuple(reversed(p.shape))).permute(tuple(range(p.dim()))[::-1])
                 for p in parameters]  # fmt: skip
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    arena.fill_segments([Coefficients(alpha=0.1)] * len(parameters))
    for i, gradient in enumerate(gradients):
        if gradient.numel():
            assert np.array_equal(gradient_of(arena, i), in_memory_order(arena, i, gradient))


def test_sparse_and_expanded_gradients() -> None:
    p, q = parameter(6, 2), parameter(2, 3)
    arena = Arena([p, q])
    indices, values = torch.tensor([[1, 4, 4]]), torch.tensor([[1.0, 2], [3, 4], [10, 20]])
    p.grad = torch.sparse_coo_tensor(indices, values, (6, 2), check_invariants=True)
    q.grad = torch.tensor(2.5).expand(2, 3)
    arena.fill_segments([Coefficients(alpha=0.1)] * 2)
    expected = np.zeros((6, 2), np.float32)
    expected[1], expected[4] = (1, 2), (13, 24)
    assert np.array_equal(gradient_of(arena, 0), expected.reshape(-1))
    assert gradient_of(arena, 1).tolist() == [2.5] * 6


def test_no_gradient_is_address_zero() -> None:
    p, q = parameter(4), parameter(3)
    arena = Arena([p, q], [torch.ones(2)])
    q.grad = torch.ones(3)
    coefficients = [Coefficients(0.1, 0.2, 0.3, 0.4, 0.5), Coefficients(1, 2, 3, 4, 5)]
    arena.fill_segments(coefficients)
    assert arena.segments["grad"].tolist() == [0, q.grad.data_ptr(), 0]
    row = arena.segments[0]
    names = ("alpha", "decay", "mu", "c_v", "c_g")
    assert [float(row[name]) for name in names] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    only_mixing = arena.mix_only_segments()
    assert only_mixing["grad"].tolist() == [0, 0, 0]
    assert only_mixing["own"].tolist() == [0, 0, 1]
    assert arena.segments["grad"][1] != 0  # a copy
    q.grad = None
    arena.fill_segments(coefficients)
    assert arena.segments["grad"].tolist() == [0, 0, 0]
    assert arena.segments["decay"][:2].tolist() == pytest.approx([0.2, 2.0])


def test_what_is_frozen_is_no_part_of_the_penalty() -> None:
    p, q = parameter(4), parameter(3)
    p.requires_grad_(False)
    q.requires_grad_(False)
    q.grad = torch.ones(3)  # from before: torch's optimizers apply it still, with decay
    arena = Arena([p, q])
    arena.fill_segments([Coefficients(alpha=0.1, decay=0.5)] * 2)
    assert arena.segments["decay"].tolist() == [0, 0.5]


def test_a_gradient_is_fresh_once() -> None:
    p, q = parameter(4), parameter(3)
    arena = Arena([p, q])
    assert arena.fresh_gradients() == 0
    p.grad, q.grad = torch.ones(4), torch.ones(3)
    assert arena.fresh_gradients() == 2
    assert arena.fresh_gradients() == 0
    p.grad.add_(1)
    assert arena.fresh_gradients() == 1
    (3 * q).sum().backward()  # accumulates into the same tensor
    assert arena.fresh_gradients() == 1
    p.grad = torch.ones(4)
    assert arena.fresh_gradients() == 1
    p.grad = q.grad = None
    assert arena.fresh_gradients() == 0


def test_layout_tells_shapes_strides_and_order_apart() -> None:
    layouts = {
        Arena([parameter(2, 3), parameter(4)]).layout(),
        Arena([parameter(4), parameter(2, 3)]).layout(),
        Arena([parameter(3, 2), parameter(4)]).layout(),
        Arena([torch.nn.Parameter(torch.randn(3, 2).t()), parameter(4)]).layout(),
        Arena([parameter(2, 3)], [torch.ones(4)]).layout(),
    }
    assert len(layouts) == 5
    assert Arena([parameter(2, 3)]).layout() == Arena([parameter(2, 3)]).layout()


def test_views_of_a_row_lie_in_that_row() -> None:
    arena = Arena([torch.zeros(2, 3), torch.zeros(5)])
    rows = torch.zeros(3, arena.size)
    for view in arena.views_of(rows[1]):
        view.fill_(1.0)
    assert rows.sum(dim=1).tolist() == [0.0, 11.0, 0.0]
