"""The section `sft`: what TRL's trainer does with it, in a few steps on a random model."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers.trainer_pt_utils import LengthGroupedSampler

from srlib import Offloader, SrlibError, engine
from srlib.data import problems
from srlib.data.prompts import encode_prompt
from srlib.data.rows import Annotated, read_jsonl, write_jsonl
from srlib.data.spans import OPEN
from srlib.decoding import policies
from srlib.params import ROOT, Params
from srlib.training import sft
from tests.purposes import Case, once, shows
from tests.purposes.grpo import launched, models
from tests.test_sft import numbered
from tests.test_trainer import written

BASE = {"sft.batch_size": 8, "sft.learning_rate": 1e-2}
ROWS = numbered(16)


@dataclass
class Part:
    """A part of a step: the labels, and what comes of them."""

    lr: float
    labels: torch.Tensor  # (B, T)
    forwards: int = 0  # of the first layer


@dataclass
class Trained:
    """A training, as it was seen from within."""

    trainer: sft.SFTTrainer | None = None
    log: list[dict] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)  # the steps of the checkpoints
    # Of the embeddings, and of the output layer where it is not tied: (V, h), and the tags' rows before the first step.
    ends: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def lora(self) -> torch.nn.Module:
        """A layer with its adapter."""
        return self.trainer.model.get_base_model().get_decoder().layers[0].self_attn.q_proj


DONE: dict[str, Trained] = {}


def trained(case: Case, **changes) -> Trained:
    """`sft.train` with these settings; one that was made with the same before is looked at again."""
    small = {key: value for key, value in models(case).items() if key in ("pair.small.path", "pair.big.path")}
    p = case.params({**BASE, **small, **{f"sft.{name}": value for name, value in changes.items()}})
    return once(DONE, p, lambda patch: _trained(p, case.folder, patch))


def _trained(p: Params, folder: Path, patch: pytest.MonkeyPatch) -> Trained:
    seen = Trained()

    class Trainer(sft._Trainer):
        def training_step(self, model, inputs, *arguments):
            seen.trainer, count = self, []
            if not seen.parts:
                layers = [each for each in self.model.modules() if isinstance(each, TrainableTokensLayer)]
                seen.ends = [layer.weight.detach().clone() for layer in layers]
                seen.rows = [layer.trainable_tokens_delta["default"].detach().clone() for layer in layers]
            seen.parts.append(Part(self.optimizer.param_groups[0]["lr"], inputs["labels"]))
            model_itself = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            layer = model_itself.get_decoder().layers[0]
            handle = layer.register_forward_pre_hook(lambda *a: count.append(1))
            try:
                return super().training_step(model, inputs, *arguments)
            finally:
                handle.remove()
                seen.parts[-1].forwards = len(count)

        def _save_checkpoint(self, *arguments, **named):
            seen.saved.append(self.state.global_step)
            return super()._save_checkpoint(*arguments, **named)

    patch.setattr(sft, "_Trainer", Trainer)
    seen.log = sft.train(p.small, ROWS, p.sft, p.seed, folder)
    return seen


@shows("sft.annotated")
def traces_of_your_own(case: Case) -> None:
    own = case.folder / "own.jsonl"
    made = case.params({"sft.annotated": str(own)})
    for file, rows in ((made.where("01_annotate") / "annotated.jsonl", ROWS[:2]), (own, ROWS[2:])):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows)
    assert [row.id for row in read_jsonl(made.annotated, Annotated)] == [row.id for row in ROWS[2:]]


@shows("sft.tags")
def tags_as_plain_text(case: Case) -> None:
    seen = trained(case, tags="plain")
    tokenizer, labels = seen.trainer.processing_class, seen.parts[0].labels[0].tolist()
    pieces = tokenizer.encode(OPEN, add_special_tokens=False)
    assert len(pieces) > 1
    assert any(labels[at : at + len(pieces)] == pieces for at in range(len(labels)))


@shows("sft.tag_init")
def rows_of_the_tags_at_first(case: Case) -> None:
    """Before the first step, at both ends: the mean of the rows of the words' pieces."""
    words = ["=*;", "?"]
    seen = trained(case, tag_init=words)
    encode = seen.trainer.processing_class.encode
    for layer, rows in zip(seen.ends, seen.rows, strict=True):
        means = torch.stack([layer[encode(text)].mean(0) for text in words])
        torch.testing.assert_close(rows, means, rtol=0, atol=1e-6)


@shows("sft.method")
def all_weights_are_trained(case: Case) -> None:
    model = trained(case, method="full").trainer.model
    assert not isinstance(model, PeftModel) and all(each.requires_grad for each in model.parameters())


@shows("sft.lora_rank")
def rank_of_the_matrices(case: Case) -> None:
    assert trained(case, lora_rank=5).lora.lora_A["default"].weight.shape[0] == 5


@shows("sft.lora_alpha")
def scale_of_the_adapter(case: Case) -> None:
    assert trained(case, lora_alpha=48).lora.scaling["default"] == 48 / 16


@shows("sft.epochs")
def times_each_trace_is_seen(case: Case) -> None:
    assert sum(len(part.labels) for part in trained(case, epochs=2.5).parts) == 2.5 * len(ROWS)


@shows("sft.batch_size")
def traces_of_a_step(case: Case) -> None:
    seen = trained(case, batch_size=4)
    assert [len(part.labels) for part in seen.parts] == [4] * 4
    assert seen.trainer.state.global_step == 4


@shows("sft.processes")
def processes_that_train(case: Case) -> None:
    seen = trained(case, processes=2)
    assert [len(part.labels) for part in seen.parts] == [4] * 4, "each has its part of the batch"
    p = case.params({"sft.processes": 2})
    with pytest.MonkeyPatch.context() as patch:
        assert "--nproc_per_node=2" in launched(patch, sft.run, p.sft.processes, p, case.folder)


@shows("sft.gradient_accumulation_steps")
def parts_of_a_step(case: Case) -> None:
    seen = trained(case, gradient_accumulation_steps=4)
    assert [len(part.labels) for part in seen.parts] == [2] * 8
    whole = [record["loss"] for record in trained(case, gradient_accumulation_steps=1).log]
    assert [record["loss"] for record in seen.log] == pytest.approx(whole, abs=1e-4) and len(whole) == 2


@shows("sft.gradient_checkpointing")
def forward_passes_again(case: Case) -> None:
    assert {part.forwards for part in trained(case, gradient_checkpointing=True).parts} == {2}


@shows("sft.learning_rate")
def highest_learning_rate(case: Case) -> None:
    assert max(part.lr for part in trained(case, learning_rate=0.02).parts) == pytest.approx(0.02)


@shows("sft.warmup_ratio")
def steps_of_warming_up(case: Case) -> None:
    rates = [part.lr for part in trained(case, warmup_ratio=0.5, epochs=4).parts]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0 and len(rates) == 8


@shows("sft.max_length")
def longest_trace(case: Case) -> None:
    with pytest.raises(SrlibError, match="sft.max_length is 16, but the shortest trace has"):
        trained(case, max_length=16)


@shows("sft.group_by_length")
def batches_of_one_length(case: Case) -> None:
    sampler = trained(case, group_by_length=True).trainer._get_train_sampler()
    assert isinstance(sampler, LengthGroupedSampler)  # what it saves: tests/test_sft.py


@shows("sft.packing")
def traces_share_rows(case: Case) -> None:
    seen = trained(case, packing=True)
    assert [len(part.labels) for part in seen.parts] == [1], "all rows of a step, one behind the other"


@shows("sft.n_validation")
def traces_held_out(case: Case) -> None:
    seen = trained(case, n_validation=4)
    assert sum(len(part.labels) for part in seen.parts) == len(ROWS) - 4
    assert [record["step"] for record in seen.log if "eval_loss" in record] == [1, 2]


@shows("sft.save_steps")
def steps_between_checkpoints(case: Case) -> None:
    assert trained(case, save_steps=2, epochs=2.5).saved == [2, 4, 5]


@shows("sft.report_to")
def tracker_that_is_told(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        told = written(patch)
        trained(case, report_to="tensorboard")
    assert "train/loss" in told.scalars


@shows("sft.trainer")
def more_arguments_of_sft(case: Case) -> None:
    assert trained(case, trainer={"weight_decay": 0.25}).trainer.optimizer.param_groups[0]["weight_decay"] == 0.25


@shows("sft.lora")
def more_arguments_of_lora(case: Case) -> None:
    dropout = trained(case, lora={"lora_dropout": 0.25}).lora.lora_dropout["default"]
    assert getattr(dropout, "p", 0.0) == 0.25


@shows("sft.n_watch")
def problems_to_watch(case: Case) -> None:
    given = models(case)
    p = case.params({**given, "data.test": given["data.traces"], "sft.n_watch": 3, "offload.max_tokens": 8})
    cells = json.loads((ROOT / "notebooks/02_sft.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = (source for each in cells if "n_watch" in (source := "".join(each["source"])))
    names = {"p": p, "Offloader": Offloader, "engine": engine, "policies": policies, "problems": problems}
    exec(cell, names)
    asked = [trace.prompt_ids for trace in names["traces"]]
    assert asked == [encode_prompt(names["tuned"].tokenizer, problem.prompt) for problem in names["test"]]
    assert len(asked) == 3
