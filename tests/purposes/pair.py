"""The section `pair`: each setting of a model, for each of the three."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from srlib import Offloader, SrlibError, engine
from srlib.data import arith
from srlib.data.prompts import encode_prompt
from srlib.decoding.policies import Never
from srlib.engine import Request, models, process
from srlib.engine.vllm.arguments import arguments
from srlib.engine.vllm.engine import VllmEngine
from srlib.engine.vllm.local import Local
from srlib.params import ModelSpec
from tests.conftest import random_model
from tests.purposes import Case, shows
from tests.test_vllm import StandIn, free_port

IDS = [[5, 6, 7, 8, 9]]


def keys(setting: str) -> list[str]:
    return [f"pair.{side}.{setting}" for side in ("small", "big", "tuned")]


def spec(case: Case, value: Any, **others: Any) -> ModelSpec:
    """The model of the case as a run has it, with its setting at `value`."""
    _, side, setting = case.key.split(".")
    settings = {"path": case.fixture("folders")[side == "big"], **others, setting: value}
    changes = {f"pair.{side}.{name}": given for name, given in settings.items()}
    if side == "small":  # nothing is trained on it
        changes["pair.tuned.path"] = settings["path"]
    return getattr(case.params(changes), side)


def adapter(case: Case) -> str:
    """A LoRA adapter for either model."""
    from peft import LoraConfig, get_peft_model

    tokenizer = case.fixture("tokenizer")
    folder = case.folder / "adapter"
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(random_model(len(tokenizer), 1), config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def stand_in(cpu: bool = False) -> Iterator[None]:
    """In the place of vLLM: an engine that keeps its arguments, which `vllm_args` gives."""

    class AsyncLLM(SimpleNamespace):
        @classmethod
        def from_engine_args(cls, args: SimpleNamespace) -> "AsyncLLM":
            length = getattr(args, "max_model_len", 256)
            return cls(args=args, model_config=SimpleNamespace(max_model_len=length), shutdown=lambda: None)

    names = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: cpu)},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": SimpleNamespace},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, held in names.items():
            module = ModuleType(name)
            vars(module).update(held)
            patch.setitem(sys.modules, name, module)
        yield


def vllm_args(spec: ModelSpec, cpu: bool = False) -> Any:
    """What vLLM's engine is made with."""
    with stand_in(cpu):
        made = engine.load(spec, 4)
        assert isinstance(made, VllmEngine) and isinstance(made._model, Local)
        args = made._model.llm.args
        made.shutdown()
    return args


@shows(*keys("path"))
def the_model_in_a_folder(case: Case) -> None:
    pair, side = case.fixture("pair"), case.key.split(".")[1] == "big"
    folder = case.fixture("folders")[side]
    asked = spec(case, folder)
    assert asked.path == folder
    given = engine.load(asked).model.model.embed_tokens.weight
    assert torch.equal(given, pair[side].model.embed_tokens.weight)


@shows(*keys("revision"))
def the_revision_of_a_model_on_the_hub(case: Case) -> None:
    asked: list[Any] = []

    def loaded(path: str, **how: Any) -> Any:
        asked.append((path, how.get("revision")))
        raise ImportError("far enough")

    pinned = spec(case, "v2", path="some/model")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
            patch.setattr(getattr(models, kind), "from_pretrained", loaded)
        for load in (models.load_model, models.load_tokenizer):
            with pytest.raises((ImportError, SrlibError), match="far enough"):
                load(pinned)
        patch.setattr("transformers.AutoConfig.from_pretrained", lambda path, **how: SimpleNamespace(**how))
        given = arguments(pinned, "some/model", 1, lora=None, cpu=False)
    assert asked == [("some/model", "v2")] * 2 and given["revision"] == "v2"


@shows(*keys("adapter"))
def weights_laid_on_top(case: Case) -> None:
    asked = spec(case, adapter(case))
    made = engine.load(asked).score(IDS)[0]
    assert made != pytest.approx(engine.load(asked.path).score(IDS)[0], abs=1e-3)


@shows(*keys("merge"))
def an_adapter_beside_the_weights(case: Case) -> None:
    folded = spec(case, True, adapter=adapter(case))
    beside = spec(case, False, adapter=folded.adapter)
    layers = ["lora_A" in dict(layer.named_children()) for layer in engine.load(folded).model.modules()]
    assert not any(layers)
    assert any("lora_A" in dict(layer.named_children()) for layer in engine.load(beside).model.modules())
    assert engine.load(folded).score(IDS)[0] == pytest.approx(engine.load(beside).score(IDS)[0], abs=1e-4)


@shows(*keys("engine"))
def what_a_model_runs_on(case: Case) -> None:
    asked = spec(case, "vllm")
    assert asked.engine == "vllm"
    assert vllm_args(asked).model == asked.path


@shows(*keys("url"))
def a_server_is_asked(case: Case) -> None:
    server = StandIn(port := free_port())
    try:
        with stand_in():
            made = engine.load(spec(case, f"http://127.0.0.1:{port}", engine="vllm"), 2)
        assert not isinstance(made._model, Local)
        made.run(Request(made.open([5, 6]), max_new=2))
        assert [body["prompt"] for body in server.asked] == [[5, 6]]
        made.shutdown()
    finally:
        server.stop()


@shows(*keys("process"))
def a_process_of_its_own(case: Case) -> None:
    class Started(Exception):
        pass

    def started(command: list[str], **how: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "srlib.engine.process"]
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.subprocess, "Popen", started)
        with pytest.raises(Started):
            engine.load(spec(case, True))


@shows(*keys("device"))
def where_the_weights_go(case: Case) -> None:
    asked: dict[str, Any] = {}

    def loaded(path: str, **how: Any) -> None:
        asked.update(how)
        raise ImportError("far enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.torch.cuda, "is_available", lambda: True)
        patch.setattr(models.torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        patch.setattr(models.AutoModelForCausalLM, "from_pretrained", loaded)
        for device in ("cuda:1", "cpu"):
            with pytest.raises(ImportError, match="far enough"):
                engine.load(spec(case, device))
            assert asked["device_map"] == {"": device}
    for parallel, ids in ((1, [1]), (2, [1, 2])):
        assert vllm_args(spec(case, "cuda:1", engine="vllm", tensor_parallel=parallel)).device_ids == ids


@shows(*keys("dtype"))
def numbers_of_the_weights(case: Case) -> None:
    made = engine.load(spec(case, "bfloat16"))
    assert {weight.dtype for weight in made.model.parameters()} == {torch.bfloat16}
    assert vllm_args(spec(case, "float16", engine="vllm")).dtype == "float16"


@shows(*keys("quantization"))
def numbers_of_few_bits(case: Case) -> None:
    for quantization, layer, dtype in (("nf4", "Linear4bit", torch.uint8), ("int8", "Linear8bitLt", torch.int8)):
        made = engine.load(spec(case, quantization))
        assert {m.weight.dtype for m in made.model.modules() if type(m).__name__ == layer} == {dtype}
        assert made.score(IDS)[0] != pytest.approx(engine.load(made.model.name_or_path).score(IDS)[0], abs=1e-4)
    assert vllm_args(spec(case, "fp8", engine="vllm")).quantization == "fp8"


@shows(*keys("context"))
def room_for_a_sequence(case: Case) -> None:
    made, prompt = engine.load(spec(case, 24)), case.fixture("prompts")[0][:20]
    (trace,) = Offloader(made, None, Never(), max_tokens=200, temperature=5.0).run([prompt])
    assert made.context == 24 and len(trace.prompt_ids) + len(trace.ids) <= 24, made.context
    assert vllm_args(spec(case, 24, engine="vllm")).max_model_len == 25  # and one for its answer


@shows(*keys("kv_cache_gb"))
def bytes_of_the_cache(case: Case) -> None:
    assert getattr(vllm_args(spec(case, 0.5, engine="vllm")), "kv_cache_memory_bytes", None) == 2**29


@shows(*keys("tensor_parallel"))
def devices_that_share_layers(case: Case) -> None:
    assert vllm_args(spec(case, 2, engine="vllm")).tensor_parallel_size == 2


@shows(*keys("pipeline_parallel"))
def devices_that_share_the_layers_out(case: Case) -> None:
    assert vllm_args(spec(case, 2, engine="vllm")).pipeline_parallel_size == 2


@shows(*keys("ray"))
def several_machines(case: Case) -> None:
    assert vllm_args(spec(case, True, engine="vllm")).distributed_executor_backend == "ray"


@shows(*keys("eager"))
def models_that_are_not_compiled(case: Case) -> None:
    for cpu, eager in ((True, True), (False, case.params({}).pair.small.eager), (False, True)):
        asked = spec(case, eager, engine="vllm")
        assert vllm_args(asked, cpu).enforce_eager == (cpu or eager), (
            "a GPU replays CUDA graphs, unless it is told not to"
        )


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if quick is defined %}<{{ quick }}>{% endif %}"
)


def asked(case: Case, value: Any) -> str:
    """A problem as the engine of a model with a chat template asks it."""
    tokenizer, folder = arith.tokenizer(), case.folder / "model"
    tokenizer.chat_template = TEMPLATE
    random_model(len(tokenizer), 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = spec(case, value, path=str(folder)).model_copy(update={"adapter": None})
    return engine.load(made).tokenizer.decode(encode_prompt(models.load_tokenizer(made), "3+4?"))


@shows(*keys("template"))
def arguments_of_the_template(case: Case) -> None:
    assert asked(case, {"quick": True}) == "[user]3+4?<True>"


@shows(*keys("system"))
def a_system_turn(case: Case) -> None:
    assert asked(case, 'Say "7".') == '[system]Say "7".[user]3+4?'
