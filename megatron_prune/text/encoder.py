"""A tokenizer: loaded when it is first needed, and known again by its vocabulary."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator

import torch

from megatron_prune.errors import InputError, reason
from megatron_prune.files.documents import read_json, shorten
from megatron_prune.runtime.chat_template import Span
from megatron_prune.text.talks import Messages
from megatron_prune.text.template import ChatTemplate


class Encoder:
    """Text → tokens by a Hugging Face tokenizer, with the special tokens it puts around a text by itself.

    Args:
        folder: directory of the tokenizer; ``None`` where there is none, which is an error only when text has to be read.
        answers: whether to tell which characters of a talk the assistant says.
    """

    def __init__(self, folder: Path | None, *, answers: bool = False):
        self._folder, self.answers = folder, answers
        self._tokenizer = self._template = None

    def __call__(self, text: str) -> torch.Tensor:
        """int64 [tokens].

        Raises:
            InputError: if there is no tokenizer or it cannot be loaded.
        """
        self.load()
        bos = self._tokenizer.bos_token
        begun = bool(bos) and text.startswith(bos)  # a talk says itself which special tokens it has
        with tokenizer_errors(f"the tokenizer in {self._folder} cannot encode a text", notes=True):
            ids = self._tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def render(self, messages: Messages, tools: list | None, where: str) -> tuple[str, list[Span]]:
        """A talk as text by the tokenizer's chat template, and which characters are the assistant's, if that is asked for.

        Args:
            where: the record, for messages.

        Raises:
            InputError: naming the record, if there is no tokenizer or template, or it does not do.
        """
        if self._folder is None:
            raise InputError(f"{where} is a talk, and there is no chat template", do="name a tokenizer that has one")
        if self._template is None:
            self.load()
            self._template = ChatTemplate(self._tokenizer, self._folder.name, answers=self.answers)
        return self._template.render(messages, tools, where)

    def load(self) -> None:
        """Load the tokenizer now.

        Raises:
            InputError: if there is no tokenizer or it cannot be loaded.
        """
        if self._tokenizer is not None:
            return
        if self._folder is None:
            raise InputError("text needs a tokenizer and the model keeps none", do="name one with --tokenizer")
        self._tokenizer = load_tokenizer(self._folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face directory, as ``transformers`` gives it.

    Raises:
        InputError: if there is none, or it cannot be loaded, or only by running code of its own.
    """
    from transformers import AutoTokenizer

    if not any(entry.name.startswith(_NAMES) or entry.suffix in _SUFFIXES for entry in folder.iterdir()):
        raise InputError(f"text needs a tokenizer, and there is none in {folder}", do="name one with --tokenizer")
    check_no_code(folder)
    with tokenizer_errors(f"the tokenizer in {folder} cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


_NAMES, _SUFFIXES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens"), (".model", ".tiktoken")
"""What the files of a tokenizer are called: one of them at least is there where there is one."""


def check_no_code(folder: Path) -> None:
    """Refuse a tokenizer that wants code of its own: its text → tokens may be another than that of the class which stands in.

    Raises:
        InputError: naming the file and the code.
    """
    for name in ("tokenizer_config.json", "config.json"):
        wanted = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        if isinstance(wanted, dict):
            wanted = wanted.get("AutoTokenizer")
        if wanted:
            raise InputError(
                f"{folder / name}: the tokenizer wants code of its own, which is never run",
                got=f"auto_map {shorten(wanted)}",
                do="name a tokenizer that needs none (--tokenizer); or take auto_map out of the file, if a class of transformers "
                "does the same",
            )


@contextlib.contextmanager
def tokenizer_errors(what: str, error: type[InputError] = InputError, *, notes: bool = False) -> Iterator[None]:
    """Say ``what`` is wrong where a library of tokenizers fails.

    They raise bare ``Exception`` for a damaged file, and for what their authors did not think of a panic of Rust, which is no
    ``Exception`` and has written to standard error before it is seen.

    Args:
        notes: leave what a panic writes where it is: to keep it off takes longer than a short text takes to encode.

    Raises:
        InputError (of the kind ``error``): with what the library says.
    """
    try:
        with contextlib.nullcontext() if notes else _no_panic_notes():
            yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as found:
        raise error(what, got=reason(found)) from None


@contextlib.contextmanager
def _no_panic_notes() -> Iterator[None]:
    """Keep notes of a panic of Rust off standard error; what else is written to it meanwhile comes after."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            lines = held.read().decode("utf-8", "replace").splitlines(keepends=True)
            sys.stderr.write("".join(_without_panics(lines)))


def _without_panics(lines: list[str]) -> list[str]:
    """Lines but for ``thread … panicked at …`` and the two or three after it."""
    found, skipping = [], False
    for line in lines:
        skipping = "panicked at" in line or (skipping and "RUST_BACKTRACE" not in line)
        if not skipping and "RUST_BACKTRACE" not in line:
            found.append(line)
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the vocabulary, added tokens with it: the same for tokenizers whose ids mean the same tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
