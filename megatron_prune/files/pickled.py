"""Pickles, read without ever running what they say: an interpreter that builds plain values and inert stand-ins.

A pickle is a program whose every call is the file's choice. Here its opcodes (taken apart by the standard library's
``pickletools``) move values about and nothing else: what would call or build something becomes an :class:`Inert` that
holds the name and the arguments, except for the few harmless constructors that the caller lists. What names a function of
Python's own that no data needs (``eval``, ``os.system`` …) is refused all the same: it was made to do harm elsewhere. Steps
and sizes are bounded by the file's, and nothing that takes longer to hash than it is long becomes a key.
"""

from __future__ import annotations

import pickletools
import sys
from typing import Any, BinaryIO, Callable, Mapping

from megatron_prune.errors import CheckpointError, reason
from megatron_prune.files.documents import shorten

MAX_STEPS = 10_000_000
_KEY_PARTS = 64
_MARK = object()


class Inert:
    """What stands for an object of a class that is not known here; it holds what the file says of it and does nothing.

    Attributes:
        kind: ``module.name`` of the class or function; the object is that itself where ``arguments`` is ``None``.
        arguments: what it would have been called with.
        state: what it would have been given afterwards.
    """

    __slots__ = ("kind", "arguments", "state")

    def __init__(self, kind: str, arguments: Any = None):
        self.kind, self.arguments, self.state = kind, arguments, None

    def __repr__(self) -> str:
        return f"<{self.kind}>"


Known = Mapping[str, Any]
"""``module.name`` → a class, or a function of the stored arguments, that is harmless whatever they are; or a value."""


def read_pickle(
    data: bytes | BinaryIO,
    where: object,
    *,
    known: Known = {},
    persistent: Callable[[Any], Any] | None = None,
    seen: set[str] | None = None,
) -> Any:
    """The value that a pickle describes.

    Args:
        data: the pickle; what follows its end is not looked at.
        where: the file, for messages.
        known: what is called, with the arguments as stored. Everything else becomes :class:`Inert`.
        persistent: persistent id → value; an :class:`Inert` without it.
        seen: takes the ``module.name`` of everything that the pickle names.

    Raises:
        CheckpointError: if it is not a whole pickle, longer than :data:`MAX_STEPS`, or names what no data needs.
    """
    machine = _Machine(where, known, persistent, set() if seen is None else seen)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == MAX_STEPS:
                raise CheckpointError(f"{where} holds a pickle of more than {MAX_STEPS:,} steps")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
        raise ValueError("it has no end")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{where} holds a damaged pickle", got=reason(error)) from None


def named(data: bytes | BinaryIO, where: object) -> set[str]:
    """``module.name`` of everything that a pickle would import, for a check before another library unpickles it."""
    seen: set[str] = set()
    read_pickle(data, where, seen=seen)
    return seen


class _Machine:
    """The stack, the memo, and what an opcode does to them."""

    def __init__(self, where: object, known: Known, persistent: Callable[[Any], Any] | None, seen: set[str]):
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._known, self._persistent, self._seen = known, persistent, seen

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self._stack.append(argument)
        else:
            getattr(self, f"_{name.lower()}")(argument)

    def _items(self) -> list[Any]:
        """Everything above the last mark."""
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:  # ends with an IndexError below the bottom
            position -= 1
            if position < 0:
                raise ValueError("a mark is missing")
        items = self._stack[position + 1 :]
        del self._stack[position:]
        return items

    # ------------------------------------------------------------------------------------------------ stack and memo

    def _proto(self, _: Any) -> None:
        pass

    _frame = _proto

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._items()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    _binput = _long_binput = _put

    def _get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    _binget = _long_binget = _get

    # ---------------------------------------------------------------------------------------------------- containers

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._items()))

    def _tuple1(self, _: Any) -> None:
        self._stack.append((self.pop(),))

    def _tuple2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self._stack.append((first, second))

    def _tuple3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self._stack.append((first, second, third))

    def _list(self, _: Any) -> None:
        self._stack.append(self._items())

    def _dict(self, _: Any) -> None:
        items = self._items()
        self._stack.append({})
        self._fill(items)

    def _frozenset(self, _: Any) -> None:
        self._stack.append(frozenset(_key(item) for item in self._items()))

    def _append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._items())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)
        elif not isinstance(self._stack[-1], Inert):
            raise ValueError("items are added to what is no list")

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._fill([key, value])

    def _setitems(self, _: Any) -> None:
        self._fill(self._items())

    def _fill(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a value is missing")
        if isinstance(self._stack[-1], dict):
            self._stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2]))
        elif not isinstance(self._stack[-1], Inert):
            raise ValueError("entries are added to what is no dictionary")

    def _additems(self, _: Any) -> None:
        items = self._items()
        if not isinstance(self._stack[-1], set):
            raise ValueError("items are added to what is no set")
        self._stack[-1].update(_key(item) for item in items)

    # ------------------------------------------------------------------------------------------- classes and objects

    def _global(self, name: str) -> None:
        self._stack.append(self._name(*name.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self._stack.append(self._name(module, name))

    def _ext1(self, code: int) -> None:
        self._stack.append(self._name("copyreg", f"extension {code}"))

    _ext2 = _ext4 = _ext1

    def _name(self, module: str, name: str) -> Any:
        kind = f"{module}.{name}"
        if module.split(".")[0] in _PYTHON and kind not in HARMLESS and (module not in _HARMLESS_MODULES or "." in name):
            raise CheckpointError(
                f"{self._where} names {shorten(kind)}, which no checkpoint needs",
                do="do not use this file anywhere unless you trust where it comes from",
            )
        self._seen.add(kind)
        return Inert(kind) if callable(self._known.get(kind, Inert)) else self._known[kind]

    def _reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._stack.append(self._made(function, arguments))

    def _newobj(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        self._stack.append(self._made(kind, arguments, new=True))

    def _newobj_ex(self, _: Any) -> None:
        named_arguments, arguments, kind = self.pop(), self.pop(), self.pop()
        self._stack.append(Inert(_kind(kind), (arguments, named_arguments)))

    def _inst(self, name: str) -> None:
        items = tuple(self._items())
        self._stack.append(self._made(self._name(*name.split(" ", 1)), items))

    def _obj(self, _: Any) -> None:
        kind, *items = self._items()
        self._stack.append(self._made(kind, tuple(items)))

    def _made(self, function: Any, arguments: Any, *, new: bool = False) -> Any:
        kind = _kind(function)
        maker = self._known.get(kind) if function.arguments is None else None  # else: what a call gave is called
        if maker is None or not isinstance(arguments, tuple):
            return Inert(kind, arguments)
        return maker.__new__(maker, *arguments) if new and isinstance(maker, type) else maker(*arguments)

    def _build(self, _: Any) -> None:
        state, built = self.pop(), self._stack[-1]
        if isinstance(built, Inert):
            built.state = state
        elif type(built) is dict:  # of an OrderedDict: attributes beside its entries, such as torch's _metadata
            pass
        elif type(built) not in self._known.values():
            raise ValueError(f"a {type(built).__name__} with a state")
        elif hasattr(type(built), "__setstate__"):
            built.__setstate__(state)
        else:
            own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            for name, value in {**(own or {}), **(slots or {})}.items():
                object.__setattr__(built, name, value)

    def _persid(self, name: Any) -> None:
        self._stack.append(self._persistent(name) if self._persistent else Inert("persistent id", (name,)))

    def _binpersid(self, _: Any) -> None:
        self._persid(self.pop())


_PYTHON = {*sys.stdlib_module_names, "__builtin__", "nt", "posix"}
_HARMLESS_MODULES = {
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "math",
    "numbers",
    "pathlib",
    "pathlib._local",
    "signal",
    "typing",
}
HARMLESS = frozenset(
    [
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            "bool bytearray bytes complex dict float frozenset getattr int list long object range set slice str tuple type unicode".split()
        )
    ]
    + "argparse.Namespace collections.Counter collections.OrderedDict collections.defaultdict collections.deque copy_reg._reconstructor "
    "copyreg._reconstructor functools.partial io.BytesIO io.StringIO _io.BytesIO _io.StringIO random.Random types.SimpleNamespace "
    "types.NoneType uuid.UUID _codecs.encode".split()
)
"""Names of Python's own that data is seen to hold; as all names that are not known they are held, never called."""

_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT".split()
)


def _kind(function: Any) -> str:
    if not isinstance(function, Inert):
        raise ValueError(f"a {type(function).__name__} is called")
    return function.kind


def _key(value: Any) -> Any:
    """A key that is quickly hashed: plain, or plain values nested a little."""
    parts = [value]
    for count, part in enumerate(parts):  # grows as it goes
        if count == _KEY_PARTS:
            raise ValueError(f"a key of more than {_KEY_PARTS} parts")
        if isinstance(part, tuple):
            parts.extend(part[: _KEY_PARTS + 1])
        elif isinstance(part, frozenset):
            raise ValueError("a set as a key")
        elif hasattr(part, "__dict__"):
            parts.extend(vars(part).values())
    return value
