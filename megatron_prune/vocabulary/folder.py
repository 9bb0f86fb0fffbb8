"""The directory that says the vocabulary of an opened model."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from megatron_prune.checkpoint import huggingface, model_folder
from megatron_prune.errors import InputError
from megatron_prune.opening.opened import Opened
from megatron_prune.vocabulary.vocabulary import Vocabulary, holds_tokenizer, open_vocabulary


def vocabulary_of(model: Opened) -> Vocabulary:
    """The tokens of a model, or of a tokenizer alone.

    Raises:
        InputError: if the tokenizer is missing, damaged or another model's.
    """
    folder = tokenizer_folder(model.folder, model.named_tokenizer) if model.checkpoint else model.path
    return open_vocabulary(folder, model.rows)


def tokenizer_folder(own: Path | None, named: str | None) -> Path:
    """The directory of a model's tokenizer, with the configuration files that name its ids.

    Args:
        own: what the model keeps.
        named: by the user, for a model that keeps none. Both are then put together in a temporary directory; what the model
            keeps comes first.

    Raises:
        InputError: if there is no tokenizer, or one too many.
    """
    held = own is not None and holds_tokenizer(own)
    if held and named:
        raise InputError(f"--tokenizer {named}", got="a model that keeps its own", do="leave it out")
    if held:
        return own
    if not named:
        raise InputError("the model keeps no tokenizer", do="name its Hugging Face directory with --tokenizer")
    joined = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, joined, ignore_errors=True)
    for folder in (model_folder.resolve(named, weights=False), own):
        if folder:
            huggingface.copy_side_files(folder, Path(joined))
    return Path(joined)
