"""Modules that users were told of before they moved: their old names are the same modules."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "mpicdsgd.bounds": "mpicdsgd.theory.bounds",
    "mpicdsgd.trace": "mpicdsgd.runs.trace",
}


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED` by their old names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's there
