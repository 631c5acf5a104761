"""What a run has made, for those who do not have this package: `srlib export outputs/cpu`.

The tuned model, merged, with its tokenizer and chat template, as any other model; and the annotated traces that it was
taught with. Each has a card, and every number on a card stands in a file of the run. Nothing leaves this machine
unless a name on the hub is given, and what is made there is private.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from srlib import SrlibError, __version__, visible
from srlib.data import benchmarks, digests
from srlib.data.rows import read_json
from srlib.data.rows import whole as whole_file
from srlib.data.spans import CLOSE, OPEN
from srlib.engine.adapters import merge, pieces_of_tags
from srlib.engine.files import saving
from srlib.engine.models import dtype_of, load_tokenizer
from srlib.evaluation.claims import percent
from srlib.params import ROOT, ModelSpec, Params, build, find, here
from srlib.run import locks
from srlib.run.manifest import ENDED, Kept, Manifest, Record
from srlib.run.stages import STAGES, artefacts

MAKERS = {"grpo": "03_grpo", "learned": "02_sft"}  # policies of a tuned model, the later one first
ANNOTATION, EVALUATION = "01_annotate", "05_evaluate"
READ = ("00_arith_pair", ANNOTATION, "02_sft", "03_grpo", EVALUATION)  # stages of which anything is looked at
BESIDE = ("small", "big")  # policies that a card shows beside the model's own


class Result(TypedDict):
    """What a card takes of a row of results.json."""

    policy: str
    dataset: str
    n_problems: int
    samples_per_problem: int
    max_tokens: int
    accuracy: float
    ci95: tuple[float, float]
    offload_share: float
    handovers: float


class Report(TypedDict):
    """What a card takes of report.json."""

    annotator: str
    traces: int
    annotated: int
    dropped: dict[str, int]
    share: float


def run(
    folder: str | Path,
    policy: str | None = None,
    to: str | Path | None = None,
    push: str | None = None,
    push_data: str | None = None,
) -> int:
    """Write `model/` and `dataset/`, each whole and with its card, or nothing; returns the exit status.

    Args:
        folder: of a run.
        policy: `learned`, the fine-tuned model, or `grpo`, the reinforced one; None: the latter, where there is one.
        to: folder to be made; None: `export` in that of the run.
        push, push_data: names on the hub, `owner/name`, for the model and for the data set; None: it stays here.

    Raises:
        SrlibError: no such run or model, it is not as the run left it, `to` holds something, or the hub
            is not reached or refuses.
    """
    p = params_of(folder)
    to = Path(to) if to is not None else p.run_dir / "export"
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise SrlibError(f"{here(to)} holds something already: remove it, or name another folder (--to).")
    names = {kind: name for kind, name in (("model", push), ("dataset", push_data)) if name is not None}
    if names:
        _check_hub(*names.values())
    with ExitStack() as held:
        for place in dict.fromkeys([p.run_dir, *(p.where(stage).parent for stage in READ)]):
            there = [name for name in READ if (place / name).is_dir()]
            held.enter_context(locks.reading(place, there))
        chosen = _chosen(p, policy)
        rows, without = _results(p, chosen)
        with _whole(to) as part:
            _write_dataset(p, part / "dataset")
            _write_model(p, chosen, rows, without, part / "model", push)
    print(f"{chosen}: the {'reinforced' if chosen == 'grpo' else 'fine-tuned'} model of {here(p.run_dir)} → {here(to)}")
    if without:
        print(f"its card has no figures: {visible(without)}")
    for kind, name in names.items():
        print(f"{kind} → {_pushed(to / kind, name, kind)}")
    return 0


def params_of(folder: str | Path) -> Params:
    """The params of a run, as far as its tuned model and its evaluation depend on them, from its manifest.

    Stages that it shares with another run are found by what the others read.

    Raises:
        SrlibError: there is no manifest, or it is damaged or of another version of this package.
    """
    found = find(folder) or Path(folder)
    file = found / "manifest.json"
    if not file.is_file():
        raise SrlibError(f"There is no run in {folder}: it has no manifest.json, which `python -m srlib run` writes.")
    own, home = _records(file), found.resolve()
    values: dict[str, Any] = {"run": home.name, "outputs": str(home.parent)}
    p = _built(own, file, values)
    given = {here(path) for artefact in artefacts(p).values() if artefact.given for path in artefact.paths}
    shared: dict[str, Path] = {}
    for path in {path for record in own.values() for path in record["inputs"]} - given:
        shared |= {a.name: a.parent for a in Path(path).parents if a.name in STAGES and a.name not in own}
    if not shared:
        return p
    folder, names = shared[max(shared)], [name for name in STAGES if name <= max(shared) and name not in own]
    values["base"] = {"folder": str(folder), "stages": names}  # with what those that are read have read themselves
    theirs = {name: record for name, record in _records(ROOT / folder / file.name).items() if name in names}
    return _built(theirs | own, file, values)


def _records(file: Path) -> dict[str, Record]:
    return read_json(file, Kept, "run the stages again: python -m srlib run …").stages


def _built(stages: dict[str, Record], file: Path, values: dict[str, Any]) -> Params:
    """`values`, with the settings that stages were run with; where two differ, the later one counts."""
    values = dict(values)
    for name in (name for name in READ if name in stages):
        for key, value in stages[name]["parameters"].items():
            *sections, setting = key.split(".")
            reduce(lambda place, section: place.setdefault(section, {}), sections, values)[setting] = value
    try:
        return build(values, here(file), Params)
    except SrlibError as error:
        raise SrlibError(f"{error} Another version of srlib has written it: export it with that one.") from None


def _chosen(p: Params, policy: str | None) -> str:
    """The policy whose model is exported: it is complete, as its stage left it, and so is what it is laid on."""
    if p.pair.tuned is not None:
        raise SrlibError(
            f"{here(p.run_dir)} has tuned no model: pair.tuned named {p.pair.tuned.path}, which is as it was."
        )
    by = {name: Manifest(p, p.where(maker).parent) for name, maker in MAKERS.items()}
    policy = policy or next((name for name, maker in MAKERS.items() if by[name].complete(maker)), "learned")
    maker, manifest = MAKERS[policy], by[policy]
    again = f"make it again: python -m srlib run … --only {maker}"
    if not manifest.complete(maker):
        state = ENDED[manifest.stages[maker]["state"]] if maker in manifest.stages else "never ran"
        raise SrlibError(
            f"{here(manifest.folder)} has no {policy} model: {maker} {state}; python -m srlib run … --until {maker}"
        )
    if manifest.stages[maker]["parameters"]["pair.small"] != p.pair.small.model_dump():
        raise SrlibError(f"{maker} ran with another pair.small than the stages behind it: run those again, too")
    spec = _spec(p, policy)
    if changed := manifest.changed(maker, spec.top):
        raise SrlibError(f"{here(manifest.folder / maker / changed[0])} is not as {maker} left it; {again}")
    read = manifest.stages[maker]["inputs"].values()
    bases = [p.small.path, p.small.adapter, spec.path if maker == "03_grpo" else None]
    for path in map(Path, filter(None, bases)):
        if path.exists() and digests.of_path(path) not in read:
            raise SrlibError(f"{here(path)} is not what {maker} has tuned: it has changed since; {again}")
    return policy


def _spec(p: Params, policy: str) -> ModelSpec:
    """The model of a policy; it is merged here, wherever it was trained."""
    return (p.reinforced if policy == "grpo" else p.tuned).model_copy(update={"device": "auto"})


def _results(p: Params, policy: str) -> tuple[list[Result], str]:
    """Rows of results.json, the policy's own the last; none, and why, if it was not measured as it is now."""
    manifest, file = Manifest(p, p.where(EVALUATION).parent), p.where(EVALUATION) / "results.json"
    if not manifest.complete(EVALUATION):
        return [], f"{EVALUATION} is not complete"
    if manifest.changed(EVALUATION, file):
        return [], f"{here(file)} is not as {EVALUATION} left it"
    if digests.of_path(Path(_spec(p, policy).top)) not in manifest.stages[EVALUATION]["inputs"].values():
        return [], f"{EVALUATION} has not measured it, but another one"
    rows = read_json(file, list[Result], f"make it again: python -m srlib run … --only {EVALUATION}")
    own = [row for row in rows if row["policy"] == policy]
    if not own:
        return [], f"{EVALUATION} has not measured it: evaluate.policies has no {policy}"
    return [row for row in rows if row["policy"] in BESIDE] + own, ""


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to be filled whole or not at all: another one takes its place at the end."""
    part = folder.with_name(folder.name + ".part")
    with saving(folder):
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir(parents=True)
    try:
        yield part
        with saving(folder):
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_model(p: Params, policy: str, rows: Sequence[Result], without: str, folder: Path, name: str | None) -> None:
    spec = _spec(p, policy)
    if spec.adapter is None:
        with saving(folder):
            shutil.copytree(spec.place, folder)
    else:
        # Weights that were quantised to save memory are whole on the disk, and an adapter can be merged into these alone.
        merge(spec.model_copy(update={"quantization": "none"}), folder)
        (folder / "source.json").unlink()  # where it was merged from here
    with whole_file(folder / "README.md") as file:
        file.write(_model_card(p, policy, rows, without, name))


def _write_dataset(p: Params, folder: Path) -> None:
    """The annotated traces that stage 02 has read, with their card."""
    manifest, file = Manifest(p, p.where("02_sft").parent), p.annotated
    if not file.is_file() or digests.of_path(file) not in manifest.stages["02_sft"]["inputs"].values():
        raise SrlibError(f"{here(file)} is not what 02_sft has learnt from: python -m srlib run … --from {ANNOTATION}")
    with saving(folder):
        folder.mkdir()
        shutil.copyfile(file, folder / "annotated.jsonl")
    with whole_file(folder / "README.md") as card:
        card.write(_dataset_card(p))


def _model_card(p: Params, policy: str, rows: Sequence[Result], without: str, name: str | None) -> str:
    from huggingface_hub import ModelCardData

    spec, where = _spec(p, policy), name or "FOLDER"
    header = ModelCardData(
        base_model=_on_hub(p.pair.small.path),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["splitreason", "srlib", "reasoning", "offloading"],
    )
    tokenizer = load_tokenizer(spec)
    a_token = len(pieces_of_tags(tokenizer)) == 2
    by = "in all its weights" if p.sft.method == "full" else f"by LoRA (rank {p.sft.lora_rank})"
    taught = f"fine-tuned {by} on annotated traces (epochs: {p.sft.epochs:g})"
    if policy == "grpo":
        taught += f", then reinforced by GRPO (steps: {p.grpo.max_steps})"
    parts = [
        _header(header.to_yaml()),
        f"# {p.run}: {policy}",
        f"{_small(p, 'A model')}, {taught}. It reasons, and writes `{OPEN}` where it expects to fail and a bigger "
        f"model should go on, until `{CLOSE}`. "
        + ("Each of the two tags is one token of its tokenizer. " if a_token else "The tags are plain text. ")
        + f"The bigger model of this run: {_named(p.pair.big.path, 'one')}."
        + (" The adapter is merged into the weights." if spec.adapter else ""),
        # Without it vLLM rounds weights of 32 bits to 16, and other tokens are the likeliest.
        f"```sh\nvllm serve {where} --dtype {str(dtype_of(spec)).removeprefix('torch.')}\n```",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n```',
        "Prompts go through the tokenizer's chat template."
        if tokenizer.chat_template
        else "It has no chat template: the problem is the prompt.",
    ]
    if p.offload.hint:
        parts.append(f"Behind every problem it was told: {_code(p.offload.hint)}")
    parts.append(
        "**By itself nobody answers it**: served alone, it writes the words between the tags, too. The figures are of "
        "both models, the bigger one writing there."
    )
    parts += ["## Evaluation", *(_evaluation(p, rows, spec) if rows else [f"Not evaluated: {_text(without)}."])]
    parts.append(f"Written by srlib {__version__} from the files of the run.")
    return "\n\n".join(parts) + "\n"


def _evaluation(p: Params, rows: Sequence[Result], spec: ModelSpec) -> Iterator[str]:
    """The figures of a model card, as text."""
    how, last = benchmarks.protocol(p).offload, rows[-1]
    drawn = "greedy" if how.temperature == 0 else f"temperature {how.temperature:g}, top-p {how.top_p:g}"
    if how.temperature and how.top_k:
        drawn += f", top-k {how.top_k}"
    yield (
        f"{_text(last['dataset'])}: n = {last['n_problems']} problems, samples a problem: {last['samples_per_problem']} "
        f"({drawn}), at most {last['max_tokens']} tokens a trace. Intervals are of 95 %, clustered by problem. "
        "Offload share: of all tokens, those that the bigger model wrote."
    )
    table = ["| who writes | accuracy | 95 % interval | offload share | hand-overs a trace |", "|---|---|---|---|---|"]
    who = {"small": "the model before tuning, alone", "big": "the bigger model, alone"}
    for row in rows:
        name, (low, high) = who.get(row["policy"], "this model and the bigger one"), row["ci95"]
        numbers = f"{percent(row['accuracy'])} | {percent(low)} – {percent(high)} | {percent(row['offload_share'])} | {row['handovers']:.2f}"
        table.append(f"| {name} | {numbers} |")
    yield "\n".join(table)
    if spec.quantization != "none":
        yield (
            f"It was measured with its weights in {spec.quantization} and the adapter beside them; here they are not "
            "quantised, and it may write other tokens."
        )
    yield "The intervals are over problems: they say nothing of another training."


def _dataset_card(p: Params) -> str:
    from huggingface_hub import DatasetCardData

    header = DatasetCardData(
        pretty_name=f"{p.run}: annotated traces",
        task_categories=["text-generation"],
        tags=["splitreason", "srlib", "reasoning", "offloading"],
        configs=[{"config_name": "default", "data_files": "annotated.jsonl"}],
    )
    source = p.data.traces.path if p.data.traces is not None else None
    parts = [
        _header(header.to_yaml()),
        f"# {p.run}: annotated traces",
        "Worked traces, and the spans of each that are hard for a small reasoning model and that a bigger one should "
        "write. One line a trace: `id`, `prompt`, `answer`, `trace` (with its answer), `spans` (start and end in "
        "characters of `trace`, the end not in it), `share` (of the trace's tokens that are in a span), `annotator`.",
        f"Traces: {_named(source, 'those')}. Small model: {_small(p)}. Bigger model: {_named(p.pair.big.path, 'one')}.",
        "## Figures",
    ]
    report, without = _report(p)
    if report is None:
        parts.append(f"None: {_text(without)}.")
    else:
        dropped = ", ".join(f"{_text(why)}: {n}" for why, n in report["dropped"].items())
        parts.append(
            f"Annotator: {_code(report['annotator'])}. Traces: n = {report['traces']}, of which {report['annotated']} "
            f"are annotated{f' ({dropped} left out)' if dropped else ''}. Of a trace's tokens {percent(report['share'])} "
            "are in a span (mean over these traces, not an estimate: there is no interval)."
        )
    parts.append(f"Written by srlib {__version__} from the files of the run.")
    return "\n\n".join(parts) + "\n"


def _report(p: Params) -> tuple[Report | None, str]:
    """What stage 01 says of the annotated traces; None, and why, if it is not of these."""
    if p.sft.annotated is not None:
        return None, f"they were given (sft.annotated), and not made by {ANNOTATION}"
    manifest, file = Manifest(p, p.where(ANNOTATION).parent), p.where(ANNOTATION) / "report.json"
    if not manifest.complete(ANNOTATION):
        return None, f"{ANNOTATION} is not complete"
    if manifest.changed(ANNOTATION, file, p.annotated):
        return None, f"report.json is not as {ANNOTATION} left it"
    return read_json(file, Report, f"make it again: python -m srlib run … --only {ANNOTATION}"), ""


def _header(yaml: str) -> str:
    """The block that the hub reads, with a place for what only the owner can say."""
    return (
        f"---\n{yaml.strip()}\n# license: yours to choose; that of the base model and of the traces may bind you\n---"
    )


def _on_hub(path: str | None) -> str | None:
    """A model's or a data set's name on the hub; None for what lies on this machine, which is named to nobody."""
    here_alone = path is None or path.startswith((".", "/")) or path.count("/") > 1 or find(path) is not None
    return None if here_alone else path


def _named(path: str | None, made: str) -> str:
    """A model or a data set in words: its name, or that it was `made` here."""
    return f"{made} of srlib's arithmetic world" if path is None else _code(_on_hub(path) or Path(path).name)


def _small(p: Params, made: str = "one") -> str:
    """The small model before it was tuned."""
    before = f" with the adapter {_named(p.pair.small.adapter, '')}" if p.pair.small.adapter else ""
    return _named(p.pair.small.path, made) + before


def _text(text: str) -> str:
    """`text` in Markdown: what could be read as markup is text."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", visible(text))


def _code(text: str) -> str:
    return f"`{visible(text).replace('`', chr(39))}`"


def _check_hub(*names: str) -> None:
    """That names are such as the hub takes, and that it knows who asks, before any work."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for name in names:
        try:
            validate_repo_id(name)
            known = name.count("/") == 1
        except HFValidationError:
            known = False
        if not known:
            raise SrlibError(f"{name!r} is no name on the hub, such as owner/name.")
    if get_token() is None:
        raise SrlibError("There is no token for the hub: `hf auth login` asks for one, or set HF_TOKEN to it.")
    try:
        HfApi().whoami()
    except Exception as error:  # of its own, of its network library, or of the system
        raise SrlibError(
            f"The hub is not reached, or does not take the token ({_line(error)}); nothing was exported."
        ) from None


def _pushed(folder: Path, name: str, kind: str) -> str:
    """Put a folder on the hub, in a private place if there is none of that name; returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, commit_message=f"srlib {__version__}")
    except Exception as error:  # as above
        raise SrlibError(
            f"The {kind} was not pushed to {name} ({_line(error)}); it is whole in {here(folder)}: "
            f"`hf upload {name} {here(folder)} --repo-type {kind}` tries again."
        ) from None
    return str(address)


def _line(error: Exception) -> str:
    """The first line of an error, without a stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
