"""MPI: the agents, what they agree on, and how values travel between them.

May import `kernels` and what is below. Begin with `agents` (who is there), `agreement` (a mistake
on one rank is raised on all), then `exchange/exchange.py` (values over the graph's edges) and
`links/assembly.py` (what is shared by other ways).
"""
