"""Which problems of a set stand in the test set as well: by runs of words that both have.

A word is one as people see it: letters and digits, whatever their case, and whatever spaces, signs and line breaks
lie between two. A problem that has fewer words than a run must be the same as a whole, signs included.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from os.path import commonprefix

WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
Words = tuple[str, ...]


class Overlap:
    """What a test set holds, to be looked for in other problems.

    Args:
        questions: of the test set, without what a params file puts around them.
        n: words in a row that no problem may share with one of them.
    """

    def __init__(self, questions: Iterable[str], n: int) -> None:
        self.n = n
        every = sorted({_words(question) for question in questions})
        # What all of them begin or end with, such as an instruction, is no problem's own.
        first, last = _shared(every), _shared([words[::-1] for words in every])
        self.wholes: set[Words] = set()
        self.runs: set[Words] = set()
        for words in every:
            own = words[first : len(words) - last] if first + last < len(words) else words
            self.runs |= self._runs(own)
            if len(_plain(own)) < n:
                self.wholes.add(words)

    def holds(self, question: str) -> bool:
        """Whether the test set has this problem."""
        words = _words(question)
        return words in self.wholes or not self.runs.isdisjoint(self._runs(words))

    def _runs(self, words: Words) -> set[Words]:
        plain = _plain(words)
        return {plain[i : i + self.n] for i in range(len(plain) - self.n + 1)}


def _words(text: str) -> Words:
    """Words and signs of a text, in one case and one writing."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _plain(words: Words) -> Words:
    return tuple(word for word in words if word.isalnum())


def _shared(every: list[Words]) -> int:
    """How many words all of several begin with; of a single one nothing is shared."""
    return len(commonprefix(every)) if len(every) > 1 else 0
