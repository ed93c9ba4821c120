"""The algorithms, and the torch optimizers that run them over MPI.

May import `models` and what is below. Begin with `cdsgd` (the paper's equation 5), then `optimizer`
(what all share), `stepper` (a step: wait, pass, post) and `factory` (an algorithm from a config).
"""
