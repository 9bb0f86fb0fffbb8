"""Checkpoints as Megatron-LM and Megatron-Bridge leave them, made from ours: no manifest, no ``hf/``, contents edited."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any, Callable

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

Edit = Callable[[dict[str, Any]], Any]


def converted(source: Path, root: Path, *, fmt: str = "torch", tp: int = 1, pp: int = 1) -> Path:
    options = {"target_tensor_parallel_size": tp, "target_pipeline_parallel_size": pp, "ckpt_format": fmt}
    convert(ConvertOptions(load=str(source), save=str(root), **options), World())
    return root


def foreign(ours: Path, root: Path, edit: Edit = lambda content: None) -> Path:
    """A copy of a checkpoint of ours as another writer leaves it; ``edit`` changes what each rank's file (``common.pt``) holds."""
    shutil.copytree(ours, root)
    folder = root / "release"
    (folder / "megatron_prune.json").unlink()
    shutil.rmtree(folder / "hf")
    for file in [*folder.glob("mp_rank_*/*.pt"), *folder.glob("common.pt")]:
        content = torch.load(file, weights_only=False)
        edit(content)
        torch.save(content, file)
    return root


def arguments(**changes: Any) -> Edit:
    """Changes of ``args``; ``...`` removes one."""

    def edit(content: dict[str, Any]) -> None:
        for name, value in changes.items():
            if value is ...:
                vars(content["args"]).pop(name, None)
            else:
                setattr(content["args"], name, value)

    return edit


def restaged(ours: Path, root: Path, chunks: list[list[int]], **changes: Any) -> Path:
    """A legacy checkpoint of one rank cut into pipeline stages.

    Args:
        chunks: layers in every model chunk, by virtual stage, then by stage.
    """
    whole = torch.load(ours / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    arguments(pipeline_model_parallel_size=len(chunks[0]), **changes)(whole)
    model, layer = whole.pop("model"), 0
    files: dict[int, dict[str, Any]] = {stage: dict(whole) for stage in range(len(chunks[0]))}
    for virtual, row in enumerate(chunks):
        for stage, count in enumerate(row):
            here: dict[str, Any] = {}
            first, last = (virtual, stage) == (0, 0), (virtual, stage) == (len(chunks) - 1, len(row) - 1)
            for key, value in model.items():
                parts = key.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    if layer <= int(parts[2]) < layer + count:
                        here[".".join([*parts[:2], str(int(parts[2]) - layer), *parts[3:]])] = value
                elif first if parts[0] == "embedding" else last:
                    here[key] = value
            if last and "output_layer.weight" not in model:
                here["output_layer.weight"] = model["embedding.word_embeddings.weight"]
            files[stage]["model" if len(chunks) == 1 else f"model{virtual}"] = here
            layer += count
    for stage, content in files.items():
        folder = root / f"release/mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        torch.save(content, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def edit_metadata(folder: Path, change: Callable[[dcp.Metadata], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def without_common(root: Path) -> Path:
    """As megatron-core writes since 0.19: the common state is an object beside the tensors."""
    folder = root / "release"
    common, file = folder / "common.pt", folder / "__0_0.distcp"
    start = file.stat().st_size
    content = torch.load(common, weights_only=False)
    with open(file, "ab") as out:
        torch.save([content], out)
    common.unlink()

    def add(metadata: dcp.Metadata) -> None:
        key = "common_state/shard_0_1"
        metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()
        place = filesystem._StorageInfo(file.name, start, file.stat().st_size - start)
        metadata.storage_data[dcp.MetadataIndex(key)] = place

    edit_metadata(folder, add)
    return root


RUN_CONFIG = """
_target_: megatron.bridge.training.config.ConfigContainer
checkpoint:
  _target_: megatron.bridge.training.config.CheckpointConfig
  save: {{_target_: pathlib.PosixPath, _call_: true}}
model:
  _target_: megatron.bridge.models.qwen.qwen_provider.Qwen2ModelProvider
  _pg_collection: null
  activation_func: {{_target_: torch.nn.functional.silu, _call_: false}}
  add_bias_linear: false
  add_qkv_bias: true
  attention_backend: {{_target_: megatron.core.transformer.enums.AttnBackend, _call_: true, _args_: [5]}}
  cuda_graph_scope: []
  ffn_hidden_size: 96
  gated_linear_unit: true
  generation_config: {{_target_: transformers.GenerationConfig.from_dict, _call_: true, config_dict: {{bos_token_id: 0}}}}
  hf_model_id: Qwen/Qwen2.5-0.5B
  hidden_size: 48
  kv_channels: 8
  layernorm_epsilon: 1.0e-06
  make_vocab_size_divisible_by: 128
  normalization: RMSNorm
  num_attention_heads: 12
  num_layers: 4
  num_moe_experts: null
  num_query_groups: 6
  params_dtype: {{_target_: torch.bfloat16, _call_: false}}
  pipeline_model_parallel_size: 1
  position_embedding_type: rope
  rope_scaling: false
  rope_scaling_factor: 1.0
  rotary_base: {rotary_base}
  rotary_percent: 1.0
  seq_length: 64
  share_embeddings_and_output_weights: false
  should_pad_vocab: false
  tensor_model_parallel_size: 1
  transformer_layer_spec: {{_target_: megatron.bridge.models.gpt_provider.default_layer_spec, _call_: false}}
  vocab_size: 307
  window_size: null
{more}
"""
"""What Bridge 0.3 writes for the tiny Qwen2."""


def bridge(ours: Path, root: Path, source: Path | None = None, *, rotary_base: object = 10000.0, more: str = "") -> Path:
    """A distributed checkpoint as Bridge leaves it: ``iter_0000000``, ``run_config.yaml``, no args, its tokenizer beside."""
    foreign(ours, root, lambda content: content.pop("args"))
    folder = (root / "release").rename(root / "iter_0000000")
    (root / "latest_checkpointed_iteration.txt").write_text("0")
    (folder / "run_config.yaml").write_text(RUN_CONFIG.format(rotary_base=rotary_base, more=more))
    if source:
        (folder / "tokenizer").mkdir()
        for file in source.glob("tokenizer*"):
            shutil.copy(file, folder / "tokenizer")
    return root
