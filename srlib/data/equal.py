"""Whether two answers are equal as mathematics, found out in a process of its own.

math-verify (sympy) can be made to compute for ever by a huge power or eat all memory, and an
alarm of its own works in a main thread only. So a worker process does it, one for each process
that asks: it counts its own CPU seconds, and the system ends it when they are used up; the next
question starts a new one. It ends by itself when nobody is left to ask.

Here the verdict is stricter than math-verify's where that takes for equal what does not say the same: a readable part
for the whole, `X` for `x`, 1/2^98 for 1/2^99, `2x = 5` for 5, `204_5` for `204_6`, `\\sin 30^\\circ` for `\\sin 30`.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import IO, Any

from srlib.data import reading

LIMIT = 1.0  # CPU seconds for one comparison
PATIENCE = 60  # times as many seconds by the clock, for a machine that is busy
MEMORY = 4 * 2**30  # bytes of address space of a worker
EQUAL, DIFFERS, UNREADABLE, GOLD = "equal", "differs", "cannot be read", "the gold cannot be read"
TIME, LOST = "took too long", "the comparison was ended from outside"


@lru_cache(maxsize=16_384)
def compare(gold: str, answer: str) -> str:
    """One of the verdicts above, within the time limit."""
    with _state.lock:
        return _state.ask(gold, answer)


class _Worker:
    """The process that compares, started when it is first needed."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0

    def ask(self, gold: str, answer: str, again: bool = True) -> str:
        process = self.process or self._start()
        try:
            _pipes(process)[0].write(json.dumps([gold, answer]).encode() + b"\n")
            line = self._line(LIMIT * PATIENCE)
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        if line is None or process.wait() == -signal.SIGPROF:
            self.stop()
            return TIME
        self.stop()  # something else ended it: with a new one it may go well
        return self.ask(gold, answer, again=False) if again else LOST

    def stop(self) -> None:
        """End the worker, if there is one."""
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.wait()
            for pipe in _pipes(process):
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        here = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "srlib.data.equal"],  # -P: no module of the working folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.started += 1
        if not self._line(None):
            code = process.wait()
            self.process = None
            raise RuntimeError(f"The process that compares answers ended with status {code}; is math-verify installed?")
        return process

    def _line(self, seconds: float | None) -> bytes | None:
        """What it answers; empty: it has ended; None: the time is over."""
        assert self.process is not None
        (_, out), line = _pipes(self.process), b""
        while not line.endswith(b"\n"):
            if not select.select([out], [], [], seconds)[0]:
                return None
            part = out.read(4096)
            if not part:
                return b""
            line += part
        return line


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """What the worker reads from, and what it writes to."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


_state = _Worker()
atexit.register(lambda: _state.stop())


def _forget() -> None:
    """After a fork the worker is the parent's."""
    global _state
    _state = _Worker()


os.register_at_fork(after_in_child=_forget)


def _verdict(gold: str, answer: str) -> str:
    wanted = _parsed(gold)
    if wanted is None:
        return GOLD
    given = _parsed(answer)
    if given is None:
        return UNREADABLE
    return EQUAL if _equal(wanted, given) or _rounds(gold, given) or _rounds(answer, wanted) else DIFFERS


DEEP = 40  # brackets one inside the other, and no answer has more
PROSE = re.compile("[A-Za-z ]{30}")  # no product of letters is that long
DROPPED = re.compile(r"\d\}?\s*_|\\[lcd]?dots|\.\.\.|…|'|\\prime|\d\s+\d|[\x00-\x1f]")
DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
DIGITS = 1000  # to which values are compared: what is smaller than 10^-1000 is taken for nothing


def _parsed(text: str) -> Any:
    """What latex2sympy reads in the whole text; None: it cannot, or would drop a part of it without a word.

    It is math-verify's own reader and comes without what math-verify does before: it would look for something
    readable inside the text, cut units off, write all letters small and take decimals for floating-point numbers.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    if DROPPED.search(text) or PROSE.search(re.sub(r"\\text\{[^{}]*\}", "", text)) or _depth(text) > DEEP:
        return None
    text = re.sub(r"\\([gG]amma)(?![A-Za-z])", r"\\text{\1letter}", text)  # else both are Euler's constant
    text = DECIMAL.sub(lambda m: f"{{\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}}}", text)
    looks = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="", equations=False
    )
    text = normalize_latex(text, looks)
    try:
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=bool(re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text)),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:
        return None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _equal(wanted: Any, given: Any) -> bool:
    """math-verify's comparison, without the equations and the letters that it takes for more than they say."""
    from math_verify import verify
    from math_verify.grader import is_equation, take_first_relation
    from sympy import E, Number, simplify
    from sympy.core.function import AppliedUndef

    if is_equation(given) and not is_equation(wanted):  # 2x = 5 is not 5, though x = 5 is, and f(2) = 5, and 2 + 3 = 5
        left = take_first_relation(given)
        if left.lhs.free_symbols or left.lhs.has(AppliedUndef):
            if not isinstance(left.lhs, AppliedUndef) and left.lhs.has(Number):
                return False
        elif simplify(left.lhs - left.rhs) != 0:
            return False
    if not verify(wanted, given, numeric_precision=DIGITS, timeout_seconds=None):
        return False
    ours, theirs = ({s.name for s in side.free_symbols} | ({"e"} if side.has(E) else set()) for side in (wanted, given))
    return not {s.casefold() for s in ours - theirs} & {s.casefold() for s in theirs - ours}  # X_1 is not x_1


def _rounds(text: str, value: Any) -> bool:
    """Whether a long decimal is what an irrational number rounds to."""
    from sympy import Expr, Rational

    match = re.fullmatch(r"-?(\d*)\.(\d+)", text)
    if not match or len(match[2]) < reading.PLACES or len((match[1] + match[2]).lstrip("0")) < reading.PLACES:
        return False
    if not isinstance(value, Expr) or value.is_Rational or not value.is_number or not value.is_extended_real:
        return False
    return abs(value.evalf(len(text) + 10) - Rational(text)) * 2 <= Rational(1, 10 ** len(match[2]))


def _serve() -> None:
    """What the worker does: a line in, a line out."""
    import logging
    import resource

    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook goes on to ask
    logging.disable(logging.CRITICAL)
    _verdict("1", "x")  # imports what it needs, which takes seconds
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    answers.write(b'"ready"\n')
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # SIGPROF ends the process, whatever it is doing
        try:
            verdict = _verdict(*json.loads(line))
        except (Exception, RecursionError, MemoryError):
            verdict = UNREADABLE
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(verdict).encode() + b"\n")


if __name__ == "__main__":
    _serve()
