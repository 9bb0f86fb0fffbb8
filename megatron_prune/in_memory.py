"""What a caller has in memory, as the files that verbs read: models, texts, samples, plans. No message names these files."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune.config import shown
from megatron_prune.errors import InputError
from megatron_prune.files import hidden
from megatron_prune.runtime.reporting import no_bars
from megatron_prune.runtime.world import World
from megatron_prune.spelling import reworded

TEXT = "names of files, folders or data sets (texts in memory: texts=), or samples as int64 [samples, tokens]"


def several(names: Any, argument: str, needed: str = "a name, a path, or several") -> tuple[str, ...]:
    """One name or several, as several.

    Raises:
        InputError: naming the argument, if they are something else.
    """
    found = (names,) if isinstance(names, (str, Path)) else tuple(names) if isinstance(names, (list, tuple)) else None
    if found is None or not all(isinstance(name, (str, Path)) for name in found):
        raise InputError(f"{argument}=", got=shown(names), needed=needed)
    return tuple(map(str, found))


def place_of(name: Any, argument: str) -> Path:
    """A place that is named.

    Raises:
        InputError: naming the argument, if it is something else, such as a model in memory.
    """
    if isinstance(name, (str, Path)):
        return Path(name)
    do = "save it (save_pretrained), and name that directory" if hasattr(name, "save_pretrained") else None
    raise InputError(f"{argument}=", got=shown(name), needed="a name, or a path", do=do)


@contextlib.contextmanager
def placed(save: str | Path | None, name: str, words: str) -> Iterator[str]:
    """Where something is written: the place that was named, or one that goes, which messages call ``words``."""
    if save is not None:
        yield str(place_of(save, "save"))
        return
    with shared_folder() as folder, standing_for(f"{folder}/{name}", words):
        yield f"{folder}/{name}"


@contextlib.contextmanager
def standing_for(path: str, words: str) -> Iterator[None]:
    """What is said of a temporary file or directory meanwhile is said of what it stands for; that it, or what is made beside it
    (``files/hidden.py``), is to be removed is not said: it goes by itself."""
    places = {Path(path), hidden.located(Path(path))}
    place = "|".join(re.escape(str(each)) for each in places)
    beside = "|".join(re.escape(str(each.with_name(f".{each.name}."))) for each in places)
    part = rf"/(?:{hidden.CONTENT}|{hidden.OLD})\b"
    inside = rf"(?:{beside})(?:{hidden.WORK}|{hidden.PARTIAL})(?:-\d+)?(?:{part})?(?!{part}|[\w-])"
    name = Path(path).name
    # a directory may be called by its last name
    alone = rf"\b{re.escape(name)}\b" if name.startswith(tempfile.gettempprefix()) else place
    said = {
        rf"\n  what to do: remove (?:{inside}|{place})[^\n]*": "",
        f"{inside}/": f"work on {words}: ",
        inside: f"work on {words}",
        f"(?:{place})/": f"{words}: ",
        place: words,
        alone: words,
    }
    with reworded(lambda text: functools.reduce(lambda so_far, how: re.sub(how, lambda _: said[how], so_far), said, text)):
        yield


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
    """Options that name the text.

    Raises:
        InputError: if it is no text and no samples, or both are there.
    """
    if data is not None and texts is not None:
        raise InputError("data= and texts=", needed="one of the two")
    if texts is not None:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in _texts(texts))
        with shared_folder() as folder, standing_for(f"{folder}/texts.jsonl", "texts"):
            World.of_environment().on_main(lambda: Path(folder, "texts.jsonl").write_text(lines, encoding="utf-8"))
            yield {"data": (f"{folder}/texts.jsonl",)}
    elif hasattr(data, "shape"):  # of torch or numpy
        from megatron_prune.text.artifact import save_samples

        samples = _samples(data)
        with shared_folder() as folder, standing_for(f"{folder}/samples.safetensors", "data"):
            file = Path(folder, "samples.safetensors")
            World.of_environment().on_main(lambda: save_samples(file, samples, {"content_id": "given in memory"}))
            yield {"data": (str(file),), "nsamples": samples.shape[0], "seq_length": samples.shape[1]}
    else:
        yield {} if data is None else {"data": several(data, "data", TEXT)}


def _texts(texts: Any) -> list[str]:
    if isinstance(texts, (str, bytes, Mapping)) or not hasattr(texts, "__iter__"):
        raise InputError("texts=", got=shown(texts), needed="a sequence of texts")
    found = list(texts)
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise InputError("texts=", got=shown(wrong[0]), needed="a sequence of texts")
    if not any(text.strip() for text in found):
        raise InputError("texts=", got=shown(found), needed="at least one text that says something")
    return found


def _samples(data: Any) -> Any:
    """Samples as a tensor: of whole numbers, two-dimensional."""
    import torch

    kind, shape = str(data.dtype).removeprefix("torch."), list(data.shape)
    if not kind.startswith("int") or len(shape) != 2 or not all(shape):
        raise InputError("data=", got=f"{kind} {shape}", needed=TEXT)
    return torch.as_tensor(data).to("cpu", torch.int64)


@contextlib.contextmanager
def named_plan(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options with a plan, or sizes by layer, that are in memory as files."""
    dumps = {"plan": lambda plan: plan.dumps(), "layer_sizes": json.dumps}
    held = {name for name in dumps if not isinstance(given.get(name), (str, Path, type(None)))}
    with contextlib.ExitStack() as stack:
        for name in sorted(held):
            folder = stack.enter_context(shared_folder())
            file = Path(folder, f"{name}.json")
            stack.enter_context(standing_for(str(file), {"plan": "the plan"}.get(name, name)))
            text = dumps[name](given[name])
            World.of_environment().on_main(functools.partial(file.write_text, text, encoding="utf-8"))
            given = {**given, name: str(file)}
        yield given


def called(model: Any) -> str:
    """What messages call a model in memory."""
    return f"{type(model).__name__} in memory"


@contextlib.contextmanager
def folder_of(model: Any, tokenizer: Any) -> Iterator[str | None]:
    """A model in memory, and its tokenizer, as a directory; ``None`` for one that is named.

    Raises:
        InputError: if it is neither, or several processes would write it.
    """
    if isinstance(model, (str, Path)):
        if not isinstance(tokenizer, (str, Path, type(None))):
            raise InputError(
                "tokenizer=", got=type(tokenizer).__name__, needed="the name of its directory, as the model is named"
            )
        yield None
        return
    _check_model(model)
    with tempfile.TemporaryDirectory() as folder, standing_for(folder, called(model)):
        with no_bars():
            model.save_pretrained(folder)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        elif tokenizer is not None:
            from megatron_prune.checkpoint import model_folder
            from megatron_prune.text.encoder import load_tokenizer

            name = place_of(tokenizer, "tokenizer")
            load_tokenizer(model_folder.resolve(str(name), weights=False)).save_pretrained(folder)
        yield folder


def _check_model(model: Any) -> None:
    if not hasattr(model, "save_pretrained") or not hasattr(model, "state_dict"):
        raise InputError("model=", got=shown(model), needed="a transformers model, or the name of a directory")
    if getattr(model, "peft_config", None):
        raise InputError(
            "model=",
            got=f"{type(model).__name__} with adapters",
            needed="weights alone",
            do="merge them: model.merge_and_unload()",
        )
    if getattr(getattr(model, "device", None), "type", None) == "meta":
        raise InputError("model=", got=f"{type(model).__name__} on meta", needed="a model with its weights")
    if World.of_environment().size > 1:
        raise InputError(
            "a model in memory, and several processes", do="save it, convert it (mp.convert) and name the checkpoint"
        )


def loaded(folder: str, like: Any, save: str | Path | None) -> Any:
    """A model in memory, with the element type and on the device of another; its name is where it was saved, if it was."""
    from megatron_prune.runtime.stock_model import load_stock_model

    model = load_stock_model(Path(folder), dtype=like.dtype).to(like.device)
    model.name_or_path = model.config.name_or_path = str(save or "")
    return model
