"""A run of a config on many ranks: start, loop, records, stop, restart.

May import `checkpoints` and what is below. Begin with `train` (a whole job), `start` (what a run
begins with) and `run` (the loop).
"""
