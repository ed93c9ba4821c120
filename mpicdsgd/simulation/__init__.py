"""A run of many agents in one process.

May import `runs` and what is below. Begin with `simulation` (the loop) and `agent_stack` (the
agents' memory and the passes over it).
"""
