"""The overview of all verbs, and what is said of one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megatron_prune.verbs.table import VERBS


def overview(verbs: Iterable[str] = VERBS) -> str:
    """A line for each verb, and how they are called."""
    lines = ["usage: megatron-prune <verb> [options]      megatron-prune <verb> --help", ""]
    lines += [f"  {verb:12} {VERBS[verb]}" for verb in verbs]
    lines += ["", "Under torchrun: torchrun --nproc-per-node N -m megatron_prune <verb> [options]"]
    lines += ['Completion of a shell: eval "$(megatron-prune completion bash)" (also zsh, tcsh, fish, powershell)']
    return "\n".join(lines)


def unknown(argv: list[str]) -> str:
    """What is wrong with a command line whose first words are no verb."""
    family = [verb for verb in VERBS if verb.startswith(f"{argv[0]} ")]
    given = " ".join(argv[:2]) if family and len(argv) > 1 and not argv[1].startswith("-") else argv[0]
    known = family or [*VERBS, *{verb.partition(" ")[0] for verb in VERBS}]
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    said = f"{given!r} is no verb" + (f"; did you mean {near[0]}?" if near else "")
    return f"{said}\n\n{overview(family or VERBS)}"
