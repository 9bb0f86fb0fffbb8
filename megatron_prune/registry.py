"""Named things found by scanning a package: one file each, one decorator each.

An import error in a scanned file is raised, never hidden; an unknown name is answered with the nearest known one.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Generic, TypeVar

from megatron_prune.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind, registered by the modules of one package.

    Args:
        kind: the word for an entry in messages (``"metric"``).
        package: dotted name of the package whose modules register entries; imported at the first look-up.
    """

    def __init__(self, kind: str, package: str):
        self._kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str):
        """Decorator: file the decorated object under ``name``."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise RuntimeError(f"{self._kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def forget(self, name: str) -> None:
        """Take an entry out again, so that another can stand under its name."""
        self._entries.pop(name, None)

    def _scan(self) -> None:
        if not self._scanned:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._scanned = True

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._scan()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            InputError: if there is none, naming the nearest and all known names.
        """
        self._scan()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            raise InputError(
                f"unknown {self._kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                needed="one of " + ", ".join(self.names()),
            )
        return self._entries[name]
