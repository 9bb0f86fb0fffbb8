"""Hugging Face directories as others write them, made from tiny models."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import save_file
from tiny import state_dict

from megatron_prune.cli.main import main

Tensors = dict[str, torch.Tensor]


def run(*argv: Any) -> int:
    """The exit code of a command, run in this process."""
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        return end.code
    return 0


def copy_model(source: Path, folder: Path, change: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Path:
    """A copy of a model at ``folder``, its tensors changed by ``change`` and its ``config.json`` by ``config``."""
    shutil.copytree(source, folder)
    tensors = {name: data.clone() for name, data in state_dict(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", **config)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    if changes:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2) + "\n")


def as_bin(folder: Path, **options: Any) -> Path:
    """Put the weights into ``pytorch_model.bin``."""
    torch.save({name: data.clone() for name, data in state_dict(folder).items()}, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()
    return folder


def there_and_back(folder: Path, home: Path) -> None:
    """Convert and export: every file comes back byte for byte."""
    assert run("convert", "--load-dir", folder, "--save-dir", home / "m") == 0
    assert run("export", "--load-dir", home / "m", "--save-dir", home / "back") == 0
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in (home / "back").iterdir())
    assert filecmp.cmpfiles(folder, home / "back", names, shallow=False)[0] == names
