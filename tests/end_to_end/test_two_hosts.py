"""Two hosts train together, a process is lost, and torchrun's restarts bring the run to the end that it would have had.

Hosts are network namespaces with a cable between them where this machine allows that, else two agents on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import numpy
import pytest
import rank_jobs_recovery as jobs
import torch

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 24


@pytest.fixture
def hosts() -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """Of each of two hosts: what to put before a command, and its environment."""
    names = [f"mp{os.getpid()}{side}" for side in "ab"]
    try:
        made = _cable(names)
        if made:
            yield [
                (
                    ["ip", "netns", "exec", name],
                    {"MASTER_ADDR": "10.77.0.1", "LOCAL_ADDR": f"10.77.0.{side}", "GLOO_SOCKET_IFNAME": "wire"},
                )
                for side, name in enumerate(names, 1)
            ]
        else:
            yield [([], {"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1"})] * 2
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def _cable(names: list[str]) -> bool:
    if not shutil.which("ip"):
        return False
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add wire netns {names[0]} type veth peer name wire netns {names[1]}"]
    for side, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{side}/24 dev wire", f"-n {name} link set wire up", f"-n {name} link set lo up"]
    return all(subprocess.run(["ip", *command.split()], stderr=subprocess.DEVNULL).returncode == 0 for command in commands)


def _data(folder: Path) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=numpy.uint16)
    for seed in range(40):
        builder.add_item(torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(seed)))
        builder.end_document()
    builder.finalize(str(folder / "data.idx"))
    return folder / "data"


def _losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return {record["iteration"]: record["loss"] for record in records if "loss" in record}


PAUSE = """
import os, time

class Run:
    def log(self, values, step):
        if step == 9 and not os.path.exists(GONE):
            open(PAUSED, "w").close()
            while not os.path.exists(GONE):
                time.sleep(0.01)

    def finish(self):
        pass

init = lambda **settings: Run()
"""
"""A ``wandb`` that the first process logs to, and waits in, after nine steps, until another process is gone."""


@pytest.mark.slow
@pytest.mark.timeout(600)  # 16 processes are started, on whatever cores there are
def test_a_lost_process_on_one_of_two_hosts_costs_time_alone(tiny, tmp_path, hosts, ranks):
    start = tmp_path / "start"
    convert(ConvertOptions(load=str(tiny("llama", dtype="float32")), save=str(start), target_tensor_parallel_size=2), World())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {
        "LOAD_DIR": str(start),
        "DATA_PATH": str(_data(tmp_path)),
        "TRAIN_ITERS": str(ITERATIONS),
        "SEQ_LENGTH": "16",
        "GLOBAL_BATCH_SIZE": "4",
        "LR": "1e-3",
        "DTYPE": "fp32",
        "TP": "2",
        "PYTHON": sys.executable,
    }
    paused, gone, hook = tmp_path / "paused", tmp_path / "gone", tmp_path / "hook"
    hook.mkdir()
    (hook / "wandb.py").write_text(f"PAUSED, GONE = {str(paused)!r}, {str(gone)!r}\n{PAUSE}")
    settings["PYTHONPATH"] = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    further = "--split 80,20,0 --save-interval 4 --eval-interval 50 --eval-iters 1 --log-interval 1 --wandb-project none".split()

    def start_host(number: int, run: Path, **changes: str) -> subprocess.Popen:
        before, own = hosts[number]
        environment = {**os.environ, **settings, **own, "SAVE_DIR": str(run), "NNODES": "2", "NODE_RANK": str(number), **changes}
        log = open(tmp_path / f"{run.name}-{number}.log", "w")
        command = [*before, "bash", str(ROOT / "scripts/recover.sh"), *further]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    lost = tmp_path / "lost"
    agents = [start_host(number, lost, MASTER_PORT=port, MAX_RESTARTS="2") for number in (0, 1)]
    try:
        while not paused.exists():
            assert all(agent.poll() is None for agent in agents), _logs(tmp_path)
            time.sleep(0.02)
        os.kill(_worker_of(agents[1].pid), signal.SIGKILL)
        gone.touch()
        assert [agent.wait() for agent in agents] == [0, 0], _logs(tmp_path)
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)

    same = {"load": str(start), "save": str(tmp_path / "whole"), "data_path": (settings["DATA_PATH"],), "split": "80,20,0"}
    same |= {"train_iters": ITERATIONS, "seq_length": 16, "global_batch_size": 4, "lr": 1e-3, "save_interval": 4}
    assert ranks(2).run(jobs.recover, {**same, "eval_interval": 50, "eval_iters": 1, "log_interval": 1}) == [0, 0]
    assert "going on after iteration" in (tmp_path / "lost-0.log").read_text() + (tmp_path / "lost-1.log").read_text()
    assert _losses(lost) == _losses(tmp_path / "whole")  # bit for bit
    assert len(_losses(lost)) == ITERATIONS


def _worker_of(agent: int) -> int:
    """A training process below ``agent``: it has a rank in its environment."""
    waiting = [agent]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{parent}/environ").read_bytes():
                return parent
        for task in Path(f"/proc/{parent}/task").iterdir():
            waiting += [int(child) for child in (task / "children").read_text().split()]
    raise AssertionError("the agent has no worker")


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
