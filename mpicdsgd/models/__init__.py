"""Models and losses by name, and evaluating a model on samples.

May import `data` and what is below. Begin with `build` (section [model] of a config).
"""
