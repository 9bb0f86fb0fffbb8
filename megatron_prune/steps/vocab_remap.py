"""Megatron ``.bin``/``.idx`` of a whole vocabulary → the same documents in a trimmed one, without their text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy

from megatron_prune.checkpoint import megatron
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World
from megatron_prune.text.answers import has_mask
from megatron_prune.text.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.text.pair import Pair, numpy_dtype, open_pair, read_record
from megatron_prune.text.parts import check_prefix, pair_files, place_pairs
from megatron_prune.verbs.vocab_remap import VocabRemapOptions
from megatron_prune.vocabulary.id_map import MAP_FILE, IdMap, load_map
from megatron_prune.writing.overwrite import check_pair


def vocab_remap(options: VocabRemapOptions, world: World) -> None:
    """Run the step on one process.

    Raises:
        InputError: if the pair, the map or the output do not do.
    """
    if world.size > 1:
        raise InputError("vocab remap is started as one process", got=f"{world.size}")
    prefix = Path(options.save)
    check_prefix(prefix)
    for file in pair_files(prefix).values():
        staging.check_file(file, inputs=[Path(options.map)] if Path(options.map).is_file() else [])
    check_pair(pair_files(prefix), staging.unfinished(prefix), options.overwrite)
    source, folder = open_pair(options.input), _folder(Path(options.map))
    if has_mask(source.prefix):
        raise InputError(
            f"{source.prefix} says which tokens are answers, and these become others",
            do="tokenise its text again with the trimmed tokenizer: megatron-prune preprocess --answers-only",
        )
    if os.path.realpath(f"{source.prefix}.bin") == os.path.realpath(pair_files(prefix)["bin"]):
        raise InputError(f"output {prefix} is the input", do="name another --save")
    ids = load_map(folder if Path(options.map).is_dir() else Path(options.map))
    lowest, highest = source.extremes()
    if lowest < 0 or highest >= len(ids.starts) - 1:
        raise InputError(
            f"{source.prefix}.bin was not made with the tokenizer that was trimmed",
            got=f"token {highest if lowest >= 0 else lowest}",
            needed=f"0 to {len(ids.starts) - 2}",
        )
    record = _record(source.prefix, folder, ids)
    with staging.work(prefix, json.dumps([options.input, options.map]), main=True, agree=world.agree) as work:
        tokens, kept = _rewrite(source, ids, work / "whole")
        if record:
            record |= {"tokens": tokens, "dtype": numpy_dtype(len(ids.new_to_old)).__name__}
            (work / "whole.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        place_pairs(work, {prefix: work / "whole"})
    log.info(
        "%s.bin: %d documents, %d tokens of %d (%.2f%% kept as they were)", prefix, source.documents, tokens, source.total, kept
    )


def _folder(path: Path) -> Path:
    """Where the map of a trimmed model lies."""
    if path.is_dir() and not (path / MAP_FILE).is_file():
        return megatron.iteration_directory(path) / megatron.HF_FOLDER
    return path if path.is_dir() else path.parent


def _rewrite(source: Pair, ids: IdMap, made: Path) -> tuple[int, float]:
    """Write the pair; its tokens, and the percentage of old ones that stay."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype, stays = numpy_dtype(len(ids.new_to_old)), ids.old_to_new >= 0
    builder = IndexedDatasetBuilder(f"{made}.bin", dtype=dtype)
    new_ends = numpy.zeros(source.sequences, dtype=numpy.int64)
    read = written = kept = sequence = 0
    with progress_bar("renumbering", source.total * source.dtype.itemsize, shown=True) as advance:
        for block in source.blocks():
            tokens, ends = ids.apply(block)
            builder.data_file.write(tokens.astype(dtype).tobytes())
            ended = int(numpy.searchsorted(source.ends, read + len(block), side="right"))
            inside = source.ends[sequence:ended] - read  # old tokens of this block up to the end of each sequence
            new_ends[sequence:ended] = written + numpy.concatenate([[0], ends])[inside]
            read, written, kept, sequence = read + len(block), written + len(tokens), kept + int(stays[block].sum()), ended
            advance(block.nbytes)
    builder.sequence_lengths.extend(numpy.diff(new_ends, prepend=0).tolist())
    builder.document_indices = source.document_indices.tolist()
    builder.finalize(f"{made}.idx")
    return written, 100 * kept / source.total


def _record(prefix: str, folder: Path, ids: IdMap) -> dict[str, Any] | None:
    """The record beside the pair, of the trimmed tokenizer now; ``None`` where there is none, or no tokenizer.

    Raises:
        InputError: if the pair was made with another tokenizer, or renumbered already.
    """
    record = read_record(prefix)
    if record is None:
        return None
    made = record["tokenizer"]
    try:
        tokenizer = load_tokenizer(folder)
    except InputError:  # the map alone, or a tokenizer that transformers does not load
        return None
    digest = tokenizer_digest(tokenizer)
    if made["digest"] == digest:
        raise InputError(f"{prefix}.bin speaks the trimmed vocabulary already", do="use it as it is")
    if ids.tokenizer and made["digest"] != ids.tokenizer:
        raise InputError(
            f"{prefix}.bin was not made with the tokenizer that was trimmed",
            got=f"{made['name']} of {made['vocab_size']} tokens",
            do="renumber what that one made, or tokenise the text again: megatron-prune preprocess",
        )
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    record.pop("digest", None)
    return {**record, "tokenizer": {"name": folder.name, "vocab_size": size, "eod": tokenizer.eos_token_id, "digest": digest}}
