"""A corpus → how often it uses every token."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from megatron_prune import __version__
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_with_vocabulary
from megatron_prune.runtime.reporting import log, progress_bar, shown_bytes, shown_time
from megatron_prune.runtime.world import World
from megatron_prune.text.contents import check_read_once, summary
from megatron_prune.text.data_specs import split_weight
from megatron_prune.text.documents import DocumentReader, check_split, open_begun
from megatron_prune.text.encoder import Encoder
from megatron_prune.text.pair import open_pair
from megatron_prune.text.reader import reader_kind, stamps
from megatron_prune.text.workers import check_workers, cores
from megatron_prune.verbs.vocab_count import VocabCountOptions
from megatron_prune.vocabulary.counting import Tally, count_documents, count_pair
from megatron_prune.vocabulary.counts import Corpus, Counts, is_counts
from megatron_prune.vocabulary.folder import vocabulary_of
from megatron_prune.vocabulary.vocabulary import Vocabulary
from megatron_prune.writing.overwrite import check_counts, is_list_of_counts


def vocab_count(options: VocabCountOptions, world: World) -> None:
    """Run the step, in one process that starts the others. A run that was stopped goes on where it was.

    Raises:
        InputError: if a corpus, the tokenizer or the output does not do.
    """
    if world.size > 1:
        raise InputError("vocab count is started as one process", got=f"{world.size}", do="say how many work with --workers")
    check_workers(options.workers)
    output = Path(options.save)
    if options.text and os.path.realpath(options.text) == os.path.realpath(output):
        raise InputError("--output and --text are the same file", got=options.text, do="name another")
    for file, is_ours in ((output, is_counts), *([(Path(options.text), is_list_of_counts)] if options.text else [])):
        staging.check_file(file, inputs=[Path(split_weight(spec, "--input")[0]) for spec in options.input])
        check_counts(file, is_ours, options.overwrite)
    specs = [split_weight(spec, "--input") for spec in options.input]
    if len({name for name, _ in specs}) < len(specs):
        raise InputError("--input lists a corpus twice", got=" ".join(options.input), do="give it a weight instead")
    if len({weight is None for _, weight in specs}) > 1:
        raise InputError("--input", got="corpora with and without a weight", needed="weights for all or for none")
    vocabulary = vocabulary_of(open_with_vocabulary(options.tokenizer, world))
    encode = Encoder(vocabulary.folder)
    sources = {name: _open(name, options, encode) for name, _ in specs}
    check_read_once("--input", ((name, _files(name, source)) for name, source in sources.items()))
    check_split(options.split, [source for source in sources.values() if source])
    for line in filter(None, (summary(name, source.contents()) for name, source in sources.items() if source)):
        log.info("%s", line)
    asked = [
        options.input,
        options.data_field,
        options.split,
        vocabulary.digest,
        vocabulary.rows,
        [stamps(name) for name, _ in specs],
        __version__,
    ]
    start = time.monotonic()
    with staging.work(output, json.dumps(asked), main=True, agree=world.agree) as folder:
        tallies = [
            _count(name, source, options, vocabulary, folder / f"corpus-{number}")
            for number, (name, source) in enumerate(sources.items())
        ]
        corpora = [
            Corpus(
                name=Path(name).name if Path(name).exists() else name,
                documents=tally.documents,
                tokens=int(tally.table.sum()),
                size=tally.size,
                weight=weight,
                contents=sources[name].contents() if sources[name] else {},
            )
            for (name, weight), tally in zip(specs, tallies)
        ]
        counts = Counts(digest=vocabulary.digest, corpora=corpora, tables=[tally.table for tally in tallies])
        files = {output: counts.dumps(), **({Path(options.text): counts.dump_text()} if options.text else {})}
        staging.write_files(files)
    seconds, size = time.monotonic() - start, sum(corpus.size for corpus in corpora)
    used = int((sum(counts.tables) > 0).sum())
    for corpus in corpora:
        log.info("%s: %d documents, %d tokens", corpus.name, corpus.documents, corpus.tokens)
    log.info("%s: %d of %d tokens occur; %s in %s", output, used, vocabulary.rows, shown_bytes(size), shown_time(seconds))


def _is_pair(name: str) -> bool:
    return reader_kind(name) in (".bin", ".idx")


def _open(name: str, options: VocabCountOptions, encode: Encoder) -> DocumentReader | None:
    """A corpus of text, if it begins well; ``None``: a pair."""
    if _is_pair(name):
        open_pair(name)
        return None
    return open_begun(name, (options.data_field,), split=options.split, encode=encode)


def _files(name: str, source: DocumentReader | None) -> list[Path]:
    return source.files() if source else [Path(f"{open_pair(name).prefix}.bin")]


def _count(name: str, source: DocumentReader | None, options: VocabCountOptions, vocabulary: Vocabulary, state: Path) -> Tally:
    if source is None:
        pair = open_pair(name)
        with progress_bar(f"counting {Path(name).name}", pair.total * pair.dtype.itemsize, shown=True) as advance:
            return count_pair(name, vocabulary.rows, advance)
    with progress_bar(f"counting {Path(name).name}", source.size(), shown=True) as advance:
        workers = options.workers or cores()
        return count_documents(source, options.data_field, vocabulary, state, workers=workers, progress=advance)
