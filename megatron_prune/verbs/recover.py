"""What ``recover`` can be asked."""

from __future__ import annotations

from megatron_prune.recovery.options import RecoverOptions

__all__ = ["RecoverOptions"]
