"""Files that are not as they were left: a sentence, or they are made again; never a traceback, never another result."""

import json
import random
import shutil
from itertools import cycle
from multiprocessing import Pipe
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from srlib import SrlibError, engine
from srlib.cost import shapes
from srlib.data.journal import Journal
from srlib.engine.models import load_model, load_tokenizer
from srlib.params import ModelSpec, load
from srlib.run import locks, pipeline, sweep
from srlib.run.manifest import Manifest
from srlib.run.stages import MAKERS, STAGES, artefacts, needed, require_artefact
from srlib.training import arith_pair

HOW = ("cut", "flipped", "emptied", "other", "no text", "gone", "a folder")


def damage(file, how, rng):
    content = file.read_bytes()
    match how:
        case "cut":
            file.write_bytes(content[: rng.randrange(max(1, len(content)))])
        case "flipped":
            at = rng.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        case "emptied":
            file.write_bytes(b"")
        case "other":
            file.write_bytes(rng.choice([b"[]", b"null", b"{}\n", b'"x"']))
        case "no text":
            file.write_bytes(b"\xff\xfe" + content)
        case _:
            file.unlink()
            if how == "a folder":
                file.mkdir()


def mend(file, content):
    if file.is_dir():
        file.rmdir()
    file.write_bytes(content)


@pytest.fixture
def run_of(finished, tmp_path, monkeypatch):
    """The complete run, copied, and what would be executed of it."""
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    outputs = tmp_path / "outputs"
    shutil.copytree(finished[0], outputs)
    manifest = outputs / "smoke" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(finished[0]), str(outputs)))
    ran = []
    monkeypatch.setattr(pipeline, "run_stage", lambda p, name, manifest: ran.append(name) or True)
    monkeypatch.setattr(pipeline, "_last_screen", lambda p: None)
    monkeypatch.setattr(locks, "begin", lambda *_: True)
    return load("params/smoke.yaml", outputs=str(outputs)), ran


def read_by_stages(p):
    """Every file that stages read, its maker, and who reads it."""
    found, files = artefacts(p), {}
    for stage in STAGES.values():
        for name in (name for name in needed(p, stage.name) if MAKERS[name] in STAGES):
            for path in map(Path, found[name].paths):
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    files.setdefault((file, MAKERS[name]), []).append(stage.name)
    return files


@pytest.mark.notebooks
def test_damage_is_seen_however_a_stage_is_started(run_of):
    p, ran = run_of
    rng, tried = random.Random(0), dict.fromkeys(("run", "first", "only", "notebook"), 0)
    cases = [(*place, rng.choice(readers), how) for place, readers in read_by_stages(p).items() for how in HOW]
    for (file, maker, reader, how), start in zip(cases, cycle(tried)):
        kept = file.read_bytes()
        damage(file, how, rng)
        ran.clear()
        case = f"{file} {how}, {reader} by {start}"
        try:
            if start == "notebook":
                scope = {"params_file": "params/smoke.yaml", "changes": {"outputs": p.outputs}}
                pipeline.begin(reader, scope)
            else:
                pipeline.run(p, **({} if start == "run" else {start: reader}))
        except SrlibError as error:
            assert "\n" not in str(error) and not ran, case
        else:  # by `run` alone, and then it is made again
            assert start == "run" and maker in ran, case
        mend(file, kept)
        tried[start] += 1
    assert sum(tried.values()) >= 200 and min(tried.values()) >= 50
    ran.clear()
    pipeline.run(p)
    assert not ran  # all is as it was


@pytest.mark.notebooks
def test_what_is_done_by_hand_is_not_held_against_an_older_run(run_of):
    """02 in a notebook after a run: 03 may be begun, and is not what the run left; a run makes both again."""
    p, ran = run_of
    scope = {"params_file": "params/smoke.yaml", "changes": {"outputs": p.outputs}}
    pipeline.begin("02_sft", scope)
    pipeline.run(p)
    assert not ran  # nothing was written: nothing is lost by having looked
    weights = Path(p.tuned.adapter) / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    pipeline.begin("03_grpo", scope)
    pipeline.run(p)
    assert ran[0] == "02_sft"
    Manifest(p).start("02_sft")
    Manifest(p).finish("02_sft", "complete", 1.0)
    assert "by_hand" not in Manifest(p).stages["02_sft"]


@pytest.mark.notebooks
def test_a_run_that_builds_on_another_holds_it_against_its_manifest(run_of, tmp_path):
    p, ran = run_of
    base = {"folder": str(p.run_dir), "stages": ["00_arith_pair", "01_annotate", "02_sft"]}
    own = load("params/smoke.yaml", outputs=str(tmp_path), run="own", base=base)
    weights = p.run_dir / "00_arith_pair" / "small" / "model.safetensors"
    pipeline.run(own, until="03_grpo")
    assert ran == ["03_grpo"]
    damage(weights, "flipped", random.Random(1))
    with pytest.raises(SrlibError, match=r"03_grpo: .*small/model\.safetensors is not as 00_arith_pair left it"):
        pipeline.run(own, until="03_grpo")


@pytest.mark.notebooks
def test_the_table_is_of_what_was_looked_at(finished, tmp_path, monkeypatch):
    """results.json is cut: no table at the end of a run without 05, and no complaint."""
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    shutil.copytree(finished[0], tmp_path / "outputs")
    p = load("params/smoke.yaml", outputs=str(tmp_path / "outputs"))
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: True)
    (p.run_dir / "05_evaluate" / "results.json").write_text("[")
    assert pipeline.run(p, only="02_sft") == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "7", '{"stages": []}', '{"stages": {"02_sft": 3}}', '{"stages": {"02_sft": {}}}', "\udcff"]
    + ['{"stages": {"02_sft": {"state": "odd", "parameters": {}, "notebook": "", "inputs": {}}}}'],
)
def test_a_manifest_of_another_shape(tmp_path, text):
    p = load("params/smoke.yaml", outputs=str(tmp_path))
    p.run_dir.mkdir()
    (p.run_dir / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SrlibError, match=r"manifest\.json is damaged .*: remove it, and every stage is done again"):
        Manifest(p)


@pytest.mark.parametrize("text", ["", "[]", "[3]", '[{"policy": 3}]', "null", '[{"policy": "big"}]', "\udcff"])
def test_results_of_another_shape(tmp_path, text):
    """Made by hand, so that no digest tells: results, or completions that are not there."""
    p = load("params/smoke.yaml", outputs=str(tmp_path))
    (p.stage_dir("05_evaluate") / "results.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SrlibError, match="07_latency: .*--only 05_evaluate"):
        require_artefact(p, "results", "07_latency")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"plan": {}, "runs": []}', '{"plan": 1}', "\udcff"])
def test_a_sweep_of_another_shape(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SrlibError, match=r"sweep\.json is damaged .*: run the sweep again"):
        sweep.read(tmp_path)


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_model_is_told_of_and_named(folders, tmp_path, how):
    """With nothing to compare it with: it is loaded as it was, or a sentence names the folder; a byte may be any."""
    folder, rng = tmp_path / "small", random.Random(how)
    shutil.copytree(folders[0], folder)
    spec = ModelSpec(path=str(folder))
    for file in sorted(folder.iterdir()):
        kept = file.read_bytes()
        damage(file, how, rng)
        shapes.shape.cache_clear()
        told = []
        for look in (engine.check, load_model, load_tokenizer, lambda spec: shapes.shape(spec.path)):
            try:
                look(spec)
            except SrlibError as error:
                told.append(str(error))
        assert all(str(folder) in each and "\n" not in each for each in told)
        assert told or how in ("flipped", "gone", "a folder", "other") or file.suffix == ".jinja", file
        mend(file, kept)


def altered(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_folder_has_no_revision(folders):
    with pytest.raises(SrlibError, match="is a folder, and has no revision 'v2'"):
        engine.check(ModelSpec(path=folders[0], revision="v2"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda some: some.pop("model.layers.1.mlp.up_proj.weight"),
            r"not whole: it has no model\.layers\.1\.mlp\.up_",
        ),
        (lambda some: some.update({"lm_head.weight": some["lm_head.weight"][:, :8].clone()}), "cannot be loaded"),
    ],
)
def test_weights_that_are_missing_are_not_drawn_at_random(folders, tmp_path, change, said):
    shutil.copytree(folders[0], tmp_path / "small")
    altered(tmp_path / "small" / "model.safetensors", change)
    with pytest.raises(SrlibError, match=f"{tmp_path / 'small'}.* {said}"):
        load_model(ModelSpec(path=str(tmp_path / "small")))


def test_an_adapter_that_is_not_whole(folders, pair, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    small, _ = load_model(ModelSpec(path=folders[0]))
    get_peft_model(small, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    spec, file = (
        ModelSpec(path=folders[0], adapter=str(tmp_path / "adapter")),
        tmp_path / "adapter/adapter_model.safetensors",
    )
    load_model(spec)
    kept = file.read_bytes()
    altered(file, lambda some: some.pop(next(iter(some))))
    with pytest.raises(SrlibError, match=f"The adapter in {tmp_path / 'adapter'} cannot be loaded"):
        load_model(spec)
    file.write_bytes(kept)
    for text in ("{}", '{"peft_type": "ODD"}', '{"peft_type": "LORA", "r": "x"}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(SrlibError, match=f"{tmp_path / 'adapter'}"):
            load_model(spec)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}',
            "model-00002-of-00002.safetensors, which its index",
        ),
        ("{}", "index.json is damaged"),
        ('{"weight_map": ["a"]}', "index.json is damaged .*weight_map"),
    ],
)
def test_an_index_of_weights(folders, tmp_path, index, said):
    shutil.copytree(folders[0], tmp_path / "small")
    (tmp_path / "small" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SrlibError, match=said):
        engine.check(ModelSpec(path=str(tmp_path / "small")))


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", None), ("num_attention_heads", 0), ("num_hidden_layers", "two")]
)
def test_a_configuration_with_another_value(folders, tmp_path, key, value):
    shutil.copytree(folders[0], tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    shapes.shape.cache_clear()
    with pytest.raises(SrlibError, match=r"config\.json is damaged"):
        shapes.shape(str(tmp_path / "small"))


def test_a_byte_of_a_journal(tmp_path):
    """Whichever is another: the record is not taken for what was written."""
    rng, wanted = random.Random(0), {"k": {"key": "k", "text": "a \udc00 b", "n": 1.5}}
    with Journal(tmp_path / "x.journal.jsonl") as journal:
        journal.append(*wanted.values(), {"key": "last"})
    kept = (tmp_path / "x.journal.jsonl").read_bytes()
    with Journal(tmp_path / "x.journal.jsonl") as journal:
        assert journal.records == wanted | {"last": {"key": "last"}}
    found = 0
    for at in range(kept.index(b"\n")):
        flipped = bytes([kept[at] ^ 1 << rng.randrange(8)])
        (tmp_path / "x.journal.jsonl").write_bytes(kept[:at] + flipped + kept[at + 1 :])
        try:
            with Journal(tmp_path / "x.journal.jsonl") as journal:
                assert {k: v for k, v in journal.records["k"].items() if k in wanted["k"]} == wanted["k"]
        except SrlibError as error:
            assert "line 1 is damaged; remove the line" in str(error) or "line 2 is damaged" in str(error)
            found += 1
    assert found > len(kept) // 2


def test_a_model_that_is_kept_is_as_it_was_left(tmp_path):
    config = load("params/smoke.yaml").arith
    for name in ("small", "big"):
        losses, pipe = Pipe(duplex=False)
        with losses, pipe:
            arith_pair._work(pipe, config, 0, tmp_path, name)
    assert all(arith_pair._losses(config, 0, tmp_path, name) for name in ("small", "big"))
    damage(tmp_path / "small" / "model.safetensors", "flipped", random.Random(0))
    (tmp_path / "big.json").write_text("[]")
    assert not any(arith_pair._losses(config, 0, tmp_path, name) for name in ("small", "big"))
