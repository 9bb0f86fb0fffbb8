"""What a caller has in memory, as the files that verbs read: models, texts, samples, plans."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World


def several(names: Any) -> tuple[Any, ...]:
    """One name or several, as several."""
    return (str(names),) if isinstance(names, (str, Path)) else tuple(names)


def is_megatron(name: Any) -> bool:
    """Whether a name is that of a Megatron checkpoint."""
    from megatron_prune.checkpoint import model_folder

    path = Path(name)
    return path.is_dir() and not model_folder.is_huggingface(path)


@contextlib.contextmanager
def placed(save: str | Path | None, name: str) -> Iterator[str]:
    """Where something is written: the place that was named, or one that goes."""
    if save is not None:
        yield str(save)
        return
    with shared_folder() as folder:
        yield f"{folder}/{name}"


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """A temporary directory, the same on every process of this machine's run."""
    world = World.of_environment()
    held = tempfile.TemporaryDirectory() if world.is_main else contextlib.nullcontext()
    with held as folder:
        yield world.all_gather(folder)[0]
        world.barrier()


@contextlib.contextmanager
def named_text(data: Any, texts: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Options that name the text."""
    if data is not None and texts is not None:
        raise InputError("data and texts", needed="one of the two")
    if texts is None and not hasattr(data, "dim"):
        yield {} if data is None else {"data": several(data)}
        return
    with shared_folder() as folder:
        world = World.of_environment()
        if texts is not None:
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise InputError("texts", needed="a sequence of texts")
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            world.on_main(lambda: Path(folder, "texts.jsonl").write_text(lines, encoding="utf-8"))
            yield {"data": (f"{folder}/texts.jsonl",)}
            return
        from megatron_prune.text.artifact import save_samples

        file = Path(folder, "samples.safetensors")
        world.on_main(lambda: save_samples(file, data, {"content_id": "given in memory"}))
        yield {"data": (str(file),), "nsamples": data.shape[0], "seq_length": data.shape[1]}


@contextlib.contextmanager
def named_plan(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options with a plan in memory as a file."""
    if not hasattr(given.get("plan"), "dumps"):
        yield given
        return
    with shared_folder() as folder:
        file = Path(folder, "plan.json")
        World.of_environment().on_main(lambda: file.write_text(given["plan"].dumps(), encoding="utf-8"))
        yield {**given, "plan": str(file)}


@contextlib.contextmanager
def folder_of(model: Any, tokenizer: Any) -> Iterator[str | None]:
    """A model in memory, and its tokenizer, as a directory; ``None`` for one that is named.

    Raises:
        InputError: if it is neither, or several processes would write it.
    """
    if isinstance(model, (str, Path)):
        yield None
        return
    if not hasattr(model, "save_pretrained"):
        raise InputError("model", got=type(model).__name__, needed="a transformers model, or the name of a directory")
    if World.of_environment().size > 1:
        raise InputError(
            "a model in memory, and several processes", do="save it, convert it (mp.convert) and name the checkpoint"
        )
    with tempfile.TemporaryDirectory() as folder:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model.save_pretrained(folder)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        elif tokenizer is not None:
            from megatron_prune.checkpoint import model_folder
            from megatron_prune.text.encoder import load_tokenizer

            load_tokenizer(model_folder.resolve(str(tokenizer), weights=False)).save_pretrained(folder)
        yield folder


def loaded(folder: str, like: Any) -> Any:
    """A model in memory, with the element type and on the device of another."""
    from megatron_prune.runtime.stock_model import load_stock_model

    return load_stock_model(Path(folder), dtype=like.dtype).to(like.device)
