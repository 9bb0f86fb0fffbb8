"""No reader of the product runs what a file says: every place that could unpickle is known, with what guards it, and programs
of all kinds that do harm to Python's own unpickler (which is shown) do none here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copyreg
import cProfile
import functools
import importlib
import io
import json
import logging
import marshal
import operator
import os
import pickle
import runpy
import shutil
import sqlite3
import subprocess
import tarfile
import time
import timeit
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy
import pytest
import torch

from megatron_prune.checkpoint import legacy, torch_archive, torch_dist
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.recovery import index_cache, reading
from megatron_prune.vocabulary import id_map
from megatron_prune.vocabulary.request import read_ids

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------------- who could unpickle

WEIGHTS_ONLY = "torch's own interpreter of plain values: weights_only=True"
ARRAYS = "numpy.load without allow_pickle (its default)"
OWN_PROCESSES = "what processes of one run send each other"
OWN_TOOLS = "imports modules of this project or named in it, never by a file's word"
TRANSFORMERS = "transformers 5 loads .bin with weights_only=True, and safetensors where there are any"
GUARDED = {
    "megatron_prune/__init__.py": {"importlib.import_module": OWN_TOOLS},
    "megatron_prune/api.py": {"importlib.import_module": OWN_TOOLS},
    "megatron_prune/cli/config_file.py": {"import yaml": "composed into nodes, whose plain values alone are taken"},
    "megatron_prune/steps/inspect.py": {"import yaml": "written by safe_dump, never read"},
    "megatron_prune/verbs/table.py": {"importlib.import_module": OWN_TOOLS},
    "megatron_prune/registry.py": {"importlib.import_module": OWN_TOOLS},
    "megatron_prune/serving/to_gguf.py": {
        "importlib.import_module": "the converter that the user names, which is a program of the user"
    },
    "megatron_prune/runtime/world.py": {"dist.all_gather_object": OWN_PROCESSES},
    "megatron_prune/runtime/megatron_stage.py": {"dist.all_gather_object": OWN_PROCESSES},
    "megatron_prune/text/encoder.py": {"AutoTokenizer.from_pretrained": "tokenizers hold no pickles"},
    "megatron_prune/text/parts.py": {"numpy.load": ARRAYS},
    "megatron_prune/text/pair.py": {"IndexedDataset": "reads numbers alone"},
    "megatron_prune/checkpoint/torch_archive.py": {"read_pickle": "files/pickled.py"},
    "megatron_prune/checkpoint/torch_dist.py": {"read_pickle": "files/pickled.py", "import pickle": "to write"},
    "megatron_prune/files/yaml_nodes.py": {"import yaml": "composed into nodes, from which nothing is built"},
    "megatron_prune/checkpoint/stored_args.py": {
        "import yaml": "nodes of files/yaml_nodes.py, whose plain values alone are taken"
    },
    "megatron_prune/runtime/stock_class.py": {"AutoConfig.from_pretrained": "JSON"},
    "megatron_prune/runtime/stock_model.py": {"kind.from_pretrained": TRANSFORMERS},
    "megatron_prune/evaluation/one_layer.py": {
        "importlib.import_module": "a module of transformers, for a family that this project knows",
    },
    "megatron_prune/files/pickled.py": {"read_pickle": "is the interpreter"},
    "megatron_prune/recovery/reading.py": {"dist_checkpointing.load": "reads through files/pickled.py, with readers of its own"},
    "megatron_prune/recovery/writer.py": {
        "import pickle": "a report",
        "pickle.loads": "of a child of this process, through memory that is no file",
    },
    "megatron_prune/recovery/data.py": {
        "BlendedMegatronDatasetBuilder": "inside index_cache.without_pickles()",
        "IndexedDataset": "reads numbers alone",
    },
    "emb_pruner/llama_emb_pruner/get_vocab_freq.py": {"torch.load": WEIGHTS_ONLY},
    "scripts/demo_model.py": {
        "AutoModelForCausalLM.from_pretrained": "a GGUF file of a known digest",
        "AutoTokenizer.from_pretrained": "a GGUF file of a known digest",
    },
    "benchmarks/gemma3.py": {
        "AutoModelForCausalLM.from_pretrained": TRANSFORMERS,
        "AutoTokenizer.from_pretrained": TRANSFORMERS,
    },
    "benchmarks/recovery.py": {
        "transformers.AutoModelForCausalLM.from_pretrained": TRANSFORMERS,
        "AutoConfig.from_pretrained": "JSON",
    },
    "benchmarks/vocabulary.py": {"AutoModelForCausalLM.from_pretrained": TRANSFORMERS},
    "containers/install.py": {"importlib.import_module": OWN_TOOLS},
}
"""File → what in it could execute what it reads → why it does not. Who adds a reader says here what guards it."""

_MODULES = "pickle _pickle cPickle dill cloudpickle joblib shelve marshal dbm jsonpickle yaml runpy".split()
_CALLS = (
    "torch.load torch.jit.load torch.hub.load torch.package.PackageImporter numpy.load np.load pandas.read_pickle pd.read_pickle "
    "eval exec compile __import__ importlib.import_module read_pickle IndexedDataset BlendedMegatronDatasetBuilder "
    "register_safe_globals torch.serialization.add_safe_globals torch.serialization.safe_globals"
).split()
_ATTRIBUTES = (
    "from_pretrained all_gather_object gather_object broadcast_object_list scatter_object_list recv_object_list "
    "load_plain_tensors load_common_state_dict load_content_metadata read_pickle Unpickler unsafe_load"
).split()


def readers(tree: ast.AST) -> set[str]:
    """What in a module could execute what it reads."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {f"import {module}" for module in modules if module.split(".")[0] in _MODULES}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_reader = name in _CALLS or name.split(".")[0] in _MODULES and "load" in name.split(".")[-1].lower()
            is_reader |= name.startswith("dist_checkpointing.load") or name.split(".")[-1] in _ATTRIBUTES
            found |= {name} if is_reader else set()
            asked = {word.arg: word.value for word in node.keywords}
            unsafe = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True}
            found |= {
                f"{word}={value}"
                for word, value in unsafe.items()
                if word in asked and isinstance(asked[word], ast.Constant) and asked[word].value is value
            }
    return found


def test_every_reader_that_could_unpickle_is_known_with_its_guard():
    found = {}
    for top in ("megatron_prune", "emb_pruner", "prune_hf", "prune_llama.py", "tools", "scripts", "benchmarks", "containers"):
        for path in [ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if names := readers(ast.parse(path.read_text(encoding="utf-8"))):
                found[name] = names
    known = {name: set(guards) for name, guards in GUARDED.items()}
    differing = {name: found.get(name, set()) ^ known.get(name, set()) for name in found | known}
    assert not {name: names for name, names in differing.items() if names}, "say in GUARDED what guards it"
    for name, guards in GUARDED.items():
        if WEIGHTS_ONLY in guards.values():
            assert (ROOT / name).read_text().count("torch.load(") == (ROOT / name).read_text().count("weights_only=True")


# ------------------------------------------------------------------------------------------------------------ the programs


class Call:
    """Pickled as a call of a function of any name."""

    def __init__(self, function: Callable, *arguments: Any):
        self._called = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self._called

    def __call__(self) -> None:
        """What a call gives may be called in turn; only what is callable is pickled as that."""


CANARY = "canary"
LINE = f"__import__('os').mkdir({CANARY!r})"
"""What a program does where it can: in the directory it runs in."""


def saved(value: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def function(module: str, name: str) -> Call:
    """One that is found while the pickle is loaded."""
    return Call(getattr, Call(importlib.import_module, module), name)


CODE = marshal.dumps(compile(LINE, "x", "eval"))
CALLS = {
    "os.system": Call(os.system, f"mkdir {CANARY}"),
    "os.mkdir": Call(os.mkdir, CANARY),
    "eval": Call(eval, LINE),
    "exec": Call(exec, LINE),
    "open": Call(open, CANARY, "w"),
    "check_call": Call(subprocess.check_call, ["mkdir", CANARY]),
    "getoutput": Call(subprocess.getoutput, f"mkdir {CANARY}"),
    "a method": Call(Path.mkdir, Path(CANARY)),
    "a method that writes": Call(Path.write_text, Path(CANARY), "x"),
    "getattr of os": Call(function("os", "mkdir"), CANARY),
    "getattr of builtins": Call(function("builtins", "eval"), LINE),
    "__import__": Call(Call(getattr, Call(__import__, "os"), "mkdir"), CANARY),
    "partial": Call(Call(functools.partial, os.mkdir, CANARY)),
    "methodcaller": Call(Call(operator.methodcaller, "mkdir"), Path(CANARY)),
    "attrgetter": Call(Call(Call(operator.attrgetter, "mkdir"), Call(importlib.import_module, "os")), CANARY),
    "map": Call(list, Call(map, os.mkdir, [CANARY])),
    "reduce": Call(functools.reduce, os.mkdir, [0o777], CANARY),
    "runpy": Call(runpy.run_path, "script.py"),
    "timeit": Call(timeit.timeit, LINE, "pass", timeit.default_timer, 1),
    "cProfile": Call(cProfile.run, LINE, "profile"),
    "a log": Call(logging.FileHandler, CANARY),
    "a database": Call(sqlite3.connect, CANARY),
    "a copy of a file": Call(shutil.copyfile, "script.py", CANARY),
    "bytecode": Call(
        Call(function("types", "FunctionType"), Call(marshal.loads, CODE), {"__builtins__": {"__import__": __import__}})
    ),
    "a pickle in a pickle": Call(pickle.loads, pickle.dumps(Call(os.mkdir, CANARY))),
    "an archive in a pickle": Call(torch.storage._load_from_bytes, saved(Call(os.mkdir, CANARY))),
    "numpy's exec": Call(numpy.testing._private.utils.runstring, LINE, {}),
    "torch's save": Call(torch.save, 1, CANARY),
    "our own": Call(staging.write_text, Path(CANARY), "x"),
}


class State:
    """What happens when it is given its state."""

    def __setstate__(self, canary: str) -> None:
        Path(canary).mkdir()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def name4(module: str, name: str) -> bytes:
    """By STACK_GLOBAL, which takes dotted names."""
    return text(module) + text(name) + b"\x93"


MKDIR, STATE, PROTO2, PROTO4 = b"cos\nmkdir\n", f"c{__name__}\nState\n".encode(), b"\x80\x02", b"\x80\x04"
PATH = text(CANARY)
BOMB = MKDIR + PATH + b"\x85R"
COMMAND = b"](" + text("mkdir") + PATH + b"e"
OPCODES = {
    "GLOBAL REDUCE": BOMB + b".",
    "STACK_GLOBAL": PROTO4 + name4("os", "mkdir") + PATH + b"\x85R.",
    "STACK_GLOBAL of a dotted name": PROTO4 + name4("os", "path.os.mkdir") + PATH + b"\x85R.",
    "STACK_GLOBAL through argparse": PROTO4 + name4("argparse", "_os.mkdir") + PATH + b"\x85R.",
    "STACK_GLOBAL through torch": PROTO4 + name4("torch", "os.mkdir") + PATH + b"\x85R.",
    "STACK_GLOBAL through a harmless module": PROTO4 + name4("glob", "os.mkdir") + PATH + b"\x85R.",
    "STACK_GLOBAL of the memo": PROTO4 + text("os") + b"\x940" + text("mkdir") + b"\x940h\x00h\x01\x93" + PATH + b"\x85R.",
    "INST": b"(" + COMMAND + b"isubprocess\nPopen\n.",
    "OBJ": b"(csubprocess\nPopen\n" + COMMAND + b"o.",
    "NEWOBJ and BUILD": PROTO2 + STATE + b")\x81" + PATH + b"b.",
    "NEWOBJ_EX and BUILD": PROTO4 + STATE + b")}\x92" + PATH + b"b.",
    "INST and BUILD": b"(i" + STATE[1:] + PATH + b"b.",
    "OBJ and BUILD": b"(" + STATE + b"o" + PATH + b"b.",
    "EXT1": PROTO2 + b"\x82\xf0" + PATH + b"\x85R.",
    "EXT2": PROTO2 + b"\x83\xf0\xf0" + PATH + b"\x85R.",
    "EXT4": PROTO2 + b"\x84\xf0\xf0\xf0\x70" + PATH + b"\x85R.",
    "Python 2's names": PROTO2 + b"c__builtin__\neval\n" + text(LINE) + b"\x85R.",
    "thrown away": BOMB + b"0N.",
    "in a list": b"](" + BOMB + b"e.",
    "in a tuple": b"(" + BOMB + b"t.",
    "a value": b"}" + text("args") + BOMB + b"s.",
    "a key": b"}" + BOMB + b"Ns.",
    "in a set": PROTO4 + b"\x8f(" + BOMB + b"\x90.",
    "in a frozen set": PROTO4 + b"(" + BOMB + b"\x91.",
    "from the memo": MKDIR + b"q\x000h\x00" + PATH + b"\x85R.",
    "a copy on the stack": MKDIR + b"20" + PATH + b"\x85R.",
    "an argument": b"ccollections\nOrderedDict\n(](](" + text("x") + BOMB + b"eetR.",
    "a state": PROTO2 + b"cargparse\nNamespace\n)\x81}" + text("x") + BOMB + b"sb.",
    "in a frame": PROTO4 + b"\x95" + len(BOMB + b".").to_bytes(8, "little") + BOMB + b".",
    "an argument of a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(" + BOMB + b"K\x00)))tR.",
    "an argument of a dtype": b"cnumpy\ndtype\n" + BOMB + b"\x85R.",
}
PROGRAMS = {
    **{f"{name}, protocol {number % 6}": pickle.dumps(call, number % 6) for number, (name, call) in enumerate(CALLS.items())},
    **{f"os.mkdir again, protocol {protocol}": pickle.dumps(CALLS["os.mkdir"], protocol) for protocol in range(6)},
    **OPCODES,
    "after the end": b"N." + BOMB + b".",
    "of a persistent id": PATH + b"Q" + BOMB + b"Q.",
    "without an end": BOMB,
}
HARMLESS_FOR_PYTHON = {
    "after the end",
    "of a persistent id",
    "without an end",
}  # or of what it does another kind of error comes first


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """What no program may make: it lies where they run."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(LINE)
    for code in (0xF0, 0xF0F0, 0x70F0F0F0):
        copyreg.add_extension("os", "mkdir", code) if code == 0xF0 else copyreg._inverted_registry.update({code: ("os", "mkdir")})
    yield tmp_path / CANARY
    copyreg.remove_extension("os", "mkdir", 0xF0)
    for code in (0xF0F0, 0x70F0F0F0):
        del copyreg._inverted_registry[code]


@pytest.mark.parametrize("program", sorted(set(PROGRAMS) - HARMLESS_FOR_PYTHON))
def test_the_programs_do_what_they_say_where_nobody_guards(canary, program):
    with contextlib.suppress(Exception):
        pickle.loads(PROGRAMS[program])
    for _ in range(500):  # a process of its own that makes it
        if canary.exists():
            break
        time.sleep(0.01)
    assert canary.exists()


# -------------------------------------------------------------------------------------------------------------- the places


def archive(path: Path, program: bytes, *, name: str = "archive/data.pkl") -> Path:
    """As ``torch.save`` writes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(name, program)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", bytes(64))
        file.writestr("archive/version", "3\n")
    return path


def torch_dist_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save({"args": argparse.Namespace()}, folder / "common.pt")
    return folder


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def old_sequence(program: bytes) -> bytes:
    """What torch wrote before 1.6: pickle after pickle."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    return magic + pickle.dumps({"little_endian": True}, 2) + program + pickle.dumps([], 2)


def old_tar(program: bytes) -> bytes:
    """And before that."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(program)
            file.addfile(info, io.BytesIO(program))
    return memory.getvalue()


def metadata(program: bytes) -> Any:
    written(torch_dist_folder(Path("d")) / ".metadata", program)
    return torch_dist.read_metadata(Path("d"))


def common(program: bytes) -> Any:
    archive(torch_dist_folder(Path("c")) / "common.pt", program)
    return torch_dist.read_stored(Path("c"))


def common_of_a_run(program: bytes) -> Any:
    archive(torch_dist_folder(Path("r")) / "common.pt", program)
    return reading._Common().load_common("r")


def object_of_a_run(program: bytes) -> Any:
    path = archive(Path("object"), program)
    return reading._object("decoder.layers.mlp.linear_fc1._extra_state/shard_0_1", torch_archive.read_objects(path), path)


def index_of_data(program: bytes) -> Any:
    path = written(Path("cache") / f"{'0' * 32}-GPTDataset-train-document_index.npy", program)
    with index_cache.held(path.parent, shared=True):
        assert not path.exists()
    written(path, program)
    with index_cache.without_pickles(), pytest.raises(Exception, match="allow_pickle|pickle|Array|magic|No data"):
        numpy.load(path, allow_pickle=True, mmap_mode="r")


PLACES = {
    ".metadata": metadata,
    "common.pt": common,
    "common.pt of a run": common_of_a_run,
    "an object in .distcp": object_of_a_run,
    "an index of the data": index_of_data,
    "a rank's file": lambda program: legacy.read_stored(archive(Path("l/mp_rank_00/model_optim_rng.pt"), program).parents[1]),
    "pytorch_model.bin": lambda program: torch_archive.read_objects(archive(Path("x.bin"), program)),
    "a TorchScript": lambda program: torch_archive.read_objects(archive(Path("s.bin"), program, name="archive/constants.pkl")),
    "a pickle named .bin": lambda program: torch_archive.read_objects(written(Path("p.bin"), program)),
    "an old .bin": lambda program: torch_archive.read_objects(written(Path("o.bin"), old_sequence(program))),
    "an older .bin": lambda program: torch_archive.read_objects(written(Path("t.bin"), old_tar(program))),
    "ids": lambda program: read_ids(str(archive(Path("ids.pt"), program))),
    "ids in a pickle": lambda program: read_ids(str(written(Path("ids.pkl"), b"\x80\x02" + program))),
    "a map of ids": lambda program: id_map.load_map(archive(Path("map.npz"), program, name="table.npy")),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_reader_runs_a_program(canary, program):
    for place, read in PLACES.items():
        with contextlib.suppress(InputError):
            read(PROGRAMS[program])
        assert not canary.exists(), place
