"""A trace as lines of text, with who wrote each token right below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from srlib import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def under(tokens: Sequence[str], owners: str, width: int = 100) -> str:
    """Lines of tokens, and below each token the letter of its owner, at its first character.

    Args:
        tokens: as they are shown; what would not be seen is escaped.
        owners: a letter for each token, as the records of stage 05 have them.
        width: characters of a line; a token that is longer has a line of its own.
    """
    above, below, lines = "", "", []
    for token, owner in zip(map(visible, tokens), owners, strict=True):
        if above and len(above) + len(token) > width:
            lines += [above, below]
            above, below = "", ""
        above += token
        below += owner.ljust(len(token)) if token else ""
    return "\n".join(line.rstrip() for line in [*lines, above, below])


def of_record(text: str, owners: str, tokenizer: PreTrainedTokenizerBase, last: int = 400) -> str:
    """The last tokens of a completion, with their owners.

    The text is read into tokens again; where that gives other ones than were written, it is shown without owners.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != len(owners):
        told = f"({len(owners)} tokens were written, and read again the text has {len(ids)}: no owners are shown)"
        return f"{visible(text[-last:])}\n{told}"
    return under([tokenizer.decode([i]) for i in ids[-last:]], owners[-last:])
