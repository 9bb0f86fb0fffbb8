"""Every format against files that torch, torch's distributed checkpoint and transformers write and read themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dense import (
    SMALL,
    assert_same_model,
    fused_model,
    labelled_model,
    layouts,
    random_model,
    rank_part,
    raw_map,
    read_all,
    role_shapes,
)
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from tiny import state_dict

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import huggingface, legacy, megatron, model_folder, torch_dist
from megatron_prune.checkpoint.description import Told, describe, settle
from megatron_prune.checkpoint.manifest import VERSION, Manifest
from megatron_prune.checkpoint.megatron_args import megatron_args, padded_as_stored
from megatron_prune.checkpoint.options import FORMATS
from megatron_prune.checkpoint.stream import stream
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.files.region import close_files

LLAMA = dataclasses.replace(SMALL, hidden_size=24, qkv_bias=False, qk_norm=False)
LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def args_for(config, layout, transformer_impl="transformer_engine") -> Namespace:
    return megatron_args(config, layout, torch.float32, None, transformer_impl)


def write(room, path, config, layout, model, transformer_impl="transformer_engine"):
    """A checkpoint of ours, filled in by a stream."""
    path.mkdir(parents=True)
    dtypes = {tensor: data.dtype for tensor, data in model.items()}
    room.lay_out(path, config, layout, dtypes, args_for(config, layout, transformer_impl), {})
    stream(raw_map(path.parent / "raw", config, model), room.open_map(path, config, layout))


def settled(stored) -> tuple[ModelConfig, ParallelLayout]:
    """What stored arguments alone say."""
    said = describe(stored, "here")
    found = settle(said, Told(), said.padded_vocab, "here")
    assert not found.unsaid and not found.notes
    layout = ParallelLayout(tensor=said.tensor, pipeline=said.pipeline, vocab_divisible_by=said.vocab_divisible_by)
    return found.config, padded_as_stored(layout, found.config.vocab_size, said.padded_vocab)


def rank_files(config, layout, model, local: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Folder → ``model`` of every rank of Megatron-LM's legacy layout, by plain chunks."""
    full = fused_model(config, model, layout.padded_vocab(config.vocab_size))
    files, each = {}, config.num_layers // layout.pipeline
    for stage in range(layout.pipeline):
        for rank in range(layout.tensor):
            held = {}
            for (name, layer), data in full.items():
                part = rank_part(name, data, layout.tensor, rank)
                if layer is not None and layer // each == stage:
                    held[f"decoder.layers.{layer % each}.{LOCAL.get(name, name) if local else name}"] = part
                elif name.startswith("embedding") and stage == 0:
                    held[name] = part
                elif layer is None and not name.startswith("embedding") and stage == layout.pipeline - 1:
                    held[name] = part
                if config.tie_embeddings and name.startswith("embedding") and 0 < stage == layout.pipeline - 1:
                    held["output_layer.weight"] = part
            files[f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")] = held
    return files


# ---------------------------------------------------------------------------------------------------------- legacy


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("local_names", [False, True])
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 2), (3, 1), (12, 4)])
def test_torch_load_finds_on_every_rank_the_chunks_of_the_dense_model(tmp_path, tensor, pipeline, local_names, tied):
    config, layout = (
        dataclasses.replace(SMALL, tie_embeddings=tied),
        ParallelLayout(tensor=tensor, pipeline=pipeline, vocab_divisible_by=8),
    )
    model = random_model(config, torch.bfloat16)
    write(legacy, tmp_path / "c", config, layout, model, "local" if local_names else "transformer_engine")
    expected = rank_files(config, layout, model, local_names)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(expected)
    for folder, tensors in expected.items():
        content = torch.load(tmp_path / "c" / folder / "model_optim_rng.pt", weights_only=False)
        held = {name: data for name, data in content["model"].items() if not name.endswith("_extra_state")}
        assert held.keys() == tensors.keys()
        assert all(held[name].dtype == torch.bfloat16 and torch.equal(held[name], data) for name, data in tensors.items())
        assert all(data is None for name, data in content["model"].items() if name.endswith("_extra_state"))
        assert content["checkpoint_version"] == 3.0 and content["args"].kv_channels == 2


@settings(max_examples=15)
@given(layouts())
def test_rank_files_that_torch_saved_are_read_as_the_dense_model(tmp_path_factory, drawn):
    config, tensor = drawn
    layout, model = ParallelLayout(tensor=tensor, vocab_divisible_by=4), labelled_model(config)
    path = tmp_path_factory.mktemp("legacy")
    save_ranks(path, config, layout, model, local=tensor % 2 == 0)
    assert_same_model(read_all(legacy.open_map(path, *settled(legacy.read_stored(path)))), model)
    close_files()


def save_ranks(path, config, layout, model, local=False) -> None:
    for folder, held in rank_files(config, layout, model, local).items():
        (path / folder).mkdir(parents=True)
        content = {"args": args_for(config, layout), "iteration": 7, "model": {k: v.clone() for k, v in held.items()}}
        torch.save(content, path / folder / "model_optim_rng.pt")


def edit_rank(path, change) -> None:
    content = torch.load(path / "model_optim_rng.pt", weights_only=False)
    change(content)
    torch.save(content, path / "model_optim_rng.pt")


@pytest.fixture
def two_ranks(tmp_path):
    """A legacy checkpoint of two ranks as Megatron-LM would have written it."""
    save_ranks(tmp_path / "iter_0000007", LLAMA, ParallelLayout(tensor=2), random_model(LLAMA))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert megatron.open_checkpoint(tmp_path).format == "torch"
    return tmp_path


QKV, FC2 = "decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.linear_fc2.weight"


DAMAGED_RANKS = {
    "no args": lambda content: content.pop("args"),
    "no model": lambda content: content.pop("model"),
    "a tensor missing": lambda content: content["model"].pop(QKV),
    "too few rows": lambda content: content["model"].update({QKV: torch.zeros(22, 24)}),
    "a vector for a matrix split by rows": lambda content: content["model"].update({QKV: torch.zeros(24)}),
    "a vector for a matrix split by columns": lambda content: content["model"].update({FC2: torch.zeros(24)}),
    "a scalar": lambda content: content["model"].update({FC2: torch.tensor(1.0)}),
    "no tensor": lambda content: content["model"].update({FC2: None}),
    "too few columns": lambda content: content["model"].update({FC2: torch.zeros(24, 11)}),
    "another dtype": lambda content: content["model"].update({FC2: content["model"][FC2].half()}),
    "a layer too many": lambda content: content["model"].update({"decoder.layers.4.mlp.linear_fc2.weight": torch.zeros(24, 12)}),
    "a foreign tensor": lambda content: content["model"].update({"decoder.layers.1.mlp.router.weight": torch.zeros(4, 24)}),
    "a model from before megatron-core": lambda content: content.update(model={"language_model": {}}),
    "a model that is no dictionary": lambda content: content.update(model=[1]),
}


@pytest.mark.parametrize("change", list(DAMAGED_RANKS.values()), ids=list(DAMAGED_RANKS))
@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_01"])
def test_a_rank_that_does_not_hold_its_part_is_refused(two_ranks, rank, change):
    edit_rank(two_ranks / "iter_0000007" / rank, change)
    with pytest.raises(CheckpointError):
        megatron.open_checkpoint(two_ranks)


def test_a_missing_rank_and_a_rank_too_many_are_refused(two_ranks):
    folder = two_ranks / "iter_0000007"
    shutil.copytree(folder / "mp_rank_01", folder / "mp_rank_02")
    with pytest.raises(CheckpointError, match="more ranks than TP 2"):
        megatron.open_checkpoint(two_ranks)
    shutil.rmtree(folder / "mp_rank_02")
    shutil.rmtree(folder / "mp_rank_01")
    with pytest.raises(CheckpointError, match="not whole"):
        megatron.open_checkpoint(two_ranks)


# ------------------------------------------------------------------------------------------------------- torch_dist


def stacked_model(config, layout, model) -> dict[str, torch.Tensor]:
    """megatron-core's global tensors: layers stacked, gate above up."""
    full = fused_model(config, model, layout.padded_vocab(config.vocab_size))
    names = {name for name, layer in full if layer is not None}
    outer = {name: data for (name, layer), data in full.items() if layer is None}
    return outer | {f"decoder.layers.{n}": torch.stack([full[n, layer] for layer in range(config.num_layers)]) for n in names}


def quietly(function, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **named)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 2), (3, 4), (12, 1)])
def test_torchs_own_distributed_checkpoint_reads_the_stacked_dense_tensors(tmp_path, tensor, pipeline, tied):
    config, layout = (
        dataclasses.replace(SMALL, tie_embeddings=tied),
        ParallelLayout(tensor=tensor, pipeline=pipeline, vocab_divisible_by=8),
    )
    model = random_model(config, torch.float16)
    write(torch_dist, tmp_path / "c", config, layout, model)
    expected = stacked_model(config, layout, model)
    found = {name: torch.full_like(data, float("nan")) for name, data in expected.items()}
    quietly(dcp.load, found, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(torch.equal(found[name], data) for name, data in expected.items())
    stored = dcp.FileSystemReader(tmp_path / "c").read_metadata().state_dict_metadata
    assert {name for name in stored if "_extra_state" not in name} == set(expected)
    assert len(list((tmp_path / "c").glob("*.distcp"))) == tensor * pipeline
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def save_dcp(path, config, layout, tensors, posix_path: bool = False) -> None:
    """A distributed checkpoint as torch writes it, with Megatron's files beside it.

    torch records its own path as a ``Path``, megatron-core 0.16 as text.
    """
    quietly(dcp.save, tensors, checkpoint_id=path, no_dist=True)
    if not posix_path:
        edit_metadata(path, lambda m: setattr(m.storage_meta, "checkpoint_id", str(path)))
    torch.save({"args": args_for(config, layout), "iteration": 3}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_checkpoint_that_torch_saved_is_read_as_the_dense_model(tmp_path, dtype, per_layer):
    layout, model = ParallelLayout(tensor=2), random_model(SMALL, dtype)
    tensors = stacked_model(SMALL, layout, model)
    if per_layer:
        single = {}
        for name, data in tensors.items():
            for layer in range(4) if name.startswith("decoder.layers.") else [None]:
                key = name if layer is None else name.replace("layers.", f"layers.{layer}.")
                if name.endswith("linear_fc1.weight"):
                    single[key + "_w"], single[key + "_v"] = (half.clone() for half in data[layer].chunk(2))
                else:
                    single[key] = data if layer is None else data[layer].clone()
        tensors = single
    save_dcp(tmp_path / "c", SMALL, layout, {**tensors, "optimizer.state.exp_avg": torch.zeros(3)})
    found = torch_dist.open_map(tmp_path / "c", *settled(torch_dist.read_stored(tmp_path / "c")))
    assert_same_model(read_all(found), model)


def test_metadata_in_which_torch_recorded_its_path_is_read(tmp_path):
    """As torch's own writer does, and megatron-core's before it had a ``checkpoint_id`` of its own."""
    layout, model = ParallelLayout(), random_model(LLAMA)
    save_dcp(tmp_path / "c", LLAMA, layout, stacked_model(LLAMA, layout, model), posix_path=True)
    assert_same_model(read_all(megatron.open_checkpoint(tmp_path / "c").tensors), model)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("decoder.layers.mlp.linear_fc2.weight"),
        lambda t: t.update({"decoder.layers.mlp.router.weight": torch.zeros(4, 2)}),
        lambda t: t.update({"decoder.layers.mlp.linear_fc2.weight": torch.zeros(4, 24, 23)}),
        lambda t: t.update({"decoder.layers.mlp.linear_fc2.weight": torch.zeros(3, 24, 24)}),
        lambda t: t.update({"decoder.layers.4.mlp.linear_fc2.weight": torch.zeros(24, 24)}),
        lambda t: t.update({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(24, 24)}),
    ],
)
def test_a_checkpoint_of_other_tensors_than_its_args_say_is_refused(tmp_path, change):
    layout = ParallelLayout()
    tensors = stacked_model(LLAMA, layout, random_model(LLAMA))
    change(tensors)
    save_dcp(tmp_path / "c", LLAMA, layout, tensors)
    with pytest.raises(CheckpointError, match="does not hold the model"):
        megatron.open_checkpoint(tmp_path / "c")


def edit_metadata(folder, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first_info(metadata):
    return next(info for index, info in metadata.storage_data.items() if "fc2" in index.fqn)


DAMAGED_METADATA = {
    "a file outside": lambda m: setattr(first_info(m), "relative_path", "../outside.distcp"),
    "an absolute path": lambda m: setattr(first_info(m), "relative_path", "/etc/passwd"),
    "the parent folder": lambda m: setattr(first_info(m), "relative_path", ".."),
    "a file that is missing": lambda m: setattr(first_info(m), "relative_path", "__9_0.distcp"),
    "an offset past the end": lambda m: setattr(first_info(m), "offset", 1 << 40),
    "a negative offset": lambda m: setattr(first_info(m), "offset", -5),
    "too small a length": lambda m: setattr(first_info(m), "length", 3),
    "an offset that is text": lambda m: setattr(first_info(m), "offset", "0"),
    "a chunk without its place": lambda m: m.storage_data.pop(next(i for i in m.storage_data if "fc2" in i.fqn)),
    "no places": lambda m: m.storage_data.clear(),
    "places that are null": lambda m: setattr(m, "storage_data", None),
    "tensors that are a list": lambda m: setattr(m, "state_dict_metadata", []),
    "a chunk missing": lambda m: m.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop(),
    "a chunk twice": lambda m: m.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.append(
        m.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[0]
    ),
    "another dtype": lambda m: setattr(
        m.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].properties, "dtype", torch.bfloat16
    ),
}


@pytest.mark.parametrize("change", list(DAMAGED_METADATA.values()), ids=list(DAMAGED_METADATA))
def test_metadata_that_does_not_fit_the_files_is_refused(tmp_path, change):
    write(torch_dist, tmp_path / "c", LLAMA, ParallelLayout(tensor=2), random_model(LLAMA))
    megatron.open_checkpoint(tmp_path / "c")
    edit_metadata(tmp_path / "c", change)
    with pytest.raises(CheckpointError):
        megatron.open_checkpoint(tmp_path / "c")


# -------------------------------------------------------------------------------------- what outsiders may have made


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


OPENED = {
    "torch_dist": megatron.open_checkpoint,
    "legacy": megatron.open_checkpoint,
    "safetensors": huggingface.open_model,
    "bin": huggingface.open_model,
}


@pytest.fixture(scope="module")
def whole_checkpoints(tmp_path_factory):
    """A whole checkpoint of every format, built once."""
    root, model, layout = tmp_path_factory.mktemp("whole"), random_model(LLAMA), ParallelLayout(tensor=2)
    write(torch_dist, root / "torch_dist", LLAMA, layout, model)
    write(legacy, root / "legacy", LLAMA, layout, model)
    for kind, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        (root / kind).mkdir()
        tensors = {FAMILIES.get("llama").tensor_name(t): data for t, data in model.items()}
        (save_file if kind == "safetensors" else torch.save)(tensors, root / kind / name)
        (root / kind / "config.json").write_text(json.dumps(FAMILIES.get("llama").hf_config(LLAMA, None)))
    for name, how in OPENED.items():
        assert_same_model(read_all(how(root / name).tensors), model)
    close_files()
    return root


@pytest.fixture
def checkpoints(whole_checkpoints, tmp_path):
    """``checkpoints("legacy")`` → (a copy that may be damaged, how it is opened)."""
    return lambda name: (Path(shutil.copytree(whole_checkpoints / name, tmp_path / name)), OPENED[name])


PICKLES = [
    ("torch_dist", ".metadata"),
    ("torch_dist", "common.pt"),
    ("torch_dist", "__1_0.distcp"),
    ("legacy", "mp_rank_00/model_optim_rng.pt"),
    ("legacy", "mp_rank_01/model_optim_rng.pt"),
    ("bin", "pytorch_model.bin"),
]


@pytest.mark.parametrize("name, file", PICKLES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_malicious_pickle_anywhere_is_refused_and_not_executed(checkpoints, tmp_path, name, file, inside):
    folder, how = checkpoints(name)
    path, bomb = folder / file, Bomb(tmp_path / "executed")
    if file == ".metadata":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = bomb
        path.write_bytes(pickle.dumps(metadata if inside else bomb))
    elif file.endswith(".distcp"):
        info = next(i for i in pickle.loads((folder / ".metadata").read_bytes()).storage_data.values() if i.relative_path == file)
        whole = path.read_bytes()
        torch.save([torch.zeros(2), bomb] if inside else bomb, tmp_path / "bomb.pt")
        text = (tmp_path / "bomb.pt").read_bytes()
        path.write_bytes(whole + text)
        edit_metadata(
            folder,
            lambda m: [
                (setattr(i, "offset", len(whole)), setattr(i, "length", len(text)))
                for i in m.storage_data.values()
                if (i.relative_path, i.offset) == (file, info.offset)
            ],
        )
    else:
        content = torch.load(path, weights_only=False)
        target = content["args"].__dict__ if "args" in content else content
        target["x"] = bomb
        torch.save(content if inside else bomb, path)
    with pytest.raises(CheckpointError):
        how(folder)
    assert not (tmp_path / "executed").exists()
    if not file.endswith(".distcp"):
        (pickle.loads(path.read_bytes()) if file == ".metadata" else torch.load(path, weights_only=False))
        assert (tmp_path / "executed").exists()  # the bomb was live


FILES = PICKLES + [("torch_dist", "metadata.json"), ("safetensors", "model.safetensors"), ("safetensors", "config.json")]


@pytest.mark.parametrize("name, file", [pair for pair in FILES if pair[1] != "metadata.json"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.95])
def test_a_truncated_file_anywhere_is_refused(checkpoints, name, file, keep):
    folder, how = checkpoints(name)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError):
        how(folder)


@pytest.mark.parametrize("name, file", FILES)
def test_a_missing_file_anywhere_is_refused(checkpoints, name, file):
    folder, how = checkpoints(name)
    (folder / file).unlink()
    with pytest.raises(CheckpointError):
        how(folder)


# ----------------------------------------------------------------------------------------------------- Hugging Face


def sharded(tiny, tmp_path, **changes):
    """A writable copy of a model in several files."""
    shutil.copytree(tiny("llama", shard="60KB", **changes), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None])
def test_an_index_that_names_a_file_outside_its_directory_is_refused(tiny, tmp_path, name):
    model = sharded(tiny, tmp_path)
    shutil.copy(next(model.glob("*.safetensors")), tmp_path / "outside.safetensors")
    edit_json(model / huggingface.INDEX, lambda data: data["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError):
        huggingface.open_model(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("weight_map"),
        lambda data: data.update(weight_map=[]),
        lambda data: data["weight_map"].pop("lm_head.weight"),
        lambda data: data["weight_map"].update(extra=data["weight_map"]["lm_head.weight"]),
        lambda data: data["weight_map"].update({"lm_head.weight": "model-00001-of-00009.safetensors"}),
        lambda data: data["weight_map"].update({"model.embed_tokens.weight": data["weight_map"]["lm_head.weight"]}),
    ],
)
def test_an_index_that_does_not_agree_with_the_files_is_refused(tiny, tmp_path, change):
    model = sharded(tiny, tmp_path)
    edit_json(model / huggingface.INDEX, change)
    with pytest.raises(CheckpointError):
        huggingface.open_model(model)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"model.norm.weight: shape \(47,\), needed \(48,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, 1)}), "model.norm.weight: shape"),
        (lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}), "model.norm.weight: shape"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.ones(96, 48)}), "not a tensor of a llama model"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}), "not a tensor of a llama model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}), "model.norm.weight"),
    ],
)
def test_a_model_of_other_tensors_than_its_config_says_is_refused_by_name(tiny, tmp_path, change, word):
    source = tiny("llama")
    tensors = state_dict(source)
    change(tensors)
    shutil.copy(source / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=word):
        huggingface.open_model(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded bin"])
def test_every_kind_of_weight_file_is_read_as_torch_reads_it(tiny, tmp_path, family, kind):
    source = tiny(family)
    tensors = {name: data.clone() for name, data in state_dict(source).items()}
    shutil.copy(source / "config.json", tmp_path)
    if kind == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        files = {f"pytorch_model-0000{n}-of-00002.bin": dict(list(tensors.items())[n - 1 :: 2]) for n in (1, 2)}
        for name, part in files.items():
            torch.save(part, tmp_path / name)
        index = {"weight_map": {key: name for name, part in files.items() for key in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = huggingface.open_model(tmp_path)
    ours = {model.family.tensor_name(t): data for t, data in read_all(model.tensors).items()}
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[name], data) for name, data in tensors.items())


def test_where_one_file_and_an_index_both_stand_the_weights_that_transformers_loads_are_read(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = sharded(tiny, tmp_path)
    save_file(
        {name: data + 1 for name, data in state_dict(model).items()}, model / "model.safetensors", metadata={"format": "pt"}
    )
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype="auto").model.norm.weight
    assert torch.equal(read_all(huggingface.open_model(model).tensors)[TensorId("final_norm")], theirs)


def test_a_stored_copy_of_a_tied_output_layer_is_a_replica_and_never_read(tiny, tmp_path):
    source = tiny("llama", tie_word_embeddings=True)
    tensors = state_dict(source)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    shutil.copy(source / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    model = huggingface.open_model(tmp_path)
    assert model.tied_head_stored and list(model.buffers) == ["model.layers.2.self_attn.rotary_emb.inv_freq"]
    assert torch.equal(read_all(model.tensors)[TensorId("embedding")], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("limit", [1, 3000, 60_000, 10**9])
def test_weight_files_stay_below_the_limit_and_safetensors_and_transformers_read_them(tiny, tmp_path, limit):
    from transformers import AutoModelForCausalLM

    source = huggingface.open_model(tiny("llama"))
    dtypes = {t: torch.bfloat16 for t in role_shapes(source.config)}
    huggingface.lay_out(tmp_path, source.config, source.family, source.hf_config, dtypes, max_shard_bytes=limit)
    stream(source.tensors, huggingface.open_model(tmp_path).tensors)
    expected = state_dict(source.path)
    assert state_dict(tmp_path).keys() == expected.keys()
    assert all(torch.equal(data, expected[name]) for name, data in state_dict(tmp_path).items())
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(data.nbytes for data in held.values()) <= limit
    assert (tmp_path / "model.safetensors").exists() == (limit == 10**9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], data) for name, data in expected.items())


def test_everything_but_weights_goes_along(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "other").mkdir()
    target.mkdir()
    kept = ["config.json", "tokenizer.json", "LICENSE", "chat_template.jinja", "additional_chat_templates/x.jinja"]
    left = ["model.safetensors", "pytorch_model.bin", "x.gguf", "model.safetensors.index.json", ".hidden", "other/y", "tf.h5"]
    for name in kept + left:
        (source / name).write_text(name)
    (source / "link.model").symlink_to(source / "LICENSE")
    huggingface.copy_side_files(source, target)
    found = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == {name: name for name in kept} | {"link.model": "LICENSE"}
    assert not (target / "link.model").is_symlink()


@pytest.mark.parametrize("text", ["", "{", "[1]", '"config"'])
def test_a_config_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        huggingface.open_model(tmp_path)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none-at-all", "none", "a/b/c"])
def test_a_name_that_is_neither_a_directory_nor_a_hub_id_is_refused_without_asking_the_hub(name):
    with pytest.raises(InputError, match="no such model directory"):
        model_folder.resolve(name)


# --------------------------------------------------------------------------------------- args, manifest and tracker


@settings(max_examples=60)
@given(layouts())
def test_a_configuration_and_a_layout_come_back_from_the_args(drawn):
    config, tensor = drawn
    for changes in (
        {},
        {"sliding_window": 9, "rotary_base": 5e5, "norm_epsilon": 1e-5},
        {"rope_scaling": RopeScaling(kind="linear", factor=2.0), "rotary_base": 12345.5},
        {"rope_scaling": RopeScaling(kind="llama3", factor=32.0), "max_position_embeddings": 131072},
    ):
        model, layout = dataclasses.replace(config, **changes), ParallelLayout(tensor=tensor, pipeline=2, vocab_divisible_by=8)
        args = args_for(model, layout)
        assert settled(vars(args)) == (model, layout)
        assert args.padded_vocab_size == layout.padded_vocab(model.vocab_size)


@pytest.mark.parametrize(
    "name, value",
    [
        ("swiglu", False),
        ("normalization", "LayerNorm"),
        ("add_bias_linear", True),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("num_experts", 8),
        ("apply_layernorm_1p", True),
        ("multi_latent_attention", True),
    ],
)
def test_args_of_a_feature_that_is_not_carried_are_refused_by_name(name, value):
    args = args_for(LLAMA, ParallelLayout())
    setattr(args, name, value)
    with pytest.raises(CheckpointError, match=name):
        settled(vars(args))


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"])
def test_args_without_a_size_are_refused_by_name(name):
    args = args_for(LLAMA, ParallelLayout())
    delattr(args, name)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        settled(vars(args))


MANIFEST = Manifest(
    family="llama",
    model=dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="llama3", factor=8.0, low_freq_factor=2.0)),
    layout=ParallelLayout(tensor=2, pipeline=4, vocab_divisible_by=64),
    content_id="xxh3-sha256:0",
    hf_dtypes={"default": "bfloat16", "layer 1 q": "float32"},
    tied_head_stored=True,
    kept_layers=[0, 1, 3, 5],
    recipe=[{"step": "convert", "from": "modèle"}],
)


def test_a_manifest_comes_back_from_its_file(tmp_path):
    (tmp_path / "m").write_text(MANIFEST.dumps(), encoding="utf-8")
    assert Manifest.load(tmp_path / "m") == MANIFEST


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("format"),
        lambda data: data.update(format="another"),
        lambda data: data.update(version=VERSION + 1),
        lambda data: data.update(experts=1),
        lambda data: data.pop("model"),
        lambda data: data["model"].update(num_layers=0),
        lambda data: data["parallel"].update(tensor=0),
        lambda data: data["parallel"].update(context=2),
        lambda data: data.update(parallel=None),
        lambda data: data.pop("family"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change):
    data = json.loads(MANIFEST.dumps())
    change(data)
    (tmp_path / "m").write_text(json.dumps(data))
    with pytest.raises(InputError):
        Manifest.load(tmp_path / "m")


def finished(tmp_path, ckpt_format):
    """A finished checkpoint of ours at a root of its own."""
    root, layout = tmp_path / "root", ParallelLayout(tensor=2, pipeline=2)
    root.mkdir()
    model = random_model(LLAMA)
    dtypes = {t: torch.float32 for t in model}
    folder = megatron.lay_out(root, root, LLAMA, layout, dtypes, ckpt_format=ckpt_format)
    stream(raw_map(tmp_path / "raw", LLAMA, model), megatron.open_target(folder, LLAMA, layout, ckpt_format))
    (folder / "hf").mkdir()
    megatron.finish(folder, Manifest(family="llama", model=LLAMA, layout=layout))
    return root, model


@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_a_finished_checkpoint_opens_by_its_root_and_by_its_iteration_directory(tmp_path, ckpt_format):
    root, model = finished(tmp_path, ckpt_format)
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    for path in (root, root / "release"):
        opened = megatron.open_checkpoint(path)
        assert (opened.format, opened.own, opened.config, opened.layout.tensor) == (ckpt_format, True, LLAMA, 2)
        assert_same_model(read_all(opened.tensors), model)


@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_a_checkpoint_of_ours_without_its_manifest_was_never_finished(tmp_path, ckpt_format):
    root, _ = finished(tmp_path, ckpt_format)
    (root / "release" / "megatron_prune.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        megatron.open_checkpoint(root)


@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_a_manifest_that_disagrees_with_the_args_is_refused(tmp_path, ckpt_format):
    root, _ = finished(tmp_path, ckpt_format)
    edit_json(root / "release" / "megatron_prune.json", lambda data: data["model"].update(ffn_hidden_size=22))
    with pytest.raises(CheckpointError, match="disagree on ffn_hidden_size"):
        megatron.open_checkpoint(root)


@pytest.mark.parametrize(
    "text, word",
    [("12", "iter_0000012"), ("soon", "an iteration number"), ("../x", "an iteration number"), ("", "an iteration number")],
)
def test_a_tracker_that_names_no_checkpoint_is_refused(two_ranks, text, word):
    (two_ranks / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match=word):
        megatron.open_checkpoint(two_ranks)


def test_a_directory_without_a_tracker_and_a_missing_one_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="is not a Megatron checkpoint"):
            megatron.open_checkpoint(path)


def test_a_hub_that_cannot_be_reached_is_said_whatever_its_client_raises(monkeypatch, tmp_path):
    import huggingface_hub

    class Unreachable(Exception):
        pass

    def fail(*_, **__):
        raise Unreachable("no route to host")

    for name in ("snapshot_download", "model_info", "list_repo_files", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    for fetch in (model_folder.resolve, model_folder.fetch_config):
        with pytest.raises(InputError, match="neither a directory nor a model that can be fetched.*\n.*no route"):
            fetch("owner/name")
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such model directory: owner/name"):
        model_folder.resolve("owner/name")


@pytest.mark.parametrize(
    "weights, fetched",
    [(True, {"config.json", "tokenizer.json", "model.safetensors"}), (False, {"config.json", "tokenizer.json"})],
)
def test_of_a_hub_id_only_what_is_needed_is_fetched(monkeypatch, tmp_path, weights, fetched):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"]
    asked = []

    def download(name, ignore_patterns):
        asked.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    assert model_folder.resolve("owner/name", weights=weights) == tmp_path
    assert asked == [fetched]
