"""Annotators: which parts of a worked trace the big model should write.

Every annotator writes the same record, spans as character positions in the plain trace, so
that one can take another's place. `gap` needs no judge: it marks the tokens that the big
model finds much likelier than the small one, from one forward pass of each. `judge` asks a
language model (see `srlib.annotation.judge`), `entropy` marks where the small model is unsure,
`worth` where it goes wrong (see `srlib.annotation.worth`), `random` is what any of them must
beat, and `given` takes the tags that the traces come with.
"""

from __future__ import annotations

import random as random_numbers
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlib import SrlibError
from srlib.annotation import answers, judge, readings, traces, worth
from srlib.annotation.alignment import Match, align, cover, units, why
from srlib.annotation.own import marks
from srlib.annotation.readings import Passage
from srlib.data import spans
from srlib.data.journal import Journal
from srlib.data.problems import told
from srlib.data.prompts import encode_prompt
from srlib.data.rows import Annotated, Problem, write_json, write_jsonl
from srlib.data.spans import Span
from srlib.engine.models import load_tokenizer
from srlib.engine.protocol import Engine
from srlib.params import Annotate, Params, own

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def run(
    p: Params, folder: Path, asked: list[Problem], small: Engine | None = None, big: Engine | None = None
) -> tuple[list[Annotated], dict[str, Any]]:
    """Annotate traces as the params say; what was asked or read is on the disk at once, and is not done again.

    Writes `annotated.jsonl` (a row a trace, the shortest first), `report.json`, and for a judge
    `unaligned.jsonl`, the passages that were not found, each with its reason. The journals beside
    them hold what a judge answered, or what models read of the traces (see `srlib.annotation.readings`).
    Each is named after all that decides what is in it, so other params do not meet it, and how
    marks are made of it may change without asking or reading again.

    Args:
        folder: of the stage's artefacts.
        asked: problems with traces.
        small, big: engines, as far as `p.annotate.engines` names them.

    Returns:
        the rows, and the report.

    Raises:
        SrlibError: another process is at work in `folder`, no trace can be annotated, or what the
            annotator raises. What was done until then is kept.
    """
    config, tokenizer = p.annotate, small.tokenizer if small else load_tokenizer(p.small)
    report: dict[str, Any] = {"annotator": config.method, "traces": len(asked)}
    made: Iterable[Annotated | str]
    if config.method == "judge":
        made, took = _judged(p, folder, asked, tokenizer)
    else:
        made, took = _annotator(p, folder, config.method, tokenizer, small, big)(asked), {}
    rows: list[Annotated] = []
    dropped: Counter[str] = Counter()
    for row in made:
        if isinstance(row, Annotated):
            rows.append(row)
        else:
            dropped[row] += 1
    if not rows:
        raise SrlibError(f"No trace could be annotated: {told(dropped)}.")
    rows.sort(key=lambda row: len(row.trace))
    write_jsonl(folder / "annotated.jsonl", rows)
    report |= {"annotated": len(rows), "dropped": dict(dropped.most_common())}
    report |= {"share": sum(row.share for row in rows) / len(rows), **took}
    write_json(folder / "report.json", report)
    return rows, report


FOUND = ("word for word", "but for case and spaces", "by likeness")


def compare(
    p: Params,
    folder: Path,
    rows: Sequence[Annotated],
    small: Engine | None = None,
    big: Engine | None = None,
) -> dict[str, list[Annotated]]:
    """What the annotators of `p.annotate.compare` mark in `n_compare` of the same traces, drawn at random, by name.

    Args:
        rows: what the chosen annotator marked; the first of what is returned are those of them that were drawn.
        small, big: as of `run`.
    """
    config, tokenizer = p.annotate, small.tokenizer if small else load_tokenizer(p.small)
    some = random_numbers.Random(p.seed).sample(rows, min(config.n_compare, len(rows)))
    marked: dict[str, list[Annotated]] = {config.method: some}
    for name in config.compare:
        if name != config.method:
            made = _annotator(p, folder, name, tokenizer, small, big)(some)
            marked[name] = [row for row in made if isinstance(row, Annotated)]
    return marked


def gap(
    small: Engine,
    big: Engine,
    problems: Sequence[Problem | Annotated],
    config: Annotate,
    files: tuple[Path | None, Path | None] = (None, None),
    hint: str = "",
) -> Iterator[Annotated]:
    """Mark the tokens with log p_big − log p_small > threshold (nats).

    Two prefills a trace, `config.batch_size` traces at a time. A number or a LaTeX command is
    marked as a whole or not at all; marks at most `merge_gap` tokens apart become one span, spans
    are cut at `max_span_tokens`, and where the marks exceed `max_share` of the trace the spans
    with the largest total gap stay.

    Args:
        small, big: engines of one vocabulary.
        problems: each with a worked trace.
        files: in which what each of the two reads is kept; see `srlib.annotation.readings`.
        hint: what stands behind every problem where it is written; see `Offload`.

    Raises:
        SrlibError: a problem has no trace, or the models do not share a vocabulary.
    """
    check_vocabularies(small.tokenizer, big.tokenizer)
    asked = _passages(problems, "gap", small.tokenizer, hint)
    read = [readings.read(model, "score", asked, config.batch_size, file) for model, file in zip((small, big), files)]
    gaps = ([b - s for s, b in zip(of_small.tolist(), of_big.tolist())] for of_small, of_big in zip(*read))
    return _by_value(gaps, "gap", problems, config, small.tokenizer)


def entropy(
    small: Engine,
    problems: Sequence[Problem | Annotated],
    config: Annotate,
    file: Path | None = None,
    hint: str = "",
) -> Iterator[Annotated]:
    """As `gap`, but for the tokens where the small model's distribution has more entropy than the threshold (nats)."""
    asked = _passages(problems, "entropy", small.tokenizer, hint)
    read = readings.read(small, "doubts", asked, config.batch_size, file)
    return _by_value((values.tolist() for values in read), "entropy", problems, config, small.tokenizer)


def random(
    problems: Sequence[Problem | Annotated], config: Annotate, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Iterator[Annotated]:
    """Spans of 1 to `max_span_tokens` tokens at random places, until they are `share` of the trace.

    Whole units and near marks are as in `gap`. Of what no token makes up exactly, such as the 0.4 of 12.4 tokens, the
    next is marked with that probability, so that over many traces the share is what was asked for.
    """
    for problem in problems:
        offsets = _encoded(tokenizer, problem)["offset_mapping"]
        whole = units(problem.worked, offsets)
        rng = random_numbers.Random(f"{seed} {problem.id}")
        chosen = _drawn(len(offsets), config, whole, rng)
        yield _annotated(problem, chosen, offsets, "random")


def given(
    problems: Sequence[Problem | Annotated], config: Annotate, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Annotated | str]:
    """The spans that the tags in the traces mark, either spelling of the closing one; a string: what is wrong.

    They are settled as the marks of any annotator; of more than `max_share`, the longest stay.
    """
    for problem in problems:
        faults, marked = spans.faults(problem.worked), spans.parse(problem.worked)
        if faults or not marked:
            names = ", ".join(sorted(faults))
            yield f"tags are {names}" if faults else "no span is marked"
            continue
        plain = problem.model_copy(update={"trace": spans.strip(problem.worked)})
        yield _of_passages(plain, marked, config, tokenizer, "given")


def by_token(small: Engine, big: Engine, problem: Problem, hint: str = "") -> list[dict[str, Any]]:
    """What `gap` sees of one trace: each token, its log-probability by either model, and the difference."""
    prompt = encode_prompt(small.tokenizer, problem.prompt + hint)
    trace = _encoded(small.tokenizer, problem)["input_ids"]
    by = [model.score([prompt + trace])[0][len(prompt) - 1 :] for model in (small, big)]
    names = small.tokenizer.convert_ids_to_tokens(trace)
    return [{"token": t, "small": s, "big": b, "gap": b - s} for t, s, b in zip(names, *by)]


def choose(gaps: list[float], config: Annotate, whole: Sequence[Span] = ()) -> list[Span]:
    """Spans, in tokens, for the gaps of one trace; those in `whole` are not cut into. See `gap`."""
    hard = [Span(i, i + 1) for i, value in enumerate(gaps) if value > config.threshold]
    return settle(hard, len(gaps), config, whole, lambda span, _: sum(gaps[span.start : span.end]))


def settle(
    marked: Iterable[Span], n: int, config: Annotate, whole: Sequence[Span], worth: Callable[[Span, Span], float]
) -> list[Span]:
    """What of the marks becomes the annotation, in tokens: whole units, near ones joined, the budgets kept.

    No span is longer than `max_span_tokens`: the pieces of one that was touch, and stay apart.

    Args:
        marked: spans of tokens, of `n`.
        whole: spans that are marked as a whole or not at all, in order.
        worth: of a piece, and of the span it is cut from; where `max_share` does not hold them all,
            the pieces with the highest stay.
    """
    marked = list(marked)
    inside = [False] * n
    for start, end in marked:
        inside[start:end] = [True] * (end - start)
    touched = [unit for unit in whole if any(inside[unit.start : unit.end])]
    joined = spans.merge([*marked, *touched], config.merge_gap)
    pieces = [(piece, span) for span in joined for piece in _cut(span, config.max_span_tokens, touched)]
    left, kept = int(config.max_share * n), []
    for piece, _ in sorted(pieces, key=lambda each: -worth(*each)):
        if piece.end - piece.start <= left:
            kept.append(piece)
            left -= piece.end - piece.start
    return sorted(kept)


def check_vocabularies(small: PreTrainedTokenizerBase, big: PreTrainedTokenizerBase) -> None:
    """Two tokenizers must agree on every id of the big one.

    Raises:
        SrlibError: they do not.
    """
    ours, theirs = small.get_vocab(), big.get_vocab()
    differing = [token for token, i in theirs.items() if ours.get(token) != i]
    if differing:
        raise SrlibError(
            f"The two models do not share a vocabulary: {len(differing)} tokens of the big one differ, "
            f"such as {differing[0]!r}. Choose two models of one family."
        )


def _passages(
    problems: Sequence[Problem | Annotated], name: str, tokenizer: PreTrainedTokenizerBase, hint: str
) -> list[Passage]:
    for problem in problems:
        if not problem.trace:
            raise SrlibError(f"Problem {problem.id} has no worked trace, and the {name} annotator needs one.")
    return readings.passages(problems, tokenizer, hint)


def _by_value(
    read: Iterable[list[float]],
    name: str,
    problems: Sequence[Problem | Annotated],
    config: Annotate,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Annotated]:
    """Rows by a number for each token."""
    for problem, values in zip(problems, read):
        offsets = _encoded(tokenizer, problem)["offset_mapping"]
        yield _annotated(problem, choose(values, config, units(problem.worked, offsets)), offsets, name)


def _encoded(tokenizer: PreTrainedTokenizerBase, problem: Problem | Annotated) -> BatchEncoding:
    return tokenizer(problem.trace, add_special_tokens=False, return_offsets_mapping=True)


def _annotated(
    problem: Problem | Annotated, marked: list[Span], offsets: Sequence[tuple[int, int]], name: str
) -> Annotated:
    """The row for spans in tokens, in order."""
    characters: list[Span] = []
    for first, behind in marked:
        start, end = offsets[first][0], offsets[behind - 1][1]
        if characters:  # one character may be of two tokens, and so of two spans: it is of the first
            start = max(start, characters[-1].end)
        if start < end:
            characters.append(Span(start, end))
    return Annotated(
        **problem.model_dump(include={"id", "prompt", "answer", "trace"}),
        spans=characters,
        share=sum(end - start for start, end in marked) / len(offsets),
        annotator=name,
    )


def _annotator(
    p: Params, folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, small: Engine | None, big: Engine | None
) -> Callable[[Sequence[Problem | Annotated]], Iterator[Annotated | str]]:
    """An annotator that needs no asking, ready to be given traces."""
    config, hint = p.annotate, p.offload.hint

    def scores() -> tuple[Path, Path]:
        return readings.journal(folder, p.small, "score"), readings.journal(folder, p.big, "score")

    def doubts() -> Path:
        return readings.journal(folder, p.small, "doubts")

    if own.named(name):
        return lambda asked: _by_own(p, asked, name, _loaded(small), _loaded(big))
    return {
        "gap": lambda asked: gap(_loaded(small), _loaded(big), asked, config, scores(), hint),
        "entropy": lambda asked: entropy(_loaded(small), asked, config, doubts(), hint),
        "worth": lambda asked: _worth(p, folder, asked, _loaded(small)),
        "random": lambda asked: random(asked, config, tokenizer, p.seed),
        "given": lambda asked: given(asked, config, tokenizer),
    }[name]


def _worth(p: Params, folder: Path, asked: Sequence[Problem | Annotated], small: Engine) -> Iterator[Annotated]:
    """As `gap`, but for the tokens at which the small model goes wrong; see `srlib.annotation.worth`."""
    config, hard = p.annotate.worth, p.annotate.model_copy(update={"threshold": p.annotate.worth.jump})
    with Journal(worth.journal(folder, p)) as journal:
        found = worth.values(small, asked, config, p.offload, journal, p.annotate.batch_size, p.seed)
        yield from _by_value(found, "worth", asked, hard, small.tokenizer)


def _by_own(
    p: Params, asked: Sequence[Problem | Annotated], name: str, small: Engine, big: Engine
) -> Iterator[Annotated | str]:
    """Settled as the spans of a judge are."""
    for problem, marked in zip(asked, marks(name, asked, small, big)):
        yield _of_passages(problem, marked, p.annotate, small.tokenizer, name)


def _loaded(engine: Engine | None) -> Engine:
    assert engine is not None, "`annotate.engines` names it"
    return engine


def _judged(
    p: Params, folder: Path, asked: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Annotated | str], dict[str, Any]]:
    """Rows by a judge, or why there is none, and what asking took; writes the passages that were not found."""
    config = p.annotate
    expected = judge.estimate(asked, config, tokenizer)
    print(
        f"{len(asked)} traces: about {expected.prompt_tokens:,} tokens to read and "
        f"{expected.completion_tokens:,} to write, cost {expected.cost(config.judge):.2f}"
    )
    with Journal(folder / f"judge-{judge.digest(p)}.journal.jsonl") as journal:
        judge.ask(judge.chosen(p, journal), asked, config, journal, expected)
        records = [journal.records[traces.key(problem)] for problem in asked]
    usage = answers.Usage()
    made: list[Annotated | str] = []
    found: list[tuple[str, str, str]] = []
    for problem, answer in zip(asked, records):
        usage.add(answer)
        made.append(_row(problem, answer, config, tokenizer, found))
    lost = ({"id": id_, "snippet": snippet, "reason": how} for id_, snippet, how in found if how not in FOUND)
    write_jsonl(folder / "unaligned.jsonl", lost)
    passages = dict(Counter(how for _, _, how in found).most_common())
    took = {"estimate": vars(expected), **vars(usage), "cost": usage.cost(config.judge), "passages": passages}
    return made, took


def _row(
    problem: Problem,
    answer: dict[str, Any],
    config: Annotate,
    tokenizer: PreTrainedTokenizerBase,
    found: list[tuple[str, str, str]],
) -> Annotated | str:
    """The row of a trace by a judge's answer, or why there is none; adds each passage to `found`, with how."""
    if answer["reason"]:
        return answer["reason"]
    trace = problem.worked
    matches = align(answer["snippets"], trace, config.min_score)
    found += ((problem.id, s, _how(s, m, trace)) for s, m in zip(answer["snippets"], matches))
    return _of_passages(problem, [Span(m.start, m.end) for m in matches if m], config, tokenizer, "judge")


def _of_passages(
    problem: Problem | Annotated, marked: list[Span], config: Annotate, tokenizer: PreTrainedTokenizerBase, name: str
) -> Annotated | str:
    """The row for passages, in characters, or why there is none."""
    offsets = _encoded(tokenizer, problem)["offset_mapping"]
    covered, whole = [cover(span, offsets) for span in marked], units(problem.worked, offsets)
    # Where they are more than may be marked, the longest passages stay: fewest hand-overs for the share.
    chosen = settle(covered, len(offsets), config, whole, lambda _, span: span.end - span.start)
    return _annotated(problem, chosen, offsets, name) if chosen else "no passage is within the budget"


def _how(snippet: str, match: Match | None, trace: str) -> str:
    if match is None:
        return why(snippet)
    if match.score < 1:
        return FOUND[2]
    return FOUND[0] if snippet.strip() in trace else FOUND[1]


def _cut(span: Span, size: int, whole: Sequence[Span]) -> Iterator[Span]:
    """`span` in pieces of at most `size` tokens, none ending inside a unit of `whole` that is not longer."""
    start = span.start
    while start < span.end:
        end = min(start + size, span.end)
        if end < span.end:
            end = next((u.start for u in whole if start < u.start < end < u.end), end)
        yield Span(start, end)
        start = end


def _drawn(n: int, config: Annotate, whole: Sequence[Span], rng: random_numbers.Random) -> list[Span]:
    """`share` of `n` tokens in random spans; those of `whole` are marked as a whole or not at all."""
    inside = {i for unit in whole for i in range(*unit)}
    atoms = sorted([*whole, *(Span(i, i + 1) for i in range(n) if i not in inside)])
    marked, gap = [False] * n, config.merge_gap

    def joined(start: int, end: int) -> Span:
        """With what lies between these tokens and marks that are near."""
        before = next((i + 1 for i in range(start - 1, max(start - gap - 2, -1), -1) if marked[i]), start)
        return Span(before, next((i for i in range(end, min(end + gap + 1, n)) if marked[i]), end))

    def fresh(span: Span) -> int:
        return marked[span.start : span.end].count(False)

    left = config.share * n
    while left > 0:
        size, first = rng.randint(1, config.max_span_tokens), rng.randrange(len(atoms))
        last = first
        while last + 1 < len(atoms) and atoms[last + 1].end - atoms[first].start <= min(size, left):
            last += 1
        span, certain = joined(atoms[first].start, atoms[last].end), True
        if fresh(span) > left:  # then the smallest that is left, or one of those that fit
            others = [other for other in (joined(*atom) for atom in atoms) if fresh(other)]
            least = min(map(fresh, others))
            span = rng.choice([other for other in others if fresh(other) <= max(least, left)])
            certain = rng.random() * fresh(span) < left
        if certain:
            start, end = span
            left -= fresh(span)
            marked[start:end] = [True] * (end - start)
        else:
            break
    runs = spans.merge(Span(i, i + 1) for i in range(n) if marked[i])
    return [piece for run in runs for piece in _cut(run, config.max_span_tokens, whole)]
