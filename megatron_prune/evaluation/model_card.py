"""``README.md`` of a model that is written: what it is, what it was made from and how, how to run it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.arch.adapter import AdapterConfig
from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint.hub_id import is_hub_id
from megatron_prune.checkpoint.huggingface import VOCABULARY_FILES
from megatron_prune.checkpoint.manifest import without_places
from megatron_prune.errors import CheckpointError, plain
from megatron_prune.evaluation.record import evaluations_of
from megatron_prune.families.form import code_of
from megatron_prune.opening.card import CardFacts
from megatron_prune.planning.plan import shown_size
from megatron_prune.vocabulary.templates import chat_templates

TAGS = ["pruned", "megatron-prune"]


@dataclass(frozen=True, kw_only=True)
class CardSubject:
    """What a card is about.

    Attributes:
        name: what the model is called: its id on the hub, or its directory.
        family: its Hugging Face ``model_type``.
        hf_config: its ``config.json``.
        recipe: the steps that made it, oldest first.
        content_id: its own, where it has one.
        base_model: id on the hub of the model it descends from, where that is known.
        source: what the card of the model that it was made from says.
        side: directory of its tokenizer, if it has one.
        adapter, adapter_on: of an adapter: its rank and scale, and the model that it belongs on, a directory or an id on the hub.
    """

    name: str
    config: ModelConfig
    family: str
    hf_config: dict[str, Any] = field(default_factory=dict)
    recipe: list[dict[str, Any]]
    content_id: str | None = None
    base_model: str | None = None
    source: CardFacts = field(default_factory=dict)
    side: Path | None = None
    adapter: AdapterConfig | None = None
    adapter_on: str | None = None

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Entries of the recipe."""
        return [entry for entry in self.recipe if entry["step"] == name]

    @property
    def tokenizer(self) -> Path | None:
        """Directory of its tokenizer; ``None`` where there is none."""
        held = self.side is not None and any(VOCABULARY_FILES.fullmatch(file.name) for file in self.side.iterdir())
        return self.side if held else None

    @property
    def cuts(self) -> list[dict[str, Any]]:
        """Those that say which sizes they changed."""
        return [entry for entry in self.recipe if "old" in entry and "new" in entry]


def model_card(subject: CardSubject) -> str:
    """The card's text, as ``huggingface_hub.ModelCard`` writes it."""
    from huggingface_hub import ModelCard

    parts = [f"# {_plain(subject.name.rpartition('/')[2])}", _what(subject), "## Sizes\n\n" + _sizes(subject)]
    parts += ["## Use\n\n" + _use(subject)]
    if data := _data(subject):
        parts.append("## Data\n\n" + data)
    parts.append("## Recipe\n\n" + _recipe(subject))
    return str(ModelCard(f"---\n{_card_data(subject).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _card_data(subject: CardSubject):
    """The front matter, a ``ModelCardData``."""
    from huggingface_hub import ModelCardData

    source, on = subject.source, subject.adapter_on
    base, relation = subject.base_model or source.get("base_model"), None
    if on is not None:
        base, relation = (on, "adapter") if is_hub_id(on) and not Path(on).exists() else (None, None)
    elif base and subject.steps("recover"):  # the hub has no word for a model that was cut alone
        relation = "finetune"
    tags = source.get("tags", [])
    return ModelCardData(
        base_model=base,
        base_model_relation=relation,
        language=source.get("language"),
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        library_name="transformers" if on is None else "peft",
        pipeline_tag="text-generation",
        tags=[*([tags] if isinstance(tags, str) else tags), *(TAGS if subject.cuts else TAGS[1:]), *(["lora"] if on else [])],
    )


def _what(subject: CardSubject) -> str:
    done = [word for word, found in (("pruned", subject.cuts), ("trained", subject.steps("recover"))) if found]
    made = f"{' and '.join(done)} with megatron-prune" if done else "written by megatron-prune"
    origin = f" It descends from `{_plain(subject.base_model)}`." if subject.base_model else ""
    if subject.adapter_on is not None:
        rank = f"rank {subject.adapter.r}, alpha {subject.adapter.alpha:g}"
        return f"A LoRA adapter ({rank}) on the {subject.family} model `{_plain(_last(subject.adapter_on))}`, {made}.{origin}"
    return f"A {subject.family} model of {parameter_count(subject.config):,} parameters, {made}.{origin}"


def _sizes(subject: CardSubject) -> str:
    """The table of before and after; after alone, where nothing was cut."""
    first, config = (subject.cuts or [None])[0], subject.config
    after: dict[str, Any] = {name: shown_size(_each(config, name)) for name in SHAPE_FIELDS}
    after["parameters"] = f"{parameter_count(config):,}"
    old = dict(first["old"]) if first else {}
    before = {
        "parameters": _number(old.pop("parameters", None)),
        **{name: shown_size(old[name]) for name in after if name in old},
    }
    told = evaluations_of(subject.recipe, before=first and first.get("content_id"), after=subject.content_id)
    for text, (one, other) in told.items():
        before[f"perplexity: {text}"], after[f"perplexity: {text}"] = one, other
    head = ["| | before | after |", "|---|---:|---:|"] if first else ["| | |", "|---|---:|"]
    row = lambda name: [_plain(name), before.get(name, "not recorded"), after[name]] if first else [_plain(name), after[name]]
    return "\n".join([*head, *(f"| {' | '.join(row(name))} |" for name in after)])


def _each(config: ModelConfig, name: str) -> int | list[int]:
    sizes = config.each(name)
    return sizes[0] if len(sizes) == 1 else list(sizes)


def _data(subject: CardSubject) -> str:
    """What text was looked at, and what that brought; empty where nothing is recorded."""
    lines = []
    for entry in subject.recipe:
        calibration = entry.get("calibration")
        sources = calibration.get("sources") if isinstance(calibration, dict) else None
        lines += [f"- Calibration: {_text(source)}." for source in sources or () if isinstance(source, dict)]
        if isinstance(losses := entry.get("held_out_loss"), dict) and (
            said := _losses(losses.get("before"), losses.get("after"))
        ):
            lines.append(f"- Pruning, on samples held out of the calibration: {said}.")
        if entry["step"] == "recover":
            lines.append(f"- Recovery: {_training(entry)}.")
    return "\n".join(dict.fromkeys(lines))


def _text(source: dict[str, Any]) -> str:
    name = source.get("dataset") or source.get("name")
    said = "samples of the model itself" if name == "self" else f"`{_plain(_last(name))}`"
    said += f", split `{_plain(source['split'])}`" if source.get("split") else ""
    return said + f": {_number(source.get('samples'))} samples, {_number(source.get('tokens'))} tokens"


def _training(entry: dict[str, Any]) -> str:
    settings = entry["settings"] if isinstance(entry.get("settings"), dict) else {}
    named = [*(settings.get("data_path") or ()), *(settings.get("train_data_path") or ())]
    data = ", ".join(f"`{_plain(_last(name))}`" for name in named if not re.fullmatch(r"[0-9.]+", str(name)))
    taught = " from the unpruned model's answers" if settings.get("teacher") or settings.get("teacher_logits") else ""
    steps, tokens = _number(entry.get("iteration")), _number(entry.get("tokens"))
    said = f"{steps} steps, {tokens} tokens" + (f" of {data}" if data else "") + taught
    losses = _losses(entry.get("start_loss"), entry.get("held_out_loss"))
    return f"{said}; held-out {losses}" if losses else said


def _losses(*losses: object) -> str:
    """Before and after, as losses and as perplexities; empty where one is not recorded."""
    if not all(isinstance(loss, float) for loss in losses):
        return ""
    loss, perplexity = (" → ".join(texts) for texts in zip(*((f"{x:.4f}", f"{math.exp(min(x, 700)):.4g}") for x in losses)))
    return f"loss {loss} nats a token (perplexity {perplexity})"


def _recipe(subject: CardSubject) -> str:
    from huggingface_hub.utils import yaml_dump

    steps = json.loads(json.dumps(without_places(subject.recipe)))  # nothing in it is one object twice
    text = yaml_dump([{"step": entry["step"], **entry} for entry in steps], sort_keys=False)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text.strip()}\n{fence}"


# --------------------------------------------------------------------------------------------------------- how to run it


def _use(subject: CardSubject) -> str:
    """A program that runs where the directory lies, or from its id on the hub."""
    code = code_of(subject.hf_config)
    classes = subject.hf_config.get("auto_map", {}) if code else {}
    if code and "AutoModelForCausalLM" not in classes:
        return (
            "Its layers differ, and transformers has no class for it: serve it with vLLM and `--trust-remote-code`\n"
            "(a file of code that lies beside the weights reads its `config.json`)."
        )
    trust = ", trust_remote_code=True" if code else ""
    auto, library = (
        ("AutoModelForCausalLM", "transformers") if subject.adapter_on is None else ("AutoPeftModelForCausalLM", "peft")
    )
    names = {library: [auto]}
    if subject.tokenizer:
        names.setdefault("transformers", []).append("AutoTokenizer")
    lines = [f"from {module} import {', '.join(imported)}" for module, imported in names.items()]
    lines += ["", f"name = {json.dumps(subject.name)}", f'model = {auto}.from_pretrained(name, dtype="auto"{trust})']
    if subject.tokenizer:
        of = "name" if subject.adapter_on is None else json.dumps(subject.adapter_on)
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({of})", *_generation(subject.tokenizer)]
    note = "Its layers differ, which a file of code beside the weights says to transformers.\n\n" if code else ""
    return note + "\n".join(["```python", *lines, "```"])


def _generation(tokenizer: Path) -> list[str]:
    if _talks(tokenizer):
        asked = ['talk = [{"role": "user", "content": "What is a kilobyte?"}]']
        more = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
        asked += [f"tokens = tokenizer.apply_chat_template(talk, {more}).input_ids"]
    else:
        asked = ['tokens = tokenizer("A kilobyte is", return_tensors="pt").input_ids']
    return [
        *asked,
        "output = model.generate(input_ids=tokens.to(model.device), max_new_tokens=32)",
        "print(tokenizer.decode(output[0]))",
    ]


def _talks(tokenizer: Path) -> bool:
    try:
        return any(file.parent == tokenizer for file, _ in chat_templates(tokenizer))
    except CheckpointError:  # whoever reads the template says so
        return False


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else "not recorded"


def _last(name: object) -> str:
    return str(without_places(str(name)))


def _plain(text: object) -> str:
    """On one line, without what Markdown would take for the end of a cell or of code."""
    return re.sub(r"[\n|`<>]", " ", plain(text, 300))
