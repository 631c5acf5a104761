"""One sequence in scoring, training, rollouts and grading, where the chat template opens the thought."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from srlib import engine
from srlib.annotation import annotators, traces
from srlib.cost import latency
from srlib.data import problems, spans
from srlib.data.rows import write_jsonl
from srlib.decoding.policies import Learned
from srlib.engine.adapters import add_tags
from srlib.engine.models import load_tokenizer
from srlib.engine.transformers import TransformersEngine
from srlib.evaluation import completions
from srlib.params import Params
from srlib.run import twins
from srlib.training import grpo, rollouts, sft
from srlib.training.launch import launch
from tests.conftest import random_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}(assistant)<think>\n{% endif %}"
)
OPENED = "<think>\n"  # what a prompt ends with
SYSTEM, HINT = "Be brief.", " Reason."
ROWS = [
    {
        "id": "a",
        "prompt": "2*3+1?",
        "answer": "7",
        "trace": "<think>\n2*3=<bigmodel>6</bigmodel>;6+1=7;\n</think>\n\n\\boxed{7}",
    },
    {
        "id": "b",
        "prompt": "9-4*8?",
        "answer": "40",
        "trace": "<think>\n9-4=5;5*8=<bigmodel>40</bigmodel>;\n</think>\n\n\\boxed{40}",
    },
]


def asked(tokenizer: PreTrainedTokenizerBase, row: dict) -> list[int]:
    """A prompt as transformers has it."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"] + HINT}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def knows(folder, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]):
    """Lay a model that has learnt some sequences by heart beside its tokenizer."""
    model = random_model(max(map(max, sequences)) + 1, 0)
    width = max(map(len, sequences))
    ids = torch.tensor([each + [-100] * (width - len(each)) for each in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(ids.clamp(min=0), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


@pytest.fixture
def pair(tmp_path):
    """Params of a pair: the small model writes the traces with their tags, and the big one without."""
    made = twins.trained()
    made.chat_template = TEMPLATE
    for side, text in (("small", str), ("big", spans.strip)):
        folder = tmp_path / side
        made.save_pretrained(folder)
        random_model(1, 0).config.save_pretrained(folder)  # by which the tokenizer's class is chosen
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tagged = AutoTokenizer.from_pretrained(folder)
        add_tags(tagged)
        written = (text(row["trace"]).removeprefix(OPENED) for row in ROWS)
        knows(
            folder,
            tokenizer,
            [
                asked(tokenizer, row) + tagged.encode(each) + [tokenizer.eos_token_id]
                for row, each in zip(ROWS, written)
            ],
        )
    data = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    return Params(
        run="x",
        outputs=str(tmp_path),
        pair={side: {"path": str(tmp_path / side), "system": SYSTEM} for side in ("small", "big")},
        data={"traces": data, "test": data, "decontaminate": 0},
        annotate={"method": "given", "n_traces": 2, "compare": ["gap", "entropy"], "max_share": 0.5},
        sft={"batch_size": 2, "epochs": 1, "learning_rate": 1e-12, "lora_rank": 2},
        offload={"hint": HINT, "max_tokens": 96, "batch_size": 4},
        grpo={
            "n_problems": 2, "batch_size": 4, "num_generations": 2, "max_steps": 1, "learning_rate": 1e-12,
            "temperature": 0.01, "rollout": "true_offload",
        },
    )  # fmt: skip


def test_what_is_scored_trained_rolled_out_and_graded_is_one_sequence(pair, monkeypatch):
    p = pair
    scored, trained, updated, graded = [], [], [], []

    def watch(owner, name, keep):
        """Have `keep` given the arguments of every call."""
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: keep(a) or function(*a, **k))

    watch(TransformersEngine, "score", lambda a: scored.extend(a[1]))
    watch(TransformersEngine, "doubts", lambda a: scored.extend(a[1]))
    watch(sft._Trainer, "training_step", lambda a: trained.append(a[2]))
    watch(grpo._Trainer, "_compute_loss", lambda a: updated.append(a[2]))
    for module in (rollouts, completions):
        watch(module, "verdict", graded.append)

    # transformers alone: a prompt through the template, and what each model goes on with
    tokenizer = load_tokenizer(p.small)
    add_tags(tokenizer)
    tokenizer.chat_template = TEMPLATE  # as it was before the params had a say
    end, own = tokenizer.eos_token_id, {"small": [], "big": []}
    for side, found in own.items():
        model = AutoModelForCausalLM.from_pretrained(getattr(p, side).path)
        for row in ROWS:
            ids = torch.tensor([asked(tokenizer, row)])
            (all_,) = model.generate(ids, max_new_tokens=96, do_sample=False).tolist()
            found.append((all_[: ids.shape[1]], all_[ids.shape[1] :]))
    tags = spans.Tags.of(tokenizer)
    for row, (prompt, small), (_, big) in zip(ROWS, own["small"], own["big"]):
        read = tokenizer.decode(prompt + small)
        assert read.endswith("(assistant)" + row["trace"] + tokenizer.eos_token) and read.count("<think>") == 1
        assert spans.strip(small, tags) == big and small[-1] == end and len(small) == len(big) + 2

    # 01: each of both models reads what the big one writes
    folder = p.stage_dir("01_annotate")
    models = {side: engine.load(getattr(p, side), p.annotate.batch_size) for side in p.annotate.engines}
    found, dropped = traces.gather(p, folder, load_tokenizer(p.small), models)
    assert len(found) == 2 and not dropped
    rows, _ = annotators.run(p, folder, found, **models)
    annotators.compare(p, folder, rows, **models)
    assert sorted(scored) == sorted(3 * [prompt + big[:-1] for prompt, big in own["big"]])

    # 02: the small one learns what it writes, tags and end included, behind its prompt
    launch(sft.run, p.sft.processes, p, p.stage_dir("02_sft"))
    (batch,) = trained
    for ids, labels, mask in zip(*(batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))):
        prompt, text = next(each for each in own["small"] if each[0] == ids[: len(each[0])])
        length = sum(mask)
        assert ids[:length] == prompt + text and labels[:length] == [-100] * len(prompt) + text
    assert len(batch["input_ids"]) == 2

    # 03: both write, and the small one is trained on it
    grpo.run(p, p.stage_dir("03_grpo"), latency.pair_speed(p.latency))
    seen = []
    for batch in updated:
        masks = [batch[f"{part}_mask"].bool() for part in ("prompt", "completion")]
        parts = [batch[f"{part}_ids"] for part in ("prompt", "completion")]
        seen += zip(*([row[m].tolist() for row, m in zip(ids, mask)] for ids, mask in zip(parts, masks)))
    assert sorted(seen) == sorted(2 * own["small"])

    # 05: and so they do once it is
    test = problems.load(p.test, None, p.seed)
    _, records = completions.run(
        engine.load(p.reinforced, 4), engine.load(p.big, 4), Learned(name="grpo"), test, p.offload, dataset=p.dataset
    )
    assert [completions.ids_of(record) for record in records] == [text for _, text in own["small"]]
    assert all("B" in record["owners"] and record["correct"] for record in records)

    # what is graded, in 03 and 05: the trace as it was given, with the beginning that stands in the prompt
    assert len(graded) == 4 + 2
    given = {row["id"]: spans.strip(row["trace"]) for row in ROWS}
    assert all((text, hint) == (given[problem.id], HINT) for text, problem, hint in graded)
