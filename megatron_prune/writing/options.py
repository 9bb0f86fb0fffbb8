"""What every verb that writes a model may be asked."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.config import option


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Whether what was written is checked."""

    no_check: bool = option(
        "leave out the check of what was written (it is reopened and compared before it is put in place)", False, group="run"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(CheckOptions):
    """How an output may come about."""

    overwrite: bool = option("replace an existing output directory", False, group="run")
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False, group="expert")
