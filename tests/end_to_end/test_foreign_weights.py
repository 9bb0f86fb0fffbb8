"""Weights of Hugging Face directories as others write them: read as transformers reads them, or refused by name."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from foreign import as_bin, run, there_and_back
from tiny import logits, state_dict

from megatron_prune.checkpoint import huggingface, model_folder
from megatron_prune.errors import CheckpointError
from megatron_prune.runtime.stock_model import load_stock_model

TOKENS = torch.randint(0, 307, (1, 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("wider", [False, True])
def test_a_tied_head_stored_in_another_dtype_with_equal_values_is_read_and_comes_back(model, tmp_path, wider):
    dtype = torch.float32 if wider else torch.float16
    exact = torch.randint(-9, 10, (307, 48)).to(torch.bfloat16) / 8  # values that all three types have

    def change(tensors):
        tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = exact, exact.to(dtype)

    there_and_back(model(change=change, tie_word_embeddings=True), tmp_path)


def test_a_tied_head_of_other_values_is_refused_by_every_verb_since_versions_of_transformers_disagree(model, tmp_path, capsys):
    change = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].float() + 1})
    folder = model(change=change, tie_word_embeddings=True)
    for verb in (["convert", "--load-dir"], ["prune-hf", "--ffn_hidden_size_remain", "60", "--model_name_or_path"]):
        out = "--output_path" if verb[0] == "prune-hf" else "--save-dir"
        assert run(*verb, folder, out, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert "transformers 5 computes with the stored output layer" in said and "tie_word_embeddings" in said


TABLES = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "model.rotary_emb.inv_freq": torch.rand(4),
    "rotary_emb.inv_freq": torch.rand(4),
    "rope.freqs": torch.rand(4),
    "model.layers.1.attention.rotary_emb.cos_cached": torch.rand(1, 1, 8, 8),
    "model.layers.1.attention.rotary_emb.sin_cached": torch.rand(1, 1, 8, 8),
    "model.layers.2.self_attn.masked_bias": torch.tensor(-1e9),
    "model.embed_positions.position_ids": torch.arange(64)[None],
    "model.causal_mask": torch.ones(4, 4, dtype=torch.bool),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_stored_table_that_transformers_computes_anew_is_passed_over_and_comes_back(model, tmp_path, name):
    there_and_back(model(change=lambda tensors: tensors.update({name: TABLES[name]})), tmp_path)


def test_tables_change_no_logits_of_transformers(model, tiny):
    assert torch.equal(logits(model(change=lambda tensors: tensors.update(TABLES)), TOKENS), logits(tiny("llama"), TOKENS))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_of_a_type_that_is_no_plain_number_are_refused_by_name(model, dtype, kind):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(96, 48).to(dtype)

    folder = model(change=change)
    if kind == "bin":
        as_bin(folder)
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"model.layers.1.mlp.up_proj.weight: dtype {word}"):
        huggingface.open_model(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused_with_what_to_do(model, tmp_path, capsys, name):
    folder = model()
    (folder / name).write_text('{"peft_type": "LORA"}')
    for argv in (
        ["convert", "--load-dir", str(folder), "--save-dir", str(tmp_path / "m")],
        ["prune-hf", "--model_name_or_path", str(folder), "--output_path", str(tmp_path / "m"), "--ffn_hidden_size_remain", "60"],
        ["inspect", str(folder)],
        ["vocab", "trim", "--load-dir", str(folder), "--save-dir", str(tmp_path / "m"), "--remain-vocab-size", "300"],
    ):
        assert run(*argv) == 2
        said = capsys.readouterr().err
        assert name in said and "merge_and_unload" in said
    assert not (tmp_path / "m").exists()


def test_an_adapter_alone_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        model_folder.read_config(tmp_path)


# -------------------------------------------------------------------------------------------------------------- files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(model, name):
    folder = model()
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="(?s)pointer of git-lfs.*git lfs pull"):
        huggingface.open_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"])
@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(model, name):
    folder = model()
    for file in ("model.safetensors", name):
        (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="regular file"):
        huggingface.open_model(folder)


def test_weights_of_another_kind_are_named(model):
    folder = model()
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match="(?s)no weights.*model.gguf"):
        huggingface.open_model(folder)


def packed(folder: Path, kind: int) -> None:
    (folder / "pytorch_model.bin").rename(folder / "plain")
    with zipfile.ZipFile(folder / "plain") as plain, zipfile.ZipFile(folder / "pytorch_model.bin", "w", kind) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    (folder / "plain").unlink()
    torch.load(folder / "pytorch_model.bin")  # torch reads it


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_archive_is_refused_and_not_read_as_weights(model, kind):
    folder = as_bin(model())
    if kind == zipfile.ZIP_BZIP2:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "a", kind) as archive:
            archive.writestr("more", "x" * 1000)
    else:
        packed(folder, kind)
    with pytest.raises(CheckpointError, match="compressed"):
        huggingface.open_model(folder)


def test_an_archive_of_the_other_byte_order_is_refused(model):
    folder = as_bin(model())
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole.replace(b"little", b"bigend"))
    with pytest.raises(CheckpointError, match="byte order"):
        huggingface.open_model(folder)


def test_a_bin_of_the_format_before_torch_1_6_is_read_or_named(model):
    folder = as_bin(model(), _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"(?s)before 1\.6.*save it again"):
        huggingface.open_model(folder)


def test_views_that_share_and_slice_storages_are_read_at_their_places(model, tiny):
    folder = model("qwen3")
    tensors = state_dict(folder)
    joined = torch.cat([tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    tensors["model.layers.0.mlp.gate_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"] = joined[:96], joined[96:]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_stock_model(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, logits(tiny("qwen3"), TOKENS))


def test_a_view_that_is_not_stored_row_by_row_is_refused(model):
    folder = model()
    tensors = state_dict(folder)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].t()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="row by row"):
        huggingface.open_model(folder)


ENTRY = '"%s":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    "header",
    [
        "{" + ENTRY % ("a", "[2]", 0, 8) + "," + ENTRY % ("b", "[2]", 4, 12) + "}",
        "{" + ENTRY % ("a", "[2]", 0, 8) + "," + ENTRY % ("b", "[1]", 12, 16) + "}",
        "{" + ENTRY % ("a", "[2]", 0, 8) + "," + ENTRY % ("a", "[2]", 8, 16) + "}",
        "{" + ENTRY % ("a", "[100000000000000000000]", 0, 16) + "}",
        "{" + ENTRY % ("a", "[4294967296,4294967296]", 0, 16) + "}",
        "{" + ENTRY % ("a", "[4]", 0, 10**19) + "}",
        "{" + ENTRY % ("a", "[-4]", 0, 16) + "}",
        "[" * 200_000,
        '{"a":{"dtype":[],"shape":{},"data_offsets":null}}',
        '"text"',
    ],
)
def test_a_damaged_header_is_refused_in_a_moment(model, header):
    folder = model()
    text = header.encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        huggingface.open_model(folder)


@pytest.mark.parametrize("length", [0, 7, 2**63, 2**64 - 1, 10**9])
def test_a_header_longer_than_its_file_is_refused(model, length):
    folder = model()
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="safetensors"):
        huggingface.open_model(folder)
