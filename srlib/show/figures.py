"""Every figure, on seaborn. Each function draws what it is given and returns the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from srlib import visible
from srlib.show.tables import NO_MATHS, escaped

SMALL_COLOUR, BIG_COLOUR = "#4c72b0", "#dd8452"


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; in a notebook it is shown as well."""
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def label(text: object) -> str:
    """`text` for a figure, as it is: a dollar begins no formula, and what begins with _ is not left out of a legend."""
    seen = visible(str(text)).replace("$", r"\$")
    return f" {seen}" if seen.startswith("_") else seen


def _axes(width: float = 6.0, height: float = 3.6, columns: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes: one, or an array of `columns`."""
    sns.set_theme(style="whitegrid", context="notebook")
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def losses(curves: dict[str, Sequence[float]], steps: dict[str, Sequence[float]] | None = None) -> Figure:
    """Training loss in nats a token, one line a model; raw values pale, a running mean in full colour."""
    figure, axes = _axes()
    for name, curve in curves.items():
        x = np.arange(1, len(curve) + 1) if steps is None else np.asarray(steps[name])
        _running_mean(axes, x, curve, max(1, len(curve) // 30), label=label(name))
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", yscale="log")
    axes.legend()
    return figure


def learning_curves(logs: dict[str, Sequence[dict]]) -> Figure:
    """Accuracy of the rollouts and offload share by GRPO step; single steps pale, a running mean in full colour.

    Looks at held-out problems are points on a dashed line, and the one that is kept is a star.

    Args:
        logs: name → the trainer's log, a record a step, and one a look.
    """
    figure, panels = _axes(10, 3.6, columns=2)
    keys = {
        "accuracy": ("rewards/accuracy/mean", "eval_accuracy"),
        "offload share": ("offload_share", "eval_offload_share"),
    }
    for axes, (what, (key, held_out)) in zip(panels, keys.items()):
        for name, log in logs.items():
            steps = [record["step"] for record in log if key in record]
            values = np.array([record[key] for record in log if key in record])
            if len(values):
                _running_mean(axes, steps, values, max(1, len(values) // 15), label=label(name))
                _looks(axes, [record for record in log if held_out in record], held_out)
        axes.set(xlabel="GRPO step", ylabel=f"{what} of the rollouts")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(logs) > 1:
        panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def _looks(axes: Axes, seen: Sequence[dict], key: str) -> None:
    """Looks, in the colour of the line before."""
    colour = axes.lines[-1].get_color()
    axes.plot([look["step"] for look in seen], [look[key] for look in seen], "o--", color=colour, markersize=4)
    for look in seen:
        if look["kept"] == 1:  # in a mean over seeds: by all of them
            axes.plot(look["step"], look[key], "*", color=colour, markersize=14)


def step_accuracy(table: dict[str, dict[str, tuple[int, int]]]) -> Figure:
    """Share of right steps by operation, beside each other for every model, with 95 % Wilson intervals.

    Args:
        table: model → operation → (right steps, steps).
    """
    from scipy.stats import binomtest

    figure, axes = _axes()
    names = list(table)
    width = 0.8 / len(names)
    for i, (name, colour) in enumerate(zip(names, sns.color_palette())):
        operations = list(table[name])
        tests = [binomtest(right, total) if total else None for right, total in table[name].values()]
        values = np.array([t.statistic if t else np.nan for t in tests])
        bounds = [t.proportion_ci(method="wilson") if t else (np.nan, np.nan) for t in tests]
        error = np.abs(np.array(bounds).T - values)
        place = np.arange(len(operations)) + (i - (len(names) - 1) / 2) * width
        axes.bar(place, values, width, yerr=error, label=label(name), color=colour, capsize=3)
        axes.set_xticks(range(len(operations)), list(map(label, operations)))
    axes.set(xlabel="operation", ylabel="right steps", ylim=(0, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower left")
    return figure


OUTLINES = [(4.0, "-"), (2.0, "--"), (1.5, "-"), (1.5, ":"), (1.0, "-."), (1.0, "--")]


def span_positions(
    positions: dict[str, Sequence[float]],
    shares: dict[str, Sequence[float]],
    lengths: dict[str, Sequence[int]] | None = None,
) -> Figure:
    """Where spans begin in their traces (0 start, 1 end), what share of each trace they take, and how long they are.

    Args:
        positions: name → relative start of every span.
        shares: name → offload share of every trace.
        lengths: name → characters of every span; None: no third panel.
    """
    figure, panels = _axes(10 if lengths is None else 14, 3.6, columns=2 if lengths is None else 3)
    left, right = panels[:2]
    drawn: list[tuple[Axes, Mapping[str, Sequence[float]], str]] = [
        (left, positions, "relative position in the trace"),
        (right, shares, "share of tokens"),
    ]
    if lengths is not None:
        drawn.append((panels[2], lengths, "characters in a span"))
    colours = dict(zip(dict.fromkeys([*positions, *shares]), sns.color_palette()))
    for axes, data, what in drawn:
        names = [name for name in data if len(data[name])]
        top = max((max(data[name]) for name in names), default=0)
        bins = np.linspace(0, 1, 21) if axes is left else np.arange(0.5, top + 1) if 1 < top <= 40 else 20
        edges = np.histogram_bin_edges(np.concatenate([[0.0], *(data[name] for name in names)]), bins)
        # Outlines, the later ones thinner and dashed: those that coincide are all seen.
        for name, (width, dashes) in zip(names, OUTLINES):
            sns.histplot(
                x=np.asarray(data[name]),
                bins=edges,
                stat="probability",
                element="step",
                fill=False,
                linewidth=width,
                linestyle=dashes,
                color=colours[name],
                label=label(name),
                ax=axes,
            )
        if names:
            axes.legend(fontsize=9)
        axes.set(xlabel=what)
    for axes, what in zip(panels, ("spans", "traces", "spans")):
        axes.set(ylabel=what)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


# What makes a curve in the main figure: family of policies, policies at its ends, colour, marker.
CURVES = (
    ("random", ("small",), "grey", "o"),
    ("rejection", ("learned", "learned_off"), "olivedrab", "."),
)
UNTRAINED = {"entropy": "x", "margin": "+", "confidence": "1"}  # all at one share: with markers of their own


def accuracy_by_share(rows: Sequence[dict]) -> Figure:
    """The main figure: accuracy against offload share, with 95 % intervals.

    Rows of the random policy make a curve, and so do those of rejection; the two models alone are horizontal
    lines; every other row is a point of its own, and those of trained policies are hollow, with their names beside
    them, so that those that coincide are all seen.
    """
    figure, axes = _axes(8, 4.4)
    by_name = {row["policy"]: row for row in rows}
    alone = [
        (by_name[name], colour) for name, colour in (("small", SMALL_COLOUR), ("big", BIG_COLOUR)) if name in by_name
    ]
    for row, colour in alone:
        axes.axhline(row["accuracy"], color=colour, linestyle="--", label=label(f"{row['policy']} alone"))
        axes.axhspan(*row["ci95"], color=colour, alpha=0.12)
    drawn = ["small", "big"]
    for family, ends, colour, marker in CURVES:
        curve = sorted(
            (row for row in rows if row["policy"].startswith(family) or row["policy"] in ends),
            key=lambda row: row["offload_share"],
        )
        if any(row["policy"].startswith(family) for row in curve):
            _points(axes, curve, colour, family, marker=marker, linestyle="-")
        drawn += [row["policy"] for row in curve if row["policy"].startswith(family)]
    for row in (row for row in rows if row["policy"] in UNTRAINED):
        marker = UNTRAINED[row["policy"]]
        _points(axes, [row], "saddlebrown", row["policy"], marker=marker, markersize=9, linestyle="none")
    others = [row for row in rows if row["policy"] not in {*drawn, *UNTRAINED}]
    colours = sns.color_palette("dark")[2:]
    for row, colour, marker in zip(others, colours, "osDv^P"):
        _points(
            axes, [row], colour, row["policy"], marker=marker, markersize=9, markerfacecolor="none", linestyle="none"
        )
    axes.set(ylim=(0, 1.03))
    _names(axes, [(row["offload_share"], row["accuracy"], row["policy"]) for row in others], colours)
    _share_against_accuracy(axes, rows[0], f"{rows[0]['dataset']}: n = {rows[0]['n_problems']}")
    return figure


def front(rows: Sequence[dict]) -> Figure:
    """Accuracy against offload share of a sweep's policies, with 95 % intervals, single seeds, and the front.

    Args:
        rows: of `sweep.collect`; `learned` is drawn hollow, `grpo` filled, `big` as a line.
    """
    figure, axes = _axes(8, 4.4)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    colours = dict(zip(labels, sns.color_palette("viridis", len(labels))))
    ours = [row for row in rows if row["policy"] == "grpo"]
    learned = [row for row in rows if row["policy"] == "learned"]
    starts = {(row["accuracy"], row["offload_share"]): row for row in learned}  # most sweeps have one
    for row in [*ours, *starts.values()]:
        grpo = row["policy"] == "grpo"
        colour = colours[row["label"]] if grpo or len(starts) > 1 else "black"
        fill = colour if grpo else "white"
        name = row["label"] if grpo else "fine-tuning alone" + (f", {row['label']}" if len(starts) > 1 else "")
        _points(axes, [row], colour, name, marker="o" if grpo else "s", markersize=9, markerfacecolor=fill)
        for accuracy, share in row["by_seed"]:
            axes.plot(share, accuracy, marker=".", color=colour, alpha=0.5)
    for row in [row for row in rows if row["policy"] == "big"][:1]:
        axes.axhline(row["accuracy"], color=BIG_COLOUR, linestyle="--", label="big alone")
        axes.axhspan(*row["ci95"], color=BIG_COLOUR, alpha=0.12)
    best, edge = 0.0, []
    for row in sorted([*ours, *starts.values()], key=lambda row: (row["offload_share"], -row["accuracy"])):
        if row["accuracy"] > best:
            best = row["accuracy"]
            edge.append((row["offload_share"], best))
    axes.plot(*zip(*edge), color="grey", linewidth=1, zorder=0, label="front")
    seeds = len(rows[0]["by_seed"])
    over = f"{seeds} seeds (intervals are over these)" if seeds > 1 else "one seed"
    _share_against_accuracy(axes, rows[0], f"n = {rows[0]['n_problems']} problems of {over}")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    return figure


def _share_against_accuracy(axes: Axes, row: dict, measured: str) -> None:
    """Labels, percentages, legend, and in the title what was `measured` and how."""
    axes.set(xlabel="offload share (tokens by the big model)", ylabel="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(_measured(row, measured), fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)


def _measured(row: dict, measured: str) -> str:
    how = f"{row['samples_per_problem']} sample(s) a problem, ≤ {row['max_tokens']} tokens; 95 % intervals"
    return label(f"{measured}, {how}")


def _running_mean(
    axes: Axes, x: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, window: int, **style: Any
) -> None:
    """A running mean in full colour over the raw values in pale."""
    (line,) = axes.plot(x[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid"), **style)
    axes.plot(x, values, alpha=0.25, color=line.get_color())


def _names(axes: Axes, points: Sequence[tuple[float, float, str]], colours: Sequence[Any]) -> None:
    """The name of each point to the right of it and below, a line further down for each that lies close by."""
    width, height = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    for i, (x, y, name) in enumerate(points):
        near = sum(abs(x - u) < width / 8 and abs(y - v) < height / 8 for u, v, _ in points[:i])
        below = -16 - 16 * near if y > height / 8 else 16 + 16 * near  # above, where little is left below
        axes.annotate(
            label(name),
            (x, y),
            xytext=(34, below),
            textcoords="offset points",
            fontsize=9,
            color=colours[i % len(colours)],
            arrowprops={"arrowstyle": "-", "color": colours[i % len(colours)], "linewidth": 0.8},
        )


def _points(axes: Axes, rows: Sequence[dict], colour: Any, name: str, **style: Any) -> None:
    values = np.array([row["accuracy"] for row in rows])
    error = np.abs(np.array([row["ci95"] for row in rows]).T - values)
    axes.errorbar(
        [row["offload_share"] for row in rows], values, error, color=colour, label=label(name), capsize=3, **style
    )


def coloured(pieces: Sequence[tuple[str, bool]], title: str = "") -> str:
    """A trace as HTML: `pieces` are (text, by the big model), the big model's are marked."""
    body = "".join(
        f'<mark style="background:{BIG_COLOUR};color:white">{escaped(text)}</mark>' if big else escaped(text)
        for text, big in pieces
    )
    heading = f"<b>{escaped(title)}</b><br>" if title else ""
    style = "font-family:monospace;white-space:pre-wrap;margin:6px 0"
    return f'<div class="{NO_MATHS}" style="{style}">{heading}{body}</div>'


def accuracy_by_mode(rows: Sequence[dict]) -> Figure:
    """A bar for each policy, from the least to the most accurate, with 95 % intervals and its offload share."""
    rows = sorted(rows, key=lambda row: row["accuracy"])
    figure, axes = _axes(8, 0.32 * len(rows) + 1.2)
    values = np.array([row["accuracy"] for row in rows])
    error = np.abs(np.array([row["ci95"] for row in rows]).T - values)
    mixed = [0 < row["offload_share"] < 1 for row in rows]
    alone = [BIG_COLOUR if row["offload_share"] else SMALL_COLOUR for row in rows]
    colours = ["olivedrab" if m else colour for m, colour in zip(mixed, alone)]
    axes.barh([label(row["policy"]) for row in rows], values, xerr=error, color=colours, capsize=3)
    for place, row in enumerate(rows):
        axes.text(1.02, place, f"{row['offload_share']:.1%}", va="center", fontsize=9)
    axes.text(1.02, len(rows) - 0.3, "share", fontsize=9)
    axes.set(xlabel="accuracy", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(_measured(rows[0], f"{rows[0]['dataset']}: n = {rows[0]['n_problems']}"), fontsize=10)
    return figure


def speed_up_by_share(curves: dict[str, tuple[Sequence[float], Sequence[float]]], title: str = "") -> Figure:
    """How many times faster than the big model alone, by offload share; `curves`: name → (shares, times)."""
    figure, axes = _axes()
    for name, (shares, times) in curves.items():
        axes.plot(shares, times, marker="o", markersize=4, label=label(name))
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xlabel="offload share", ylabel="speed-up over the big model alone", title=label(title))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend()
    return figure


def measured_speed_up(rows: Sequence[dict], title: str = "") -> Figure:
    """How many times faster than the big model alone, by its cost; the simulation dashed, the limit dotted.

    Args:
        rows: of `srlib.cost.speed`; a panel for each batch.
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "big"))
    figure, panels = _axes(1 + 5 * len(batches), 3.8, columns=len(batches))
    for axes, batch in zip(np.atleast_1d(panels), batches):
        for name, colour in zip(names, sns.color_palette("deep", len(names))):
            some = [row for row in rows if (row["batch"], row["policy"]) == (batch, name)]
            costs = [row["cost_ratio"] for row in some]
            axes.plot(costs, [row["speed_up"] for row in some], color=colour, marker="o", label=label(name))
            for key, style in (("predicted_speed_up", "--"), ("limit_speed_up", ":")):
                known = [(cost, row[key]) for cost, row in zip(costs, some) if row[key] is not None]
                if known:
                    axes.plot(*zip(*known), color=colour, linestyle=style)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(xscale="log", yscale="log", title=label(f"{title} batch {batch}".strip()))
        axes.set(xlabel="cost of a big token, in small ones", ylabel="speed-up over the big model alone")
    np.atleast_1d(panels)[0].legend(fontsize="x-small")
    return figure


def accuracy_by_time(rows: Sequence[dict], title: str = "") -> Figure:
    """Accuracy, with its interval, against seconds a problem; a colour for each big model, a marker for each policy.

    Args:
        rows: each with `big`, `policy`, `seconds`, `accuracy`, `ci95`.
    """
    figure, axes = _axes(8, 4.4)
    bigs, policies = (list(dict.fromkeys(row[key] for row in rows)) for key in ("big", "policy"))
    colours = dict(zip(bigs, sns.color_palette("deep", len(bigs))))
    markers = dict(zip(policies, "osD^vP*X<>p"))
    for row in rows:
        low, high = row["ci95"]
        error = [[abs(row["accuracy"] - low)], [abs(high - row["accuracy"])]]
        colour, marker = colours[row["big"]], markers[row["policy"]]
        axes.errorbar(
            row["seconds"], row["accuracy"], error, color=colour, marker=marker, markerfacecolor="none", capsize=2
        )
    for big in bigs:
        axes.plot([], [], color=colours[big], label=label(big))
    for policy in policies:
        style = {"color": "grey", "linestyle": "none", "markerfacecolor": "none"}
        axes.plot([], [], marker=markers[policy], label=label(policy), **style)
    axes.set(xlabel="seconds a problem", ylabel="accuracy", xscale="log", ylim=(0, 1.03), title=label(title))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def latency_by_load(curves: dict[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Mean seconds of a request against requests a second; `curves`: name → (rates, seconds)."""
    figure, axes = _axes()
    for name, (rates, seconds) in curves.items():
        axes.plot(rates, seconds, marker="o", markersize=4, label=label(name))
    axes.set(xlabel="requests a second", ylabel="mean latency (s)", xscale="log", yscale="log")
    axes.legend(fontsize=9)
    return figure
