"""What the card of a model (the front matter of its ``README.md``) says of it, for the cards of models that are made from it."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.checkpoint.hub_id import is_hub_id
from megatron_prune.errors import CheckpointError, plain
from megatron_prune.files.documents import read_text
from megatron_prune.files.yaml_nodes import compose, entries, texts
from megatron_prune.runtime.reporting import log

FILE = "README.md"
TEXTS, LISTS = ("license_name", "license_link"), ("base_model", "license", "language", "tags")
"""Fields that are taken over: one text each; one or several."""
_BYTES, _LONGEST, _MOST = 1 << 22, 300, 500

CardFacts = dict[str, str | list[str]]


def card_facts(folder: Path | None, *, warn: bool) -> CardFacts:
    """:data:`TEXTS` and :data:`LISTS` of the card in a model's directory, as far as it has them; plain texts of one line.

    Args:
        warn: say it, once, where a card cannot be read; what cannot be read is left out.
    """
    if folder is None or not (folder / FILE).exists():
        return {}
    facts: CardFacts = {}
    try:
        facts, left = _read(folder / FILE)
        if left:
            needed = "a text, or a list of texts"
            raise CheckpointError(f"{folder / FILE}: {', '.join(left)}", got="something else", needed=needed)
    except CheckpointError as error:
        if warn:
            log.warning("%s\n  not taken over into the new model's card", error)
    return facts


def _read(file: Path) -> tuple[CardFacts, list[str]]:
    """What is taken over, and names of fields that are of no use."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.match(read_text(file, limit=_BYTES).removeprefix("\ufeff"))
    nodes = entries(compose(found[2], file)) if found else {}
    facts: CardFacts = {}
    left = []
    for name in (name for name in nodes if name in (*TEXTS, *LISTS)):
        said = texts(nodes[name])
        if said is None or len(said) > _MOST or isinstance(said, list) and name in TEXTS:
            left.append(name)
            continue
        clean = [plain(" ".join(text.split()), _LONGEST) for text in ([said] if isinstance(said, str) else said)]
        clean = [text for text in clean if text and (name != "base_model" or is_hub_id(text))]
        if clean:
            facts[name] = clean if isinstance(said, list) else clean[0]
    return facts, left
