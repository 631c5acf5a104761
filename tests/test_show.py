"""What models and data sets write is text wherever it is shown."""

import inspect
import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.text import Text

from srlib import SrlibError, visible
from srlib.params import ROOT
from srlib.show import figures
from srlib.show.tables import table

HOSTILE = [
    "<script>alert(1)</script>",
    "$x^{$",
    r"\$ and $$",
    "\u202edesrever",
    "nul\0bell\a",
    "\ud800",
    "_hidden",
    "\x1b[31m",
]
SHOWN = [r"$x^{$", r"\$ and $$", r"\u202edesrever", r"nul\x00bell\x07", r"\ud800", "_hidden", r"\x1b[31m"]


@given(st.text(st.characters() | st.sampled_from("\u2066\u200f\x7f\x85\u2028\ud83d\n\t"), max_size=20))
def test_what_is_visible(text):
    seen = visible(text)
    seen.encode()
    assert visible(seen) == seen and seen.isprintable() >= text.isprintable()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", seen)
    assert visible(text, but="\n").count("\n") == text.count("\n")
    assert visible(str(SrlibError(text))) == str(SrlibError(text))


def test_an_error_is_one_line():
    assert str(SrlibError("a \x1b[2J:\n  b\r\n")) == r"a \x1b[2J: b"


def test_words_of_any_script_are_left_as_they_are():
    text = "naïve שלום مرحبا 漢字 😀👩‍👩‍👧 ½ €"
    assert visible(text) == text


def frames():
    """Tables with hostile names and cells wherever they may be."""
    names = [name for name in HOSTILE if name != "\ud800"]  # pandas takes none
    cells = pd.DataFrame({"a": names, "b": range(len(names)), "c": [[name] for name in names]})
    yield cells
    yield cells.set_index("a")
    yield pd.DataFrame({name: [1.5] for name in names})
    yield pd.concat({name: cells.set_index("a") for name in HOSTILE[:2]}, axis=1)
    yield cells.set_index(["a", "b"])
    named = cells.set_index("a").rename_axis(HOSTILE[0], axis=0).rename_axis(HOSTILE[0], axis=1)
    yield named
    yield pd.Series(dict.fromkeys(names, 1)).to_frame(HOSTILE[0])
    yield cells.pivot_table("b", "a", "a", "first")


@pytest.mark.parametrize("frame", frames())
def test_a_table_shows_text(frame):
    page = table(frame).to_html()
    assert "<script" not in page and "&lt;script&gt;" in page
    page.encode()
    assert not re.search("[\x00\x07\x1b\u202e]", page)
    assert 'class="tex2jax_ignore mathjax_ignore"' in page


def test_a_table_shows_numbers():
    page = table({"n": [1234, 5], "x": [0.12345, float("nan")], "ok": [True, None]}, 2).to_html()
    assert "1 234" in page and "0.12" in page and "0.123" not in page and "nan" in page and "True" in page
    page = table([{"n": 1.0, "m": 3.0}, {"n": 0.0, "m": 3.0}], warm=["n"], warmest=2.0, index=False).to_html()
    assert page.count("background-color") == 2 and "row_heading" not in page
    assert "<table" in table([]).to_html()


def row(name, **values):
    return {
        "policy": name, "label": name, "big": name, "dataset": name, "accuracy": 0.5, "ci95": [0.4, 0.6], "seconds": 2.0,
        "offload_share": 0.3, "by_seed": [(0.5, 0.3)], "n_problems": 9, "samples_per_problem": 1, "max_tokens": 96,
    } | values  # fmt: skip


def drawn(name):
    """Every figure of the room, with `name` wherever a name is."""
    curve, log = {name: ([0.1, 0.5], [1.0, 2.0])}, [{"step": i, "offload_share": 0.1} for i in range(4)]
    log = [record | {"rewards/accuracy/mean": 0.5} for record in log]
    log += [{"step": i, "eval_accuracy": 0.5, "eval_offload_share": 0.1, "kept": i == 3} for i in (1, 3)]
    return {
        figures.losses: lambda: figures.losses({name: [2.0, 1.0, 0.5]}),
        figures.learning_curves: lambda: figures.learning_curves({name: log, "other": log}),
        figures.step_accuracy: lambda: figures.step_accuracy({name: {name: (1, 2), "+": (1, 3)}}),
        figures.span_positions: lambda: figures.span_positions({name: [0.1, 0.5]}, {name: [0.1, 0.2]}, {name: [3, 4]}),
        figures.accuracy_by_share: lambda: figures.accuracy_by_share([row("small"), row("big"), row(name)]),
        figures.front: lambda: figures.front(
            [row(name, policy="grpo"), row("x", policy="learned"), row(name, policy="big")]
        ),
        figures.accuracy_by_mode: lambda: figures.accuracy_by_mode([row(name), row("big", dataset=name)]),
        figures.speed_up_by_share: lambda: figures.speed_up_by_share(curve, name),
        figures.measured_speed_up: lambda: figures.measured_speed_up(
            [
                {
                    "batch": b,
                    "policy": name,
                    "cost_ratio": 2.0,
                    "speed_up": 1.5,
                    "predicted_speed_up": 1.4,
                    "limit_speed_up": 1.6,
                }
                for b in (1, 16)
            ],
            name,
        ),
        figures.accuracy_by_time: lambda: figures.accuracy_by_time([row(name)], name),
        figures.latency_by_load: lambda: figures.latency_by_load(curve),
    }


def test_every_figure_is_drawn_here():
    """A figure that is added is to be among them."""
    made = {f for _, f in inspect.getmembers(figures, inspect.isfunction) if f.__module__ == figures.__name__}
    assert {f for f in made if inspect.signature(f).return_annotation == "Figure"} == set(drawn("x"))


def test_no_line_is_drawn_where_nothing_was_measured():
    """A random share of 0 is the small model; a baseline that was measured at one share is a point."""
    at = {"small": 0.0, "big": 1.0, "random_0.50": 0.5, "entropy": 0.066, "margin": 0.067}
    made = figures.accuracy_by_share([row(name, offload_share=share) for name, share in at.items()])
    drawn_at = {c.get_label(): sorted(c.lines[0].get_xdata()) for c in made.axes[0].containers}
    assert drawn_at == {"random": [0.0, 0.5], "entropy": [0.066], "margin": [0.067]}
    plt.close("all")


def test_points_that_coincide_are_all_seen():
    """Each has its name, apart from the others' and tied to its point, and no marker covers another."""
    names = ["learned", "grpo", "learned_off"]
    rows = [row(name, offload_share=0.07, accuracy=0.94, ci95=[0.93, 0.95]) for name in names]
    made = figures.accuracy_by_share([row("small", offload_share=0.0), row("big", offload_share=1.0), *rows])
    axes = made.axes[0]
    made.canvas.draw()
    texts = [text for text in axes.texts if text.get_text() in names]
    assert [text.get_text() for text in texts] == names
    assert all(text.xy == (0.07, 0.94) and text.arrow_patch is not None for text in texts)
    boxes = [Text.get_window_extent(text) for text in texts]  # without their lines
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert {c.lines[0].get_markerfacecolor() for c in axes.containers} == {"none"}
    assert len({c.lines[0].get_marker() for c in axes.containers}) == 3
    made = figures.accuracy_by_time([row(name, policy=name, big="8B") for name in names])
    drawn_as = [c.lines[0] for c in made.axes[0].containers]
    assert {line.get_markerfacecolor() for line in drawn_as} == {"none"}
    assert len({line.get_marker() for line in drawn_as}) == 3
    plt.close("all")


def test_outlines_that_coincide_are_all_seen():
    same = {"learned": [0.1, 0.5], "grpo": [0.1, 0.5]}
    made = figures.span_positions(same, same, {name: [2, 3] for name in same})
    for axes in made.axes:
        first, second = axes.lines
        assert (first.get_xydata() == second.get_xydata()).all() and not axes.collections
        assert first.get_linewidth() > second.get_linewidth() and first.get_linestyle() != second.get_linestyle()
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(same)
    plt.close("all")


NAMES = dict(zip(HOSTILE[1:], SHOWN))


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # for a name so long
@pytest.mark.parametrize("figure", drawn("x"), ids=lambda figure: figure.__name__)
def test_a_figure_shows_text(figure, tmp_path):
    """All hostile names at once, and each as it is: a formula would be drawn, or end the stage; a `_` would hide a curve."""
    made = drawn("; ".join(HOSTILE))[figure]()
    figures.save(made, tmp_path / "x.png")
    texts = [text for text in made.findobj(Text) if "alert" in text.get_text()]
    assert texts
    for text in texts:
        shown, maths = text._preprocess_math(text.get_text())
        assert not maths and all(seen in shown for seen in SHOWN)
    plt.close("all")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_one_hostile_name_alone(name, tmp_path):
    made = figures.losses({name: [2.0, 1.0, 0.5]})
    figures.save(made, tmp_path / "x.png")
    (text,) = made.axes[0].get_legend().get_texts()
    shown, maths = text._preprocess_math(text.get_text())
    assert shown.strip() == NAMES[name] and not maths
    plt.close("all")


def test_formulas_of_our_own_are_drawn():
    made = figures.losses({"a": np.linspace(2, 0.001, 30)})
    made.canvas.draw()
    assert any("$" in label.get_text() for label in made.axes[0].get_yticklabels())  # of a logarithmic axis
    assert all(
        label._preprocess_math(label.get_text())[1] for label in made.axes[0].get_yticklabels() if label.get_text()
    )
    plt.close("all")


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_trace_shows_text(name):
    page = figures.coloured([(f"{name}\n", False), (name, True)], name)
    page.encode()
    assert "<script" not in page and not re.search("[\x00\x07\x1b\u202e]", page)
    assert 'class="tex2jax_ignore mathjax_ignore"' in page and "\n" in page


def test_notebooks_show_tables_by_the_one_function():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            assert ".style" not in source and "to_html" not in source and "Markdown(" not in source
            last = source.rstrip().splitlines()[-1] if source.strip() else ""
            *_, shown = re.split(r"\n(?=\S)", source.rstrip())
            assert not re.match(r"pd\.|\w+\.(T|pivot_table|to_frame|head)\b", shown), (path.name, last)
            for line in re.findall(r"HTML\((?:.|\n)*", source):
                assert "figures.coloured(" in line, path.name
