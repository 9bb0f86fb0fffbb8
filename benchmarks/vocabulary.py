"""What trimming a vocabulary costs, beside a plain cut by frequency; how fast counting is; what trimming takes in memory.

    python benchmarks/vocabulary.py lengths DIR --count train.txt --held-out test.txt --sizes 8192 16384
        a model or a tokenizer: tokens per text and texts that encode as before
    python benchmarks/vocabulary.py bits MODEL --count train.txt --held-out test.txt --sizes 8192 16384 [--fold]
        held-out bits per byte as well, by stock transformers, nothing trained
    python benchmarks/vocabulary.py speed DIR --count train.txt --rounds 5
        counting in one process beside the tokenizer alone, in turns
    python benchmarks/vocabulary.py memory MODEL --size 8192
        peak memory of a trim above an idle process, in largest tensors

The plain cut keeps the most frequent tokens, the special ones and the bytes (S4's rule for SentencePiece), whether or not a kept
token can still be put together.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import numpy

from megatron_prune.checkpoint.huggingface import copy_side_files
from megatron_prune.text.documents import pieces
from megatron_prune.vocabulary.counting import count_texts
from megatron_prune.vocabulary.selection import Wanted, select
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import Vocabulary, open_vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lengths", "bits", "speed", "memory"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=Path, help="text that is counted")
    parser.add_argument("--held-out", type=Path, help="text that is measured")
    parser.add_argument("--second", type=Path, help="another text that is measured")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paragraphs", type=int, default=100)
    parser.add_argument("--fold", action="store_true", help="also fold dropped tokens into the head, on the counted text")
    parser.add_argument("--nsamples", type=int, default=96)
    options = parser.parse_args()
    {"lengths": lengths, "bits": bits, "speed": speed, "memory": memory}[options.what](options)


def _counts(options: argparse.Namespace, vocabulary: Vocabulary) -> numpy.ndarray:
    texts = list(pieces([options.count.read_text(encoding="utf-8")]))
    return count_texts(texts, vocabulary).astype(numpy.float64)


def _plain(vocabulary: Vocabulary, counts: numpy.ndarray, size: int) -> numpy.ndarray:
    """Special tokens, bytes, and the most frequent others."""
    always = [token for token, why in vocabulary.pinned.items() if why not in ("part of one that stays", "chat template")]
    order = [token for token in numpy.argsort(-counts, kind="stable").tolist() if token not in set(always)]
    return numpy.array(sorted(always + order[: size - len(always)]))


def _trimmed(options: argparse.Namespace, vocabulary: Vocabulary, counts: numpy.ndarray, size: int) -> dict[str, Trimmed]:
    rows = {"frequency": _plain(vocabulary, counts, size), "ours": select(vocabulary, counts, Wanted(size=size)).rows}
    return {name: Trimmed(vocabulary=vocabulary, rows=kept) for name, kept in rows.items()}


def lengths(options: argparse.Namespace) -> None:
    """Tokens per text against the size."""
    vocabulary = open_vocabulary(options.model)
    counts = _counts(options, vocabulary)
    texts = [line for line in options.held_out.read_text(encoding="utf-8").splitlines() if line.strip()]
    before = vocabulary.encode(texts)
    print(f"{vocabulary.rows} tokens, {len(texts)} held-out lines, {sum(map(len, before))} tokens")
    print("| tokens | rule | tokens per text | texts that encode as before | kept tokens out of reach |\n|---|---|---|---|---|")
    for size in options.sizes:
        for name, trimmed in _trimmed(options, vocabulary, counts, size).items():
            with tempfile.TemporaryDirectory() as folder:
                written = _written(trimmed, Path(folder))
                after = written.encode(texts)
                everything = {token: token for token in range(written.rows)}
                split, whole_split = written.splitter(everything), vocabulary.splitter({t: t for t in range(vocabulary.rows)})
            same = [[trimmed.new_ids.get(token) for token in old] == list(new) for old, new in zip(before, after)]
            reachable = [row for row in trimmed.rows.tolist() if row in vocabulary.main.pieces and whole_split(row) == [row]]
            lost = sum(split(trimmed.new_ids[row]) != [trimmed.new_ids[row]] for row in reachable)
            ratio = sum(map(len, after)) / sum(map(len, before))
            print(f"| {size} | {name} | {ratio:.4f} | {sum(same) / len(same):.3f} | {lost} |", flush=True)


def _written(trimmed: Trimmed, folder: Path) -> Vocabulary:
    copy_side_files(trimmed.vocabulary.folder, folder)
    trimmed.write(folder)
    return open_vocabulary(folder, len(trimmed.rows))


def bits(options: argparse.Namespace) -> None:
    """Held-out bits per byte, no training."""
    import torch
    from transformers import AutoModelForCausalLM

    vocabulary = open_vocabulary(options.model)
    counts = _counts(options, vocabulary)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False).eval()
    table = model.get_input_embeddings().weight.data
    head = model.get_output_embeddings().weight.data
    files = [file for file in (options.held_out, options.second) if file]
    texts = [_paragraphs(file, options.paragraphs) for file in files]
    measured = lambda enc, rows, inputs, outputs: [_bits(model, enc(part), inputs[rows], outputs[rows], part) for part in texts]
    whole = torch.arange(vocabulary.rows)
    shown = lambda values: " / ".join(f"{value:.4f}" for value in values)
    print(f"| tokens | rule | bits per byte of {' / '.join(file.name for file in files)} |\n|---|---|---|")
    print(f"| {vocabulary.rows} | whole | {shown(measured(vocabulary.encode, whole, table, head))} |", flush=True)
    for size in options.sizes:
        for name, trimmed in _trimmed(options, vocabulary, counts, size).items():
            with tempfile.TemporaryDirectory() as folder:
                written, rows = _written(trimmed, Path(folder)), torch.from_numpy(trimmed.rows)
            print(f"| {size} | {name} | {shown(measured(written.encode, rows, table, head))} |", flush=True)
        if options.fold:
            inputs, outputs = _folded(options, trimmed, table, head)
            print(f"| {size} | ours, folded | {shown(measured(written.encode, rows, inputs, outputs))} |", flush=True)


def _paragraphs(file: Path, count: int) -> list[str]:
    """Texts of six lines, spread over the file."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = ["\n".join(lines[start : start + 6]) for start in range(0, len(lines) - 5, 6)]
    return texts[:: max(1, len(texts) // count)][:count]


def _bits(model, encoded, table, head, texts: list[str]) -> float:
    import torch

    loss = 0.0
    with torch.no_grad():
        for ids in encoded:
            tokens = torch.tensor([list(ids)])
            hidden = model.model(inputs_embeds=table[tokens]).last_hidden_state[0, :-1]
            loss += torch.nn.functional.cross_entropy(hidden @ head.T, tokens[0, 1:], reduction="sum").item()
    return loss / math.log(2) / sum(len(text.encode()) for text in texts)


def _folded(options: argparse.Namespace, trimmed: Trimmed, table, head):
    """Embedding and head with the fitted rows, as ``vocab trim --fold`` makes them."""
    import torch

    from megatron_prune.opening.opened import open_huggingface
    from megatron_prune.pruning.engines.huggingface import HuggingFaceEngine
    from megatron_prune.runtime.world import World
    from megatron_prune.surgery.fold_tokens import fold_rows, hidden_states, respelled
    from megatron_prune.text.data_specs import parse_data
    from megatron_prune.text.sources import load_calibration

    world = World()
    model = open_huggingface(Path(options.model), world)
    calibration = load_calibration(
        parse_data([f"{options.count}:1"]),
        tokenizer_dir=options.model,
        seq_length=512,
        nsamples=options.nsamples,
        seed=1234,
        max_position_embeddings=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        self_samples=None,
    )
    calibration = respelled(calibration, trimmed.id_map)
    stage = HuggingFaceEngine(model).stage(model.config, dtype=torch.float32, seq_length=512)
    hidden = hidden_states(model.tensors, calibration, stage, world, torch.float32, lambda count: None)
    rows = fold_rows(model.tensors, trimmed.id_map, hidden, stage, world)
    outputs = rows.put_into(head.clone())
    return (outputs if model.config.tie_embeddings else table), outputs


def speed(options: argparse.Namespace) -> None:
    """Counting beside the tokenizer alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocabulary = open_vocabulary(options.model)
    texts = list(pieces([options.count.read_text(encoding="utf-8")]))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    vocabulary.encode(texts[:4])
    alone: list[float] = []
    counted: list[float] = []
    for _ in range(options.rounds):
        for times, work in ((alone, lambda: _alone(vocabulary, texts)), (counted, lambda: count_texts(texts, vocabulary))):
            start = time.perf_counter()
            work()
            times.append(megabytes / (time.perf_counter() - start))
    ratios = [one / other for one, other in zip(counted, alone)]
    print(f"tokenizer alone {statistics.median(alone):.2f} MB/s, counting {statistics.median(counted):.2f} MB/s (one core)")
    print(f"counting / alone: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {options.rounds} rounds")


def _alone(vocabulary: Vocabulary, texts: list[str]) -> None:
    if hasattr(vocabulary.main, "runtime"):
        vocabulary.main.runtime().encode_batch_fast(texts, add_special_tokens=False)
    else:
        vocabulary.encode(texts)


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a trim, by a process of its own."""
    from megatron_prune.checkpoint import huggingface

    model = huggingface.open_model(options.model)
    largest = max(model.tensors.nbytes(tensor) for tensor in chain(model.tensors.tiles))
    verb = ["vocab", "trim", "--load", str(options.model), "--remain-vocab-size", str(options.size)]
    with tempfile.TemporaryDirectory() as folder:
        peak = _peak([*verb, "--save", f"{folder}/out"])
        idle = _peak([*verb, "--save", f"{folder}/tok", "--tokenizer-only"])
    print(f"largest tensor {largest / 1e6:.0f} MB; peak {peak / 1e6:.0f} MB, of the tokenizer alone {idle / 1e6:.0f} MB")
    print(f"above the tokenizer alone, in largest tensors: {(peak - idle) / largest:.2f}")


def _peak(arguments: list[str]) -> int:
    code = "import resource, sys\nfrom megatron_prune.cli.main import main\nmain(sys.argv[1:])\n"
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split("peak ")[1])


if __name__ == "__main__":
    main()
