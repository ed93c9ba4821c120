"""On a GPU: `suite.sh` builds, tests and measures; `kernel.py`, `exchange.py`, `step.py` alone."""
