"""What lies beside the weights of a model: links, and files that were edited."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.checkpoint import huggingface, megatron, model_folder
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.errors import CheckpointError
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World


def say_links(folder: Path, world: World) -> None:
    """Say which weights are read from elsewhere, and refuse what else is not the directory's own.

    Raises:
        InputError: naming a file beside the weights that is a link out of the directory, or no file.
    """
    for each in (folder, folder / megatron.HF_FOLDER):
        if model_folder.is_huggingface(each):
            huggingface.side_files(each)
    linked = huggingface.linked_weights(folder)
    if linked and world.is_main:
        log.info("weights that are links: %s", "; ".join(linked))


def check_side_files(world: World, folder: Path, described: Manifest) -> None:
    """Warn of configuration and tokenizer files of a checkpoint that were edited: they are used as they are now.

    Raises:
        CheckpointError: on tensors beside the weights (rotary tables) that are not as they were written.
    """
    edited = megatron.edited_files(folder, described)
    if tables := [name for name in edited if Path(name).name == huggingface.BUFFERS_FILE]:
        raise CheckpointError(f"{folder / tables[0]}", got="other bytes than were written", do="restore it, or convert again")
    if edited and world.is_main:
        log.warning("%s: edited or removed since it was written, and used so: %s", folder, ", ".join(edited))
