"""The command line: ``mpicdsgd train | submit | simulate | graph | theory | plot ...``.

Exit codes: 0 done, 2 a user's mistake (one line on stderr, on no rank a traceback), 80 stopped with
a checkpoint (see `stop`), 1 all else.
Each command is a file of this folder, with its arguments. MPI and torch take seconds: who needs
them imports them in a function, so the other commands work on a login node.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from mpicdsgd import __version__
from mpicdsgd.cli import (
    compare,
    exit_codes,
    export,
    graph,
    info,
    inspect,
    plot,
    simulate,
    submit,
    theory,
    train,
)
from mpicdsgd.common.errors import UserError

# In the order in which the help shows them.
_COMMANDS = (train, simulate, submit, graph, theory, plot, compare, inspect, export, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv``; returns the exit code. ``train`` is collective."""
    code = _main(argv)
    if exit_codes.started():
        from mpicdsgd.comm import shutdown

        shutdown.leave(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no overrides behind an option: train RUN.toml --agents 5 optim.lr=0.1
        if not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    logging.basicConfig(
        format="%(message)s", level=logging.INFO if exit_codes.first() else logging.WARNING
    )
    try:
        code: int = arguments.run(arguments)
        return code
    except UserError as error:
        return exit_codes.mistake(error)
    except KeyboardInterrupt:
        # It comes twice, from the terminal and from the launcher.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return exit_codes.interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Prints a mistake in the arguments on the first rank only; all of them leave with code 2."""

    def error(self, message: str) -> NoReturn:
        if exit_codes.first():
            super().error(message)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpicdsgd",
        description="Decentralised training of PyTorch models over MPI.",
    )
    parser.add_argument("--version", action="version", version=f"mpicdsgd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
