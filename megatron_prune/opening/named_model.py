"""The Hugging Face model that an adapter belongs on, by the name that peft is to load it by."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.hub_id import id_of_snapshot, is_hub_id
from megatron_prune.errors import InputError
from megatron_prune.families.family import family_of
from megatron_prune.opening.opened import Opened

_DO = "write that model with megatron-prune export, and name its directory, or its id on the hub, with --base-model-name"


def named_model(model: Opened, named: str | None) -> str:
    """A directory, as an absolute path, or an id on the hub.

    Args:
        model: a checkpoint of adapters, opened with the model that they are merged into.
        named: what the user says; else it is what was converted, if the adapter was trained on that as it was.

    Raises:
        InputError: if it is unknown, or not a model of this shape.
    """
    described = model.checkpoint.manifest
    if named is None:
        converted = len(described.recipe) > 1 and described.recipe[-2]["step"] == "convert"
        if not converted or described.converted_from is None:
            raise InputError(
                "which Hugging Face model the adapter belongs on is not known",
                got="an adapter on a model that was pruned or trained after it was converted"
                if not converted
                else "a checkpoint of an earlier version, which does not say it",
                do=_DO,
            )
        if found := id_of_snapshot(Path(described.converted_from)):
            return found
        named = described.converted_from
        if not model_folder.is_huggingface(Path(named)):
            raise InputError(f"the model that the adapter belongs on was converted from {named}", got="no model there", do=_DO)
    elif not Path(named).is_dir():
        if not is_hub_id(named):
            raise InputError("--base-model-name", got=repr(named[:120]), needed="a directory, or an id on the hub", do=_DO)
        return named
    if found := id_of_snapshot(Path(named)):
        return found
    hf_config = model_folder.read_config(Path(named))
    if family_of(hf_config).model_config(hf_config) != model.config:
        raise InputError(f"{named} is not the model that the adapter belongs on", got="another config.json", do=_DO)
    return str(Path(named).absolute())
