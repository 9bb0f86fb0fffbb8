"""What a family is: its Hugging Face tensor names and configuration fields, and ours, in one table."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_prune.arch.model import ModelConfig, check_value, value_kinds
from megatron_prune.arch.tensors import TensorId, layer_roles
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.families import config_keys
from megatron_prune.families.entries import Entries
from megatron_prune.families.form import Form, Refused, commonest, differences, is_plain
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.families.per_layer import PER_LAYER
from megatron_prune.families.rope import ROTARY
from megatron_prune.families.windows import NO_WINDOW, kept_types
from megatron_prune.files.documents import shorten
from megatron_prune.registry import Registry

FAMILIES: Registry[Family] = Registry("model family", "megatron_prune.families")

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Tensor names that Llama introduced and the families after it kept."""

QKV_BIASES = {f"{role}_bias": NAMES[role].replace("weight", "bias") for role in ("q", "k", "v")}

FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
"""Field of :class:`ModelConfig` ↔ the key in ``config.json`` that says it alone, the same in all families so far."""

FORMS = (PER_LAYER, NEMOTRON_NAS)
"""Ways to say layers that have sizes of their own."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face model family.

    Attributes:
        name: its ``model_type``.
        architecture: its class for causal language modelling in transformers.
        names: role → tensor name, ``{layer}`` standing for the 0-based layer.
        defaults: values transformers assumes for keys that ``config.json`` leaves out.
        traits: fields of :class:`ModelConfig` that every model of the family has alike and no key says, where they are not the
            default.
        entries: what is said by more than one key, or in other words: rotary positions, windows, …
        fixed, idle: keys of its class beside those of ``config_keys.py`` → the values carried; the types taken.
        stated: keys that a ``config.json`` made from nothing begins with.
        heads_divide_hidden: transformers' class refuses ``hidden_size % num_attention_heads != 0`` (and, reading it of the model as
            a whole, heads that differ by layer).
        needs_bos: its models are lost on text that does not begin with the BOS token, wherever the text was cut.
        form: name of the form that is to be written, or ``"plain"``, where one was asked for; else what a model needs.
        zeros: matrix → name of a bias that its class adds to what that writes, where it has those of queries, keys and values. It
            is zero in every model that is carried: Megatron has none, so that it is no role tensor.
    """

    name: str
    architecture: str
    names: dict[str, str] = field(default_factory=lambda: dict(NAMES))
    defaults: dict[str, Any] = field(default_factory=dict)
    traits: dict[str, Any] = field(default_factory=dict)
    entries: tuple[Entries, ...] = (ROTARY, NO_WINDOW)
    fixed: dict[str, tuple] = field(default_factory=dict)
    idle: dict[str, tuple[type, ...]] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    heads_divide_hidden: bool = False
    needs_bos: bool = False
    form: str | None = None
    zeros: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def keys(self) -> config_keys.Keys:
        """What every key of its ``config.json`` is."""
        looked_at = {*FIELDS.values(), *(key for entries in self.entries for key in entries.keys)}
        return config_keys.keys_of(looked_at, self.fixed, self.idle)

    def tensor_name(self, tensor: TensorId) -> str:
        """Hugging Face's name of a tensor."""
        return self.names[tensor.role].format(layer=tensor.layer)

    def zero_tensors(self, config: ModelConfig) -> dict[str, TensorId]:
        """Names of the biases that are zero (:attr:`zeros`), [rows of the matrix], each with that matrix."""
        found = {}
        for layer in range(config.num_layers if config.qkv_bias else 0):
            roles = layer_roles(config.of_layer(layer))
            found |= {name.format(layer=layer): TensorId(role, layer) for role, name in self.zeros.items() if role in roles}
        return found

    def model_config(self, hf: dict[str, Any]) -> ModelConfig:
        """Read ``config.json``, in any form.

        Raises:
            CheckpointError: on a missing key, a value that no model has, or a feature that this project does not carry.
        """
        form = form_of(hf)
        config = self._read(form.plain(hf) if form else hf)
        return replace(config, **form.sizes(hf, config)) if form else config

    def _read(self, hf: dict[str, Any]) -> ModelConfig:
        """What a ``config.json`` of the stock class says."""
        config_keys.check_keys(hf, self.name, self.architecture, self.keys)
        missing = [key for key in _NEEDED if hf.get(key) is None]
        if missing:
            raise CheckpointError("config.json lacks " + ", ".join(missing), do="is this a model's config.json?")
        kinds = value_kinds()
        for ours, theirs in FIELDS.items():
            if theirs in hf and not (hf[theirs] is None and theirs in _DERIVED):
                check_value(kinds[ours], hf[theirs], f"config.json: {theirs}")
        merged = self._completed(hf)
        if merged["head_dim"] % 2:
            raise CheckpointError(
                "config.json: head_dim", got=merged["head_dim"], needed="an even number: positions rotate pairs"
            )
        _check_padding(merged.get("pad_token_id"), merged["vocab_size"])
        said = {ours: merged[theirs] for ours, theirs in FIELDS.items()}
        for entries in self.entries:
            said |= entries.read(merged)
        return ModelConfig(**said, **self.traits)

    def hf_config(self, config: ModelConfig, template: dict[str, Any] | None, kept_layers: list[int] | None = None) -> dict:
        """``config.json`` for a model of this family.

        Args:
            config: the model to describe.
            template: the ``config.json`` it descends from; keys that need no change keep value and order.
            kept_layers: original layers that remain, to cut per-layer lists such as ``layer_types``.

        Raises:
            InputError: if this family's class cannot express the model.
            CheckpointError: if the template is one of no model that is carried.
        """
        form = self._form(config, template)
        self._check(form, config)
        if form is None:
            return self._written(config, _plain(template), kept_layers)
        if template and form_of(template) is form and family_of(template).model_config(template) == config:
            if form.whole(template) and (self.form is None or family_of(template).name == self.name):
                return dict(template)
        hf = form.write(self._host(form, config)._written(commonest(config), _plain(template), kept_layers), config)
        family_of(hf)._check_written(hf, config, "the config.json that the model descends from")
        return hf

    def _written(self, config: ModelConfig, template: dict[str, Any] | None, kept_layers: list[int] | None) -> dict:
        """``config.json`` of the stock class."""
        hf = dict(template) if template else self._fresh(config)
        family_of(hf).model_config(hf)
        if template and template.get("model_type") != self.name:
            foreign = {key for entries in family_of(hf).entries for key in entries.keys} - self.keys.read
            hf = {key: value for key, value in hf.items() if key not in foreign}
            hf.update(model_type=self.name, architectures=[self.architecture])
        if "layer_types" in hf and hf.get("num_hidden_layers") != config.num_layers:
            hf.update(num_hidden_layers=config.num_layers)
            said = {key: value for entries in self.entries for key, value in entries.write(config).items()}
            types = said.get("layer_types") or kept_types(hf["layer_types"], config.num_layers, kept_layers)
            hf.update(layer_types=types)
        # Only what would be read otherwise is written, so that an unchanged model keeps its file as it was.
        # Keys that are left out follow from others, so the file is read again until nothing differs.
        for _ in FIELDS:
            if not (wrong := self._differing(hf, config)):
                break
            hf.update({FIELDS[ours]: getattr(config, ours) for ours in wrong})
        read = self.model_config(hf)
        for entries in self.entries:
            if any(getattr(read, name) != getattr(config, name) for name in entries.fields):
                hf = entries.rewritten(hf, config)
        self._check_written(hf, config, "the config.json that the model descends from")
        return hf

    def _differing(self, hf: dict[str, Any], config: ModelConfig) -> list[str]:
        """Fields that a ``config.json`` would give other values than ``config`` has."""
        read = self._completed(hf)
        return [ours for ours, theirs in FIELDS.items() if read[theirs] != getattr(config, ours)]

    def _completed(self, hf: dict[str, Any]) -> dict[str, Any]:
        """``config.json`` with the values that transformers assumes for sizes that it leaves out, or that are null."""
        merged = {**self.defaults, **hf}
        heads = merged["num_attention_heads"]
        for key, derived in (("num_key_value_heads", heads), ("head_dim", merged["hidden_size"] // heads)):
            if merged.get(key) is None:
                merged[key] = derived
        return merged

    def _check_written(self, hf: dict[str, Any], config: ModelConfig, what: str) -> None:
        read = self.model_config(hf)
        lost = [item.name for item in fields(config) if getattr(read, item.name) != getattr(config, item.name)]
        if lost:
            raise CheckpointError(
                f"{what} cannot be brought to say this model's {', '.join(lost)}",
                got=", ".join(shorten(getattr(read, name)) for name in lost),
                needed=", ".join(shorten(getattr(config, name)) for name in lost),
            )

    def check_expressible(self, config: ModelConfig) -> None:
        """Refuse a model that no form of this family which may be written describes, or its class in transformers refuses.

        Raises:
            InputError: naming what cannot be said, and the families and forms that can say it.
        """
        self._check(self._form(config, None), config)

    def _check(self, form: Form | None, config: ModelConfig) -> None:
        if (said := self._refused(form, config)) is None:
            return
        others = ", ".join(f"--target-family {name}" for name in self.others(config))
        raise InputError(
            said.what,
            got=said.got,
            needed=said.needed,
            do=f"write the model as what can say it: {others}"
            if others
            else "choose other sizes: no other family or form says these",
        )

    def refused(self, config: ModelConfig) -> Refused | None:
        """Why no form of this family which may be written describes a model; ``None``: one does."""
        return self._refused(self._form(config, None), config)

    def _refused(self, form: Form | None, config: ModelConfig) -> Refused | None:
        if form is not None:
            why = self._form_unsaid(form, config)
            return Refused(f"{self._named(form)} cannot say this model", got=why) if why else None
        if not is_plain(config):
            needed = "layers that are alike (a plan becomes such a one with megatron-prune prune --plan PLAN --uniform)"
            return Refused(f"transformers' {self.architecture} has layers that are alike", got=differences(config), needed=needed)
        if lost := self._unsaid(config):
            return Refused(f"transformers' {self.architecture} cannot express this model's {', '.join(lost)}")
        heads, hidden = config.num_attention_heads, config.hidden_size
        if self._divides(config):
            return None
        what = f"transformers' {self.architecture} cannot express hidden_size {hidden} with {heads} attention heads"
        return Refused(what, needed=f"a hidden size that is a multiple of {heads}")

    def fits(self, config: ModelConfig) -> bool:
        """Whether a model has this family's traits: the same tensors, computed with in the same way."""
        said = {*FIELDS, *(name for entries in self.entries for name in entries.fields)}
        free = (item for item in fields(config) if item.name not in said)
        return all(getattr(config, item.name) == self.traits.get(item.name, item.default) for item in free)

    def says(self, config: ModelConfig) -> bool:
        """Whether this family can express a model, in a form that may be written."""
        form = self._form(config, None)
        return not self._form_unsaid(form, config) if form else self._class_says(config)

    def _class_says(self, config: ModelConfig) -> bool:
        """Whether the stock class can."""
        return is_plain(config) and not self._unsaid(config) and self._divides(config)

    def written_as(self, config: ModelConfig, template: dict[str, Any] | None) -> tuple[str, str]:
        """The family whose class a model is written as, and the name of the form (``""``: the stock class)."""
        form = self._form(config, template)
        return ((self._host(form, config) or self).name, form.name) if form else (self.name, "")

    def _form(self, config: ModelConfig, template: dict[str, Any] | None) -> Form | None:
        """The form that a model is written in: what was asked for, else that which it had, else what it needs."""
        asked = {form.name: form for form in FORMS}.get(self.form)
        if self.form is None and template and form_of(template) is NEMOTRON_NAS and not self._form_unsaid(NEMOTRON_NAS, config):
            asked = NEMOTRON_NAS
        if asked is NEMOTRON_NAS:
            return asked
        return None if is_plain(config) or self.form == "plain" else PER_LAYER

    def _host(self, form: Form, config: ModelConfig) -> Family | None:
        """The family whose class a form's layers are of: this one, or one of its kin where that may be."""
        free = self.form is None or form is NEMOTRON_NAS
        alike = len(set(config.each("num_attention_heads")) - {0}) < 2
        for family in (self, *(map(FAMILIES.get, kin(config)) if free else ())):
            if family._class_says(commonest(config)) and (alike or not family.heads_divide_hidden):
                return family
        return None

    def _form_unsaid(self, form: Form, config: ModelConfig) -> str:
        """What of a model a form cannot say, in words; ``""`` if it can."""
        if why := form.unsaid(config):
            return why
        if self._host(form, config) is not None:
            return ""
        heads = ", ".join(map(str, sorted(set(config.each("num_attention_heads")) - {0})))
        return f"hidden_size {config.hidden_size} with {heads} attention heads, in layers that {self.architecture} makes"

    def _named(self, form: Form) -> str:
        """A form as ``--target-family`` says it."""
        return f"{self.name}-{form.name}" if form is PER_LAYER else form.name

    def _unsaid(self, config: ModelConfig) -> list[str]:
        """Fields that no ``config.json`` of this family can say."""
        by_layer = {name for entries in self.entries if entries.by_layer for name in entries.fields}
        if lost := [name for name in config.differing if name not in by_layer]:
            return [f"{name}, which differs by layer" for name in lost]
        try:
            read = self.model_config(self._fresh(config))
        except CheckpointError as error:  # a value that its keys never have
            return [str(error).partition("\n")[0]]
        return [item.name for item in fields(config) if getattr(read, item.name) != getattr(config, item.name)]

    def _divides(self, config: ModelConfig) -> bool:
        return not self.heads_divide_hidden or config.hidden_size % config.num_attention_heads == 0

    def others(self, config: ModelConfig) -> dict[str, Family]:
        """What else can describe a model of this architecture: as ``--target-family`` names it → the family in that form."""
        able_to_be = [FAMILIES.get(name) for name in kin(config)]
        if is_plain(config):
            return {family.name: replace(family, form="plain") for family in able_to_be if family._class_says(config)}
        as_form = [(PER_LAYER, replace(family, form=PER_LAYER.name)) for family in able_to_be]
        as_form.append((NEMOTRON_NAS, replace(self, form=NEMOTRON_NAS.name)))
        return {family._named(form): family for form, family in as_form if not family._form_unsaid(form, config)}

    def _fresh(self, config: ModelConfig) -> dict[str, Any]:
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name, **self.stated}
        hf.update({theirs: getattr(config, ours) for ours, theirs in FIELDS.items()})
        for entries in self.entries:
            hf.update(entries.write(config))
        return hf


_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DERIVED = ("num_key_value_heads", "head_dim")


def _check_padding(token: Any, vocab_size: int) -> None:
    """Refuse a padding token that no embedding has a row for: transformers then cannot build the model."""
    whole = isinstance(token, int) and not isinstance(token, bool)
    if token is not None and not (whole and -vocab_size <= token < vocab_size):
        raise CheckpointError(
            "config.json: pad_token_id",
            got=shorten(token),
            needed=f"an id below the vocab_size {vocab_size}, or null",
            do='write "pad_token_id": null in config.json: no weight depends on it',
        )


def form_of(hf: dict[str, Any]) -> Form | None:
    """The form in which ``config.json`` says layers that have sizes of their own; ``None``: it is one of a stock class."""
    return next((form for form in FORMS if form.said_in(hf)), None)


def _plain(template: dict[str, Any] | None) -> dict[str, Any] | None:
    """A ``config.json`` as that of a stock class."""
    form = form_of(template) if template else None
    return form.plain(template) if form else template


def family_of(hf: dict[str, Any]) -> Family:
    """The family that ``config.json`` names.

    Raises:
        CheckpointError: if it names none, or one that is not supported.
    """
    if len(forms := [form.name for form in FORMS if form.said_in(hf)]) > 1:
        do = "remove what the weights do not have"
        raise CheckpointError(
            "config.json says twice what single layers are", got=" and ".join(forms), needed="one of the two", do=do
        )
    model_type = _plain(hf).get("model_type") if NEMOTRON_NAS.said_in(hf) else hf.get("model_type")
    if model_type not in FAMILIES.names():
        raise CheckpointError(
            "config.json is of a family that is not supported", got=shorten(model_type), needed=", ".join(FAMILIES.names())
        )
    return FAMILIES.get(model_type)


def kin(config: ModelConfig) -> list[str]:
    """Families of a model's architecture (tensors, biases, norms), each of which it can be moved to, where that says its sizes."""
    return [name for name in FAMILIES.names() if FAMILIES.get(name).fits(config)]


def family_for(config: ModelConfig) -> Family:
    """The family that can hold ``config`` (the first by name of those all of whose models are most like it): for Megatron
    checkpoints that do not name theirs."""
    able = [family for family in map(FAMILIES.get, kin(config)) if family.says(config)]
    if not able:
        raise CheckpointError("no supported Hugging Face family has this architecture", got=config)
    return max(able, key=lambda family: len(family.traits))
