"""Every error a user can cause, under one root.

A message says what was wrong, what was got, what was needed and what to do. Errors are raised before the first
collective and alike on every rank; the command line turns them into exit code 2 (see ``cli.py``).
"""

from __future__ import annotations


class PruneError(Exception):
    """Root of this project's errors."""


class InputError(PruneError):
    """The request, an argument or an input file is wrong; nothing has been written.

    Args:
        what: what is wrong, naming the argument or file.
        got: what was found.
        needed: what would have been right.
        do: what the user can do about it.
    """

    def __init__(self, what: str, *, got: object = None, needed: object = None, do: str | None = None):
        lines = [what]
        for label, value in (("got", got), ("needed", needed), ("what to do", do)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged, of an unknown kind, or not the one that was asked for."""


class PlanError(InputError):
    """A plan is not well formed, or does not fit the checkpoint it is applied to."""


def raise_all(kind: type[InputError], what: str, problems: list[str], *, do: str | None = None) -> None:
    """Raise ``kind`` naming up to twenty ``problems`` at once; do nothing when there are none."""
    if not problems:
        return
    shown = problems[:20]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more")
    raise kind(what + "".join(f"\n  - {problem}" for problem in shown), do=do)
