"""What ``vocab select`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.vocabulary.options import SelectOptions


@dataclass(frozen=True, kw_only=True)
class VocabSelectOptions(SelectOptions):
    """Choose the tokens that stay, report what that saves and costs, and write a plan for trim, prune or a teacher."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune vocab select --load model --counts counts --remain-vocab-size 24576 --save-plan vocab.json",
        "shape": "--coverage 0.9999 --keep-script Han,Latin --multiple-of 128",
    }

    save_plan: str | None = option("write the plan here", None, group="model")
