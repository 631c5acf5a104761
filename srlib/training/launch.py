"""Reinforcement in several processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from srlib import SrlibError
from srlib.cost.latency import PairSpeed, Speed
from srlib.data.rows import read_json, write_json
from srlib.engine.models import device_of
from srlib.params.loading import build
from srlib.params.paths import find
from srlib.params.run import Params
from srlib.training.grpo import run


def launch(p: Params, speed: PairSpeed, folder: Path) -> list[dict]:
    """`run` in `grpo.processes` processes; their screen is streamed to this one.

    Each process writes and trains on its part of every batch. On GPUs they start under
    `accelerate launch`, with the configuration `grpo.accelerate_config` (DeepSpeed, FSDP) if one
    is named; on a CPU under torchrun, which accelerate takes up in the same way.

    Raises:
        SrlibError: a process failed; what it said stands above.
    """
    job = folder / "job.json"
    write_json(job, {"params": p.model_dump(), "speed": asdict(speed), "folder": str(folder)})
    processes = p.grpo.processes
    environment = {**os.environ, "OMP_NUM_THREADS": str(p.threads or 1)}
    if device_of(p.small) == "cpu":  # accelerate's own launcher would ask for MPI there
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
        config = p.grpo.accelerate_config
        command.append(f"--config_file={find(config)}" if config else "--multi_gpu")
    command += ["-m", "srlib.training.launch", str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        try:
            # newline="": a progress bar's carriage returns are kept as they are
            for line in io.TextIOWrapper(process.stdout, newline="", errors="replace"):
                print(line, end="", flush=True)
        except BaseException:  # an interrupted cell leaves nothing running
            process.terminate()
            raise
    if process.returncode:
        raise SrlibError(f"grpo: the training in {processes} processes failed, with status {process.returncode}.")
    job.unlink()
    return read_json(folder / "log.json", list[dict[str, Any]])


def _work(job: Path) -> None:
    """What each process of `launch` does."""
    given = json.loads(job.read_text())
    p = build(given["params"], str(job), Params)
    if p.threads:
        torch.set_num_threads(p.threads)
    set_seed(p.seed)
    speed = PairSpeed(**{**given["speed"], **{side: Speed(**given["speed"][side]) for side in ("small", "big")}})
    PartialState()  # makes this process's GPU the current one, on which models are loaded
    run(p, speed, Path(given["folder"]))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
