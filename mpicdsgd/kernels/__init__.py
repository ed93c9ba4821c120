"""The fused update: one pass over an agent's flat memory mixes, steps and publishes.

May import `common` and `graphs`. Begin with `arena` (the flat memory), then `update` (the pass on
host and GPU), `native/reference.py` (what it computes, in NumPy) and `native/update.h` (the same
bits, compiled).
"""
