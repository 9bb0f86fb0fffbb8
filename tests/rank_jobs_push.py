"""What the ranks of tests/end_to_end/test_push.py do."""

from __future__ import annotations

import os
from typing import Any

import huggingface_hub.constants
from hub_stand_in import TOKEN

from megatron_prune.errors import PruneError
from megatron_prune.runtime.world import World
from megatron_prune.steps.export import ExportOptions, export


def export_to(world: World, address: str, options: dict[str, Any]) -> str | None:
    """Run ``export`` with a stand-in of the hub at ``address``; what it raised, if it did."""
    huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HUB_DISABLE_XET = address, True
    os.environ["HF_TOKEN"] = TOKEN
    try:
        export(ExportOptions(**options), world)
    except PruneError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del os.environ["HF_TOKEN"]
    return None
