"""Adapters of a recovery checkpoint: merged into the weights they were trained on, or as a directory that peft loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_prune.arch.adapter import AdapterConfig
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint import megatron, torch_dist
from megatron_prune.checkpoint.description import Told
from megatron_prune.checkpoint.digests import digest
from megatron_prune.checkpoint.manifest import FILE, Manifest
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.tensor_map import DamagedTensor
from megatron_prune.errors import CheckpointError, PruneError
from megatron_prune.families.family import Family
from megatron_prune.files.documents import read_json
from megatron_prune.files.region import Scratch
from megatron_prune.files.tensor_file import save_tensors

PREFIX = "adapter.layers."
KEY = "adapter.layers.{layer}.{role}.{part}"
"""Name of A (``a``, [r, in]) or B (``b``, [out, r]) of a role in a checkpoint."""
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


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

    def _peft_tensors(self, family: Family) -> dict[str, torch.Tensor]:
        named = {}
        for tensor, (a, b) in self.matrices.items():
            name = _module(family, tensor)
            named[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
            named[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        return named

    def check_peft(self, folder: Path, family: Family) -> None:
        """Read again what :meth:`write_peft` wrote.

        Raises:
            PruneError: if it is not this adapter.
        """
        written, wanted = load_file(folder / PEFT_WEIGHTS), self._peft_tensors(family)
        names = sorted(written.keys() | wanted.keys())
        wrong = [n for n in names if n not in written or n not in wanted or not torch.equal(written[n], wanted[n])]
        if wrong or read_json(folder / PEFT_CONFIG)["r"] != self.config.r:
            raise PruneError(f"the check of what was written failed; nothing is put in place: {', '.join(wrong) or PEFT_CONFIG}")

    def write_peft(self, folder: Path, family: Family, base: str) -> None:
        """Fill a directory as ``peft.PeftModel.from_pretrained`` reads it.

        Args:
            base: what to name as the model that it belongs on: a directory, or an id on the hub.
        """
        from peft import LoraConfig

        save_tensors(folder / PEFT_WEIGHTS, self._peft_tensors(family), {"format": "pt"})
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            r=self.config.r,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            inference_mode=True,
        )
        config.target_modules = sorted({_module(family, tensor).rpartition(".")[2] for tensor in self.matrices})  # a set in peft
        config.save_pretrained(str(folder))


def _module(family: Family, tensor: TensorId) -> str:
    return family.tensor_name(tensor).removesuffix(".weight")


def open_adapted(path: Path, base: Path | None = None, told: Told = Told()) -> tuple[MegatronCheckpoint, StoredAdapter | None]:
    """Open a checkpoint as :func:`megatron.open_checkpoint` does; one of adapters as the model it was trained on.

    Args:
        base: where that model is now, if not where it was.
        told: what the user says beside the checkpoint, or that model.

    Returns:
        The checkpoint, whose manifest also tells how the adapter came to be, and the adapter, if it is one.

    Raises:
        CheckpointError: also if the model is not found, or is another one; if ``base`` is named and this is no adapter.
    """
    folder = megatron.iteration_directory(path)
    described = Manifest.load(folder / FILE) if (folder / FILE).is_file() else None
    if described is None or described.adapter is None:
        if base is not None:
            raise CheckpointError(f"--base {base} has no effect: {folder} holds a model, not an adapter", do="leave it out")
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
    megatron.check_structure(folder, described)
    config = described.adapter.config
    adapter = StoredAdapter(config=config, matrices=_read(folder, config, checkpoint.config, described.digests))
    base_manifest = checkpoint.manifest  # the digests are of what lies at ``checkpoint.path``
    told = replace(described, adapter=None, digests=base_manifest.digests, files=base_manifest.files)
    return replace(checkpoint, manifest=told), adapter


def adapter_digests(folder: Path) -> dict[str, str]:
    """Digest of every matrix of an adapter, by its name in the checkpoint."""
    return {name: digest(matrix) for name, matrix in read_matrices(folder, {}).items()}


def read_matrices(folder: Path, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    """Every matrix of an adapter by its name in the checkpoint, compared with its digest where that is known.

    Raises:
        DamagedTensor: if one is not what was written.
    """
    stored = torch_dist.read_tensors(folder, PREFIX)
    for name, expected in digests.items():
        if name not in stored or digest(stored[name]) != expected:
            raise DamagedTensor(f"{folder}: {name} is not what was written there")
    return stored


def _read(
    folder: Path, config: AdapterConfig, model: ModelConfig, digests: dict[str, str]
) -> dict[TensorId, tuple[torch.Tensor, torch.Tensor]]:
    stored, found = read_matrices(folder, digests), {}
    for tensor in tensor_ids(model):
        if tensor.role in config.roles:
            names = [KEY.format(layer=tensor.layer, role=tensor.role, part=part) for part in "ab"]
            missing = [name for name in names if name not in stored]
            if missing:
                raise CheckpointError(f"{folder} lacks {missing[0]}")
            found[tensor] = stored[names[0]], stored[names[1]]
    return found
