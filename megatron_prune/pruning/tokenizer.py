"""The tokenizer of a pruned model."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.arch.model import ModelConfig
from megatron_prune.planning.plan import load_plan
from megatron_prune.pruning.request import Request, TargetOptions
from megatron_prune.vocabulary.choice import trimmed_by
from megatron_prune.vocabulary.opened import tokenizer_folder
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import holds_tokenizer, open_vocabulary


def kept_vocabulary(
    options: TargetOptions, request: Request, config: ModelConfig, tokenizer: str | None, own: Path | None
) -> Trimmed | None:
    """The tokenizer that goes with the tokens that stay; ``None`` where all do.

    Args:
        tokenizer: named by the user.
        own: directory that the model keeps.

    Raises:
        InputError: if there is no tokenizer, it is not the model's, or it needs a token that goes.
    """
    if request.vocab is None:
        return None
    folder = own if own and holds_tokenizer(own) else tokenizer_folder(own, tokenizer)  # --tokenizer may be of the text alone
    path = options.vocab_plan or options.plan
    return trimmed_by(load_plan(Path(path)), request.vocab, open_vocabulary(folder, config.vocab_size), path)
