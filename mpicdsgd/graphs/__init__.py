"""Graphs between agents and the mixing matrices on them: NumPy and networkx, no MPI, no torch.

May import `common`. Begin with `graph` (who reads whom), then `mixing_matrix` (the paper's Pi and
Assumption 2), `mixing_rules` (weights from degrees) and `specs` (both from a config's text).
"""
