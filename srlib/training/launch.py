"""Training in one process or in several, each with a copy of the model and its part of every batch."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed

from srlib import SrlibError
from srlib.data.rows import read_json
from srlib.params.models import ModelSpec
from srlib.params.run import Params

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What shares a model's parts out among processes; each would save its own part of what is trained as if it were all.
SHARDING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def launch(run: Callable[..., list[dict]], processes: int, p: Params, folder: Path, *given: Any) -> list[dict]:
    """`run(p, folder, *given)` in so many processes: one is this one, several have their screen streamed to it.

    They start under torchrun, on the GPUs `cuda:0` and on or all on the CPU, and each trains as accelerate and TRL
    do: data parallel. Its port is a free one.

    Args:
        run: `sft.run` or `grpo.run`, which leaves its log in `folder/log.json`.

    Returns:
        the log.

    Raises:
        SrlibError: there are not so many GPUs, the environment asks for ZeRO or FSDP, or a process failed; what
            it said stands above.
    """
    for name in SHARDING:
        if parse_flag_from_env(name):
            raise SrlibError(
                f"{name} is {os.environ[name]}, but what is trained is saved from one process, which holds all of it: unset "
                f"{name}. Training is data parallel, and an adapter's gradients and moments are not worth sharing out."
            )
    if processes == 1:
        return run(p, folder, *given)
    from srlib.engine.models import device_of

    environment = {**os.environ, "OMP_NUM_THREADS": str(p.threads or 1)}
    if device_of(p.small) == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    elif (there := torch.cuda.device_count()) < processes:
        raise SrlibError(f"processes is {processes}, a GPU for each, but torch sees {there} here: set it to {there}.")
    with tempfile.TemporaryDirectory() as temporary:
        job = Path(temporary) / "job"
        job.write_bytes(pickle.dumps((run, p, folder, given)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
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
        raise SrlibError(f"The training in {processes} processes failed, with status {process.returncode}.")
    return read_json(folder / "log.json", list[dict[str, Any]])


def on_one_device(args: TrainingArguments, device: torch.device) -> None:
    """Have a trainer keep to `device`, where its model is. Alone in its process, it would take all GPUs there are."""
    state = args.distributed_state
    if state.num_processes == 1:
        args._n_gpu = min(1, args.n_gpu)
        args._setup_devices = state.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)


def placed(p: Params, device: torch.device) -> Params:
    """The params of a process whose GPU is `device`: what is loaded here is loaded there, as it cannot always be moved."""
    if device.type == "cpu":
        return p

    def here(spec: ModelSpec | None) -> ModelSpec | None:
        if spec is None or spec.url or spec.device == "cpu":
            return spec
        return spec.model_copy(update={"device": str(device)})

    pair = {"small": here(p.pair.small), "big": here(p.pair.big), "tuned": here(p.pair.tuned)}
    return p.model_copy(update={"pair": p.pair.model_copy(update=pair)})


def _work(job: Path) -> None:
    """What each process of `launch` does."""
    run, p, folder, given = pickle.loads(job.read_bytes())
    if p.threads:
        torch.set_num_threads(p.threads)
    set_seed(p.seed)
    # They wait for each other's rollouts, which take long. On GPUs, this one's becomes the current one.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=2))
    if not state.is_main_process:  # whose bars are enough
        from datasets import disable_progress_bars
        from transformers.utils import logging

        logging.disable_progress_bar()
        disable_progress_bars()
    run(placed(p, state.device), folder, *given)


if __name__ == "__main__":
    try:
        _work(Path(sys.argv[1]))
    except SrlibError as error:
        sys.exit(str(error))
