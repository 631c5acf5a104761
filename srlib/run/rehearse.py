"""A rehearsal: every stage of a params file on this machine, with twins of its models that differ in size alone.

Lengths, batches, steps and numbers of problems are scaled down, and the structure is kept: the notebooks, the
engines, quantisation, processes (at most two), gradient checkpointing, streaming, overlap. What cannot be kept
here is listed. Nothing that a rehearsal computes means anything; that it ends does.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import yaml

from srlib import SrlibError, params
from srlib.data import benchmarks, problems
from srlib.data.rows import whole
from srlib.params import Params, Source, paths
from srlib.run import pipeline, twins

TOKENS = 320  # of the longest trace
PROMPT = 96  # tokens beside it, for a prompt and its hint
ROWS = 64  # traces, and problems
CACHE_GB = 0.25
# The most of each that a rehearsal has.
MOST: dict[str, Any] = {
    "arith.n_traces": ROWS, "arith.n_test": ROWS, "arith.batch_size": 8,
    "arith.small.train_steps": 20, "arith.big.train_steps": 20,
    "annotate.n_traces": ROWS, "annotate.n_compare": 16, "annotate.batch_size": 8, "annotate.tries": 2,
    "sft.epochs": 1, "sft.batch_size": 8, "sft.gradient_accumulation_steps": 2, "sft.processes": 2, "sft.n_watch": 8,
    "sft.n_validation": 8,
    "grpo.n_problems": 16, "grpo.max_steps": 2, "grpo.save_steps": 1, "grpo.eval_steps": 1,
    "grpo.n_validation": 4, "grpo.sample_every": 1, "grpo.processes": 2,
    "grpo.num_generations": 4, "grpo.gradient_accumulation_steps": 2, "grpo.rollouts_at_once": 8,
    "grpo.vllm_kv_cache_gb": CACHE_GB, "pair.small.kv_cache_gb": CACHE_GB, "pair.big.kv_cache_gb": CACHE_GB,
    "pair.tuned.kv_cache_gb": CACHE_GB,
    "offload.batch_size": 8, "offload.n_demo": 4,
    "evaluate.n_problems": 8, "evaluate.samples_per_problem": 2, "evaluate.n_refused": 4, "evaluate.n_tuned": 4,
    "latency.n_check": 2, "bench.repeats": 1, "bench.traces_per_slot": 1, "bench.min_traces": 4,
}  # fmt: skip
# The lengths that shrink with the longest trace, and the least each is worth.
LENGTHS = {
    "offload.max_tokens": 32, "offload.span_budget": 4, "offload.control_chunk": 1, "offload.stream_chunk": 1,
    "annotate.max_span_tokens": 4, "sft.max_length": 32, "evaluate.random_chunk": 1, "bench.max_tokens": 16,
    "latency.decode": 64, "latency.span": 4,
}  # fmt: skip
FIRST = ("evaluate.random_shares", "evaluate.rejections", "evaluate.chunks")  # lists of which one value will do


def run(p: Params, file: str | Path) -> int:
    """Rehearse `p`; returns the exit status, after a table of what was rehearsed.

    Args:
        file: the params file, whose comment says how a server is started.

    Raises:
        SrlibError: a model has no twin, the params do not stand being scaled down, or the problems are fewer than they ask for.
    """
    folder = p.run_dir.parent / f"rehearsal-{p.run}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _enough(p)
    noted: list[str] = []
    values = scaled(p, folder, noted)
    with _server(values, Path(file), folder, noted):
        q = params.build(values, "the rehearsal", Params)
        with whole(folder / "params.yaml") as written:
            yaml.safe_dump(q.model_dump(), written, sort_keys=False)
        rows, status = [], 0
        for stage in pipeline.choose(q):
            with _peak() as peak:
                began = time.perf_counter()
                status = pipeline.run(q, only=stage)
            rows.append((stage, "failed" if status else "went through", time.perf_counter() - began, peak[0]))
            if status:
                break
    print(f"\n{'stage':<16}{'':<14}{'seconds':>8}{'peak GiB':>10}")
    for stage, state, seconds, gib in rows:
        print(f"{stage:<16}{state:<14}{seconds:>8.0f}{gib:>10.1f}")
    print(f"\nnot as in {file}:", *(dict.fromkeys(noted) or ["nothing but sizes"]), sep="\n  ")
    return status


def scaled(p: Params, folder: Path, noted: list[str]) -> dict[str, Any]:
    """The values of `p` made small, with twins of its models and problems in `folder`; tells `noted` what is not kept."""
    values = p.model_dump()
    values |= {"run": f"rehearsal-{p.run}", "base": None, "hardware": {"gpus": 0}}
    specs = [spec for spec in (p.pair.small, p.pair.big, p.pair.tuned) if spec is not None]
    longest = max(p.offload.max_tokens, p.sft.max_length, *(spec.context or 0 for spec in specs))
    scale = max(1.0, longest / TOKENS)
    for key, most in MOST.items():
        _change(values, key, lambda value, most=most: min(value, most))
    for key, least in LENGTHS.items():
        _change(values, key, lambda value, least=least: max(least, int(value / scale)) if value else value)
    for key in FIRST:
        _change(values, key, lambda value: value[:1])
    grpo = values["grpo"]
    grpo["batch_size"] = grpo["num_generations"] * grpo["processes"] * grpo["gradient_accumulation_steps"]
    sft = values["sft"]
    sft["batch_size"] -= sft["batch_size"] % (sft["processes"] * sft["gradient_accumulation_steps"])
    values["bench"]["batch_sizes"] = [min(4, most) for most in p.bench.batch_sizes[:2]]
    context = PROMPT + values["offload"]["max_tokens"]
    values["sft"]["max_length"] = max(values["sft"]["max_length"], PROMPT)
    _machine(values, noted)
    known = _here(p.data.traces) or _here(p.data.test)
    _models(values, folder, max(context, values["sft"]["max_length"]), noted, known)
    _data(p, values, folder, scale, noted)
    return values


def _change(values: Mapping[str, Any], key: str, to: Any) -> None:
    """Change a setting, if its section is there and it has a value."""
    *sections, name = key.split(".")
    inner: Any = values
    for section in sections:
        inner = inner[section]
        if inner is None:
            return
    if inner[name] is not None:
        inner[name] = to(inner[name])


def _machine(values: dict[str, Any], noted: list[str]) -> None:
    """What needs more than this machine has."""
    here = find_spec("vllm") is not None
    for side, spec in _specs(values):
        if spec["tensor_parallel"] * spec["pipeline_parallel"] > 1 or spec["ray"]:
            noted.append(f"{side} is on one device, not on {spec['tensor_parallel'] * spec['pipeline_parallel']}")
            spec |= {"tensor_parallel": 1, "pipeline_parallel": 1, "ray": False}
        if spec["engine"] == "vllm" and here and not (spec["url"] or spec["eager"]):
            noted.append(f"{side} is not compiled, and replays no CUDA graphs")
        if spec["quantization"] in ("awq", "gptq", "fp8"):
            noted.append(f"{side} is not quantised ({spec['quantization']}): that needs weights of its own, or a GPU")
            spec["quantization"] = "none"
        if spec["engine"] == "vllm" and not here:
            noted.append(f"{side} runs on transformers: vLLM is not installed")
            spec |= {"engine": "transformers", "url": None, "kv_cache_gb": None}
        if spec["dtype"] == "float16" and side == "pair.small" and values["pair"]["tuned"] is None:
            noted.append(f"{side} is trained in float16 without scaling its losses: that needs a GPU")
        if spec["device"] not in ("auto", "cpu"):
            noted.append(f"{side} is on the CPU, not on {spec['device']}")
            spec["device"] = "auto"
    grpo = values["grpo"]
    if grpo["use_vllm"] and (not here or grpo["vllm_url"]):
        why = "no second server is started" if here else "vLLM is not installed"
        noted.append(f"the small model's part of the rollouts is written by transformers: {why}")
        grpo |= {"use_vllm": False, "vllm_url": None, "vllm_kv_cache_gb": None}
    if values["annotate"]["method"] == "judge" and values["annotate"]["judge"]["local"] is None:
        noted.append("annotate.method is gap: no judge is asked")
        values["annotate"]["method"] = "gap"


def _specs(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for side, spec in values["pair"].items():
        if spec is not None:
            yield f"pair.{side}", spec


def _here(source: Source | None) -> Path | None:
    """The file of a source, if it is on this machine."""
    file = source.file if source is not None else None
    return file if file is not None and file.is_file() else None


def _enough(p: Params) -> None:
    """As many problems as the params ask for, in what is here: a rehearsal draws fewer."""
    stages = pipeline.choose(p)
    if _here(p.data.traces) and "01_annotate" in stages:
        problems.traces(p, p.annotate.n_traces, worked=not p.annotate.tries)
    if _here(p.data.traces) and "03_grpo" in stages:
        problems.traces(p, p.grpo.n_problems + p.grpo.n_validation * bool(p.grpo.eval_steps))
    if _here(p.data.test):
        problems.load(p.test, benchmarks.protocol(p).n_problems)


def _models(values: dict[str, Any], folder: Path, context: int, noted: list[str], known: Path | None) -> None:
    """A twin in the place of each model, whose tokenizer knows some text; an adapter that is given is left out."""
    for side, spec in _specs(values):
        if spec["path"] is None:
            continue  # stage 00 makes it, and is rehearsed itself
        twin = folder / "twins" / re.sub(r"[^A-Za-z0-9.-]+", "-", spec["path"]).strip("-")
        if not twin.exists():
            twins.make(spec["path"], twin, context, noted.append, known, spec["revision"])
        if spec["adapter"]:
            noted.append(f"{side}.adapter is left out: it fits no twin")
        spec |= {"path": str(twin), "revision": None, "adapter": None, "context": spec["context"] and context}


def _data(p: Params, values: dict[str, Any], folder: Path, scale: float, noted: list[str]) -> None:
    """The rows of the files that are here, cut; else traces and problems made for it."""
    made: dict[str, Path] = {}
    for name, source in (("traces", p.data.traces), ("test", p.data.test)):
        if source is None:
            continue
        file = folder / f"{name}.jsonl"
        if here := _here(source):
            twins.cut(here, file, scale)
            set_, mark, _ = source.path.partition(":") if benchmarks.find(source) else ("", "", "")
            values["data"][name]["path"] = f"{set_}{mark}{file}"
            noted.append(f"data.{name}: long texts in it are cut, to their length / {scale:.3g}")
            continue
        noted.append(f"data.{name} is made here: {source.path} is no file on this machine")
        made = made or twins.problems(folder / "made", ROWS, p.seed)
        values["data"][name] = {"path": str(made[name])}


@contextmanager
def _server(values: dict[str, Any], file: Path, folder: Path, noted: list[str]) -> Iterator[None]:
    """The server that the params name, for the twin, with the flags that the file's comment gives."""
    asked = [spec for _, spec in _specs(values) if spec["url"]]
    if not asked:
        yield
        return
    spec = asked[0]
    found = paths.find(file)
    flags = _flags(found.read_text(encoding="utf-8")) if found else []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    small = {
        "--port": port,
        "--tensor-parallel-size": 1,
        "--max-model-len": spec["context"] or PROMPT + TOKENS,
        "--kv-cache-memory-bytes": int(CACHE_GB * 2**30),
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        spec["path"],
        "--block-size",
        "32",
    ]
    for flag, value in flags:
        command += [flag, *([str(small.get(flag, value))] if value else [])]
    spec["url"] = f"http://127.0.0.1:{port}"
    noted.append(f"the server is started here: vllm serve, with {' '.join(flag for flag, _ in flags)}")
    with (folder / "server.txt").open("w") as screen:
        server = subprocess.Popen(command, stdout=screen, stderr=subprocess.STDOUT)
    try:
        _wait_for(server, spec["url"], folder / "server.txt")
        yield
    finally:
        server.terminate()
        server.wait()


def _flags(text: str) -> list[tuple[str, str]]:
    """The flags of the `vllm serve` command in the comments of a params file, each with its value, or with none."""
    comment = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#")).replace("\\\n", " ")
    line = next((line for line in comment.splitlines() if "vllm serve" in line), "")
    words = shlex.split(line.partition("vllm serve")[2])[1:]
    pairs = zip(words, [*words[1:], "--"])
    return [(word, "" if value.startswith("--") else value) for word, value in pairs if word.startswith("--")]


def _wait_for(server: subprocess.Popen[bytes], url: str, screen: Path) -> None:
    import httpx

    until = time.monotonic() + 300
    while time.monotonic() < until and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SrlibError(f"The server of the rehearsal did not start; what it said stands in {paths.here(screen)}.")


@contextmanager
def _peak() -> Iterator[Sequence[float]]:
    """The most memory, in GiB, that this process and those it has started had at a time."""
    most, over = [0.0], Event()

    def watch() -> None:
        while not over.wait(0.2):
            now = 0
            for process in (me := psutil.Process(), *me.children(recursive=True)):
                try:
                    now += process.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            most[0] = max(most[0], now / 2**30)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()
