"""Configuration of ``nemotron-nas`` models: what every block of every layer is, as attributes.

Runtimes that have the model's code (vLLM, SGLang, TensorRT-LLM) take the class of its configuration from here and read
``config.block_configs[3].attention.no_op``.
"""

from transformers import MistralConfig


class Attributes(dict):
    """A JSON object whose entries are attributes too; what is not there is no attribute."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def readable(value):
    """JSON, its objects with attributes."""
    if isinstance(value, dict):
        return Attributes({name: readable(entry) for name, entry in value.items()})
    return [readable(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class DeciLMConfig(MistralConfig):
    """Mistral's keys (Llama's, where heads need not divide the width of the stream) without a window, and ``block_configs``:
    for each layer ``attention`` and ``ffn``.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**{"sliding_window": None, **kwargs})
        self.block_configs = readable(block_configs)
