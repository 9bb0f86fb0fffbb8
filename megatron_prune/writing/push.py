"""A finished Hugging Face directory, uploaded to the hub; whether that can be done is asked before any work."""

from __future__ import annotations

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.hub_id import is_hub_id
from megatron_prune.errors import InputError, PruneError, reason
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.writing.options import PushOptions

_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""Weights of an earlier upload, which would be loaded beside or instead of the new ones."""
_BEAT = 60.0
"""Seconds between signs of life of the process that uploads: the others give up on one that is silent for long."""


@dataclass(frozen=True)
class Push:
    """An upload that may be done.

    Attributes:
        id: the repository.
        public: whether it is made for everybody to see.
    """

    id: str
    public: bool

    def send(self, folder: Path, world: World) -> None:
        """Upload a directory from the main process; every process takes part, and ends alike.

        Raises:
            PruneError: if the hub or the network refuses; the directory stays.
        """
        if world.size == 1:
            self._upload(folder)
            return
        with ThreadPoolExecutor(1) as aside:
            upload = aside.submit(self._upload, folder) if world.is_main else None
            while not all(world.all_gather(upload is None or bool(wait([upload], _BEAT).done))):
                pass
            world.agree(upload.exception() if upload else None)

    def _upload(self, folder: Path) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        api = HfApi()
        try:
            api.create_repo(self.id, private=not self.public, exist_ok=True)
            api.upload_folder(
                repo_id=self.id, folder_path=folder, commit_message="Upload with megatron-prune", delete_patterns=_REPLACED
            )
        except Exception as error:  # of the library, of its HTTP client, of the disk
            seen = "--no-private" if self.public else "--private"
            command = f"hf upload {self.id} {shlex.quote(str(folder))} . {seen}"
            raise PruneError(
                f"{folder} is written and complete, but was not uploaded to {self.id}\n  got: {reason(error)}\n  what to do: {command}"
            ) from None
        log.info("uploaded to %s", self.id)


def check_push(options: PushOptions, world: World) -> Push | None:
    """The upload that was asked for, if one was; every process takes part.

    Raises:
        InputError: if it cannot be done: no token, no access, no such id, a repository that more can see than was said.
    """
    if options.push_to_hub is None:
        if options.push_public:
            raise InputError("--push-public without --push-to-hub", do="leave it out, or name a repository")
        return None
    if not is_hub_id(options.push_to_hub):
        needed = "owner/name of letters, digits, '-', '_' and '.', at most 96 characters"
        raise InputError("--push-to-hub", got=repr(options.push_to_hub[:120]), needed=needed)
    found = []
    world.on_main(lambda: found.append(_checked(options.push_to_hub, public=options.push_public)))
    return Push(world.all_gather(found[0] if found else None)[0], options.push_public)


def _checked(name: str, *, public: bool) -> str:
    """The whole id, after the hub was asked who the user is and whether the repository is there."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if get_token() is None:
        raise InputError(
            f"--push-to-hub {name}",
            got="no token of the hub",
            needed="one that may write",
            do="set HF_TOKEN, or run hf auth login",
        )
    api = HfApi()
    try:
        user = api.whoami()
        full = name if "/" in name else f"{user['name']}/{name}"
        _check_owner(user, full)
        if not api.repo_info(full).private and not public:
            raise InputError(
                f"--push-to-hub {name}",
                got="a repository that is there and that everybody sees",
                needed="a private one, or a new one",
                do="name another, or pass --push-public",
            )
    except RepositoryNotFoundError:
        pass
    except InputError:
        raise
    except Exception as error:  # of the library, and of its HTTP client
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        do = "set HF_TOKEN to a token that may write" if refused else "look at the network, and at HF_ENDPOINT and HF_HUB_OFFLINE"
        raise InputError(f"--push-to-hub {name}: the hub cannot be asked", got=reason(error), do=do) from None
    return full


def _check_owner(user: dict[str, Any], name: str) -> None:
    """Refuse a token that can only read, and an owner that the user is not; of a fine-grained token the hub does not say all."""
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise InputError(
            f"--push-to-hub {name}", got="a token that can only read", needed="one that may write", do="set HF_TOKEN to one"
        )
    owners = [user["name"], *(org["name"] for org in user.get("orgs") or ())]
    if role != "fineGrained" and name.partition("/")[0] not in owners:
        raise InputError(f"--push-to-hub {name}", got="an owner that this token is not of", needed="one of " + ", ".join(owners))
