"""transformers 5: everything that is written for it was compared with its logits; only one form has no class there."""

from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.serving.runtime import REFUSED, RUNTIMES, Rule, Runtime

NO_CLASS = Rule(of=(NEMOTRON_NAS.name,), what="all models", then=REFUSED, found=lambda layer: "a class that it does not have")

RUNTIMES.register("transformers")(Runtime(title="transformers 5", rules=(NO_CLASS,)))
