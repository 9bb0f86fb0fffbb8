"""Scores on disk: what was measured, on which model and text, and every metric's scores, to make any number of plans from.

``scores.json`` says what the directory holds and is written last; without it the directory is unfinished.
``scores.safetensors`` holds one float64 vector by global unit id per metric, axis and layer (``activation.ffn.7``,
``activation.hidden.all``, ``obs:damping=0.1.ffn.7``; ``angular.block.6`` scores every 6 consecutive layers). The statistics they were computed from
(``importance/statistics.py``) and the tokens (``calibration.safetensors``) lie beside them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError, raise_all
from megatron_prune.files import staging
from megatron_prune.files.documents import STRICT, parse_versioned, read_bytes, read_json, shorten
from megatron_prune.files.tensor_file import TensorFile, open_tensors
from megatron_prune.importance.metric import metric_named
from megatron_prune.importance.statistics import replace_file
from megatron_prune.planning import costs_file
from megatron_prune.planning.plan import shape_of
from megatron_prune.planning.selection import Scores
from megatron_prune.text.tokens import Calibration

FILE = "scores.json"
FORMAT, VERSION = "megatron-prune scores", 1
SCORES_FILE = "scores.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
_AGAIN = "make them with megatron-prune score --save"


Sizes = dict[str, int | list[int]]


class TextRecord(TypedDict):
    """The text that was measured on: digest of tokens and weights, and where each source came from."""

    digest: str
    sources: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ScoresManifest:
    """``scores.json``.

    Attributes:
        content_id: digest of the model that was measured.
        model: its sizes: numbers, or lists of one for each layer where these differ.
        metrics: spellings of the metrics whose scores are there.
        moments: sites whose second moments were collected.
        calibration: the text.
        dtype: what was computed in.
        parallel: tensor, pipeline and data-parallel sizes of the pass.
    """

    __pydantic_config__ = STRICT

    content_id: str
    model: Sizes
    metrics: list[str]
    moments: list[str]
    calibration: TextRecord
    dtype: str
    parallel: dict[str, int]

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> ScoresManifest:
        """Read it.

        Raises:
            InputError: if the directory is not one of finished scores.
        """
        file = folder / FILE
        if not file.exists():
            raise InputError(f"{folder} holds no finished scores", do=_AGAIN)
        read = read_bytes(file, error=InputError)
        found = parse_versioned(read, cls, file, format=FORMAT, version=VERSION, error=InputError, do=_AGAIN)
        if set(found.model) != set(SHAPE_FIELDS) or not all(_is_size(size, found.model) for size in found.model.values()):
            raise InputError(f"{file}: model", got=shorten(found.model), needed="sizes of " + ", ".join(SHAPE_FIELDS), do=_AGAIN)
        for name in found.metrics:
            metric_named(name)
        return found

    def check(self, config: ModelConfig, content_id: str, where: object) -> None:
        """Refuse scores of another model.

        Raises:
            InputError: naming what differs.
        """
        shape = shape_of(config)
        wrong = [f"{key}: {self.model.get(key)} there, {shape[key]} here" for key in shape if self.model.get(key) != shape[key]]
        raise_all(InputError, f"{where} were made from a model of another shape", wrong, do="score this checkpoint")
        if self.content_id != content_id:
            raise InputError(
                f"{where} were made from another model of the same shape",
                got=self.content_id,
                needed=content_id,
                do="score this checkpoint",
            )


def _is_size(size: int | list[int], sizes: Sizes) -> bool:
    if isinstance(size, list):
        return len(size) == sizes["num_layers"] and min(size) >= 0
    return size >= 1


def save_scores(folder: Path, scores: dict[str, Scores]) -> None:
    """Write every metric's scores."""
    replace_file(
        folder / SCORES_FILE,
        {_key(metric, *place): value for metric, found in scores.items() for place, value in found.items()},
    )


def load_scores(folder: Path, metric: str) -> Scores:
    """One metric's scores, of every axis and layer that it scores.

    Raises:
        InputError: if the directory has none of that metric, or they are not one finite number for each unit (nor one below
            zero, but of a metric that gives such).
    """
    sizes, kind = ScoresManifest.load(folder).model, metric_named(metric)
    with open_tensors(folder / SCORES_FILE, error=InputError, do="score again") as file:
        places = [_place(file, key, sizes) for key in file.names]
        if metric not in {name for name, _, _ in places}:
            names = ", ".join(sorted({name for name, _, _ in places}))
            raise InputError(f"{folder} holds no scores of {metric}", got=names, do=f"score with --metrics {metric}")
        needed = [(axis, place) for axis in kind.axes for place in _places(axis, sizes)]
        held = [(axis, place) for name, axis, place in places if name == metric]
        found: Scores = {}
        for axis, place in dict.fromkeys([*needed, *held]):
            name = _key(metric, axis, place)
            values = file.read(name, torch.float64, (_units(axis, place, sizes),))
            if not kind.signed and float(values.min()) < -_ROUNDING * float(values.abs().max()):
                raise file.refuse(name, got=float(values.min()), needed=f"{metric} is never below 0")
            found[axis, place] = values
    return found


_ROUNDING = 1e-6
"""How far below zero rounding may take a score, as a share of the largest."""


def _place(file: TensorFile, key: str, sizes: Sizes) -> tuple[str, str, int | None]:
    """(metric, axis, layer or number of layers) of a tensor's name."""
    rest, _, place = key.rpartition(".")
    metric, _, axis = rest.rpartition(".")  # from the right: a parameter of the metric may have a point in it
    number = None if place == "all" else int(place) if place.isdecimal() and len(place) < 7 else -1
    legal = range(1, sizes["num_layers"] + 1) if axis == "block" else _places(axis, sizes) if axis in AXES.names() else []
    if number not in legal:
        raise file.refuse(key, got="another name", needed="a metric, an axis and a layer of this model, such as fisher.ffn.0")
    return metric, axis, number


def _places(axis: str, sizes: Sizes) -> list[int | None]:
    if not AXES.get(axis).per_layer:
        return [None]
    return [layer for layer in range(sizes["num_layers"]) if _units(axis, layer, sizes)]


def _units(axis: str, place: int | None, sizes: Sizes) -> int:
    if axis == "block":
        return sizes["num_layers"] - place + 1
    size = sizes[AXES.get(axis).field]
    return size if isinstance(size, int) else size[place]


def _key(metric: str, axis: str, place: int | None) -> str:
    return f"{metric}.{axis}.{'all' if place is None else place}"


def scores_digest(folder: Path) -> str:
    """SHA-256 of a directory's manifest and scores, and of its costs of blocks where it holds any."""
    digest = hashlib.sha256()
    for name in (FILE, SCORES_FILE, costs_file.FILE, costs_file.COSTS_FILE):
        if name in (FILE, SCORES_FILE) or costs_file.has_costs(folder):
            digest.update(read_bytes(folder / name, error=InputError))
    return digest.hexdigest()


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep the tokens beside what is measured on them."""
    tensors = {"tokens": calibration.tokens, "lengths": calibration.lengths, "weights": calibration.weights}
    replace_file(folder / CALIBRATION_FILE, tensors)
    staging.write_text(folder / "calibration.json", json.dumps(calibration.provenance, indent=2) + "\n")


def load_calibration_file(folder: Path, config: ModelConfig | None = None) -> Calibration | None:
    """The tokens kept in a directory, if they are there.

    Args:
        config: of the model that they are for.

    Raises:
        InputError: if the files are damaged, or hold what the model has not.
    """
    about, tensors = folder / "calibration.json", folder / CALIBRATION_FILE
    if not about.exists():
        return None
    provenance = read_json(about, list[dict[str, Any]], error=InputError, do="score again")
    with open_tensors(tensors, error=InputError, do="score again") as file:
        tokens = file.read("tokens", torch.int64, (None, None), least=0)
        lengths, weights = file.read("lengths", torch.int64, (None,)), file.read("weights", torch.float64, (None,))
        if tokens.numel() == 0:
            raise file.refuse("tokens", got="none", needed="samples")
        if config is not None and int(tokens.max()) >= config.vocab_size:
            raise file.refuse("tokens", got=f"token {int(tokens.max())}", needed=f"0 to {config.vocab_size - 1}")
        if config is not None and tokens.shape[1] > config.max_position_embeddings:
            raise file.refuse("tokens", got=f"{tokens.shape[1]} a sample", needed=f"at most {config.max_position_embeddings}")
    try:
        return Calibration(tokens=tokens, lengths=lengths, weights=weights, provenance=provenance)
    except InputError as error:
        raise InputError(f"{tensors}: {error}", do="score again") from None
