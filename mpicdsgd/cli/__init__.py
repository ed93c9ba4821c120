"""The command line: ``mpicdsgd train``, ``simulate``, ``graph``, ``theory`` and the others.

May import everything. Begin with `parser` (the commands), `exit_codes` and `launch`.
"""

from mpicdsgd.cli.parser import main

__all__ = ["main"]
