import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from srlib import SrlibError, engine
from srlib.cost.latency import pair_speed
from srlib.data import arith, spans
from srlib.data.rows import Annotated, Problem, write_jsonl
from srlib.data.spans import Span
from srlib.decoding import policies, scheduler
from srlib.engine.adapters import add_tags
from srlib.engine.models import load_model
from srlib.params import ModelSpec, Params, Sft, load
from srlib.show import claims, figures
from srlib.training import grpo, sft
from tests.cells import run_cells
from tests.conftest import small_on_disk

losses = figures.losses


def annotated(n):
    """Traces whose marked span is always the digit behind the first `=`."""
    trace = "<think>2*3=6;6+1=7;</think>\\boxed{7}"
    at = trace.index("=") + 1
    return [
        Annotated(
            id=str(i), prompt="2*3+1?", answer="7", trace=trace, spans=[Span(at, at + 1)], share=0.04, annotator="x"
        )
        for i in range(n)
    ]


def numbered(n):
    """`annotated`, with a prompt of its own for each."""
    return [row.model_copy(update={"prompt": f"{i}*{i}+1?", "id": str(i)}) for i, row in enumerate(annotated(n))]


@pytest.fixture
def saved(tmp_path):
    """A tiny small model on disk, with tied embeddings as in the arithmetic world, or without."""

    def save(tied):
        return ModelSpec(path=small_on_disk(tmp_path / "small", tied))

    return save


def test_loss_is_on_the_completion_alone(tokenizer):
    row = annotated(1)[0]
    example = sft.example(tokenizer, row)
    hinted = sft.example(tokenizer, row, "=?")
    prompt = tokenizer.encode(row.prompt)
    assert hinted["input_ids"] == prompt + tokenizer.encode("=?") + example["input_ids"][len(prompt) :]
    prompt = len(tokenizer.encode(row.prompt))
    assert example["labels"][:prompt] == [-100] * prompt
    assert example["labels"][prompt:] == example["input_ids"][prompt:]
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example["input_ids"][prompt:-1]) == row.tagged


@pytest.mark.parametrize("tied", [True, False])
def test_tags_are_learnt_with_the_adapter(saved, tmp_path, tied):
    spec = saved(tied)
    config = Sft(epochs=40, batch_size=8, learning_rate=2e-2, lora_rank=8)
    log = sft.train(spec, annotated(16), config, 0, tmp_path)
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
        size = sum(weights.get_tensor(name).numel() for name in names)
    assert sum("trainable_tokens" in name or "token_adapter" in name for name in names) == (1 if tied else 2)
    assert size < 40_000  # two rows of the embeddings, not all of them

    # loaded again, merged, it writes what it was taught, tags and all
    tuned = engine.load(spec.model_copy(update={"adapter": str(tmp_path / "adapter")}))
    (trace,) = scheduler.Offloader(tuned, None, policies.Never(), max_tokens=40).run(["2*3+1?"])
    assert tuned.tokenizer.decode(trace.ids) == annotated(1)[0].tagged + "<|endoftext|>"
    assert spans.parse(trace.ids, trace.tags) == [(5, 6)]
    assert trace.finish == "eos" and not trace.malformed


@pytest.mark.parametrize("tied", [True, False])
def test_tags_begin_as_words(saved, tmp_path, tied):
    """At both ends, as the mean of the pieces; those that a model has learnt already stay as they are."""
    spec, words = saved(tied), ["2*3", "=;"]
    config = Sft(epochs=1, batch_size=8, learning_rate=1e-12, tag_init=words)
    sft.train(spec, annotated(8), config, 0, tmp_path / "first")
    tuned = spec.model_copy(update={"adapter": str(tmp_path / "first" / "adapter")})
    (tmp_path / "again").mkdir()
    sft.train(tuned, annotated(8), config.model_copy(update={"tag_init": ["7", "7"]}), 0, tmp_path / "again")
    model, tokenizer = load_model(spec)
    for folder in ("first", "again"):
        found = load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")
        rows = {name: row for name, row in found.items() if "token" in name}
        ends = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
        assert len(rows) == (1 if tied else 2)
        for name, row in rows.items():
            (end,) = (end.weight for part, end in ends.items() if part in name)
            means = torch.stack([end[tokenizer.encode(text)].mean(0) for text in words])
            torch.testing.assert_close(row, means, rtol=0, atol=1e-6)


def test_words_that_no_tag_can_begin_as(saved, tmp_path):
    with pytest.raises(ValueError, match="tag_init needs tags: token"):
        Sft(tags="plain", tag_init=["a", "b"])
    with pytest.raises(ValueError, match="at least 2"):
        Sft(tag_init=["a"])
    spec = saved(True)
    for words, known in ((["frag ü", "="], "frag "), (["=", ""], "")):
        with pytest.raises(SrlibError, match=f"of which the tokenizer of {spec.path} can only write '{known}'"):
            sft.train(spec, annotated(8), Sft(tag_init=words), 0, tmp_path)


def test_the_base_model_is_left_alone(saved, tmp_path):
    spec = saved(True)
    before = (tmp_path / "small" / "model.safetensors").read_bytes()
    sft.train(spec, annotated(8), Sft(epochs=1, batch_size=8), 0, tmp_path)
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == before


def test_plain_tags(saved, tmp_path):
    spec = saved(True)
    config = Sft(tags="plain", epochs=60, batch_size=8, learning_rate=2e-2, lora_rank=8)
    sft.train(spec, annotated(16), config, 0, tmp_path)
    tuned = engine.load(spec.model_copy(update={"adapter": str(tmp_path / "adapter")}))
    assert len(tuned.tokenizer) == len(arith.tokenizer())
    before, after = (each.model.get_input_embeddings().weight for each in (engine.load(spec), tuned))
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert sorted(tuned.tokenizer.decode([i]) for i in moved) == sorted(set("<bigmodel></bigmodel>"))
    big = engine.load(spec)
    (trace,) = scheduler.Offloader(tuned, big, policies.Learned(), max_tokens=60, span_budget=2).run(["2*3+1?"])
    assert "<bigmodel>" in tuned.tokenizer.decode(trace.ids)
    assert trace.big_tokens >= 1


def test_same_seed_same_adapter(saved, tmp_path):
    spec = saved(True)
    adapters = []
    for other, name in enumerate("ab"):
        torch.manual_seed(other)  # whatever was drawn before
        sft.train(spec, annotated(16), Sft(epochs=2, batch_size=4), 5, tmp_path / name)
        adapters.append({f.name: f.read_bytes() for f in (tmp_path / name / "adapter").iterdir()})
    assert adapters[0] == adapters[1]
    modules = json.loads(adapters[0]["adapter_config.json"])["target_modules"]
    assert modules == sorted(modules)  # not in the order of a set, which changes from process to process
    assert not (tmp_path / "a" / "trainer").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_training_is_taken_up(saved, tmp_path, monkeypatch, method):
    """Killed before its first checkpoint, within an epoch, and before its result was written: it ends the same, to the bit."""
    spec, rows = saved(True), numbered(16)
    # 104 steps, the last within an epoch, of which every second is logged; what is dropped is drawn anew at each step
    config = Sft(method=method, epochs=34.5, batch_size=4, n_validation=4, save_steps=15, lora={"lora_dropout": 0.2})
    made = "adapter" if method == "lora" else "model"
    seen, step = [], sft._Trainer.training_step

    class Killed(BaseException):
        pass

    def train(folder, killed_at):
        def stepping(self, *arguments):
            seen.append(self.state.global_step)
            if self.state.global_step == killed_at:
                raise Killed
            return step(self, *arguments)

        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sft._Trainer, "training_step", stepping)
            if killed_at == 104:
                patch.setattr(sft, "save", stop)
            return sft.train(spec, rows, config, 5, tmp_path / folder)

    def stop(*arguments):
        raise Killed

    def left(folder):
        return {f.name: f.read_bytes() for f in (tmp_path / folder / made).iterdir()}

    def counted(log):
        return [{**record, "num_tokens": 0} for record in log]  # which TRL counts from where it is taken up

    log = train("whole", None)
    assert len([record for record in log if "loss" in record]) == 52
    for killed_at, again_at in ((9, 0), (43, 32), (104, None)):
        name = str(killed_at)
        with pytest.raises(Killed):
            train(name, killed_at)
        assert not (tmp_path / name / made).exists()
        broken = tmp_path / name / "trainer" / "checkpoint-1000"  # which it was writing
        broken.mkdir(parents=True)
        assert counted(train(name, None)) == counted(log)
        assert next(iter(seen), None) == again_at, "it goes on at the last checkpoint"
        assert left(name) == left("whole")
        assert sorted(f.name for f in (tmp_path / name).iterdir()) == sorted([made, "log.json"])


def of_many_lengths(n):
    """`annotated`, each with a prompt that is two tokens longer than the last one's."""
    return [row.model_copy(update={"prompt": "3+" * i + "1?", "id": str(i)}) for i, row in enumerate(annotated(n))]


@pytest.fixture
def batches(monkeypatch):
    """What the trainer is given, a batch a part of a step."""
    seen, step = [], sft._Trainer.training_step

    def stepping(self, model, inputs, *arguments):
        seen.append({name: each.clone() for name, each in inputs.items() if isinstance(each, torch.Tensor)})
        return step(self, model, inputs, *arguments)

    monkeypatch.setattr(sft._Trainer, "training_step", stepping)
    return seen


def test_packed_traces_are_trained_on_once_and_do_not_see_each_other(saved, tokenizer, tmp_path, batches):
    """Every completion token has its label, each trace its own positions, and the loss is that of traces by themselves."""
    spec, rows = saved(True), of_many_lengths(20)
    config = Sft(epochs=1, batch_size=32, max_length=120, learning_rate=1e-12, n_validation=4, group_by_length=True)
    (plain, held) = sft.train(spec, rows, config, 0, tmp_path / "plain")
    (padded,) = batches
    batches.clear()
    (log, held_out) = sft.train(spec, rows, config.model_copy(update={"packing": True}), 0, tmp_path / "packed")
    (packed,) = batches
    assert packed["input_ids"].numel() < 0.8 * padded["input_ids"].numel()
    starts = [*(packed["position_ids"][0] == 0).nonzero().flatten().tolist(), None]
    found = [
        [packed[name][0, start:end].tolist() for name in ("input_ids", "labels")]
        for start, end in zip(starts, starts[1:])
    ]
    add_tags(tokenizer := load_model(spec)[1])
    taught, _ = sft.split([sft.example(tokenizer, row) for row in rows], 4, 0)
    assert sorted(found) == sorted([each["input_ids"], each["labels"]] for each in taught)
    assert log["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert held_out["eval_loss"] == pytest.approx(held["eval_loss"], abs=1e-5)


def test_an_attention_that_may_not_know_of_packing_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen2ForCausalLM, "_supports_attention_backend", False)
    with pytest.raises(SrlibError, match="sft.packing is true, but .*small has an attention of its own"):
        sft.train(saved(True), annotated(4), Sft(packing=True), 0, tmp_path)


def test_the_schedule_counts_packed_rows(saved, tmp_path, batches):
    config = Sft(epochs=4, batch_size=2, max_length=120, packing=True, warmup_ratio=0.5)
    log = sft.train(saved(True), of_many_lengths(12), config, 0, tmp_path)
    assert log[-1]["step"] == len(batches) < 4 * 12 / 2
    highest = max(log, key=lambda record: record["learning_rate"])
    assert highest["step"] == len(batches) // 2


def test_traces_of_about_one_length_share_a_batch(saved, tmp_path, batches):
    spec, padding = saved(True), []
    for grouped in (False, True):
        batches.clear()
        config = Sft(epochs=1, batch_size=4, group_by_length=grouped)
        sft.train(spec, of_many_lengths(64), config, 0, tmp_path / str(grouped))
        padding.append(sum((batch["attention_mask"] == 0).sum().item() for batch in batches))
    assert padding[1] < 0.5 * padding[0]


@pytest.mark.parametrize("name", ["packing", "packing_strategy", "padding_free"])
def test_traces_are_packed_in_one_way(name):
    with pytest.raises(SrlibError, match=f"sft.trainer holds {name}, which srlib sets itself"):
        sft.check(load("params/smoke.yaml", **{"sft.trainer": {name: "wrapped"}}))


def test_traces_are_held_out(saved, tmp_path, monkeypatch):
    """They are not trained on, drawn by the seed, and what is logged is their loss."""
    spec, rows, trainers = saved(True), numbered(20), []
    init = sft._Trainer.__init__
    monkeypatch.setattr(sft._Trainer, "__init__", lambda self, **named: (trainers.append(self), init(self, **named))[1])
    config = Sft(epochs=3, batch_size=4, n_validation=6)
    log = sft.train(spec, rows, config, 5, tmp_path)
    assert json.loads((tmp_path / "log.json").read_text()) == log
    model, tokenizer = load_model(spec.model_copy(update={"adapter": str(tmp_path / "adapter")}))
    every = [sft.example(tokenizer, row) for row in rows]
    taught, held = (list(getattr(trainers[0], name)["input_ids"]) for name in ("train_dataset", "eval_dataset"))
    assert len(held) == 6 and sorted(taught + held) == sorted(each["input_ids"] for each in every)
    assert sft.split(every, 6, 5) == sft.split(every, 6, 5) != sft.split(every, 6, 6)
    losses = []
    for at in (0, 4):  # a batch's loss counts as often as it has traces
        some = [each for ids in held[at : at + 4] for each in every if each["input_ids"] == ids]
        batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(some)
        with torch.no_grad():
            losses += [model(**batch).loss.item()] * len(some)
    records = [record for record in log if "eval_loss" in record]
    assert records[-1]["eval_loss"] == pytest.approx(sum(losses) / 6, abs=1e-4)
    assert records[-1]["step"] == log[len(log) - len(records) - 1]["step"] == 12
    with pytest.raises(SrlibError, match="sft.n_validation is 20, but there are 20 traces to train on"):
        sft.train(spec, rows, config.model_copy(update={"n_validation": 20}), 5, tmp_path)


def test_an_adapter_that_is_given_stays(saved, tmp_path):
    """Stage 02 trains on base and adapter together, and what it leaves is loaded as it was in memory."""
    spec = saved(True)
    sft.train(
        spec, annotated(16), Sft(epochs=20, batch_size=8, learning_rate=2e-2, tags="plain"), 0, tmp_path / "given"
    )
    p = Params(
        run="run",
        outputs=str(tmp_path),
        pair={"small": {"path": spec.path, "adapter": str(tmp_path / "given" / "adapter")}, "big": {"path": spec.path}},
        data={"traces": str(tmp_path / "problems.jsonl")},
        offload={"max_tokens": 24},
        grpo={"batch_size": 4, "num_generations": 4, "n_problems": 2, "max_steps": 1, "beta": 0.1, "save_steps": 9},
    )
    write_jsonl(
        tmp_path / "problems.jsonl", [Problem(id=str(i), prompt=f"{i}+1?", answer=str(i + 1)) for i in range(2)]
    )
    log = sft.train(p.small, annotated(16), Sft(epochs=1, batch_size=16, learning_rate=1e-7), 0, p.stage_dir("02_sft"))
    (trace,) = annotated(1)

    def loss(of):
        model, tokenizer = load_model(of)
        row = {name: torch.tensor([ids]) for name, ids in sft.example(tokenizer, trace).items()}
        with torch.no_grad():
            return model(**row).loss.item()

    assert loss(p.tuned) == pytest.approx(log[-1]["loss"], abs=1e-3)
    assert loss(spec) > loss(p.tuned) + 1  # which the adapter that was given has brought down
    (step,) = grpo.run(p, p.stage_dir("03_grpo"), pair_speed(p.latency))
    assert step["kl"] == pytest.approx(0, abs=1e-6)
    assert loss(p.reinforced) == pytest.approx(loss(p.tuned), abs=0.2)


@pytest.fixture
def full(saved, tmp_path):
    """Params of a run whose stage 02 trains all weights, with a pair and problems."""
    small = saved(True).path
    write_jsonl(
        tmp_path / "problems.jsonl", [Problem(id=str(i), prompt=f"{i}+1?", answer=str(i + 1)) for i in range(2)]
    )
    return Params(
        run="run",
        outputs=str(tmp_path),
        pair={"small": {"path": small}, "big": {"path": small}},
        data={"traces": str(tmp_path / "problems.jsonl")},
        sft={"method": "full", "epochs": 30, "batch_size": 8, "learning_rate": 1e-2, "lora_rank": 3, "lora_alpha": 5},
        offload={"max_tokens": 24},
        grpo={"batch_size": 4, "num_generations": 4, "n_problems": 2, "max_steps": 2, "beta": 0.1, "save_steps": 1},
    )


def test_all_weights_are_trained_and_reinforced_with_an_adapter(full, tmp_path, monkeypatch):
    """What comes of 02 is a model like any other; 03 begins as it, and its adapter is what the section says."""
    log = sft.train(full.small, annotated(16), full.sft, 0, full.stage_dir("02_sft"))
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert full.tuned.adapter is None and sorted(f.name for f in full.where("02_sft").iterdir()) == [
        "log.json",
        "model",
    ]
    before, after = (dict(load_model(each)[0].named_parameters()) for each in (full.small, full.tuned))
    for name, weights in before.items():
        assert (after[name][: len(weights)] != weights).float().mean() > 0.9, name
    tuned = engine.load(full.tuned)
    (trace,) = scheduler.Offloader(tuned, None, policies.Never(), max_tokens=40).run(["2*3+1?"])
    assert tuned.tokenizer.decode(trace.ids) == annotated(1)[0].tagged + "<|endoftext|>"
    assert spans.parse(trace.ids, trace.tags) == [(5, 6)]

    kept = {f.name: f.read_bytes() for f in (full.where("02_sft") / "model").iterdir()}
    first, _ = grpo.run(full, full.stage_dir("03_grpo"), pair_speed(full.latency))
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert kept == {f.name: f.read_bytes() for f in (full.where("02_sft") / "model").iterdir()}
    adapter = json.loads((full.where("03_grpo") / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 5) and len(
        adapter["trainable_token_indices"]["embed_tokens"]
    ) == 2
    assert engine.load(full.reinforced).tokenizer.encode("<bigmodel>") == tuned.tokenizer.encode("<bigmodel>")

    saving = grpo._Trainer._save_checkpoint

    def killed(self, *arguments, **named):
        saving(self, *arguments, **named)
        raise KeyboardInterrupt

    again = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo._Trainer, "_save_checkpoint", killed)
        grpo.run(full, again, pair_speed(full.latency))
    grpo.run(full, again, pair_speed(full.latency))
    whole, taken_up = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (full.where("03_grpo"), again)
    )
    assert whole == taken_up


def test_all_weights_with_an_adapter_that_is_given(full, tmp_path):
    """It is merged in, in memory alone."""
    given = full.sft.model_copy(update={"method": "lora", "epochs": 20, "tags": "plain"})
    sft.train(full.small, annotated(16), given, 0, tmp_path / "given")
    small = full.small.model_copy(update={"adapter": str(tmp_path / "given" / "adapter")})
    still = full.sft.model_copy(update={"epochs": 1, "learning_rate": 1e-12})
    (log, *_) = sft.train(small, annotated(16), still, 0, full.stage_dir("02_sft"))
    merged, _ = load_model(small)
    model, _ = load_model(full.tuned)
    torch.testing.assert_close(model.lm_head.weight[: len(merged.lm_head.weight)], merged.lm_head.weight)
    assert not (full.where("02_sft") / "merged").exists()


def test_all_weights_are_trained_in_full_precision(full, tmp_path):
    """Steps that bfloat16 would round to nothing add up; what is written is as it will be loaded."""
    spec = full.small.model_copy(update={"dtype": "bfloat16", "device": "cpu"})
    config = full.sft.model_copy(update={"epochs": 50, "learning_rate": 2e-5})
    log = sft.train(spec, annotated(16), config, 0, tmp_path / "02")
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    assert {each.dtype for each in load_file(tmp_path / "02" / "model" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_quantised_weights_cannot_be_trained():
    small = {"path": "a", "quantization": "nf4"}
    with pytest.raises(ValueError, match="sft.method full trains all weights, and pair.small.quantization is nf4"):
        Params(run="x", pair={"small": small}, sft={"method": "full"})
    Params(run="x", pair={"small": small, "tuned": {"path": "b"}}, sft={"method": "full"})  # where nothing is trained


@pytest.mark.parametrize(
    ("small", "message"),
    [({"merge": False}, "pair.small.merge is false"), ({"quantization": "nf4"}, "pair.small.quantization is nf4")],
)
def test_an_adapter_that_cannot_be_merged_is_refused(small, message):
    with pytest.raises(ValueError, match=message):
        Params(run="x", pair={"small": {"path": "a", "adapter": "b", **small}})


@pytest.mark.parametrize("tags", ["token", "plain"])
def test_every_part_of_an_adapter_on_quantised_weights_is_trained_in_full_precision(saved, tmp_path, tags):
    """The rows of the tags, too: in bfloat16, in which TRL puts them, steps as small as these round to nothing."""
    spec, config = saved(True).model_copy(update={"quantization": "nf4"}), Sft(tags=tags, epochs=1, batch_size=8)
    ends = []
    for rate in (1e-12, 1e-6):
        sft.train(spec, annotated(16), config.model_copy(update={"learning_rate": rate}), 0, tmp_path / str(rate))
        ends.append(load_file(tmp_path / str(rate) / "adapter" / "adapter_model.safetensors"))
    assert any("token_adapter" in name for name in ends[0])
    for name, start in ends[0].items():
        moved = (ends[1][name] - start).abs()
        if "lora_A" not in name:  # whose first step waits for lora_B, which begins at 0
            assert 0 < moved.max() < 1e-5 and (moved > 0).float().mean() > 0.9, name


def test_bfloat16_on_a_cpu(saved, tmp_path):
    spec = saved(True).model_copy(update={"dtype": "bfloat16", "device": "cpu"})
    log = sft.train(spec, annotated(8), Sft(epochs=4, batch_size=8, learning_rate=2e-2), 0, tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]


def test_errors(saved, tmp_path):
    with pytest.raises(
        ValueError, match="batch_size 6 is not a multiple of processes × gradient_accumulation_steps = 4"
    ):
        Sft(batch_size=6, processes=2, gradient_accumulation_steps=2)
    spec = saved(True)
    plain = [row.model_copy(update={"spans": []}) for row in annotated(4)]
    with pytest.raises(SrlibError, match="No annotated trace has a span"):
        sft.train(spec, plain, Sft(), 0, tmp_path)
    with pytest.raises(SrlibError, match="sft.max_length is 16, but the shortest trace has"):
        sft.train(spec, annotated(4), Sft(max_length=16), 0, tmp_path)


def test_the_notebook_warns_of_a_model_that_asks_nowhere(saved, capsys):
    """Of what the tuned model wrote on the problems to watch, in a line of its own, with what to change."""
    model, tokenizer = load_model(saved(True))
    add_tags(tokenizer)

    def told(*texts):
        traces = [SimpleNamespace(ids=tokenizer.encode(text)) for text in texts]
        scope = {"tuned": SimpleNamespace(tokenizer=tokenizer), "traces": traces, "rows": annotated(4), "spans": spans}
        scope |= {"claims": claims, "p": SimpleNamespace(sft=Sft(epochs=0.5))}
        run_cells("02_sft", scope, "warn_if_silent")
        return capsys.readouterr().out.splitlines()

    (*_, line) = told("2*3=6;", "6+1=7;")
    assert line.startswith("warning: the tuned model asks in none of 2 traces")
    for change in ("sft.epochs, now 0.5", "sft.learning_rate, now 0.003", "annotate.threshold"):
        assert change in line
    assert not [line for line in told("2*3=6;", "2*3=<bigmodel>6</bigmodel>;") if "warning" in line]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_notebook_draws_the_loss_of_what_is_held_out(tmp_path, held_out, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        figures, "losses", lambda curves, steps: (drawn.append((curves, steps)), losses(curves, steps))[1]
    )
    log = [{"step": step, "epoch": step / 9, "loss": 3 / step, "grad_norm": 1.0} for step in (1, 2, 3, 4)]
    log += [{"step": step, "epoch": step / 9, "eval_loss": 4 / step} for step in (2, 4)] if held_out else []
    run_cells("02_sft", {"log": log, "folder": tmp_path, "claims": claims}, "figures.losses")
    ((curves, steps),) = drawn
    assert [*curves.values()] == [[3, 1.5, 1, 0.75], *([[2, 1]] if held_out else [])]
    assert [*steps.values()] == [[1, 2, 3, 4], *([[2, 4]] if held_out else [])]
    assert (tmp_path / "loss.png").stat().st_size
