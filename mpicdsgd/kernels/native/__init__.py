"""The fused update kernel: one pass over memory finishes a step of any of the algorithms."""

from mpicdsgd.kernels.native.dispatch import backend, fallback, isa, reason, update
from mpicdsgd.kernels.native.reference import SEGMENT, Result

__all__ = ["SEGMENT", "Result", "backend", "fallback", "isa", "reason", "update"]
