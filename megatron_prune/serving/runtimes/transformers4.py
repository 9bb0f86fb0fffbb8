"""transformers 4.57: what ``checkpoint/both_versions.py`` writes says the same to it."""

from megatron_prune.serving.runtime import RUNTIMES, Runtime
from megatron_prune.serving.runtimes.transformers5 import NO_CLASS

RUNTIMES.register("transformers4")(Runtime(title="transformers 4.57", rules=(NO_CLASS,)))
