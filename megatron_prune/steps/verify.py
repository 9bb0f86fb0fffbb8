"""Compare logits: the Hugging Face model in transformers, and the Megatron checkpoint running under TP × PP."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import torch

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.checkpoint import both_versions, megatron, model_folder
from megatron_prune.checkpoint.huggingface import VOCABULARY_FILES
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.tied_copy import check_tied_copy
from megatron_prune.config import check_limits
from megatron_prune.errors import InputError
from megatron_prune.opening.opened import open_huggingface, open_megatron
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.stock_model import load_stock_model
from megatron_prune.runtime.world import World
from megatron_prune.text.encoder import load_tokenizer
from megatron_prune.text.windows import read_windows
from megatron_prune.verbs.verify import VerifyOptions

TEXT = "The quick brown fox jumps over the lazy dog. In 1969, people first walked on the Moon; 384,400 km from home."


def verify(options: VerifyOptions, world: World) -> int:
    """Run the step; every process takes part.

    Returns:
        0 if the logits agree and no file that says which token has which id differs, 1 if not.

    Raises:
        InputError: if the two models have different shapes, or the layout does not fit.
    """
    check_limits(options)
    folder = model_folder.resolve(options.hf_dir)
    model = open_huggingface(folder, world)
    check_tied_copy(model.checkpoint)
    checkpoint = open_megatron(options.load, world, options).checkpoint
    compared = [item.name for item in fields(ModelConfig)] if checkpoint.own else SHAPE_FIELDS
    differing = [name for name in compared if getattr(model.config, name) != getattr(checkpoint.config, name)]
    if differing:
        raise InputError("the two models differ in " + ", ".join(differing), got=model.config, needed=checkpoint.config)
    layout = run_layout(checkpoint.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    layout.check(checkpoint.config)
    tokens = _tokens(options, folder, checkpoint)
    difference = _difference(checkpoint, layout, world, tokens, folder)
    values = [value for value in world.all_gather(difference) if value is not None][0]
    agrees = values["largest"] <= options.tolerance
    same_ids = _same_vocabulary(checkpoint, folder, world)
    if world.is_main:
        log.info(
            "%s: over %d tokens the logits differ by at most %.2e (mean %.2e; their deviation is %.2f), tolerance %.0e; "
            "most likely token the same at %.1f %% of positions; TP %d × PP %d against transformers",
            "agree" if agrees else "DISAGREE",
            tokens.numel(),
            values["largest"],
            values["mean"],
            values["deviation"],
            options.tolerance,
            100 * values["same"],
            layout.tensor,
            layout.pipeline,
        )
    return 0 if agrees and same_ids else 1


def _same_vocabulary(checkpoint: MegatronCheckpoint, folder: Path, world: World) -> bool:
    """Say which kept files were edited or are not those of the Hugging Face directory; whether tokens have the same ids."""
    kept = {name: name.removeprefix(f"{megatron.HF_FOLDER}/") for name in checkpoint.manifest.files if name.count("/") == 1}
    said = {name: "edited or removed since it was written" for name in checkpoint.edited_files()}
    for name, plain in kept.items():
        decides = VOCABULARY_FILES.fullmatch(plain) or plain.startswith(
            ("generation_config", "chat_template", "tokenizer_config")
        )
        if name not in said and decides and megatron.differing_files(folder, {plain: checkpoint.manifest.files[name]}):
            if not _say_the_same((checkpoint.path / name).parent, folder, plain):
                said[name] = f"not that of {folder}"
    decisive = [name for name in said if VOCABULARY_FILES.fullmatch(Path(name).name)]
    for name, text in said.items() if world.is_main else ():
        log.log(logging.ERROR if name in decisive else logging.WARNING, "%s: %s", checkpoint.path / name, text)
    return not decisive


def _say_the_same(kept: Path, folder: Path, name: str) -> bool:
    """Whether a file says the same in two directories, though one is written for both versions of transformers."""
    if name not in both_versions.SIDE_FILES or not (folder / name).is_file():
        return False
    try:
        return both_versions.settings(kept, name) == both_versions.settings(folder, name)
    except InputError:  # damaged, and so another
        return False


def _tokens(options: VerifyOptions, folder: Path, checkpoint: MegatronCheckpoint) -> torch.Tensor:
    """int64 [1, tokens]: of the text, or of a fixed pattern where the model has no tokenizer."""
    limit = min(options.seq_length, checkpoint.config.max_position_embeddings)
    if options.text:
        return read_windows(Path(options.text), folder, seq_length=limit, count=1)
    try:
        ids = load_tokenizer(folder)(TEXT)["input_ids"]
    except InputError as error:
        if any(folder.glob("tokenizer*")):
            log.warning("%s\ncomparing on a fixed pattern of tokens", error)
        ids = [7919 * position % checkpoint.config.vocab_size for position in range(64)]
    if max(ids, default=0) >= checkpoint.config.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} names tokens that the model has no row for",
            got=max(ids),
            needed=f"ids below {checkpoint.config.vocab_size}",
        )
    return torch.tensor([ids[:limit]])


def _difference(checkpoint: MegatronCheckpoint, layout, world: World, tokens: torch.Tensor, folder: Path):
    """Statistics of the difference, on one rank of the last stage; ``None`` on the others."""
    from megatron.core import parallel_state

    from megatron_prune.runtime.forward import full_logits
    from megatron_prune.runtime.model import build_model, stop_parallel

    running = build_model(checkpoint.tensors, layout, world, dtype=torch.float32, seq_length=tokens.shape[1])
    logits = full_logits(running, [tokens])
    first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_data_parallel_rank() == 0
    stop_parallel()
    if not logits or not first:
        return None
    reference_model = load_stock_model(folder, dtype=torch.float32)
    with torch.no_grad():
        reference = reference_model(tokens).logits.float()
    gap = (logits[0] - reference).abs()
    finite = gap.isfinite().all(dim=-1)
    same = ((logits[0].argmax(-1) == reference.argmax(-1)) & finite).float().mean()
    return {
        "largest": gap.max().item() if gap.isfinite().all() else float("inf"),
        "mean": gap.mean().item() if finite.all() else float("inf"),
        "deviation": reference.std().item(),
        "same": same.item(),
    }
