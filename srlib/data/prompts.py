"""Prompts: how a question is put to a model, in words and in ids; what one ends with, and what a trace begins with.

A prompt is a text: a question, or a conversation that ends with one, whose turns each stand behind two of ASCII's
separators with the role between them (`conversation`). So what is put behind a prompt is part of its last turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

    Raises:
        SrlibError: a prompt is a conversation, and a tokenizer has no chat template, or one that does not take its turns.
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
            if any(map(TURN.match, prompts)):
                raise SrlibError(f"{tokenizer.name_or_path} has no chat template, and a problem is a conversation.")
            encoded.append(tokenizer([prompt + end for prompt in prompts], **ids_alone)["input_ids"])
        else:
            key = (type(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
            if key not in filled:
                filled[key] = [text.removesuffix(own) + end for text in _filled(tokenizer, prompts)]
            encoded.append(tokenizer(filled[key], add_special_tokens=False, **ids_alone)["input_ids"])
    return encoded


ROLES = ("system", "user", "assistant")
TURN = re.compile(rf"\x1e({'|'.join(ROLES)})\x1f")


def conversation(said: Sequence[tuple[str, str]]) -> str:
    """A prompt of several turns (role, text); that of a user alone is its text.

    Raises:
        ValueError: the last turn is not a user's, or one has another role, is empty, or holds a separator.
    """
    for role, text in said:
        if role not in ROLES or not text.strip() or "\x1e" in text or "\x1f" in text:
            raise ValueError(f"a turn is {role}: {text[:50]!r}")
    if not said or said[-1][0] != "user":
        raise ValueError("it does not end with a user's turn")
    return said[0][1] if len(said) == 1 else "".join(f"\x1e{role}\x1f{text}" for role, text in said)


def turns(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt, as chat templates take them."""
    _, *parts = TURN.split(prompt) if TURN.match(prompt) else ["", "user", prompt]
    return [{"role": role, "content": text} for role, text in zip(parts[::2], parts[1::2])]


def readable(prompt: str) -> str:
    """A prompt for one who reads it: a conversation with its roles."""
    return TURN.sub(lambda mark: f"\n\n{mark[1]}: ", prompt).strip() if TURN.match(prompt) else prompt


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
        own = "messages if messages[0]['role'] == 'system' else"  # a conversation's own
        given["messages"] = f"{own} {[{'role': 'system', 'content': system}]} + messages"
    if tokenizer.chat_template is None:
        if given:
            raise SrlibError(f"{tokenizer.name_or_path} has no chat template: leave template and system empty for it.")
        return
    *_, after = str(tokenizer.chat_template).rpartition(MARK)  # of what was set where it was saved
    head = "".join(f"{{%- set {name} = {value} -%}}" for name, value in given.items())
    tokenizer.chat_template = head + MARK + after if given else after


def _filled(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(map(turns, prompts)), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise SrlibError(
            f"The chat template of {tokenizer.name_or_path} takes no such conversation: {error}."
        ) from None


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

    Of a conversation it is that of the last turn.

    Raises:
        SrlibError: it is neither.
    """
    text = FORMATS.get(how, how)
    if "{question}" not in text:
        near = nearest(how, list(FORMATS))
        hint = f"; did you mean {near!r}?" if near else "."
        raise SrlibError(f"prompt is {how!r}, which is none of {', '.join(FORMATS)} and has no {{question}}{hint}")
    start = question.rfind("\x1f") + 1 if TURN.match(question) else 0
    return question[:start] + text.replace("{question}", question[start:])
