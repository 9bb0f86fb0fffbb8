"""What ``import megatron_prune`` gives, for type checkers: its names come to be when they are first used."""

from megatron_prune.api import apply as apply
from megatron_prune.api import convert as convert
from megatron_prune.api import evaluate as evaluate
from megatron_prune.api import export as export
from megatron_prune.api import metric as metric
from megatron_prune.api import plan as plan
from megatron_prune.api import prune as prune
from megatron_prune.api import recover as recover
from megatron_prune.api import score as score
from megatron_prune.api import trim_vocabulary as trim_vocabulary
from megatron_prune.errors import InputError as InputError
from megatron_prune.importance.metric import Metric as Metric
from megatron_prune.planning.plan import Plan as Plan

__version__: str
