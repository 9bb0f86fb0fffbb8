"""Costs of blocks on disk: ``costs.safetensors`` holds the losses, those that are not measured yet as NaN; ``costs.json`` says
what they were measured on, and is written last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import InputError
from megatron_prune.files.atomic import write_text
from megatron_prune.files.documents import STRICT, parse_versioned, read_bytes
from megatron_prune.files.tensor_file import open_tensors, save_tensors
from megatron_prune.planning.costs import Costs, levels

FILE, COSTS_FILE = "costs.json", "costs.safetensors"
FORMAT, VERSION = "megatron-prune costs", 1
_AGAIN = "measure them again with megatron-prune score --costs"


@dataclass(frozen=True, kw_only=True)
class CostsManifest:
    """``costs.json``.

    Attributes:
        content_id: digest of the model that was measured.
        calibration: digest of the text.
        samples: of it that were probed.
        metrics: axis → name of the metric whose scores chose the units that stayed.
        ridge: how strongly writers were held to the cut matrices.
    """

    __pydantic_config__ = STRICT

    content_id: str
    calibration: str
    samples: int
    metrics: dict[str, str]
    ridge: float

    def save(self, folder: Path) -> None:
        """Write it: the costs beside it are whole."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2)
        write_text(folder / FILE, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> CostsManifest:
        """Read it.

        Raises:
            InputError: if the directory holds no finished costs.
        """
        if not has_costs(folder):
            raise InputError(f"{folder} holds no costs of blocks", do=_AGAIN)
        read = read_bytes(folder / FILE, error=InputError)
        return parse_versioned(read, cls, folder / FILE, format=FORMAT, version=VERSION, error=InputError, do=_AGAIN)

    def check(self, content_id: str, metrics: dict[str, str], where: object) -> None:
        """Refuse costs of another model, or of units that were chosen otherwise.

        Raises:
            InputError: naming what differs.
        """
        if self.content_id != content_id:
            raise InputError(f"{where}: costs of another model", got=self.content_id, needed=content_id, do=_AGAIN)
        for axis, name in metrics.items():
            if self.metrics.get(axis) != name:
                what = f"{where}: costs of {axis} were measured with units that another metric chose"
                raise InputError(what, got=self.metrics.get(axis), needed=name, do=f"leave --metric out, or {_AGAIN}")


def has_costs(folder: Path) -> bool:
    """Whether a directory holds finished costs."""
    return (folder / FILE).is_file()


def save_costs(folder: Path, costs: Costs) -> None:
    """Write what is measured so far, in one move."""
    parts = {"dense": np.array([costs.dense])}
    for kind in costs.alone:
        parts |= {f"{kind}.alone": costs.alone[kind], f"{kind}.together": costs.together[kind]}
    aside = folder / (COSTS_FILE + ".new")
    save_tensors(aside, {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()})
    aside.replace(folder / COSTS_FILE)


def load_costs(folder: Path, config: ModelConfig) -> Costs:
    """What is measured so far; NaN everywhere where nothing is.

    Raises:
        InputError: if the file is damaged, or of another shape.
    """
    kinds, path = [BLOCKS.get(name) for name in config.blocks], folder / COSTS_FILE
    shapes: dict[str, tuple[int, ...]] = {"dense": (1,)}
    for kind in kinds:
        shapes |= {f"{kind.name}.alone": (config.num_layers, len(levels(kind))), f"{kind.name}.together": (len(levels(kind)),)}
    if path.exists():
        with open_tensors(path, error=InputError, do=_AGAIN) as file:
            read = {name: file.read(name, torch.float64, shape, finite=False).numpy() for name, shape in shapes.items()}
    else:
        read = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    return Costs(
        config=config,
        dense=float(read["dense"][0]),
        alone={kind.name: read[f"{kind.name}.alone"] for kind in kinds},
        together={kind.name: read[f"{kind.name}.together"] for kind in kinds},
    )
