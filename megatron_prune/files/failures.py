"""What disks and the operating system refuse, as messages: the file, the cause, what to do."""

from __future__ import annotations

import contextlib
import errno
import re
from typing import Iterator

from safetensors import SafetensorError

from megatron_prune.errors import PruneError

_DO = {
    errno.ENOSPC: "make room, or name a place that has it; then run the same command again",
    errno.EDQUOT: "make room within the quota, or name another place; then run the same command again",
    errno.EACCES: "ask for the permission, or name another place",
    errno.EPERM: "ask for the permission, or name another place",
    errno.EROFS: "name a place that may be written to",
    errno.EIO: "look at the disk: it fails to read or write",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files (ulimit -n)",
    errno.EXDEV: "name an output in another directory",
    errno.EBUSY: "name an output in another directory",
}
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_TORCH = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")


def describe(error: OSError, what: str | None = None) -> str:
    """File, cause and what to do, on lines.

    Args:
        what: named where the error names no file.
    """
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = " → ".join(names) or what
    cause = error.strerror or str(error).split("\n")[0] or type(error).__name__
    do = _DO.get(error.errno)
    return (f"{where}: {cause}" if where else cause) + (f"\n  what to do: {do}" if do else "")


def refusal(error: BaseException) -> OSError | None:
    """What the system refused, where that is behind an error: libraries wrap it in errors of their own."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, SafetensorError) and (found := _IN_TEXT.search(str(error))):
        return OSError(int(found[1]), str(error).split(": ")[-1].removesuffix(found[0]).strip())
    if isinstance(error, RuntimeError) and _TORCH.search(str(error)):  # torch.save does not say why
        behind = error.__cause__ or error.__context__
        return behind if isinstance(behind, OSError) else OSError(errno.ENOSPC, "not written to its end; is there room?")
    return None


@contextlib.contextmanager
def explained(what: object, *, kept: str | None = None) -> Iterator[None]:
    """Let what the system refuses within be one :class:`PruneError`, which says so.

    Args:
        what: is being written.
        kept: said besides, where something stays.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        found = refusal(error)
        if found is None:
            raise
        lines = describe(found, str(what)).split("\n", 1)
        more = [*lines[1:], *([f"  {kept}"] if kept else [])]
        raise PruneError("\n".join([f"{what} was not written", f"  got: {lines[0]}", *more])) from error
