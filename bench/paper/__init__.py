"""The paper's experiments, and a page that answers its claims: `run.py`."""
