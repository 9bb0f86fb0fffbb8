"""Adapters of a recovery checkpoint: merged into the weights they were trained on, or as a directory that peft loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_prune.arch.adapter import AdapterConfig
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import megatron, torch_dist
from megatron_prune.checkpoint.description import Told
from megatron_prune.checkpoint.manifest import FILE, Manifest
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.errors import CheckpointError
from megatron_prune.families.family import Family
from megatron_prune.files.region import Scratch

KEY = "adapter.layers.{layer}.{role}.{part}"
"""Name of A (``a``, [r, in]) or B (``b``, [out, r]) of a role in a checkpoint."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """The matrices of an adapter, full, by the tensor they change: A [r, in] and B [out, r]."""

    config: AdapterConfig
    matrices: dict[TensorId, tuple[torch.Tensor, torch.Tensor]]

    def merge(self, tensor: TensorId, full: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The weight with its update, float32 (a ``Transform`` of ``checkpoint/stream.py``)."""
        if tensor not in self.matrices:
            return full
        a, b = self.matrices[tensor]
        return torch.addmm(full.float(), b.float(), a.float(), alpha=self.config.scale)

    def write_peft(self, folder: Path, family: Family, base: str) -> None:
        """Fill a directory as ``peft.PeftModel.from_pretrained`` reads it.

        Args:
            base: what to name as the model that it belongs on.
        """
        tensors, targets = {}, set()
        for tensor, (a, b) in self.matrices.items():
            name = family.tensor_name(tensor).removesuffix(".weight")
            targets.add(name.rpartition(".")[2])
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.config.r,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": sorted(targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def open_adapted(path: Path, base: Path | None = None, told: Told = Told()) -> tuple[MegatronCheckpoint, StoredAdapter | None]:
    """Open a checkpoint as :func:`megatron.open_checkpoint` does; one of adapters as the model it was trained on.

    Args:
        base: where that model is now, if not where it was.
        told: what the user says beside the checkpoint, or that model.

    Returns:
        The checkpoint, whose manifest also tells how the adapter came to be, and the adapter, if it is one.

    Raises:
        CheckpointError: also if the model is not found, or is another one.
    """
    folder = megatron.iteration_directory(path)
    described = Manifest.load(folder / FILE) if (folder / FILE).is_file() else None
    if described is None or described.adapter is None:
        return megatron.open_checkpoint(path, told), None
    where = Path(base or described.adapter.base)
    try:
        checkpoint = megatron.open_checkpoint(where, told)
    except CheckpointError as error:
        raise CheckpointError(f"the model that the adapter in {folder} belongs on: {error}", do="name it with --base") from None
    if checkpoint.manifest.content_id != described.adapter.base_content_id:
        raise CheckpointError(
            f"{where} is not the model that the adapter in {folder} was trained on",
            got=checkpoint.manifest.content_id,
            needed=described.adapter.base_content_id,
            do="name that model with --base",
        )
    config = described.adapter.config
    adapter = StoredAdapter(config=config, matrices=_read(folder, config, checkpoint.config.num_layers))
    return replace(checkpoint, manifest=replace(described, adapter=None)), adapter


def _read(folder: Path, config: AdapterConfig, layers: int) -> dict[TensorId, tuple[torch.Tensor, torch.Tensor]]:
    stored = torch_dist.read_tensors(folder, "adapter.layers.")
    found = {}
    for layer in range(layers):
        for role in config.roles:
            names = [KEY.format(layer=layer, role=role, part=part) for part in "ab"]
            missing = [name for name in names if name not in stored]
            if missing:
                raise CheckpointError(f"{folder} lacks {missing[0]}")
            found[TensorId(role, layer)] = stored[names[0]], stored[names[1]]
    return found
