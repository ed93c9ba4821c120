"""GPUs: which one a rank uses, or why none."""

from __future__ import annotations

from functools import cache

import torch

from mpicdsgd.kernels.gpu.cuda import Gpu

__all__ = ["Gpu", "count", "open_gpu", "why_not"]


def count() -> int:
    """GPUs that torch sees in this process."""
    return torch.cuda.device_count()


def why_not() -> str:
    """Why this process can use no GPU, "" where it can. Local."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    extra = f"cuda{torch.version.cuda.split('.')[0]}"
    try:
        from cupy.cuda import runtime
    except Exception as error:  # a broken install raises anything
        return f"CuPy cannot be imported ({error}): pip install 'mpicdsgd[{extra}]'"
    try:
        runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy finds no GPU ({error}): it must be for torch's CUDA, 'mpicdsgd[{extra}]'"
    return ""


@cache
def open_gpu(index: int) -> Gpu:
    """GPU ``index`` of those that this process sees, always the same. Local; may wait."""
    return Gpu(index)
