"""A run of many agents in one process.

May import `runs` and what is below. Begin with `simulation` (the loop) and `rows` (the
verbs of a step over the memory of all agents).
"""
