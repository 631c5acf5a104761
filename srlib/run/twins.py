"""Twins: models and problems that differ from the real ones in size alone, made here in seconds.

A twin has the architecture of its model: the same class and configuration, with fewer and narrower layers and
random weights; and its tokenizer: the real one where it is here or the hub is reached, else one with the same
special tokens and the same shape of chat template, trained on the text of the problems: so that a trace has
about as many tokens by it as by the real one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlib import SrlibError
from srlib.data import arith
from srlib.data.rows import lines, parsed, whole, write_jsonl
from srlib.data.spans import SPELLINGS
from srlib.params.data import Arith

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

HEAD = 64  # numbers of a head; of these sizes vLLM's attention and the 4-bit kernels take any number of heads
LAYERS = 2
VOCABULARY = 4096  # most entries of a tokenizer that is trained here
LEARNT = 1_000_000  # characters of given problems that it is trained on
LONG = 200  # characters of a text that is not cut
SPARE = 64  # rows of a twin's embeddings beyond its tokenizer, where its model has some
# What is known of models that a params file of this project names, where the hub is not reached: from their configurations.
QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": False}
KNOWN: dict[str, dict[str, Any]] = {
    r"r1-distill-qwen-1\.5b": QWEN2 | {"num_attention_heads": 12, "num_key_value_heads": 2},
    r"r1-distill-qwen-7b": QWEN2 | {"num_attention_heads": 28, "num_key_value_heads": 4},
    r"r1-distill-qwen-(14|32)b": QWEN2 | {"num_attention_heads": 40, "num_key_value_heads": 8},
}
# R1's special tokens and the shape of its template: it opens the thought behind the assistant's mark.
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    f"{{{{ '{USER}' if m.role == 'user' else '{ASSISTANT}' if m.role == 'assistant' else '' }}}}"
    "{{ m.content }}{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}<think>\\n' }}}}{{% endif %}}"
)


def make(
    path: str,
    folder: Path,
    context: int,
    noted: Callable[[str], None],
    problems: Path | None = None,
    revision: str | None = None,
) -> None:
    """Write the twin of the model `path`, a folder or a name on the hub, to `folder`.

    Args:
        context: tokens of its longest sequence.
        noted: is told what could not be kept.
        problems: a JSONL file whose text a tokenizer that is trained here should know.
        revision: of the model on the hub; None: the newest.

    Raises:
        SrlibError: nothing here or on the hub tells of its architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config, tokenizer = _config(path, noted, revision), _tokenizer(path, noted, problems, revision)
    spare = SPARE if config.get_text_config().vocab_size > len(tokenizer) + len(SPELLINGS) else 0
    narrow(config, len(tokenizer) + spare, context)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    # Random weights should end now and then, and ask: by the first rows that are spare, which become the tags'.
    with torch.no_grad():
        head.weight[[tokenizer.eos_token_id, *range(len(tokenizer), len(tokenizer) + spare)][:3]] *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def narrow(config: PreTrainedConfig, vocabulary: int, context: int) -> None:
    """Make a configuration small: what is a size shrinks, and what is structure stays.

    Kept are the number of query heads to a key head, the kinds of layers, mixtures of experts, whether the
    embeddings are tied, windows (shorter than the context), and whatever else the architecture knows.
    """
    inner = config.get_text_config()
    heads, keys = inner.num_attention_heads, getattr(inner, "num_key_value_heads", None) or inner.num_attention_heads
    keys_now = 1 if keys < heads else min(2, heads)
    heads_now = keys_now * (heads // keys)
    kinds = list(dict.fromkeys(getattr(inner, "layer_types", None) or ()))
    sizes = {
        "num_attention_heads": heads_now,
        "num_key_value_heads": keys_now,
        "head_dim": HEAD,
        "hidden_size": HEAD * heads_now,
        "intermediate_size": HEAD * heads_now,
        "moe_intermediate_size": HEAD,
        "shared_expert_intermediate_size": HEAD,
        "num_hidden_layers": max(LAYERS, len(kinds)),
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": context,
        "max_window_layers": 1,
        "vocab_size": vocabulary,
    }
    for name, size in sizes.items():
        if getattr(inner, name, None) is not None:
            setattr(inner, name, size)
    if getattr(inner, "sliding_window", None):
        inner.sliding_window = min(inner.sliding_window, context // 4)
    if kinds:
        inner.layer_types = (kinds * LAYERS)[: inner.num_hidden_layers]


def problems(folder: Path, n: int, seed: int) -> dict[str, Path]:
    """Worked traces and test problems, `n` of each; a trace begins with `<think>` and goes over its steps again and again.

    How often is log-normal: as in real sets, most are short, and some are many times as long.
    """
    rng, files = random.Random(seed), {}
    folder.mkdir(exist_ok=True)
    for split in ("traces", "test"):
        rows = []
        for problem in islice(arith.generate(Arith(), split, seed), n):
            steps, end, answer = problem.worked.removeprefix(arith.THINK).partition(arith.END_THINK)
            again = f"Wait, let me check this again. {steps} " * min(40, int(rng.lognormvariate(0, 1)))
            rows.append(problem.model_copy(update={"trace": f"{arith.THINK}\n{again}{steps}{end}{answer}"}))
        files[split] = folder / f"{split}.jsonl"
        write_jsonl(files[split], rows)
    return files


def cut(source: Path, file: Path, scale: float) -> None:
    """The rows of a JSONL file as they are, but for their long texts, which have one `scale`-th of their length.

    All of them: what is wrong with a row is what a rehearsal is to find, wherever it stands. A row that is no JSON is kept as it is, too: what a stage makes of it is to be seen.
    """

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        return value[: max(LONG, int(len(value) / scale))] if isinstance(value, str) else value

    with whole(file) as written:
        for _, line in lines(source):
            with suppress(ValueError):
                line = json.dumps(short(parsed(line)), ensure_ascii=False, default=str)
            written.write(f"{line}\n")


@cache
def reached() -> bool:
    """Whether the hub answers; it is asked once, and not for long."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return httpx.head(constants.ENDPOINT, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


def _config(path: str, noted: Callable[[str], None], revision: str | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main", local_files_only=not reached())
    except (OSError, ValueError) as error:
        known = next((values for name, values in KNOWN.items() if re.search(name, path.lower())), None)
        if known is None:
            raise SrlibError(
                f"{path}: neither a folder nor the hub gives its configuration, so it has no twin here: "
                f"{str(error).splitlines()[0]}"
            ) from None
        noted(f"{path}: its configuration is what srlib knows of it, as the hub was not reached")
        return AutoConfig.for_model(**known)
    if getattr(config, "quantization_config", None):
        noted(f"{path}: its weights are quantised, and those of its twin are not")
        del config.quantization_config
    return config


def _tokenizer(
    path: str, noted: Callable[[str], None], problems: Path | None, revision: str | None
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", local_files_only=not reached())
    except Exception:  # tokenizers raises nothing narrower
        noted(f"{path}: its tokenizer is one trained here, with R1's special tokens and shape of template")
        return trained(problems)


def trained(problems: Path | None = None) -> PreTrainedTokenizerBase:
    """A byte-level BPE with the special tokens of R1 and a template that opens the thought; it knows the text of `problems`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = [EOS, BOS, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(_text(problems), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=TEMPLATE
    )
    made.add_tokens([AddedToken(word, normalized=False) for word in (arith.THINK, arith.END_THINK)])
    return made


def _text(given: Path | None) -> Iterator[str]:
    """What a tokenizer is trained on: problems, those that are given too, and the letters of the tags."""
    for problem in islice(arith.generate(Arith(), "train", 0), 200):
        yield f"{problem.prompt} Wait, let me check this again. {problem.worked}"
    yield from SPELLINGS
    left = LEARNT
    for _, line in lines(given) if given else ():
        with suppress(ValueError):
            line = "\n".join(_texts(parsed(line)))  # without JSON's own marks
        yield line[:left]
        left -= len(line)
        if left <= 0:
            return


def _texts(value: Any) -> Iterator[str]:
    """The texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
