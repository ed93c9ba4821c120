"""The fused update kernel: one pass over memory finishes a step of any of the algorithms."""

from mpicdsgd.native.dispatch import backend, fallback, isa, reason, update
from mpicdsgd.native.reference import SEGMENT

__all__ = ["SEGMENT", "backend", "fallback", "isa", "reason", "update"]
