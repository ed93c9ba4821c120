"""What checkpoints and starts cost: `run.py`."""
