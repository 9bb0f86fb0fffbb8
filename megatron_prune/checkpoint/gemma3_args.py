"""What the stored arguments of Gemma 3 say otherwise than those of other models, in both directions.

The names and values are Megatron-Bridge's (``gemma3_provider.py``). Its layer spec is the one argument that says the norms
after the blocks and the scaled embedding; without it none of this is read, and each of these values is refused.
"""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.files.pickled import Inert

SPEC = "megatron.bridge.models.gemma.gemma3_provider.gemma3_layer_spec"
_TRAITS = {"after_norms": True, "scaled_embedding": True, "zero_centered_norms": True, "activation": "gelu_tanh"}
_OFF = (False, None)

FIXED: dict[str, tuple[Any, ...]] = {
    "transformer_layer_spec": (SPEC,),
    "swiglu": _OFF,
    "activation_func": ("megatron.core.activations.fast_gelu", "fast_gelu", "gelu_pytorch_tanh"),
    "apply_layernorm_1p": (True,),
    "layernorm_zero_centered_gamma": (True,),
    "is_vision_language": _OFF,
    "use_rope_scaling": _OFF,
    "rope_scaling": _OFF,
    "seq_len_interpolation_factor": (None, 1.0),
    "rotary_seq_len_interpolation_factor": (None, 1.0),
}
"""Argument → its values in this family, before those of ``known_args.py``."""

UNDERSTOOD = frozenset(("softmax_scale", "interleaved_attn_pattern", "window_attn_skip_freq", "spec"))
"""What is read here beside what all models say."""


def is_gemma3(stored: dict[str, Any]) -> bool:
    """Whether arguments are of Gemma 3's layers."""
    spec, words = stored.get("transformer_layer_spec"), stored.get("spec")
    named = spec.kind == SPEC and spec.arguments is None if isinstance(spec, Inert) else spec == SPEC
    return named or (isinstance(words, (list, tuple)) and list(words) == list(SPEC.rsplit(".", 1)))


def write(config: ModelConfig) -> dict[str, Any]:
    """Arguments that say what others do not; none of a model that is not made so."""
    if any(getattr(config, name) != value for name, value in _TRAITS.items()):
        return {}
    layers = range(config.num_layers)
    windows = [config.of_layer(layer).sliding_window for layer in layers]
    local = [layer for layer in layers if windows[layer] is not None]
    world = [layer for layer in layers if windows[layer] is None]
    scaling = next((found for layer in world if (found := config.of_layer(layer).rope_scaling)), None)
    found: dict[str, Any] = {
        "spec": SPEC.rsplit(".", 1),
        "swiglu": False,
        "gated_linear_unit": True,
        "activation_func": "fast_gelu",
        "apply_layernorm_1p": True,
        "layernorm_zero_centered_gamma": True,
        "softmax_scale": config.kv_channels**-0.5 if config.softmax_scale is None else config.softmax_scale,
        "rotary_base": [config.of_layers(some or layers).first_rotary_base for some in (local, world)],
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": bool(scaling and scaling.kind == "llama3"),
        "rope_scaling_factor": scaling.factor if scaling and scaling.kind == "linear" else 1.0,
        "window_size": (windows[local[0]] - 1, 0) if local else None,
    }
    if local and world:
        found["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return found


def read(stored: dict[str, Any], layers: int) -> tuple[dict[str, Any], list[str]]:
    """Fields of :class:`ModelConfig`, and what is wrong with the arguments in words.

    Args:
        layers: how many the model has.
    """
    found: dict[str, Any] = {**_TRAITS, "qk_norm": True}
    try:
        bases, local = _bases(stored.get("rotary_base")), _local(stored, layers)
        window, factor = (
            _window(stored.get("window_size")),
            _positive(stored.get("rope_scaling_factor", 1.0), "rope_scaling_factor"),
        )
        scale = stored.get("softmax_scale")
        if scale is not None:
            found["softmax_scale"] = _scale(_positive(scale, "softmax_scale"))
    except ValueError as error:
        return found, [str(error)]
    scaling = None if factor == 1.0 else RopeScaling(kind="linear", factor=factor)
    if window is None:
        local = [False] * layers
    found["sliding_window"] = tuple(window if here else None for here in local)
    found["rotary_base"] = tuple(bases[0 if here else 1] for here in local)
    found["rope_scaling"] = tuple(None if here else scaling for here in local)
    return found, []


def _positive(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise ValueError(f"{name} = {value!r:.80}, needed a positive number")
    return float(value)


def _bases(value: Any) -> tuple[float, float]:
    """Of local layers, and of global ones."""
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"rotary_base = {value!r:.80}, needed a pair: of local layers, of global ones")
    return tuple(_positive(base, "rotary_base") for base in pair)


def _window(value: Any) -> int | None:
    """Tokens that a local layer sees: a number says them, a pair how many before the current one."""
    if value is None:
        return None
    if type(value) is int and 0 < value < 1 << 31:
        return value
    if (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and type(value[0]) is int
        and 0 <= value[0] < 1 << 31
        and value[1] == 0
    ):
        return value[0] + 1
    raise ValueError(f"window_size = {value!r:.80}, needed how many tokens a local layer sees")


def _local(stored: dict[str, Any], layers: int) -> list[bool]:
    """Which layers see a window."""
    pattern, skipped = stored.get("interleaved_attn_pattern"), stored.get("window_attn_skip_freq")
    if pattern is None and skipped is None:
        return [True] * layers
    name, said = ("interleaved_attn_pattern", pattern) if pattern is not None else ("window_attn_skip_freq", skipped)
    said = list(said) if isinstance(said, (list, tuple)) else said
    if pattern is None and type(said) is int and said > 0:
        return [(layer + 1) % said != 0 for layer in range(layers)]
    if isinstance(said, list):
        if pattern is None and len(said) == layers and all(one in (0, 1) for one in said):
            return [bool(one) for one in said]
        if pattern is not None and len(said) == layers and all(one in ("sliding_attention", "full_attention") for one in said):
            return [one == "sliding_attention" for one in said]
        if pattern is not None and len(said) == 2 and all(type(one) is int and one >= 0 for one in said) and sum(said) > 0:
            return [layer % sum(said) < said[0] for layer in range(layers)]
    raise ValueError(f"{name} = {said!r:.80}, needed which of the {layers} layers see a window")


def _scale(scale: float) -> float:
    """1 / √n to the last digit, n the whole number that ``config.json`` says.

    Raises:
        ValueError: if it is that of none.
    """
    if not 1e-6 <= scale <= 1.0:
        raise ValueError(f"softmax_scale = {scale:g}, needed 1 / √query_pre_attn_scalar, from 1e-06 to 1")
    return round(scale**-2) ** -0.5
