"""Every error a user can cause, under one root.

A message says what was wrong, what was got, what was needed and what to do. Errors are raised before the first
collective and alike on every rank; the command line turns them into exit code 2 (see ``cli/``).
"""

from __future__ import annotations

import re


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
        super().__init__("\n".join(map(plain, lines)))


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


_TERMINAL_CODE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")
_ADVICE = re.compile(
    r"weights_only|add_safe_globals|safe_globals|allow_pickle|trust_remote_code|dangerous|pickle_module|trust(ed)?( the)? source"
    r"|arbitrary code|RUST_BACKTRACE|TORCH_FORCE|https?://|traceback|documentation of torch|we changed the default|"
    r"please (use|file|report|open|set|pass)|you can (use|set|pass|try)|weights only load",
    re.IGNORECASE,
)
"""What other libraries add for their own users: what to switch off, whom to ask."""


def plain(text: object, limit: int = 8000) -> str:
    """Text from outside for a message: no terminal codes or control characters but line ends, at most ``limit`` characters."""
    clean = _TERMINAL_CODE.sub("", str(text))
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in clean[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def reason(error: BaseException, limit: int = 200) -> str:
    """What an exception of another library says, for a message of ours: the first sentence that is no advice, plain."""
    if isinstance(error, OSError) and error.strerror:
        return plain(error.strerror, limit)
    text = plain(error, 1 << 16)
    sentences = (part.strip() for line in text.split("\n") for part in re.split(r"(?<=[.!])\s+(?=[A-Z(])", line))
    said = next((sentence for sentence in sentences if sentence and not _ADVICE.search(sentence)), "")
    name = type(error).__name__
    return plain(said if isinstance(error, InputError) else f"{name}: {said}" if said else name, limit)
