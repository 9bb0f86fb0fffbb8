"""What ``--overwrite`` may replace: what this project wrote, or a plain checkpoint of the kind that is about to be written.

A directory is replaced only if all that it holds can be part of such an output; one file more, and it stays.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping

from megatron_prune.checkpoint import huggingface, manifest, megatron
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.files.documents import read_json
from megatron_prune.files.hidden import entries
from megatron_prune.importance import artifact
from megatron_prune.text.pair import is_index
from megatron_prune.vocabulary.id_map import MAP_FILE


class Leaf(Enum):
    """What a name may be, other than a directory whose content is known."""

    FILE, LINK, ANYTHING = range(3)


Tree = Mapping[str, Any]
"""Pattern of a name → a :class:`Leaf`, or the tree below it."""


def _files(*patterns: str) -> Tree:
    return dict.fromkeys(patterns, Leaf.FILE)


_HUGGING_FACE: Tree = {
    **_files("config.json", "generation_config.json", "configuration.json", "README.md", ".gitattributes"),
    **_files("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    **_files("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    **_files("adapter_config.json", "adapter_model.safetensors", huggingface.BUFFERS_FILE),
    **_files("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "*.tiktoken", MAP_FILE),
    **_files("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    **_files("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    **_files("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "[Ll]icense*", "[Nn]otice*"),
    **_files("modeling_*.py", "configuration_*.py", "tokenization_*.py", manifest.RECIPE_FILE, megatron.PLAN_FILE),
    "additional_chat_templates": _files("*.jinja"),
}
_ITERATION: Tree = {
    **_files("__*_*.distcp", ".metadata", "metadata.json", "common.pt", manifest.FILE, megatron.PLAN_FILE),
    "mp_rank_*": _files("model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt", "optim.pt"),
    megatron.HF_FOLDER: _HUGGING_FACE,
}
_MEGATRON: Tree = {**_files(megatron.TRACKER), megatron.RELEASE: _ITERATION, "iter_*": _ITERATION}
_RUN: Tree = {
    **_MEGATRON,
    **_files("run.json", "history.jsonl", "summary.json", "loss.png"),
    "best": Leaf.LINK,
    "tensorboard": _files("events.out.tfevents.*"),
    "data_cache": _files("*-index.npy", "*_index.npy", "*-description.txt"),
    **dict.fromkeys(("wandb", ".*.partial*", ".iter_*.removed"), Leaf.ANYTHING),
}
_SCORES: Tree = _files(
    *("scores.json", "scores.safetensors", "calibration.safetensors", "calibration.json", "final.safetensors"),
    *("layer_????.safetensors", "gradients.safetensors", "losses.safetensors", "costs.json", "costs.safetensors"),
)
_TEACHER: Tree = _files("teacher.json", "part_?????.safetensors")


@dataclass(frozen=True)
class Kind:
    """Outputs of a kind.

    Attributes:
        name: with an article.
        tree: all that one may hold.
        is_one: whether a directory is one, whoever wrote it.
        is_ours: whether this project wrote it.
    """

    name: str
    tree: Tree
    is_one: Callable[[Path], bool]
    is_ours: Callable[[Path], bool]


def _says(name: str, *fields: str, **values: str) -> Callable[[Path], bool]:
    """Whether a JSON file of that name has these fields and values."""

    def test(folder: Path) -> bool:
        try:
            data = read_json(folder / name)
        except InputError:
            return False
        return all(field in data for field in fields) and all(data.get(field) == value for field, value in values.items())

    return test


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


_is_scores, _is_teacher, _is_run = (
    _says("scores.json", format=artifact.FORMAT),
    _says("teacher.json", "teacher", "settings"),
    _says("run.json", "id", "settings"),
)
_is_model = _has("*.safetensors", "*.bin")

MEGATRON = Kind("a Megatron checkpoint", _MEGATRON, _has(megatron.TRACKER), _has(f"*/{manifest.FILE}"))
HUGGING_FACE = Kind(
    "a Hugging Face model",
    _HUGGING_FACE,
    lambda folder: _is_model(folder) and _has("config.json", "adapter_config.json")(folder) or _has(MAP_FILE)(folder),
    _has(manifest.RECIPE_FILE, MAP_FILE),
)
SCORES = Kind("scores", _SCORES, _is_scores, _is_scores)
TEACHER = Kind("a teacher's answers", _TEACHER, _is_teacher, _is_teacher)
RUN = Kind("a run of recover", _RUN, _is_run, _is_run)


def check_output(
    save: Path, writing: Kind, *, overwrite: bool, source: Path | None = None, inputs: Iterable[str | None] = ()
) -> None:
    """Refuse an output directory that is taken, cannot be put in place, or holds what may not be replaced.

    Args:
        source: what is turned into the output; names of its side files may be among those of the output.
        inputs: what else is read.

    Raises:
        InputError: naming what stands in the way.
    """
    staging.check_output(save, overwrite=overwrite, source=source, inputs=inputs)
    if overwrite and not staging.unfinished(save):
        check_replaceable(save, writing, known=_side_files(source) if source else set())


def check_replaceable(save: Path, writing: Kind, *, known: Collection[str]) -> None:
    """Refuse to replace a directory that is neither an output of this project nor a checkpoint of the kind that is written.

    Args:
        known: names of files that may be beside a configuration, as the new output has them too.

    Raises:
        InputError: naming what it holds.
    """
    if not save.is_dir() or not entries(save):
        return
    kinds = [kind for kind in (RUN, writing, MEGATRON, HUGGING_FACE, SCORES, TEACHER) if kind.is_one(save)]
    kind = next((kind for kind in kinds if kind is writing or kind.is_ours(save)), None)
    do = "name another directory, or remove this one yourself"
    if kind is None:
        got = f"{kinds[0].name} of another origin" if kinds else ", ".join(entries(save)[:5])
        needed = f"an output of megatron-prune, or {writing.name}, to replace"
        raise InputError(f"output {save} is not replaced", got=got, needed=needed, do=do)
    foreign = next(_foreign(save, entries(save), kind.tree, known), None)
    if foreign is not None:
        got = f"{foreign.relative_to(save)}, which is no part of {kind.name}"
        raise InputError(f"output {save} is not replaced", got=got, do=f"move that away, or {do}")


def _side_files(source: Path) -> set[str]:
    """Names beside a source's configuration, in a model or in what a checkpoint keeps of one."""
    folders = [source, source / megatron.HF_FOLDER, *source.glob(f"*/{megatron.HF_FOLDER}")]
    return {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()}


def _foreign(folder: Path, names: list[str], tree: Tree, known: Collection[str]) -> Iterator[Path]:
    """What can be no part of a tree; files of ``known`` names can where a configuration is."""
    files = known if tree is _HUGGING_FACE else set()
    for name in names:
        path, leaf = folder / name, next((tree[pattern] for pattern in tree if fnmatchcase(name, pattern)), None)
        if path.is_symlink():
            fits = leaf is Leaf.LINK
        elif path.is_dir() and isinstance(leaf, Mapping):
            fits = True
            yield from _foreign(path, sorted(os.listdir(path)), leaf, known)
        else:
            fits = leaf is Leaf.ANYTHING or path.is_file() and (leaf is Leaf.FILE or name in files)
        if not fits:
            yield path


def check_pair(files: Mapping[str, Path], unfinished: bool, overwrite: bool) -> None:
    """Refuse to replace files that are no Megatron pair with the record of one.

    Args:
        files: ending → place of ``json``, ``bin``, ``idx``.
        unfinished: whether a stopped run was putting them in place.

    Raises:
        InputError: naming the file.
    """
    there = {ending: file for ending, file in files.items() if os.path.lexists(file)}
    if not there or unfinished:
        return
    file = next(iter(there.values()))
    if not overwrite:
        raise InputError(f"output {file} exists", do="name another --save, or pass --overwrite to replace it")
    do = "name another --save, or remove it yourself"
    if ("bin" in there) != ("idx" in there) or "idx" in there and not is_index(there["idx"]):
        lone = there.get("bin", there.get("idx"))
        raise InputError(f"output {lone} is not replaced", got="no pair of Megatron's .bin and .idx", do=do)
    if "json" in there and not _says(there["json"].name, "tokenizer", format="megatron-prune documents")(there["json"].parent):
        raise InputError(f"output {there['json']} is not replaced", got="no record of megatron-prune preprocess", do=do)


_LINE = re.compile(rb"\d+ \d+\n")


def check_counts(file: Path, is_counts: Callable[[Path], bool], overwrite: bool) -> None:
    """Refuse to replace a file that holds no counts.

    Raises:
        InputError: naming the file.
    """
    if not os.path.lexists(file):
        return
    if not overwrite:
        raise InputError(f"output {file} exists", do="name another, or pass --overwrite to replace it")
    if not is_counts(file):
        raise InputError(f"output {file} is not replaced", got="no counts of tokens", do="name another, or remove it yourself")


def is_list_of_counts(file: Path) -> bool:
    """Whether a text file has lines ``id count``."""
    with open(file, "rb") as data:
        start = data.read(1 << 16)
    return not start or _LINE.match(start) is not None
