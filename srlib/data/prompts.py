"""Prompts: how a question is put to a model, in words and in ids; what one ends with, and what a trace begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from srlib import SrlibError
from srlib.params.loading import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt as the model is asked: through the tokenizer's chat template, if it has one."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """`encode_prompt` of each of `prompts`, in half the time."""
    return encode_for_each([tokenizer], prompts)[0]


def encode_for_each(tokenizers: list[PreTrainedTokenizerBase], prompts: list[str]) -> list[list[list[int]]]:
    """`encode_prompts` for each of `tokenizers`; a chat template that several share is filled in once.

    All prompts end as that of the first does (see `opening`): what the models write goes on behind each.
    """
    ids_alone = {"return_attention_mask": False}
    end = opening(tokenizers[0])
    filled: dict[tuple[Any, ...], list[str]] = {}
    encoded: list[list[list[int]]] = []
    for tokenizer in tokenizers:
        own = opening(tokenizer)
        if not prompts:
            encoded.append([])
        elif tokenizer.chat_template is None:
            encoded.append(tokenizer([prompt + end for prompt in prompts], **ids_alone)["input_ids"])
        else:
            key = (type(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
            if key not in filled:
                filled[key] = [text.removesuffix(own) + end for text in _filled(tokenizer, prompts)]
            encoded.append(tokenizer(filled[key], add_special_tokens=False, **ids_alone)["input_ids"])
    return encoded


THINK = "<think>"
MARK = "{#- above: from the params -#}"


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a prompt ends with that is the beginning of the answer: `<think>` and what follows, or nothing.

    Chat templates of the R1 family write it behind the assistant's mark, so the model does not.
    """
    if tokenizer.chat_template is None:
        return ""
    return _opening(_filled(tokenizer, ["?"])[0])


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A worked trace as it goes on behind a prompt: without the beginning that stands in the prompt already."""
    own = opening(tokenizer)
    trace = text.lstrip()
    if not own or not trace.startswith(THINK):
        return text
    return trace.removeprefix(THINK).removeprefix(own.removeprefix(THINK))


def with_opening(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What a model wrote behind a prompt, with the beginning that stands in the prompt: what is graded."""
    return opening(tokenizer) + text


def set_template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], system: str = "") -> None:
    """Fix arguments of the chat template, and a system turn, in the template itself.

    So whoever fills it in has them, and so does the tokenizer that is saved with an adapter.

    Raises:
        SrlibError: there is no chat template, or one argument is no name.
    """
    for name in arguments:
        if not name.isidentifier():
            raise SrlibError(f"template holds {name!r}, which is no name of an argument.")
    given = {name: repr(value) for name, value in arguments.items()}  # Jinja reads Python's literals
    if system:
        given["messages"] = f"{[{'role': 'system', 'content': system}]} + messages"
    if tokenizer.chat_template is None:
        if given:
            raise SrlibError(f"{tokenizer.name_or_path} has no chat template: leave template and system empty for it.")
        return
    *_, after = str(tokenizer.chat_template).rpartition(MARK)  # of what was set where it was saved
    head = "".join(f"{{%- set {name} = {value} -%}}" for name, value in given.items())
    tokenizer.chat_template = head + MARK + after if given else after


def _filled(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _opening(prompt: str) -> str:
    before, mark, after = prompt.rpartition(THINK)
    return mark + after if mark and not after.strip() else ""


FORMATS = {
    "plain": "{question}",
    "boxed": "{question}\n\nReason step by step, and put the final answer into \\boxed{}.",
    "base": "Question: {question}\n\nAnswer, step by step, with the final result in \\boxed{}: ",
}


def ask(question: str, how: str) -> str:
    """A question as the model is asked it: `how` is one of `FORMATS`, or a text with {question} in it.

    Raises:
        SrlibError: it is neither.
    """
    text = FORMATS.get(how, how)
    if "{question}" not in text:
        near = nearest(how, list(FORMATS))
        hint = f"; did you mean {near!r}?" if near else "."
        raise SrlibError(f"prompt is {how!r}, which is none of {', '.join(FORMATS)} and has no {{question}}{hint}")
    return text.replace("{question}", question)
