"""The arena: one flat buffer for all parameters, which the model's tensors are views into.

Each tensor begins at a multiple of 64 bytes and keeps its own strides, so channels_last weights
stay so. Nothing is flattened or copied in a step: the kernel reads gradients where autograd left
them, by a table of segments, one for each tensor.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.kernels.native import SEGMENT

log = logging.getLogger("mpicdsgd")

_ALIGN = 16  # float32 elements in 64 bytes
_CPU = torch.device("cpu")


class Arena:
    """Flat float32 memory for ``parameters`` and then ``buffers``, and the tensors' views into it.

    Making one copies the tensors' values in and points the tensors (their ``.data``) at it.

    Args:
        parameters: distinct dense float32 tensors on ``device``, any shapes, also empty and 0-d.
        buffers: tensors that are mixed but have no gradient, such as BatchNorm's statistics; what
            the forward pass does to them is kept (own = 1 in the segments).
        device: where all of them are.
        flat: memory to take, of a size that an arena of such tensors has; None: its own.

    Attributes:
        flat: float32, shape (D,), D a multiple of 16; padding is 0.
        parameters_end: where the parameters end in ``flat`` and the buffers begin.
        segments: the kernel's table, one row for each tensor.

    Raises:
        UserError: for a tensor of another dtype, layout or device, or for two that share memory.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor] = (),
        device: torch.device = _CPU,
        flat: torch.Tensor | None = None,
    ) -> None:
        self._device = device
        self.parameters = list(parameters)
        self.tensors = [*parameters, *buffers]
        for i, tensor in enumerate(self.tensors):
            _check(f"tensor {i} {tuple(tensor.shape)}", tensor, device)
        _check_apart(self.tensors)
        lengths = np.array([t.numel() for t in self.tensors], dtype=np.int64)
        padded = -(-lengths // _ALIGN) * _ALIGN
        ends = np.cumsum(padded)
        self.size = int(ends[-1]) if len(ends) else 0
        if flat is None:
            flat = torch.zeros(self.size, dtype=torch.float32, device=device)
        assert flat.shape == (self.size,), "laid out alike"
        self.flat = flat
        self.segments = np.zeros(len(self.tensors), dtype=SEGMENT)
        self.segments["offset"] = ends - padded
        self.segments["length"] = lengths
        self.segments["own"][len(self.parameters) :] = 1
        self.parameters_end = int((ends - padded)[len(self.parameters)]) if buffers else self.size
        self._strides = [_dense_strides(t) for t in self.tensors]
        self.views = self.views_of(self.flat)
        for tensor, view in zip(self.tensors, self.views, strict=True):
            view.copy_(tensor.detach())
            tensor.data = view
        self._pointers = [view.data_ptr() for view in self.views]
        self._versions: list[int] = []
        self._keep_alive: list[torch.Tensor] = []
        self._gradients: list[tuple[torch.Tensor | None, int]] = [(None, -1)] * len(self.parameters)
        self.accept()

    @property
    def numpy(self) -> NDArray[np.float32]:
        """`flat` as an array on the host: the same memory there, a copy of a GPU's."""
        return self.flat.cpu().numpy()

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views into another flat buffer of the same layout, one for each tensor."""
        first = flat.storage_offset()  # a row of a matrix does not begin its storage
        return [
            flat.as_strided(tensor.shape, strides, first + int(offset))
            for tensor, strides, offset in zip(
                self.tensors, self._strides, self.segments["offset"], strict=True
            )
        ]

    def layout(self) -> str:
        """Shapes, strides and order as text, which must be the same on all agents."""
        tensors = [(tuple(t.shape), t.stride()) for t in self.views]
        return repr((len(self.parameters), tensors))

    def repair(self) -> bool:
        """Point tensors that left the arena back at it; True if their values were other ones.

        ``model.to(memory_format=...)`` and the like replace a parameter's storage. Where shape,
        dtype and device still fit, its values are taken into the arena.

        Raises:
            UserError: where they do not fit.
        """
        changed = False
        moved = 0
        for i, (tensor, view, pointer) in enumerate(
            zip(self.tensors, self.views, self._pointers, strict=True)
        ):
            here = tensor.data_ptr() == pointer and tensor.dtype == torch.float32
            here = here and tensor.device == self._device
            if here and (tensor.shape, tensor.stride()) == (view.shape, view.stride()):
                continue
            if tensor.numel() == 0 and tensor.shape == view.shape:
                continue
            name = f"parameter {i} of shape {tuple(view.shape)}"
            if tensor.shape != view.shape:
                raise UserError(
                    f"{name} now has shape {tuple(tensor.shape)}: make a new optimizer for it"
                )
            _check(name, tensor, self._device)
            if not torch.equal(tensor.detach(), view):
                changed = True
                view.copy_(tensor.detach().clone())  # it may be a view of the same memory
            tensor.data = view
            moved += 1
        if moved:
            log.warning(
                "%d parameters had left the optimizer's memory (model.to(), another optimizer) and "
                "were put back, in the memory format they had at first",
                moved,
            )
        return changed

    def changed(self) -> bool:
        """Whether anybody wrote parameters since `accept`, by their version counters."""
        return self._versions != [p._version for p in self.parameters]

    def accept(self) -> None:
        """Take the parameters' present values as ours."""
        self._versions = [p._version for p in self.parameters]

    def written(self) -> None:
        """Tell autograd that the parameters were written, and `accept` that."""
        torch.autograd.graph.increment_version(self.tensors)
        self.accept()

    def checksum(self) -> int:
        """CRC-32 of the parameters' bytes (not the buffers', which a forward pass writes)."""
        return zlib.crc32(self.flat[: self.parameters_end].cpu().numpy().data)

    def fresh_gradients(self) -> int:
        """How many parameters have a gradient that is not the one of the last call, untouched.

        None has where backward() ran on other parameters: a copied model's, or those that
        ``load_state_dict(assign=True)`` put in their place.
        """
        before = self._gradients
        now = [p.grad for p in self.parameters]
        self._gradients = [(g, -1 if g is None else g._version) for g in now]
        return sum(
            g is not None and (g is not old or g._version != version)
            for g, (old, version) in zip(now, before, strict=True)
        )

    def require_fresh_gradients(self) -> None:
        """Raise a RuntimeError unless `fresh_gradients` finds one."""
        if self.fresh_gradients() == 0:
            raise RuntimeError(
                "no parameter has a new gradient: did backward() run, or were the model's "
                "parameters replaced (deepcopy, load_state_dict(assign=True))? opt.mix() steps "
                "without one"
            )

    def fill_segments(self, coefficients: Sequence[Coefficients]) -> None:
        """Write gradients and coefficients, one for each parameter, into `segments`.

        The addresses stay valid until the next call.
        """
        self._keep_alive = []
        addresses = [self._gradient_address(p, i) for i, p in enumerate(self.parameters)]
        rows = self.segments[: len(self.parameters)]
        rows["grad"] = addresses
        for name in ("alpha", "decay", "mu", "c_v", "c_g"):
            rows[name] = [getattr(c, name) for c in coefficients]
        held = np.array([p.requires_grad for p in self.parameters], np.bool_)
        rows["decay"][(rows["grad"] == 0) & ~held] = 0  # frozen: no part of what is minimised

    def mix_only_segments(self) -> NDArray[np.void]:
        """A copy of `segments` without gradients: x <- mix, v kept."""
        rows = self.segments.copy()
        rows["grad"] = 0
        return rows

    def _gradient_address(self, parameter: torch.Tensor, index: int) -> int:
        gradient = parameter.grad
        if gradient is None or gradient.numel() == 0:
            return 0
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if gradient.dtype != torch.float32 or gradient.stride() != parameter.stride():
            # The kernel reads a segment in the parameter's own order.
            view = self.views[index]
            own = torch.empty_strided(view.shape, view.stride(), device=self._device)
            gradient = own.copy_(gradient)
        self._keep_alive.append(gradient)
        return gradient.data_ptr()


def _check(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.float32:
        raise UserError(
            f"{name} is {tensor.dtype}, but agents keep float32 state: convert the model with "
            ".float() before making the optimizer (autocast may compute in bfloat16)"
        )
    if tensor.device != device or tensor.layout != torch.strided:
        raise UserError(
            f"{name} is {tensor.layout} on {tensor.device}: parameters must be dense on {device}, "
            "the agent's device (model.to(agents.device))"
        )


def _check_apart(tensors: Sequence[torch.Tensor]) -> None:
    # Views of their own in the arena, they would not change together any more.
    dense = [(i, t) for i, t in enumerate(tensors) if t.numel() and _dense_strides(t) == t.stride()]
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel(), i) for i, t in dense)
    for (_, end, i), (begin, _, j) in pairwise(spans):
        if begin < end:
            raise UserError(
                f"tensors {min(i, j)} and {max(i, j)} share memory: give each once, and tie "
                "parameters by using the same Parameter object in both places"
            )


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides, or row-major ones where its own leave gaps or overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()
