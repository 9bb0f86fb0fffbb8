"""Where a name leads, a directory or a hub id, and the ``config.json`` there: what can be said of a model without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prune.errors import CheckpointError, InputError, reason
from megatron_prune.files.documents import read_json

CONFIG, _ADAPTER = "config.json", "adapter_config.json"
TRACKER = "latest_checkpointed_iteration.txt"
"""Names the iteration directory of a Megatron checkpoint."""


def is_huggingface(path: Path) -> bool:
    """Whether ``path`` looks like a Hugging Face model directory."""
    return (path / CONFIG).is_file()


def is_megatron(path: Path) -> bool:
    """Whether ``path`` looks like a Megatron checkpoint: its root, or an iteration directory."""
    return any((path / name).exists() for name in (TRACKER, "metadata.json", ".metadata")) or any(path.glob("mp_rank_*"))


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory (or that very file) as it stands.

    Raises:
        CheckpointError: if it is missing or not a JSON object; or if a file that is named by itself describes no model.
    """
    file = path if path.is_file() else path / CONFIG
    if path.is_dir() and not file.exists():
        check_no_adapter(path)
        if is_megatron(path):
            raise CheckpointError(
                f"{path} has no {CONFIG}",
                got="a Megatron checkpoint",
                needed="a Hugging Face model directory",
                do=f"make one of it: megatron-prune export --load {path} --save DIRECTORY (as it is, a checkpoint is cut by megatron-prune "
                "prune, and brought to another layout by transfer)",
            )
        raise CheckpointError(f"{path} has no {CONFIG}", needed="a Hugging Face model directory")
    do = "fetch it again" if file.name == CONFIG else f"name a model's directory, or its {CONFIG}"
    config = read_json(file, do=do)
    if path.is_file() and "model_type" not in config:
        said = str(config.get("format", ""))
        raise CheckpointError(
            f"{path} is no configuration of a model",
            got=f"a file of {said[:80]!r}" if said.startswith("megatron-prune") else "no model_type",
            needed=f"a model's directory, or its {CONFIG}",
        )
    return config


def check_no_adapter(path: Path) -> None:
    """Refuse an adapter: transformers would add it to the weights where peft is installed, and pass it over where it is not.

    Raises:
        CheckpointError: naming its file.
    """
    found = sorted(entry.name for entry in path.glob("adapter_*") if entry.name == _ADAPTER or entry.stem == "adapter_model")
    if found:
        raise CheckpointError(
            f"{path} holds an adapter: {', '.join(found)}",
            needed="weights alone",
            do="merge it (peft: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(…)); "
            "or move its files elsewhere, if the model without it is meant",
        )


def resolve(name_or_path: str, *, weights: bool = True) -> Path:
    """A local directory, or the snapshot of a hub id (fetched on first use).

    Args:
        weights: fetch them too; a tokenizer needs none.

    Raises:
        InputError: if it is neither.
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir():
        return path
    from huggingface_hub import HfApi, snapshot_download

    def fetch() -> str:
        files = HfApi().list_repo_files(name_or_path)
        ignored = ["original/*", "consolidated*", "*.gguf", "*.pt", "*.pth", "*.onnx", "onnx/*", "*.msgpack", "*.h5"]
        if not weights:
            ignored += ["*.bin", "*.safetensors"]
        elif any(file.endswith(".safetensors") for file in files):
            ignored.append("*.bin")
        return snapshot_download(name_or_path, ignore_patterns=ignored)

    return Path(_from_hub(name_or_path, fetch))


_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
"""``owner/name``."""


def fetch_config(name: str) -> Path:
    """``config.json`` of a hub id, and nothing else of it.

    Raises:
        InputError: if there is none.
    """
    from huggingface_hub import hf_hub_download

    return Path(_from_hub(name, lambda: hf_hub_download(name, CONFIG)))


def _from_hub(name: str, fetch: Callable[[], str]) -> str:
    """What ``fetch`` brings; an offline machine serves what it fetched before."""
    if Path(name).exists() or Path(name).parent != Path() and Path(name).parent.is_dir() or not _HUB_ID.fullmatch(name):
        raise InputError(f"no such model directory: {name}")
    from huggingface_hub import snapshot_download

    try:
        return fetch()
    except Exception as error:  # the HTTP client's own kinds are no part of any interface
        try:
            return snapshot_download(name, local_files_only=True)
        except Exception:
            raise InputError(
                f"{name} is neither a directory nor a model that can be fetched from the hub", got=reason(error)
            ) from None
