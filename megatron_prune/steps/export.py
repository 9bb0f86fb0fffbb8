"""Megatron → Hugging Face: the way back, bit for bit where nothing was pruned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prune.arch.tensors import EMBEDDING, HEAD, TensorId, tensor_ids
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.adapter import StoredAdapter
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.evaluation.model_card import model_card
from megatron_prune.families.choice import choose_family
from megatron_prune.families.family import Family
from megatron_prune.families.form import code_of
from megatron_prune.files.documents import read_text
from megatron_prune.opening.foreign import ForeignOptions
from megatron_prune.opening.opened import open_merged
from megatron_prune.opening.side_files import say_links
from megatron_prune.opening.source import Source, commonest
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.serving.demand import warnings
from megatron_prune.writing.check import CheckOptions
from megatron_prune.writing.huggingface import parse_size, write_huggingface
from megatron_prune.writing.output import Output, staged
from megatron_prune.writing.overwrite import HUGGING_FACE, check_output


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ForeignOptions, CheckOptions):
    """Turn a Megatron checkpoint into a Hugging Face model that stock transformers loads."""

    load_dir: str = option("Megatron checkpoint: its root, or an iteration directory")
    save_dir: str = option("Hugging Face directory to write")
    target_params_dtype: str | None = option(
        "element type (default: that of the Hugging Face model it came from)", None, choices=["fp32", "bf16", "fp16"]
    )
    target_family: str | None = option(
        "write as another family of the same architecture, such as mistral; or layers that differ as llama-per-layer "
        "(transformers, with a file of code) or nemotron-nas (vLLM and others)",
        None,
    )
    max_shard_size: str = option("split weight files larger than this", "5GB")
    adapter_only: bool = option("write an adapter as a directory that peft loads, not merged", False)
    base: str | None = option("model that an adapter belongs on (default: where it was when it was trained)", None)
    overwrite: bool = option("replace an existing output directory", False)
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False)


def export(options: ExportOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on an argument or checkpoint that does not fit; nothing is written.
    """
    save = Path(options.save_dir)
    read = (options.hf_dir, options.base)
    check_output(save, HUGGING_FACE, overwrite=options.overwrite, source=Path(options.load_dir), inputs=read)
    shard_bytes = parse_size(options.max_shard_size)
    model = open_merged(options.load_dir, options.base, world, options)
    checkpoint = model.checkpoint
    if options.adapter_only:
        _write_adapter(options, model.adapter, choose_family(model.family, options.target_family, model.config), world)
        return
    side, template = model.folder, model.template
    family = choose_family(model.family, options.target_family, model.config)
    config = checkpoint.config
    hf_config = family.hf_config(config, template, checkpoint.manifest.kept_layers)
    if world.is_main:
        for line in warnings(config, family, template):
            log.warning("%s", line)
    dtypes = _dtypes(checkpoint, options.target_params_dtype)
    named = (template or {}).get("dtype") or (template or {}).get("torch_dtype")  # what a foreign checkpoint has besides
    stored = checkpoint.manifest.hf_dtypes.get("default", named)
    changed = any(entry["step"] not in ("convert", "transfer") for entry in checkpoint.manifest.recipe)
    unchanged = not changed and hf_config == template and str(commonest(dtypes)) == f"torch.{stored}"
    if side is None and world.is_main:
        log.warning("no tokenizer is kept in %s; pass --hf-dir to add one", checkpoint.path)
    pruned = any(entry["step"] in ("prune", "recover") for entry in checkpoint.manifest.recipe)
    say_links(checkpoint.path, world)
    plan = checkpoint.plan_text()
    files = {megatron.PLAN_FILE: plan} if plan is not None else {}
    if pruned:
        files["README.md"] = model_card(
            config, checkpoint.manifest.recipe, name=save.name, family=family.name, code=bool(code_of(hf_config))
        )
    write_huggingface(
        world,
        Output(save=save, overwrite=options.overwrite, strict=options.strict, check=not options.no_check),
        model.source(),
        config=config,
        family=family,
        hf_config=hf_config,
        config_text=read_text(side / "config.json") if unchanged else None,
        dtypes=dtypes,
        max_shard_bytes=shard_bytes,
        side_files=side,
        tied_head_stored=checkpoint.manifest.tied_head_stored,
        buffers={} if pruned else huggingface.load_buffers(checkpoint.path / megatron.HF_FOLDER),
        files=files,
        recipe=checkpoint.manifest.recipe if pruned else None,
    )


def _write_adapter(options: ExportOptions, adapter: StoredAdapter | None, family: Family, world: World) -> None:
    if adapter is None:
        raise InputError(f"--adapter-only: {options.load_dir} is no adapter", do="leave it out")
    with staged(world, Output(save=Path(options.save_dir), overwrite=options.overwrite), HUGGING_FACE) as partial:
        world.on_main(lambda: adapter.write_peft(partial, family, options.base or ""))
        if not options.no_check:
            world.on_main(lambda: adapter.check_peft(partial, family))
            if world.is_main:
                log.info("checked: %d matrices lie as they were written", 2 * len(adapter.matrices))


def _dtypes(checkpoint: MegatronCheckpoint, asked: str | None) -> dict[TensorId, torch.dtype]:
    if asked or not checkpoint.manifest.hf_dtypes:
        return Source(tensors=checkpoint.tensors).dtypes(checkpoint.config, asked)
    recorded = checkpoint.manifest.hf_dtypes
    names = {tensor: recorded.get(str(tensor), recorded["default"]) for tensor in tensor_ids(checkpoint.config)}
    if checkpoint.manifest.tied_head_stored:
        names[HEAD] = recorded.get(str(HEAD), names[EMBEDDING])
    return {tensor: getattr(torch, name) for tensor, name in names.items()}
