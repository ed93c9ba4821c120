"""Views into rows that are laid out as an arena."""

from __future__ import annotations

import torch

from mpicdsgd.kernels.arena import Arena


def stacked_views(layout: Arena, stack: torch.Tensor) -> list[torch.Tensor]:
    """Views into rows laid out as ``layout``: of each parameter, shape (N, ...)."""
    n, size = stack.shape
    return [
        stack.as_strided((n, *view.shape), (size, *view.stride()), view.storage_offset())
        for view in layout.views[: len(layout.parameters)]
    ]
