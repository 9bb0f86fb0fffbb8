"""Blends of Megatron ``.bin/.idx`` pairs → batches of tokens, by the number of samples consumed so far.

The data sets are megatron-core's ``GPTDataset`` and ``BlendedDataset``. What a step sees depends on the data, the seed, the
sequence length, the global batch and the step alone, not on the parallel layout: the position in the data is one number.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from megatron_prune.config import flag
from megatron_prune.errors import InputError, PruneError
from megatron_prune.recovery import index_cache
from megatron_prune.runtime.world import World
from megatron_prune.text.answers import mask_prefix, open_mask
from megatron_prune.text.pair import Pair, open_pair

SPLITS = ("train", "valid", "test")

IGNORED = -100
"""The label of a token that does not count, as torch's cross-entropy has it."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained and measured on.

    Attributes:
        data_path: prefixes of pairs, each after a weight (``0.3 a 0.7 b``) or all without; cut by ``split``.
        split: shares of the documents for training, validation and test, such as ``"969,30,1"``.
        train_data_path, valid_data_path, test_data_path: instead of ``data_path``, one blend for each.
        cache: directory for the indices that megatron-core makes.
        shared: whether other runs use that directory too.
        answers_only: whether only tokens count that the mask beside each pair names.
    """

    data_path: tuple[str, ...] = ()
    split: str = "969,30,1"
    train_data_path: tuple[str, ...] = ()
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    seq_length: int
    seed: int
    cache: Path
    shared: bool = False
    answers_only: bool = False

    @property
    def separate(self) -> tuple[tuple[str, ...], ...]:
        """The blends of the three splits, where each has its own."""
        return self.train_data_path, self.valid_data_path, self.test_data_path


class _NoTokenizer:
    """megatron-core's data set asks its tokenizer for these alone."""

    vocab_size = None
    eod = -1
    unique_identifiers: dict[str, Any] = {}


def parse_blend(words: tuple[str, ...], flag: str) -> tuple[list[str], list[float] | None]:
    """``("0.3", "a", "0.7", "b")`` or ``("a", "b")`` → prefixes, weights.

    Raises:
        InputError: if it is neither.
    """
    prefixes = [_prefix(word) for word in words]
    if len(words) % 2 or not _is_number(words[0]):
        if any(_is_number(word) and not Path(f"{word}.idx").is_file() for word in words):
            raise InputError(flag, got=" ".join(words), needed="WEIGHT PREFIX WEIGHT PREFIX …, or prefixes alone")
        return prefixes, None
    weights = [float(word) if _is_number(word) else -1.0 for word in words[::2]]
    if not all(0 < weight < float("inf") for weight in weights):
        raise InputError(flag, got=" ".join(words), needed="a positive weight before every prefix")
    return prefixes[1::2], weights


def _prefix(word: str) -> str:
    return word[:-4] if word.endswith((".bin", ".idx")) else word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_data(options: DataOptions, vocab_size: int) -> dict[str, Pair]:
    """Open every pair that is named, and see that every split that is needed has a document.

    Raises:
        InputError: naming the pair that is missing, empty or damaged, holds a token that the model has not, or the split
            that would be empty.
    """
    if bool(options.data_path) == bool(options.train_data_path):
        raise InputError(
            "the data is named by --data-path, or by --train-data-path and --valid-data-path",
            got="both" if options.data_path else "neither",
            do="make .bin/.idx pairs from text with: megatron-prune preprocess",
        )
    if options.data_path:
        prefixes, _ = parse_blend(options.data_path, "--data-path")
        pairs = {prefix: open_pair(prefix) for prefix in prefixes}
        for prefix, pair in pairs.items():
            _check_split(prefix, pair, options)
    else:
        if not options.valid_data_path:
            raise InputError("--train-data-path without --valid-data-path", do="name what the held-out loss is measured on")
        blends = {flag(f"{split}_data_path"): words for split, words in zip(SPLITS, options.separate) if words}
        pairs = {prefix: open_pair(prefix) for flag, words in blends.items() for prefix in parse_blend(words, flag)[0]}
    for prefix, pair in pairs.items():
        _check_pair(prefix, pair, options.seq_length, vocab_size)
        if options.answers_only:
            open_mask(pair)
    return pairs


def _check_pair(prefix: str, pair: Pair, seq_length: int, vocab_size: int) -> None:
    if pair.total < seq_length + 1:
        raise InputError(
            f"{prefix}.bin is too short", got=f"{pair.total} tokens", needed=f"at least {seq_length + 1}: one sample"
        )
    lowest, highest = pair.extremes()
    if lowest < 0 or highest >= vocab_size:
        raise InputError(
            f"{prefix}.bin was made with a tokenizer that is not the model's",
            got=f"token {highest if highest >= vocab_size else lowest}",
            needed=f"0 to {vocab_size - 1}",
            do="make it again with this model's tokenizer: megatron-prune preprocess; or, where the model's vocabulary was "
            "trimmed, renumber it: megatron-prune vocab remap",
        )


def _check_split(prefix: str, pair: Pair, options: DataOptions) -> None:
    for name, count in zip(SPLITS[:2], split_counts(options.split, pair.sequences)):
        if count == 0:
            raise InputError(
                f"--split {options.split} leaves no document of {prefix} to the {name} split",
                got=f"{pair.sequences} document{'s' if pair.sequences > 1 else ''}",
                needed="some to train on and some to measure on",
                do="name --train-data-path and --valid-data-path, or another --split",
            )


def split_counts(split: str, sequences: int) -> list[int]:
    """How many of a pair's sequences (documents, where each is one) fall to training, validation and test.

    Raises:
        InputError: if ``split`` is not shares.
    """
    try:
        shares = [float(share) for share in split.split(",")]
        if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or not any(shares):
            raise ValueError
    except ValueError:
        raise InputError("--split", got=split, needed="shares of training, validation and test such as 969,30,1") from None
    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return [0 if share is None else round(share[1] * sequences) - round(share[0] * sequences) for share in bounds]


def build_datasets(options: DataOptions, samples: tuple[int, int, int], world: World) -> list[Dataset | None]:
    """The training, validation and test sets; every process takes part. The main one makes the indices that are not there.

    Args:
        samples: of each, at the least.

    Returns:
        What yields ``tokens`` and ``labels``, int64 [seq_length] (``IGNORED`` for labels that do not count); ``None`` for a
        split that is empty.

    Raises:
        PruneError: if the indices cannot be written.
    """
    error = None
    if world.is_main:
        try:
            build_alone(options, samples)
        except OSError as found:
            error = PruneError(f"the indices of the data cannot be written to {options.cache}: {found}")
    world.agree(error)
    with index_cache.without_pickles():
        return _build(options, samples)


def build_alone(options: DataOptions, samples: tuple[int, int, int]) -> list[Dataset | None]:
    """The same in one process, waiting for no other."""
    with index_cache.held(options.cache, shared=options.shared), index_cache.without_pickles(), index_cache.alone():
        return _build(options, samples)


def _build(options: DataOptions, samples: tuple[int, int, int]) -> list[Dataset | None]:
    blends: dict[str, Any] = {"blend": None, "blend_per_split": None, "split": None}
    if options.data_path:
        blends |= {"blend": parse_blend(options.data_path, "--data-path"), "split": _without_empty_test(options)}
    else:
        blends["blend_per_split"] = [parse_blend(words, "--data-path") if words else None for words in options.separate]
    config = GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.seq_length,
        path_to_cache=str(options.cache),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blends,
    )
    kind = AnswersDataset if options.answers_only else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, list(samples), lambda: True, config).build()


class AnswersDataset(GPTDataset):
    """megatron-core's data set of a pair with a mask beside it: labels that the mask does not name are ``IGNORED``.

    The mask is read as the tokens are, by the same indices of documents, samples and their order.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str, *args: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *args)
        self._mask = copy.copy(self)
        self._mask.dataset = IndexedDataset(str(mask_prefix(dataset_path)), mmap=self.config.mmap_bin_files)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        item = super().__getitem__(idx)
        counted, _ = self._mask._query_document_sample_shuffle_indices(idx or 0)
        return {**item, "labels": item["labels"].where(torch.from_numpy(counted[1:] == 1), IGNORED)}


def _without_empty_test(options: DataOptions) -> str:
    """The split, without the share of the test where a pair has no document for it: megatron-core would look for one for ever."""
    prefixes, _ = parse_blend(options.data_path, "--data-path")
    if all(split_counts(options.split, open_pair(prefix).sequences)[2] for prefix in prefixes):
        return options.split
    return ",".join([*options.split.split(",")[:2], "0"])


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sequences in a step (``global_batch``) and in one forward pass of a data-parallel copy (``micro_batch``)."""

    global_batch: int
    micro_batch: int

    def check(self, copies: int) -> None:
        """Refuse sizes that do not divide.

        Raises:
            InputError: if the global batch is no multiple of micro-batch × data-parallel copies.
        """
        if self.global_batch % (self.micro_batch * copies):
            raise InputError(
                f"--global-batch-size {self.global_batch} does not divide over {copies} data-parallel "
                f"cop{'ies' if copies > 1 else 'y'} in micro-batches of {self.micro_batch}",
                needed=f"a multiple of {self.micro_batch * copies}",
            )

    @property
    def micro_batches(self) -> int:
        """Of one data-parallel copy in a step."""
        return self.global_batch // (self.micro_batch * parallel_state.get_data_parallel_world_size())


def step_batches(
    dataset: Dataset, consumed: int, sizes: BatchSizes, vocab_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, range]]:
    """This data-parallel copy's micro-batches of the step that starts after ``consumed`` samples.

    Yields:
        Tokens and labels (``IGNORED`` where one does not count), int64 [micro_batch, seq_length], and the numbers of their
        samples in ``dataset``.

    Raises:
        InputError: on a token that the model has not.
    """
    copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for number in range(sizes.micro_batches):
        first = consumed + (number * copies + copy) * sizes.micro_batch
        numbers = range(first, first + sizes.micro_batch)
        items = [dataset[sample % len(dataset)] for sample in numbers]
        tokens, labels = (torch.stack([item[name] for item in items]) for name in ("tokens", "labels"))
        if max(int(tokens.max()), int(labels.max())) >= vocab_size:
            raise InputError(f"samples {numbers.start} to {numbers.stop - 1} hold a token above the model's {vocab_size - 1}")
        yield tokens, labels, numbers
