"""torchrun that does not try bad input again: ``--max-restarts`` is for lost processes, and a verb's exit code 2 ends the job.

python scripts/torchrun.py [torchrun's own arguments] PROGRAM …    used by launch.sh where MAX_RESTARTS is set. Exit code 2 where
a process of this machine ended with it, else torchrun's own.
"""

from __future__ import annotations

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

BAD_INPUT = 2


class Agent(api.LocalElasticAgent):
    """The one that torchrun runs; it has no restarts left once a process says that its input is bad."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED and any(failed.exitcode == BAD_INPUT for failed in result.failures.values()):
            self._remaining_restarts = 0
        return result


if __name__ == "__main__":
    api.LocalElasticAgent = Agent
    try:
        run.main()
    except ChildFailedError as error:  # torchrun has printed its report
        raise SystemExit(BAD_INPUT if any(failed.exitcode == BAD_INPUT for failed in error.failures.values()) else 1) from None
