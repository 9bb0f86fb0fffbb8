"""Text → Megatron's ``.bin``/``.idx``: what ``tools/preprocess_data.py`` of Megatron-LM does, for any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from megatron_prune import __version__
from megatron_prune.calibration.documents import DocumentReader, open_documents
from megatron_prune.calibration.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.calibration.parts import Coding, Part, grouped, join_parts, pair_files, place_pair, text_digest, write_parts
from megatron_prune.calibration.reader import TRAIN, stamps
from megatron_prune.calibration.workers import cores
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.manifest import FILE, Manifest
from megatron_prune.config import option, require_positive
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.runtime.world import World
from megatron_prune.steps.output import check_side_files, log, progress_bar


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Tokenise text for training: PREFIX_KEY_document.bin and .idx, as Megatron-LM reads them, for every key."""

    input: tuple[str, ...] = option(
        "text files, JSONL (also .gz), folders, owner/name on the Hugging Face hub, known data sets (wikitext2, c4 …)"
    )
    output_prefix: str = option("start of the names of the files to write")
    tokenizer: str = option("Hugging Face directory or hub id, or a Megatron checkpoint that keeps a tokenizer")
    json_keys: tuple[str, ...] = option("names of the texts in JSONL and data sets; a pair of files for each", ("text",))
    append_eod: bool | None = option("end every document with the tokenizer's end-of-text token", True)
    tokenizer_hf_include_special_tokens: bool = option("keep what the tokenizer itself puts around a text (Llama: BOS)", False)
    workers: int | None = option("processes that tokenise (default: the cores that may be used)", None)
    split: str = option("split of data sets", TRAIN)
    overwrite: bool = option("replace existing files", False)


def preprocess(options: PreprocessOptions, world: World) -> None:
    """Run the step, in one process that starts the others. A run that was stopped goes on where it was.

    Raises:
        InputError: if an input, the tokenizer or the output does not do; parts that are finished are kept.
    """
    _check(options, world)
    folder = tokenizer_folder(options.tokenizer)
    tokenizer = load_tokenizer(folder)
    facts = _tokenizer_facts(options, tokenizer)
    coding = Coding(
        tokenizer=tokenizer,
        special_tokens=options.tokenizer_hf_include_special_tokens,
        eod=facts["eod"] if options.append_eod else None,
        dtype=numpy_dtype(facts["vocab_size"]).__name__,
    )
    sources = [_open(name, options) for name in options.input]
    try:
        with staging.work(Path(options.output_prefix), _key(facts, coding, folder), main=True, agree=world.agree) as work:
            start = time.monotonic()
            size, parts = _tokenise(sources, options, coding, work)
            written = [_join(column, parts, options, coding, facts, work) for column in range(len(options.json_keys))]
            _place(work, options)
    except OSError as error:
        raise InputError(
            f"{options.output_prefix} cannot be written",
            got=str(error),
            do="make room or name another place; the finished parts are kept, and the same command goes on from them",
        ) from None
    for key, (documents, tokens) in zip(options.json_keys, written):
        log.info("%s: %d documents, %d tokens (%s)", outputs(options, key)["bin"], documents, tokens, coding.dtype)
    seconds, total = time.monotonic() - start, sum(tokens for _, tokens in written)
    log.info("%.1f MB in %.1f s: %.0f tokens a second", size / 1e6, seconds, total / seconds)


def outputs(options: PreprocessOptions, key: str) -> dict[str, Path]:
    """Ending → file that is written for a key."""
    prefix = Path(options.output_prefix)
    return pair_files(prefix.with_name(f"{prefix.name}_{key}_document"))


def tokenizer_folder(name: str) -> Path:
    """Directory of the tokenizer that ``name`` means.

    Raises:
        InputError: if it means none.
    """
    path = Path(name).expanduser()
    if not (path / megatron.TRACKER).is_file() and not (path / megatron.HF_FOLDER).is_dir():
        return huggingface.resolve(name, weights=False)
    folder = megatron.iteration_directory(path) / megatron.HF_FOLDER
    if not folder.is_dir():
        raise InputError(f"{path} keeps no tokenizer", do="name its Hugging Face directory with --tokenizer")
    if (folder.parent / FILE).is_file():
        check_side_files(World(), folder.parent, Manifest.load(folder.parent / FILE))
    return folder


def _check(options: PreprocessOptions, world: World) -> None:
    """Refuse what can be refused without reading anything."""
    if world.size > 1:
        raise InputError("preprocess is started as one process", got=f"{world.size}", do="say how many work with --workers")
    require_positive(options, "workers")
    keys = options.json_keys
    if len(set(keys)) < len(keys) or any(not key or "/" in key for key in keys):
        raise InputError("--json-keys", got=" ".join(keys), needed="different names that can be part of a file's name")
    if options.output_prefix.endswith("/"):
        raise InputError("--output-prefix", got=options.output_prefix, needed="a directory and the start of a file's name")
    for file in (file for key in keys for file in outputs(options, key).values()):
        staging.check_file(file)
        for name in options.input:
            if Path(name).exists() and Path(name).resolve() in (file.resolve(), *file.resolve().parents):
                raise InputError(f"output {file} is the input {name} or lies in it", do="name another --output-prefix")
        if file.exists() and not options.overwrite:
            raise InputError(f"output {file} exists", do="name another --output-prefix, or pass --overwrite to replace it")


def _open(name: str, options: PreprocessOptions) -> DocumentReader:
    """A source that begins well: what is wrong with its first document is said before hours of work on others."""
    source = open_documents(name, options.json_keys, split=options.split)
    if not any(text.strip() for document in source.documents(options.json_keys) for text in document.texts):
        raise InputError(f"{name} is empty", got="no text", needed="at least one document")
    return source


def _tokenizer_facts(options: PreprocessOptions, tokenizer: Any) -> dict[str, Any]:
    """What the record says of the tokenizer."""
    if options.append_eod and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {options.tokenizer} has no end-of-text token", do="pass --no-append-eod")
    return {
        "name": _label(options.tokenizer),
        "vocab_size": max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())),
        "eod": tokenizer.eos_token_id,
        "digest": tokenizer_digest(tokenizer),
    }


def _label(name: str) -> str:
    """What a record calls an input: no folders of this machine."""
    return Path(name).name if Path(name).exists() else name


def numpy_dtype(vocab_size: int) -> Any:
    """numpy's type of a token in Megatron's files."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def _key(facts: dict[str, Any], coding: Coding, folder: Path) -> str:
    """What parts must have been made with to be used again; their names say what text they were made of."""
    files = [stamp for file in sorted(folder.glob("tokenizer*")) for stamp in stamps(str(file))]
    return json.dumps([facts, coding.eod, coding.special_tokens, coding.dtype, files, __version__])


def _tokenise(sources: list[DocumentReader], options: PreprocessOptions, coding: Coding, work: Path) -> tuple[int, list[str]]:
    """Write all parts into ``work``; (bytes that were read, prefixes of the parts as :func:`_parts` gives them)."""
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

        parts = _parts(sources, options.json_keys, part_size(total), work)
        prefixes = write_parts(parts, coding, workers=options.workers or cores(), progress=progress)
    return done, prefixes


def part_size(total: int | None) -> int:
    """Bytes of text in a part: many parts for any number of workers, not too many files, and the same if a line is mended."""
    return 1 << 22 if total is None else 1 << min(max((total >> 9).bit_length(), 20), 24)


def _parts(sources: list[DocumentReader], keys: tuple[str, ...], size: int, work: Path) -> Iterator[Part]:
    """A part of the texts of every key, then the next of each."""
    documents = (document for source in sources for document in source.documents(keys))
    for number, group in enumerate(grouped(documents, lambda document: document.size, size)):
        for column in range(len(keys)):
            texts = [document.texts[column] for document in group if document.texts[column].strip()]
            taken = sum(document.size for document in group) if column == 0 else 0
            yield Part(prefix=str(work / f"part-{column}-{number:08}-{text_digest(texts)}"), texts=texts, size=taken)


def _join(
    column: int, parts: list[str], options: PreprocessOptions, coding: Coding, facts: dict[str, Any], work: Path
) -> tuple[int, int]:
    """Make the pair of a key and its record in ``work``; (documents, tokens)."""
    key, whole = options.json_keys[column], work / f"whole-{column}"
    documents, tokens = join_parts(parts[column :: len(options.json_keys)], str(whole), coding.dtype)
    if not documents:
        raise InputError(f"there is no text in field {key!r}", do="name the fields that hold text with --json-keys")
    record = {
        "format": "megatron-prune documents",
        "version": __version__,
        "inputs": [_label(name) for name in options.input],
        "key": key,
        "split": options.split,
        "tokenizer": facts,
        "append_eod": coding.eod is not None,
        "include_special_tokens": coding.special_tokens,
        "documents": documents,
        "tokens": tokens,
        "dtype": coding.dtype,
        "digest": _digest(whole.with_suffix(".bin")),
    }
    whole.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return documents, tokens


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _place(work: Path, options: PreprocessOptions) -> None:
    for column, key in enumerate(options.json_keys):
        prefix = outputs(options, key)["bin"].with_suffix("")
        place_pair(work / f"whole-{column}", prefix)
