"""Scores on disk: what was measured, on which model and text, and every metric's scores, to make any number of plans from.

``scores.json`` says what the directory holds and is written last; without it the directory is unfinished.
``scores.safetensors`` holds one float64 vector by global unit id per metric, axis and layer (``activation.ffn.7``,
``activation.hidden.all``; ``angular.block.6`` scores every 6 consecutive layers). The statistics they were computed from
(``importance/statistics.py``) and the tokens (``calibration.safetensors``) lie beside them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.calibration.tokens import Calibration
from megatron_prune.errors import InputError, raise_all
from megatron_prune.files import staging
from megatron_prune.importance.statistics import replace_file
from megatron_prune.planning.selection import Scores

FILE = "scores.json"
FORMAT, VERSION = "megatron-prune scores", 1
SCORES_FILE = "scores.safetensors"
CALIBRATION_FILE = "calibration.safetensors"


@dataclass(frozen=True, kw_only=True)
class ScoresManifest:
    """``scores.json``.

    Attributes:
        content_id: digest of the model that was measured.
        model: its sizes.
        metrics: names of the metrics whose scores are there.
        moments: sites whose second moments were collected.
        calibration: digest of tokens and weights, and where each source came from.
        dtype: what was computed in.
        parallel: tensor, pipeline and data-parallel sizes of the pass.
    """

    content_id: str
    model: dict[str, int]
    metrics: list[str]
    moments: list[str]
    calibration: dict[str, Any]
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
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT or data.pop("version") != VERSION:
                raise ValueError("another format or version")
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder} holds no finished scores", got=str(error), do="make them with megatron-prune score --save"
            ) from None

    def check(self, config: ModelConfig, content_id: str, where: object) -> None:
        """Refuse scores of another model.

        Raises:
            InputError: naming what differs.
        """
        shape = {name: getattr(config, name) for name in SHAPE_FIELDS}
        wrong = [f"{key}: {self.model.get(key)} there, {shape[key]} here" for key in shape if self.model.get(key) != shape[key]]
        raise_all(InputError, f"{where} were made from a model of another shape", wrong, do="score this checkpoint")
        if self.content_id != content_id:
            raise InputError(
                f"{where} were made from another model of the same shape",
                got=self.content_id,
                needed=content_id,
                do="score this checkpoint",
            )


def save_scores(folder: Path, scores: dict[str, Scores]) -> None:
    """Write every metric's scores."""
    replace_file(
        folder / SCORES_FILE,
        {_key(metric, *place): value for metric, found in scores.items() for place, value in found.items()},
    )


def load_scores(folder: Path, metric: str) -> Scores:
    """One metric's scores.

    Raises:
        InputError: if the directory has none of that metric.
    """
    held = load_file(folder / SCORES_FILE)
    found: Scores = {}
    for key, value in held.items():
        name, axis, place = key.rsplit(".", 2)
        if name == metric:
            found[axis, None if place == "all" else int(place)] = value
    if not found:
        names = sorted({key.rsplit(".", 2)[0] for key in held})
        raise InputError(f"{folder} holds no scores of {metric}", got=", ".join(names), do=f"score with --metrics {metric}")
    return found


def _key(metric: str, axis: str, place: int | None) -> str:
    return f"{metric}.{axis}.{'all' if place is None else place}"


def scores_digest(folder: Path) -> str:
    """SHA-256 of a directory's manifest and scores."""
    digest = hashlib.sha256()
    for name in (FILE, SCORES_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep the tokens beside what is measured on them."""
    tensors = {"tokens": calibration.tokens, "lengths": calibration.lengths, "weights": calibration.weights}
    replace_file(folder / CALIBRATION_FILE, tensors)
    staging.write_text(folder / "calibration.json", json.dumps(calibration.provenance, indent=2) + "\n")


def load_calibration_file(folder: Path) -> Calibration | None:
    """The tokens kept in a directory, if they are there."""
    try:
        provenance = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Calibration(**load_file(folder / CALIBRATION_FILE), provenance=provenance)
