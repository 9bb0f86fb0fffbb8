"""Text → Megatron's ``.bin``/``.idx``: what ``tools/preprocess_data.py`` of Megatron-LM does, for any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

from megatron_prune import __version__
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_tokenizer
from megatron_prune.runtime.reporting import log, progress_bar, shown_bytes, shown_time
from megatron_prune.runtime.world import World
from megatron_prune.text.answers import mask_prefix
from megatron_prune.text.contents import check_read_once, summary
from megatron_prune.text.cutting import checked, cut, part_size
from megatron_prune.text.documents import DocumentReader, check_split, open_begun
from megatron_prune.text.encoder import Encoder, load_tokenizer, tokenizer_digest
from megatron_prune.text.pair import numpy_dtype
from megatron_prune.text.parts import Coding, check_prefix, join_parts, pair_files, place_pairs, write_parts
from megatron_prune.text.reader import stamps
from megatron_prune.text.workers import check_workers, cores
from megatron_prune.verbs.preprocess import PreprocessOptions
from megatron_prune.writing.overwrite import check_pair


def preprocess(options: PreprocessOptions, world: World) -> None:
    """Run the step, in one process that starts the others. A run that was stopped goes on where it was.

    Raises:
        InputError: if an input, the tokenizer or the output does not do; parts that are finished are kept.
    """
    _check(options, world)
    folder = open_tokenizer(options.tokenizer, world)
    tokenizer = load_tokenizer(folder)
    facts = _tokenizer_facts(options, tokenizer)
    coding = Coding(
        tokenizer=tokenizer,
        special_tokens=options.tokenizer_hf_include_special_tokens,
        eod=facts["eod"] if options.append_eod else None,
        dtype=numpy_dtype(facts["vocab_size"]).__name__,
        answers=options.answers_only,
    )
    encode = Encoder(folder, answers=options.answers_only)
    sources = [open_begun(name, options.json_keys, split=options.split, encode=encode) for name in options.input]
    check_read_once("--input", ((source.name, source.files()) for source in sources))
    check_split(options.split, sources)
    for line in filter(None, (summary(source.name, source.contents()) for source in sources)):
        log.info("%s", line)
    with staging.work(Path(options.save), _key(facts, coding, folder), main=True, agree=world.agree) as work:
        start = time.monotonic()
        size, parts, left_out = _tokenise(sources, options, coding, work)
        record = _record(sources, options, coding, facts)
        written = [
            _join(column, parts[column :: len(left_out)], {**record, "key": key, "left_out": left_out[column]}, coding, work)
            for column, key in enumerate(options.json_keys)
        ]
        _place(work, options)
    for key, (documents, tokens), passed in zip(options.json_keys, written, left_out):
        log.info("%s: %d documents, %d tokens (%s)", outputs(options, key)["bin"], documents, tokens, coding.dtype)
        for why, number in passed.items():
            log.info("%s: passed over %d documents %s", outputs(options, key)["bin"], number, why)
    seconds, total = time.monotonic() - start, sum(tokens for _, tokens in written)
    log.info("%s in %s: %.0f tokens a second", shown_bytes(size), shown_time(seconds), total / seconds)


def outputs(options: PreprocessOptions, key: str) -> dict[str, Path]:
    """Ending → file that is written for a key."""
    prefix = Path(options.save)
    check_prefix(prefix)
    return pair_files(prefix.with_name(f"{prefix.name}_{key}_document"))


def _pairs(options: PreprocessOptions, key: str) -> Iterator[dict[str, Path]]:
    """The files of the pair of a key, and of its mask if there is one or a new pair may make it go."""
    files = outputs(options, key)
    yield files
    if options.answers_only or options.overwrite:
        yield pair_files(mask_prefix(files["bin"].with_suffix("")))


def _check(options: PreprocessOptions, world: World) -> None:
    """Refuse what can be refused without reading anything."""
    if world.size > 1:
        raise InputError("preprocess is started as one process", got=f"{world.size}", do="say how many work with --workers")
    check_workers(options.workers)
    keys = options.json_keys
    if len(set(keys)) < len(keys) or any(not key or "/" in key for key in keys):
        raise InputError("--json-keys", got=" ".join(keys), needed="different names that can be part of a file's name")
    if options.save.endswith("/"):
        raise InputError("--save", got=options.save, needed="a directory and the start of a file's name")
    for key in keys:
        for files in _pairs(options, key):
            for file in files.values():
                staging.check_file(file, inputs=map(Path, options.input))
            check_pair(files, staging.unfinished(Path(options.save)), options.overwrite)


def _tokenizer_facts(options: PreprocessOptions, tokenizer: Any) -> dict[str, Any]:
    """What the record says of the tokenizer."""
    if options.append_eod and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {options.tokenizer} has no end-of-text token", do="pass --no-append-eod")
    if options.answers_only and not tokenizer.is_fast:
        raise InputError(
            f"--answers-only: the tokenizer {options.tokenizer} does not say which characters a token stands for",
            needed="one with a tokenizer.json",
        )
    return {
        "name": _label(options.tokenizer),
        "vocab_size": max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())),
        "eod": tokenizer.eos_token_id,
        "digest": tokenizer_digest(tokenizer),
    }


def _label(name: str) -> str:
    """What a record calls an input: no folders of this machine."""
    return Path(name).name if os.path.exists(name) else name


def _key(facts: dict[str, Any], coding: Coding, folder: Path) -> str:
    """What parts must have been made with to be used again; their names say what text they were made of."""
    named = sorted(file for pattern in ("tokenizer*", "chat_template*") for file in folder.glob(pattern))
    files = [stamp for file in named for stamp in stamps(str(file))]
    return json.dumps([facts, coding.eod, coding.special_tokens, coding.dtype, coding.answers, files, __version__])


def _tokenise(
    sources: list[DocumentReader], options: PreprocessOptions, coding: Coding, work: Path
) -> tuple[int, list[str], list[Counter]]:
    """Write all parts into ``work``.

    Returns:
        Bytes that were read; prefixes of the parts as :func:`_parts` gives them; for every key how many documents are left
        out, by the reason.
    """
    left_out: list[Counter] = [Counter() for _ in options.json_keys]
    sizes = [source.size() for source in sources]
    total, done = None if None in sizes else sum(sizes), 0
    kept = len(list(work.glob("part-*.npy")))
    if kept:
        log.info("going on from %d finished parts of a run before", kept)
    with progress_bar("tokenising", total, shown=True) as advance:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            advance(size)

        documents = checked(sources, options.json_keys, coding)
        parts = cut(documents, part_size(total), work, left_out, answers=coding.answers)
        prefixes = write_parts(parts, coding, workers=options.workers or cores(), progress=progress)
    return done, prefixes, left_out


def _record(sources: list[DocumentReader], options: PreprocessOptions, coding: Coding, facts: dict[str, Any]) -> dict[str, Any]:
    """What the records of all keys say."""
    return {
        "format": "megatron-prune documents",
        "version": __version__,
        "inputs": [_label(name) for name in options.input],
        "contents": {_label(source.name): found for source in sources if (found := source.contents())},
        "split": options.split,
        "tokenizer": facts,
        "append_eod": coding.eod is not None,
        "include_special_tokens": coding.special_tokens,
        "dtype": coding.dtype,
    }


def _join(column: int, parts: list[str], record: dict[str, Any], coding: Coding, work: Path) -> tuple[int, int]:
    """Make the pair of a key and its record in ``work``, and the mask if there is one; (documents, tokens)."""
    whole = work / f"whole-{column}"
    documents, tokens = join_parts(parts, str(whole), coding.dtype)
    if not documents:
        raise InputError(
            f"there is no text in field {record['key']!r}" + (" with answers" if coding.answers else ""),
            do="name the fields that hold text with --json-keys",
        )
    record |= {"documents": documents, "tokens": tokens, "digest": _digest(whole.with_suffix(".bin"))}
    if coding.answers:
        join_parts(parts, str(mask_prefix(whole)), "uint8", "mask")
        record["answers"] = {"digest": _digest(mask_prefix(whole).with_suffix(".bin"))}
    whole.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return documents, tokens


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _place(work: Path, options: PreprocessOptions) -> None:
    """Put pairs in place, each with its mask; where an old one has a mask and the new one none, it goes."""
    pairs = {}
    for column, key in enumerate(options.json_keys):
        prefix, made = outputs(options, key)["bin"].with_suffix(""), work / f"whole-{column}"
        if options.answers_only or options.overwrite:
            pairs[mask_prefix(prefix)] = mask_prefix(made)
        pairs[prefix] = made
    place_pairs(work, pairs)
