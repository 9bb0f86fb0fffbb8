"""A model of either kind, or a tokenizer alone, with its vocabulary."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.description import Told
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.errors import InputError
from megatron_prune.files.documents import shorten
from megatron_prune.vocabulary.vocabulary import Vocabulary, holds_tokenizer, open_vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """What ``--load-dir`` means.

    Attributes:
        path: what was opened.
        checkpoint: the Megatron checkpoint or Hugging Face model; ``None`` for a tokenizer alone.
        vocabulary: its vocabulary.
    """

    path: Path
    checkpoint: MegatronCheckpoint | HuggingFaceModel | None
    vocabulary: Vocabulary

    @property
    def config(self) -> ModelConfig | None:
        return self.checkpoint.config if self.checkpoint else None

    @property
    def layout(self) -> ParallelLayout | None:
        """How a Megatron checkpoint is divided."""
        return self.checkpoint.layout if isinstance(self.checkpoint, MegatronCheckpoint) else None


def open_subject(load_dir: str, tokenizer: str | None, beside: Told = Told()) -> Model:
    """Open a model of either kind, or a tokenizer.

    Args:
        beside: what is said of a Megatron checkpoint.

    Raises:
        InputError: if there is none, or its tokenizer is missing, damaged or another model's.
    """
    path = Path(os.path.expanduser(load_dir))
    if megatron.is_megatron(path):
        checkpoint = megatron.open_checkpoint(path, beside)
        folder = tokenizer_folder(checkpoint.hf_folder, tokenizer)
        return Model(path=path, checkpoint=checkpoint, vocabulary=open_vocabulary(folder, checkpoint.config.vocab_size))
    if beside != Told():
        raise InputError(f"{load_dir} is no Megatron checkpoint", do="leave out what is said of one: --hf-dir and the like")
    folder = huggingface.resolve(load_dir)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        if tokenizer:
            raise InputError(f"--tokenizer beside {load_dir}", got="a tokenizer already", do="leave it out")
        rows = huggingface.read_config(folder).get("vocab_size") if huggingface.is_huggingface(folder) else None
        if rows is not None and (type(rows) is not int or rows < 1):
            raise InputError(f"{folder}/config.json: vocab_size", got=shorten(rows), needed="a positive whole number")
        return Model(path=folder, checkpoint=None, vocabulary=open_vocabulary(folder, rows))
    model = huggingface.open_model(folder)
    source = tokenizer_folder(folder, tokenizer)
    return Model(path=folder, checkpoint=model, vocabulary=open_vocabulary(source, model.config.vocab_size))


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
    for folder in (huggingface.resolve(named, weights=False), own):
        if folder:
            huggingface.copy_side_files(folder, Path(joined))
    return Path(joined)
