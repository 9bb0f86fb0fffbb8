"""Which model of the Hugging Face hub a directory is, or says that it was made from; nothing is asked of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def is_hub_id(name: str) -> bool:
    """Whether a text can be the id of a repository of the hub: ``owner/name``, or an old one's ``name`` alone."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def id_of_snapshot(folder: Path) -> str | None:
    """The id of the model that a directory is a snapshot of (``models--owner--name/snapshots/…``); ``None`` if it is none."""
    home = Path(os.path.realpath(folder))
    kind, *names = home.parent.parent.name.split("--")
    name = "/".join(names)
    return name if home.parent.name == "snapshots" and kind == "models" and is_hub_id(name) else None


def id_said_by(hf_config: dict[str, Any]) -> str | None:
    """``_name_or_path`` of a ``config.json``, if that is ``owner/name`` and no path here."""
    name = hf_config.get("_name_or_path")
    said = isinstance(name, str) and name.count("/") == 1 and is_hub_id(name) and not Path(name).exists()
    return name if said else None
