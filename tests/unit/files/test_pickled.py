"""Pickles are interpreted: plain values come out as Python's own unpickler gives them, and nothing else ever happens."""

from __future__ import annotations

import enum
import pickle
import struct
from argparse import Namespace
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import CheckpointError
from megatron_prune.files import pickled
from megatron_prune.files.documents import shorten
from megatron_prune.files.pickled import Inert, named, read_pickle

KEYS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.tuples(st.integers(), st.text())
)
PLAIN = st.recursive(
    KEYS | st.binary().map(bytearray) | st.sets(KEYS),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)
CODEC = {"_codecs.encode": lambda text, coding: text.encode(coding), "builtins.set": set, "builtins.bytearray": bytearray}


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back(value, protocol):
    known = {
        **CODEC,
        **{name.replace("builtins", "__builtin__"): made for name, made in CODEC.items()},
        "__builtin__.bytes": bytes,
    }
    shared = [value, value]
    assert read_pickle(pickle.dumps(shared, protocol), "x", known=known) == shared


class Scope(enum.Enum):
    LAYER = 2


class Own:
    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_not_known_is_held_with_what_the_file_says_of_it(protocol):
    data = pickle.dumps({"scope": Scope.LAYER, "own": Own(a=1), "kind": Own}, protocol)
    value = read_pickle(data, "x")
    assert (value["scope"].kind, value["scope"].arguments) == (f"{__name__}.Scope", (2,))
    assert value["own"].state == {"a": 1}
    assert (value["kind"].kind, value["kind"].arguments) == (f"{__name__}.Own", None)
    assert {f"{__name__}.Scope", f"{__name__}.Own"} <= named(data, "x")
    assert repr(value["own"]).startswith("<")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_known_class_is_built(protocol):
    args = Namespace(a=1, b=[2])
    assert (
        read_pickle(pickle.dumps(args, protocol), "x", known={"argparse.Namespace": Namespace, "copy_reg._reconstructor": made})
        == args
    )


def made(kind, base, state):
    return Namespace()


def name(module: bytes, attribute: bytes) -> bytes:
    return b"c" + module + b"\n" + attribute + b"\n"


def text(value: bytes) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value


SYSTEM = name(b"os", b"system")
TOUCH = text(b"touch executed")
BOMBS = {
    "REDUCE": SYSTEM + TOUCH + b"\x85R.",
    "REDUCE of posix": name(b"posix", b"system") + TOUCH + b"\x85R.",
    "STACK_GLOBAL": text(b"os") + text(b"system") + b"\x93" + TOUCH + b"\x85R.",
    "INST": b"(" + TOUCH + b"ios\nsystem\n.",
    "OBJ": b"(" + SYSTEM + TOUCH + b"o.",
    "NEWOBJ": SYSTEM + TOUCH + b"\x85\x81.",
    "NEWOBJ_EX": SYSTEM + TOUCH + b"\x85}\x92.",
    "eval": name(b"builtins", b"eval") + TOUCH + b"\x85R.",
    "Python 2": name(b"__builtin__", b"eval") + TOUCH + b"\x85R.",
    "exec": name(b"builtins", b"exec") + TOUCH + b"\x85R.",
    "a dotted name": text(b"pathlib") + text(b"Path.touch") + b"\x93" + TOUCH + b"\x85R.",
    "a dotted name of a harmless class": text(b"collections") + text(b"OrderedDict.fromkeys") + b"\x93.",
    "importlib": name(b"importlib", b"import_module") + TOUCH + b"\x85R.",
    "subprocess": name(b"subprocess", b"Popen") + TOUCH + b"\x85R.",
    "runpy": name(b"runpy", b"run_path") + TOUCH + b"\x85R.",
    "a submodule": name(b"multiprocessing.util", b"spawnv_passfds") + b".",
    "in a list, never called": b"](" + SYSTEM + b"e.",
    "thrown away": SYSTEM + b"0N.",
    "a state": name(b"types", b"FunctionType") + b")\x81}" + text(b"x") + b"K\x01sb.",
    "operator": name(b"operator", b"methodcaller") + TOUCH + b"\x85R.",
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("protocol", [b"\x80\x02", b"\x80\x04", b"\x80\x05"])
def test_a_function_of_pythons_own_is_refused_by_name(kind, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"x names '[\w.]+', which no checkpoint needs"):
        read_pickle(protocol + BOMBS[kind], "x")
    assert not list(tmp_path.iterdir())


def test_one_of_these_does_go_off_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x04" + BOMBS["REDUCE"])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_a_class_by_the_number_that_a_process_has_given_it_is_refused(code):
    with pytest.raises(CheckpointError, match="names 'copyreg.extension 1'"):
        read_pickle(b"\x80\x02" + code + b".", "x")


@pytest.mark.parametrize("data", [b"Pname\n.", b"Vname\nQ."])
def test_a_persistent_id_is_held_or_looked_up(data):
    assert read_pickle(data, "x").arguments == ("name",)
    assert read_pickle(data, "x", persistent=str.upper) == "NAME"


def test_the_state_of_a_class_that_is_not_known_runs_nothing():
    data = name(b"some.module", b"Kind") + b")\x81" + text(b"state") + b"b."
    assert read_pickle(data, "x").state == "state"


def test_what_follows_the_end_is_not_looked_at():
    assert read_pickle(pickle.dumps(1) + b"cos\nsystem\n.", "x") == 1


PAIRS = b"K\x01\x85q\x000" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(60))
"""Memo 60: a tuple of 2^60 parts, all shared."""
DAMAGED = {
    "nothing": b"",
    "no end": b"\x80\x02N",
    "an unknown opcode": b"\x80\x02\xff.",
    "an empty stack": b"\x80\x02.",
    "a mark as the value": b"(.",
    "no mark": b"NNt.",
    "an odd number of items": b"}(NNNu.",
    "a memo that was not made": b"h\x05.",
    "a list as a key": b"}]Ns.",
    "a key that takes 2^60 steps to hash": b"\x80\x02" + PAIRS + b"}h\x3cK\x01s.",
    "the same in a set": b"\x80\x04" + PAIRS + b"\x8f(h\x3c\x90.",
    "the same frozen": b"\x80\x04" + PAIRS + b"(h\x3c\x91.",
    "the same in a class": b"\x80\x02" + PAIRS + b"}" + name(b"a", b"Key") + b"h\x3c\x85RK\x01s.",
    "a call of no class": b"K\x01)R.",
    "items for a number": b"K\x01K\x02a.",
    "entries for a list": b"]K\x01K\x02s.",
    "items for a list as a set": b"\x80\x04](K\x01\x90.",
    "a state for a number": b"K\x01K\x02b.",
    "a text that is cut short": b"\x8c\x10abc.",
    "a text longer than memory": b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc.",
    "bytes longer than memory": b"B" + struct.pack("<I", (1 << 32) - 1) + b"abc.",
    "a number of too many digits": b"I" + b"9" * 10_000 + b"\n.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
}


@dataclass(frozen=True)
class Key:
    part: object


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_pickle_is_a_message(kind):
    with pytest.raises(CheckpointError, match="x holds a damaged pickle"):
        read_pickle(DAMAGED[kind], "x", known={"a.Key": Key})


def test_a_stand_in_is_a_key_by_its_identity():
    assert len(read_pickle(DAMAGED["the same in a class"], "x")) == 1


def test_nesting_has_no_limit_and_its_message_is_short():
    value = read_pickle(b"]" + b"](" * 200_000 + b"e" * 200_000 + b".", "x")
    assert isinstance(value, list)
    shared = read_pickle(b"\x80\x02" + PAIRS + b"h\x3c.", "x")
    assert len(shorten(shared)) <= 80


def test_steps_are_counted(monkeypatch):
    monkeypatch.setattr(pickled, "MAX_STEPS", 100)
    with pytest.raises(CheckpointError, match="more than 100 steps"):
        read_pickle(b"]" * 101 + b".", "x")


def test_no_opcode_of_python_is_forgotten():
    import pickletools

    named_here = {name for name in vars(pickled._Machine) if name.startswith("_")}
    for opcode in pickletools.opcodes:
        found = opcode.name in pickled._CONSTANTS or opcode.name in pickled._LITERALS or f"_{opcode.name.lower()}" in named_here
        assert found or opcode.name in ("STOP", "NEXT_BUFFER", "READONLY_BUFFER"), opcode.name


def test_a_stand_in_is_no_more_than_it_says():
    assert Inert.__slots__ == ("kind", "arguments", "state")
