"""Sentences about results, each held against the run it stands in, and small cases chosen by what they are to show.

A sentence is printed with its verdict and the numbers behind it, so that it is true of any run. What it takes for a
sentence to hold stands in the sentence itself; where a run has nothing to tell it by, it says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from srlib import visible
from srlib.data import arith
from srlib.data.spans import Span
from srlib.evaluation import claims as policies
from srlib.evaluation import stats
from srlib.params import Sft

Row = Mapping[str, Any]
Case = TypeVar("Case")
VERDICTS = {True: "holds here", False: "does not hold here", None: "cannot be told here"}


def claim(sentence: str, holds: bool | None, numbers: str = "") -> None:
    """Print whether `sentence` holds in this run (None: it cannot be told), and the numbers that say so."""
    verdict = VERDICTS[None if holds is None else bool(holds)]
    print(visible(f"{verdict}: {sentence}" + (f" – {numbers}" if numbers else "")))


def case(candidates: Iterable[Case], shows: Callable[[Case], bool], what: str) -> Case:
    """The first candidate that shows what a text is about; if there is none, a sentence says so, and the first is it.

    Raises:
        ValueError: there are no candidates.
    """
    tried = 0
    for tried, candidate in enumerate(candidates, 1):
        if shows(candidate):
            return candidate
        if tried == 1:
            first = candidate
    if not tried:
        raise ValueError(f"There is nothing that could show {what}.")
    print(visible(f"no case here: none of {tried} shows {what}; what follows is the first of them."))
    return first


def at_products(trace: str, marks: Sequence[Span], every: bool = False) -> bool:
    """Whether there are marks, and in an arithmetic trace all of them at results of products; in characters.

    Args:
        every: whether each product of an arithmetic trace is to be marked, too.
    """
    results = arith.hard_spans(trace)
    if not marks or not re.search(r"\d[-+*]\d+=\d+;", trace):
        return bool(marks)
    return all(_inside(mark, results) for mark in marks) and (not every or len(marks) == len(results))


def hard_at_products(trace: str, tokens: Sequence[str], hard: Sequence[bool]) -> bool:
    """`at_products` of the tokens that are hard; in an arithmetic trace tokens are as long as their names."""
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    marks = [Span(end - len(token), end) for token, end, h in zip(tokens, ends, hard) if h]
    return at_products(trace, marks)


def _inside(mark: Span, spans: Sequence[Span]) -> bool:
    return any(span.start <= mark.start and mark.end <= span.end for span in spans)


def of_training(losses: Mapping[str, Sequence[float]]) -> None:
    """Two curves of a pair's training losses: how fast they fall, and which ends lower."""
    ends = {name: float(np.mean(curve[-max(1, len(curve) // 30) :])) for name, curve in losses.items()}
    early = {name: curve[len(curve) // 5] for name, curve in losses.items()}
    claim(
        "a fifth of the steps brings either loss below half of what it began with",
        all(early[name] < curve[0] / 2 for name, curve in losses.items()),
        "; ".join(f"{name} from {curve[0]:.2f} to {early[name]:.2f} nats" for name, curve in losses.items()),
    )
    claim(
        "the big model ends lower than the small one",
        ends["big"] < ends["small"],
        f"{ends['big']:.3f} and {ends['small']:.3f} nats a token",
    )


def of_steps(table: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """Where the two models differ, from the right steps and the steps of either model by operation."""

    def right(model: str, operations: str) -> float:
        done, steps = np.sum([table[model][operation] for operation in operations], axis=0)
        return float(done / max(1, steps))

    easy, hard = ([right(model, operations) for model in ("small", "big")] for operations in ("+-", "*"))
    claim(
        "the models are further apart on products than on sums and differences",
        hard[1] - hard[0] > easy[1] - easy[0],
        f"small and big have {hard[0]:.1%} and {hard[1]:.1%} of the products right, "
        f"{easy[0]:.1%} and {easy[1]:.1%} of the rest",
    )


def of_wrong_traces(problems: Sequence[Any], records: Sequence[Row]) -> None:
    """Whether it is at products that a model's wrong traces go wrong, step by step as it wrote them."""
    counts = [arith.step_accuracy(problem.worked, record["text"]) for problem, record in zip(problems, records)]
    failed = [{o for o, (right, steps) in count.items() if right < steps} for count in counts]
    wrong = [f for f, record in zip(failed, records) if not record["correct"]]
    products, others = (sum(bool(f & set(of)) for f in wrong) for of in ("*", "+-"))
    spared = sum("*" in f for f, record in zip(failed, records) if record["correct"])
    claim(
        "most of the small model's wrong traces have a wrong product",
        products > len(wrong) / 2 if wrong else None,
        f"{products} of {len(wrong)}; {others} a wrong sum or difference; "
        f"a wrong product in {spared} of {len(records) - len(wrong)} right ones",
    )


def of_gaps(gaps: Sequence[float], threshold: float) -> None:
    """How few tokens of a trace the big model finds much likelier than the small one does; nats."""
    near, hard = (float(np.mean(which)) for which in (np.abs(gaps) < 0.1, np.asarray(gaps) > threshold))
    claim(
        "the gap is near zero nearly everywhere, below a tenth of a nat at four tokens of five",
        near >= 0.8,
        f"{near:.1%} of {len(gaps)} tokens; above the threshold at {hard:.1%}",
    )


def of_marks(found: Sequence[Row], method: str, everything: float) -> None:
    """Whether marks lie at what is hard, from their precision and recall against the truth.

    Args:
        found: of each annotator `annotator`, `precision`, `recall`.
        everything: the precision of marking all tokens.
    """
    by_name = {row["annotator"]: row for row in found}
    own = by_name[method]
    claim(
        f"a token that {method} marks is hard more than twice as often as any token",
        own["precision"] > 2 * everything,
        f"{own['precision']:.1%} against {everything:.1%}; {own['recall']:.1%} of the hard tokens are marked",
    )
    if "random" in by_name:
        lots = by_name["random"]["precision"]
        claim(
            "what is drawn at random is hard about as often as any token, within two points",
            abs(lots - everything) <= 0.02,
            f"{lots:.1%} against {everything:.1%}",
        )


def of_answers(marked: Mapping[str, Sequence[Any]], method: str) -> None:
    """How many of each annotator's spans lie in what stands behind the thought: an answer that is only copied."""
    shares = {}
    for name, rows in marked.items():
        places = [span.end > _answer(row.trace) for row in rows for span in row.spans]
        shares[name] = sum(places) / len(places) if places else 0.0
    numbers = ", ".join(f"{name} {share:.1%} of its spans" for name, share in shares.items())
    others = [share for name, share in shares.items() if name == "random"]
    claim(
        f"{method} leaves the copied answer alone more often than random does",
        shares[method] < others[0] if others and method != "random" else None,
        numbers,
    )


def _answer(trace: str) -> int:
    at = trace.find(arith.END_THINK)
    return at if at >= 0 else len(trace)


def of_finetuning(log: Sequence[Row]) -> None:
    """How soon a loss falls, from a trainer's log; each record has `step` and `loss`."""
    first, last = log[0], log[-1]
    early = [record for record in log if record["step"] <= last["step"] / 5][-1:] or [first]
    fall, soon = first["loss"] - last["loss"], first["loss"] - early[0]["loss"]
    claim(
        "a fifth of the steps brings most of the fall of the loss",
        soon > fall / 2 if fall > 0 else False,
        f"from {first['loss']:.3f} at step {first['step']} to {early[0]['loss']:.3f} at {early[0]['step']} "
        f"and {last['loss']:.3f} at {last['step']}",
    )


def warn_if_silent(found: Sequence[Sequence[Span]], learnt: Sequence[Any], sft: Sft) -> None:
    """Print a warning, with what to try, where a tuned model asks in no trace.

    Args:
        found: the spans of each of its traces.
        learnt: rows with `spans`: the traces it was to learn from.
        sft: how it was trained.
    """
    if any(found):
        return
    spans = sum(len(row.spans) for row in learnt)
    print(
        f"warning: the tuned model asks in none of {len(found)} traces, so nothing would be handed over, and 03 would "
        f"have nothing to reinforce: train it longer (sft.epochs, now {sft.epochs:g}), faster (sft.learning_rate, now "
        f"{sft.learning_rate:g}), or on more than these {spans} spans in {len(learnt)} traces (annotate.n_traces; a lower "
        "annotate.threshold)"
    )


def of_imitation(annotated: Sequence[Any], places: Sequence[float], shares: Sequence[float]) -> None:
    """Whether a tuned model asks where, and as much as, its annotator marked.

    Args:
        annotated: rows with `spans`, `trace` and `share`.
        places: relative start of every span of the tuned model.
        shares: of each of its traces.
    """
    from scipy.stats import ks_2samp

    marks = [span.start / len(row.trace) for row in annotated for span in row.spans]
    apart = float(ks_2samp(marks, places).statistic) if marks and len(places) else None
    claim(
        "its spans lie where the annotator's lay: up to no place in a trace do the two differ by more than ten points",
        apart <= 0.1 if apart is not None else None,
        f"{apart:.1%} at most" if apart is not None else "it does not ask",
    )
    theirs, own = float(np.mean([row.share for row in annotated])), float(np.mean(shares))
    claim(
        "they take about the same share of a trace, within a quarter",
        abs(own - theirs) <= theirs / 4,
        f"{own:.1%} and {theirs:.1%} on average",
    )


def of_rewards(totals: Mapping[str, float]) -> None:
    """In what order the rewards in use put three completions."""
    alone, asked, wrong = (totals[name] for name in ("right, alone", "right, asked", "wrong, alone"))
    claim(
        "a right answer without help is worth most, a right one with help more than a wrong one",
        alone > asked > wrong,
        ", ".join(f"{name} {total:.3f}" for name, total in totals.items()),
    )


def of_reinforcement(log: Sequence[Row]) -> None:
    """What the rollouts of the last fifth of the steps have over those of the first."""
    values = {}
    for key in ("rewards/accuracy/mean", "offload_share"):
        some = [record[key] for record in log if key in record]
        n = max(1, len(some) // 5)
        values[key] = float(np.mean(some[:n])), float(np.mean(some[-n:]))
    (before, after), (asked, asks) = values.values()
    steps = f"{before:.1%} in the first {n} step(s), {after:.1%} in the last"
    claim("the accuracy of the rollouts rises", after > before, steps)
    claim("their offload share does not rise", asks <= asked, f"{asked:.2%} and {asks:.2%}")


def of_policies(rows: Sequence[Row]) -> None:
    """What the main figure shows of random offloading, trained policies, their controls, and untrained baselines."""
    for words, holds, found in policies.of_policies({row["policy"]: row for row in rows}):
        plain = words.replace("**", "")
        claim(plain[0].lower() + plain[1:], holds, found)


def of_reach(rows: Sequence[Row]) -> None:
    """Which policies of two models have intervals that meet the big model's, and at which share."""
    bigs = [row for row in rows if row["policy"] == "big"]
    mixed = [row for row in rows if 0 < row["offload_share"] < 1]
    near = [row for row in mixed for big in bigs if row["ci95"][1] >= big["ci95"][0]]
    claim(
        "some policy of both models reaches the big model's interval",
        bool(near) if bigs and mixed else None,
        ", ".join(f"{row['policy']} at {row['offload_share']:.1%}" for row in near),
    )


def of_places(places: Mapping[str, Sequence[float]], shares: Mapping[str, Sequence[float]]) -> None:
    """Where in their traces the spans of policies begin, 0 to 1, and which part of each trace they take."""
    for name, some in places.items():
        early = sum(place < 0.5 for place in some) / len(some) if some else 0.0
        claim(
            f"the spans of {name} begin in either half of a trace, a quarter of them at least in each",
            0.25 <= early <= 0.75 if some else None,
            f"{early:.1%} of {len(some)} in the first half",
        )
        middle = float(np.median(shares[name]))
        claim(
            f"{name} hands over less than a tenth of most traces",
            middle < 0.1 if some else None,
            f"half of them at most {middle:.1%}",
        )


def of_intervals(ways: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Whether three ways to an interval agree; policy → way → (low, high)."""
    ends = [np.ptp(np.array(list(some.values())), axis=0).max() for some in ways.values()]
    claim(
        "no two ways differ by a point or more",
        max(ends) < 0.01 if ends else None,
        ", ".join(f"{name} {100 * end:.2f} points" for name, end in zip(ways, ends)),
    )


def of_worth(differences: Mapping[str, stats.Difference]) -> None:
    """Whether trained policies are right more often than the best baseline that needs no training, at a like share."""
    if not differences:
        claim("training is worth more than asking where the small model is unsure", None)
    for name, d in differences.items():
        claim(
            f"training is worth more than asking where the small model is unsure, {name} is above 0",
            d.low > 0,
            f"{d.value:+.1%} [{d.low:+.1%}, {d.high:+.1%}]",
        )


def of_difficulty(parts: Mapping[str, Any]) -> None:
    """Whether share and gain grow with difficulty; policy → data frame by difficulty, from easy to hard."""
    if not {"small", "learned"} <= parts.keys():
        return claim("share and distance to the small model grow with difficulty", None)
    learned, small = parts["learned"], parts["small"]
    shares = learned["offload share"].tolist()
    gains = (learned["accuracy"] - small["accuracy"]).tolist()
    for sentence, values in (
        ("the share grows with difficulty", shares),
        ("the distance to the small model grows with difficulty", gains),
    ):
        rising = all(one < other for one, other in pairwise(values))
        claim(sentence, rising, ", ".join(f"{value:.1%}" for value in values))
    return None


def of_requests(requests: Sequence[Row]) -> None:
    """Whether requests at products are needed more often than others; each has `at`, `verdict` and its problem's `id`."""
    sides = [[r for r in requests if (r["at"] == "*") == product] for product in (True, False)]
    sentence = "requests at products are needed more often than others, and the intervals do not meet"
    if not all(sides):
        return claim(sentence, None, f"{len(sides[0])} at products, {len(sides[1])} elsewhere")
    product, other = (stats.proportion([r["verdict"] == "needed" for r in s], [r["id"] for r in s]) for s in sides)
    told = [f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in (product, other)]
    return claim(sentence, product.low > other.high, f"{told[0]} of {len(sides[0])}, {told[1]} of {len(sides[1])}")


def of_processing(traces: Sequence[Any]) -> None:
    """How many tokens each model processed, beside those of prompt and trace; of `srlib.decoding.trace.Trace`."""
    least, small, big = (
        sum(getattr(t, key) for t in traces)
        for key in ("least_forward_tokens", "small_forward_tokens", "big_forward_tokens")
    )
    claim(
        "neither model processes more tokens than prompt and trace hold, in any trace",
        all(max(t.small_forward_tokens, t.big_forward_tokens) <= t.least_forward_tokens for t in traces),
        f"{small:,} by the small model and {big:,} by the big one, of {least:,}; more than its own in "
        f"{sum(max(t.small_forward_tokens, t.big_forward_tokens) > t.least_forward_tokens for t in traces)} traces",
    )
    never = [t for t in traces if not t.handovers]
    claim(
        "the big model processes nothing where it was never asked",
        not any(t.big_forward_tokens for t in never) if never else None,
        f"{len(never)} of {len(traces)} traces",
    )
