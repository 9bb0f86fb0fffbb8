"""What the vocabulary's verbs ask: the counts, which tokens are to stay, the texts of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import torch_archive
from megatron_prune.config import check_limits, flag
from megatron_prune.errors import InputError, reason
from megatron_prune.files import staging
from megatron_prune.files.documents import read_bytes, read_text, shorten
from megatron_prune.files.hidden import located
from megatron_prune.opening.opened import Opened
from megatron_prune.runtime.reporting import log
from megatron_prune.serving.demand import demanded
from megatron_prune.serving.options import parse_serve
from megatron_prune.text.contents import summary
from megatron_prune.text.data_specs import split_weight
from megatron_prune.text.documents import open_documents
from megatron_prune.text.splits import TRAIN
from megatron_prune.vocabulary.counts import Counts, load_counts, merged
from megatron_prune.vocabulary.options import SelectOptions
from megatron_prune.vocabulary.selection import PRIOR, Wanted, tokens_of_scripts, tokens_of_texts
from megatron_prune.vocabulary.vocabulary import Vocabulary

LINES = 20_000
"""Lines of held-out text that are encoded."""


def check_select(options: SelectOptions) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        InputError: naming the option.
    """
    check_limits(options)
    if options.serve:
        parse_serve(options.serve)
    sizes = [name for name in ("remain_vocab_size", "min_count", "coverage") if getattr(options, name) is not None]
    if len(sizes) > 1:
        raise InputError(" and ".join(flag(name) for name in sizes) + " both say how many tokens stay", do="give one of the two")
    if options.prior != PRIOR and not options.counts:
        raise InputError("--prior without --counts", got="nothing to weigh it against", do="leave it out, or name counts")
    for name in ("min_count", "coverage"):
        if getattr(options, name) is not None and not options.counts:
            raise InputError(
                f"{flag(name)} needs counts", do="make them with megatron-prune vocab count, and name them with --counts"
            )
    files = [getattr(options, name, None) for name in ("report", "save_ids", "save_plan")]
    named = [located(Path(path)) for path in files if path]
    if len(set(named)) < len(named):
        raise InputError("two outputs are the same file", got=", ".join(map(str, named)), do="name different ones")
    save = getattr(options, "save", None)
    for path in named:
        staging.check_file(path, beside=Path(save) if save else None)
    if len(set(options.counts)) < len(options.counts):
        raise InputError("--counts names a file twice", got=" ".join(options.counts), do="give it a weight instead")


def read_counts(names: tuple[str, ...], vocabulary: Vocabulary) -> Counts | None:
    """The counts of all files that are named.

    Raises:
        InputError: if one is damaged, of another tokenizer, or empty.
    """
    if not names:
        return None
    parts = []
    for spec in names:
        path, weight = split_weight(spec, "--counts")
        found = load_counts(Path(path))
        if found.digest != vocabulary.digest:
            raise InputError(
                f"{path} counts the tokens of another tokenizer",
                got=", ".join(corpus.name for corpus in found.corpora),
                needed=f"counts made with the tokenizer in {vocabulary.folder}",
            )
        parts.append(found if weight is None else found.weighted(weight))
    counts = merged(parts)
    if not counts.total().any():
        raise InputError("--counts: nothing was counted", got=", ".join(corpus.name for corpus in counts.corpora))
    return counts


def read_lines(name: str) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        InputError: if it cannot be read, or has none.
    """
    found = [line for line in read_text(Path(name), error=InputError).splitlines() if line.strip()]
    if not found:
        raise InputError(f"--keep {name} is empty", needed="texts, one a line")
    return found


def read_ids(name: str) -> set[int]:
    """The ids in a file: a list or tensor that ``torch.save`` wrote, or numbers one a line.

    Raises:
        InputError: if it holds something else.
    """
    do = "a list or tensor of ids, or one a line"
    data = read_bytes(Path(name), error=InputError)
    try:
        if data[:2] == b"PK":
            held = torch_archive.read_objects(Path(name))
            ids = torch_archive.values(held, Path(name)).tolist() if isinstance(held, torch.Tensor) else held
        else:
            ids = [int(line.split()[0]) for line in data.decode("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"--keep-ids {name} holds no ids", got=reason(error), needed=do) from None
    if not isinstance(ids, list) or not ids or any(type(number) is not int for number in ids):
        raise InputError(f"--keep-ids {name} holds no ids", got=shorten(ids), needed=do)
    return set(ids)


def held_out_lines(options: SelectOptions) -> list[str]:
    """Lines of the held-out texts.

    Raises:
        InputError: if one cannot be read or holds none.
    """
    found: list[str] = []
    for name in options.held_out:
        before = len(found)
        source = open_documents(name, (options.data_field,), split=TRAIN)
        if line := summary(name, source.contents()):
            log.info("%s", line)
        for document in source.documents((options.data_field,)):
            found += [line for line in document.texts[0].splitlines() if line.strip()]
            if len(found) >= LINES:
                break
        if len(found) == before:
            raise InputError(f"--held-out {name} is empty", needed="text")
    return found[:LINES]


def served_tokens(options: SelectOptions, model: Opened) -> dict[str, Any]:
    """What of a vocabulary --serve asks for, as fields of :class:`Wanted`.

    Raises:
        InputError: of a tokenizer alone, or a model that cannot be served whatever its number of tokens.
    """
    if not options.serve:
        return {}
    if model.config is None:
        raise InputError("--serve", got=f"a tokenizer alone, {model.path}", needed="a model, which is what is served")
    demand = demanded(options.serve, model.family, model.template)
    demand.check_but_tokens(model.config)
    return {"unserved": demand.token_problems(model.config), "period": demand.period}


def wanted_tokens(
    options: SelectOptions, vocabulary: Vocabulary, layout: ParallelLayout | None, served: dict[str, Any] | None = None
) -> Wanted:
    """What the options ask for.

    Args:
        layout: of a Megatron checkpoint, which pads the vocabulary.
        served: of :func:`served_tokens`.

    Raises:
        InputError: if they ask for nothing, or a file or script is not what it should be.
    """
    if all(getattr(options, name) is None for name in SelectOptions.CRITERIA):
        names = ", ".join(map(flag, SelectOptions.CRITERIA))
        raise InputError("nothing says which tokens stay", needed=f"one of {names}")
    keep: dict[int, str] = {}
    if options.keep_script:
        scripts = [name.strip() for name in options.keep_script.split(",") if name.strip()]
        keep |= dict.fromkeys(tokens_of_scripts(vocabulary, scripts), "script")
    if options.keep_ids:
        ids = read_ids(options.keep_ids)
        wrong = sorted(token for token in ids if not 0 <= token < vocabulary.rows)
        if wrong:
            raise InputError(f"--keep-ids {options.keep_ids}", got=f"ids {wrong[:5]}", needed=f"0 to {vocabulary.rows - 1}")
        keep |= dict.fromkeys(ids, "kept id")
    if options.keep:
        keep |= dict.fromkeys(tokens_of_texts(vocabulary, read_lines(options.keep)), "kept text")
    multiple = options.multiple_of
    if multiple is None:
        padding = layout.vocab_divisible_by * layout.tensor if layout else 1
        multiple = padding if options.remain_vocab_size is None else 1
    return Wanted(
        size=options.remain_vocab_size,
        min_count=options.min_count,
        coverage=options.coverage,
        multiple_of=multiple,
        prior=options.prior,
        keep=keep,
        **(served or {}),
    )
