"""What the definitions of several commands have in common."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_config(command: argparse.ArgumentParser) -> None:
    """A run's config, and what is to be different in it."""
    command.add_argument("config", metavar="RUN.toml")
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
