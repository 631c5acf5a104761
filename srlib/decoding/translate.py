"""Ids of one tokenizer into ids of another, through their bytes: how two models of different vocabularies meet.

A token stands for the same bytes wherever it is, so a stream of ids is a stream of bytes, and translating
never looks back further than the last character. Whole characters are encoded as the other tokenizer would
in the middle of a text; what is no whole character goes over in tokens of one byte each, so both streams hold
the same bytes, in any script, whatever a model writes and wherever a hand-over falls.

The text of a control token such as the end of text, and of srlib's tags, is spelled out in the target: no
text can become one. `<think>` and `</think>` are tokens in the target if it has them.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from srlib import SrlibError
from srlib.data.spans import SPELLINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK = ("<think>", "</think>")
# What a vocabulary may lack, as no script needs it: control characters, planes without any character, and
# bytes that are not in UTF-8. The text has U+FFFD for each of these bytes that one of the two lacks.
DISPENSABLE = {*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF4, 0x100)} - set(b"\t\n\r")
LOST = "\ufffd".encode()
# Letters and digits; CJK, Devanagari, Arabic, Hangul; joined emoji and a flag; accents apart from their letters.
PROBE = "".join(map(chr, range(0x20, 0x7F))) + (
    "\t\n\r\n\n    x  y 中文，漢字𠮷 हिन्दी क्षि العَرَبِيَّة 한국어 👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 e\u0301o\u0308 é ﬁ ① Ω Å ∑∈ℝ½ \u00a0\u200b\u3000\U000e0041"
)


class Vocabulary:
    """A tokenizer as bytes: what bytes an id stands for, and ids for bytes in the middle of a text.

    Raises:
        SrlibError: some text is lost in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if backend is None:
            raise SrlibError(f"The tokenizer {self.name} is not of the tokenizers library: no text goes through it.")
        state = json.loads(backend.to_str())
        byte_level = '"ByteLevel"' in json.dumps(state["decoder"])
        self._of_character = {c: b for b, c in bytes_to_unicode().items()} if byte_level else None
        self._added = {token["id"]: token["content"] for token in state["added_tokens"]}
        self._backend = Tokenizer.from_str(json.dumps(_continuing(state)))
        self._backend.encode_special_tokens = True
        self._cache: dict[int, bytes] = {}
        self._of_byte: dict[int, list[int]] = {}
        for b, name in bytes_to_unicode().items():
            i = self._backend.token_to_id(name if byte_level else f"<0x{b:02X}>")
            ids = [i] if i is not None else self._backend.encode(chr(b), add_special_tokens=False).ids
            if self.join(ids) == bytes([b]):
                self._of_byte[b] = ids
        self.lacks = set(range(256)) - self._of_byte.keys()
        self._check(tokenizer)

    def spell(self, i: int) -> bytes:
        """What the id stands for in the middle of a text; nothing if it is not in the vocabulary."""
        if i not in self._cache:
            self._cache[i] = self._spell(i)
        return self._cache[i]

    def join(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.spell, ids))

    def encode(self, data: bytes) -> list[int]:
        """Ids for exactly these bytes; what the tokenizer would change, or no character, is written byte by byte.

        Raises:
            SrlibError: there is no token for one of those; not after `Translator` has put U+FFFD in its place.
        """
        text = data.decode("utf-8", "surrogateescape")  # a byte of no character becomes a lone surrogate
        if (ids := self._exact(text)) is not None:
            return ids
        changed = {c for c in text if self._exact(c) is None}
        ids = []
        for alone, characters in itertools.groupby(text, changed.__contains__):
            run = "".join(characters)
            whole = None if alone else self._exact(run)
            ids += whole if whole is not None else [i for c in run for i in self._exact(c) or self._bytewise(c)]
        return ids

    def _spell(self, i: int) -> bytes:
        token = self._backend.id_to_token(i)
        if token is None:
            return b""
        if self._of_character is None and (match := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(match[1])
        if i in self._added:
            return self._added[i].encode()
        if self._of_character is not None:
            known = self._of_character.keys() >= set(token)
            return bytes(map(self._of_character.__getitem__, token)) if known else token.encode()
        decoder = self._backend.decoder
        return (decoder.decode(["a", token])[1:] if decoder else token).encode()

    def _exact(self, text: str) -> list[int] | None:
        """Ids of the tokenizer's own choice, if they say just this."""
        if re.search("[\udc80-\udcff]", text):
            return None
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return ids if self.join(ids) == text.encode() else None

    def _bytewise(self, character: str) -> list[int]:
        data = character.encode("utf-8", "surrogateescape")
        if not self.lacks.isdisjoint(data):
            raise SrlibError(
                f"The tokenizer {self.name} cannot write every text: {character!r} is lost. Choose two models of one "
                "vocabulary, or tokenizers that write any text (byte-level, or with byte fallback)."
            )
        return [i for b in data for i in self._of_byte[b]]

    def _check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for data in [*(c.encode() for c in PROBE), *(bytes([b]) for b in sorted(self.lacks - DISPENSABLE))]:
            self.encode(data)
        text = "a" + PROBE  # a space at the very start may be dropped
        decoded = tokenizer.decode(self.encode(text.encode()), clean_up_tokenization_spaces=False)
        if decoded != text:
            at = next((n for n, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
            raise SrlibError(f"The tokenizer {self.name} decodes {text[at : at + 9]!r} as {decoded[at : at + 9]!r}.")


def check_lossless(tokenizer: PreTrainedTokenizerBase) -> None:
    """Any text must go through the tokenizer unchanged.

    Raises:
        SrlibError: it does not; the message names the tokenizer and a character that is lost.
    """
    Vocabulary(tokenizer)


class Translator:
    """One direction in one trace: ids of `source` come in as they are written, ids of `target` go out."""

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        self._source, self._target = source, target
        lacking = bytes(source.lacks | target.lacks)
        self._lacking = re.compile(b"[" + re.escape(lacking) + b"]") if lacking else None
        self._window: list[int] = []  # source ids: what was held before the latest feed, and that feed
        self._before = self._over = 0  # bytes of the window that had gone over before that feed, and after it
        self._out: list[int] = []  # target ids of that feed

    @property
    def held(self) -> list[int]:
        """The last source ids, whose text has not wholly gone over."""
        return self._window[self._within(self._over)[0] :]

    def feed(self, ids: list[int], last: bool = False) -> list[int]:
        """Target ids for the new source ids; an unfinished character waits for its rest, or for `last`."""
        done, size = self._within(self._over)
        self._window = self._window[done:] + ids
        self._before = self._over - size
        data = self._join(self._window)[self._before :]
        _, used = codecs.utf_8_decode(data, "surrogateescape", last)
        self._over = self._before + used
        self._out = self._target.encode(data[:used])
        return list(self._out)

    def rewind(self, kept: int) -> tuple[int, list[int]]:
        """Only the first `kept` target ids of the latest feed stay; what was held is dropped.

        Returns:
            how many ids to take back from the end of the source stream, which may reach into earlier feeds
            by what was held, and the source ids to put there instead. Then both streams end with the same byte.
        """
        self._out = self._out[:kept]
        self._over = self._before + len(self._target.join(self._out))
        stay, size = self._within(self._over)
        again = self._source.encode(self._join(self._window)[size : self._over])
        taken = len(self._window) - stay
        self._window = self._window[:stay] + again
        return taken, again

    def _join(self, ids: list[int]) -> bytes:
        """The bytes to go over."""
        data = self._source.join(ids)
        return self._lacking.sub(LOST, data) if self._lacking else data

    def _within(self, limit: int) -> tuple[int, int]:
        """How many ids of the window lie wholly within its first `limit` bytes, and their bytes."""
        size = 0
        for n, i in enumerate(self._window):
            length = len(self._join([i]))
            if size + length > limit:
                return n, size
            size += length
        return len(self._window), size


class Same:
    """A `Translator` between equal vocabularies: ids pass as they are."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self._out: list[int] = []

    def feed(self, ids: list[int], last: bool = False) -> list[int]:
        self._out = ids
        return ids

    def rewind(self, kept: int) -> tuple[int, list[int]]:
        taken = len(self._out[kept:])
        self._out = self._out[:kept]
        return taken, []


class Bridge:
    """Both directions between the tokenizers of a pair.

    Raises:
        SrlibError: the vocabularies differ, and one of them loses text.
    """

    def __init__(self, small: PreTrainedTokenizerBase, big: PreTrainedTokenizerBase) -> None:
        self.same = same_vocabulary(small, big)
        if not self.same:
            self._small, self._big = Vocabulary(small), Vocabulary(big)

    def start(self) -> tuple[Translator | Same, Translator | Same]:
        """Two translators for a new trace: to the big model, and to the small one."""
        if self.same:
            return Same(), Same()
        return Translator(self._small, self._big), Translator(self._big, self._small)


def same_vocabulary(small: PreTrainedTokenizerBase, big: PreTrainedTokenizerBase) -> bool:
    """Whether ids mean the same in both tokenizers, srlib's tags aside, which need not be in both."""
    if small is big:
        return True
    ours, theirs = ({t: i for t, i in each.get_vocab().items() if t not in SPELLINGS} for each in (small, big))
    return ours == theirs


def _continuing(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a tokenizer that encodes the rest of a text: no first space, nothing normalised or cut off."""
    for token in state["added_tokens"]:
        token.update(lstrip=False, rstrip=False, normalized=False)
        token["special"] = token["content"] in SPELLINGS or (token["special"] and token["content"] not in THINK)
    for part in _parts(state["pre_tokenizer"], "pretokenizers"):
        part.update({k: v for k, v in (("prepend_scheme", "never"), ("add_prefix_space", False)) if k in part})
    spaces = [part for part in _parts(state["normalizer"], "normalizers") if part.get("content") == "▁"]
    normalizer = {"type": "Sequence", "normalizers": spaces} if spaces else None
    return {**state, "normalizer": normalizer, "post_processor": None, "truncation": None, "padding": None}


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A component, or those of a sequence of them."""
    if component is None:
        return []
    return [p for inner in component[key] for p in _parts(inner, key)] if key in component else [component]
