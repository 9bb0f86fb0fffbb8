"""The model's own samples as a file: safetensors with one tensor ``tokens`` and, in the metadata, where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.files.documents import parse_json, shorten
from megatron_prune.files.tensor_file import open_tensors

FORMAT = "megatron-prune samples"


def save_samples(path: Path, tokens: torch.Tensor, provenance: dict[str, Any]) -> None:
    """Write samples atomically.

    Args:
        tokens: int64 [samples, seq_length].
        provenance: JSON-able; ``content_id`` names the model they were drawn from.

    Raises:
        InputError: if the tokens are not samples, or the model is not named.
    """
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.numel() == 0:
        raise InputError("samples to keep", got=f"{tokens.dtype} {list(tokens.shape)}", needed="int64 [samples, seq_length]")
    if not isinstance(provenance.get("content_id"), str):
        raise InputError(
            "samples to keep", got=f"provenance {sorted(provenance)}", needed="content_id of the model they are from"
        )
    metadata = {"format": FORMAT, "provenance": json.dumps(provenance, sort_keys=True)}
    staging.write_files({path: save({"tokens": tokens.cpu().contiguous()}, metadata=metadata)})


def load_samples(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """(int64 [samples, seq_length], provenance) of a file written by :func:`save_samples`.

    Raises:
        InputError: if it is missing, damaged, or something else.
    """
    with open_tensors(path, error=InputError, do="make it again") as file:
        if file.metadata.get("format") != FORMAT or file.names != ["tokens"]:
            raise InputError(f"{path} is not a file of samples", got="tensors " + shorten(file.names), needed=FORMAT)
        tokens = file.read("tokens", torch.int64, (None, None), least=0)
        if tokens.numel() == 0:
            raise file.refuse("tokens", got=list(tokens.shape), needed="samples")
        said, where = file.metadata.get("provenance", ""), f"{path}: provenance"
        return tokens, parse_json(said, dict[str, Any], where, error=InputError, do="make it again")
