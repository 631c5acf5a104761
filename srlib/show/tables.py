"""Tables, in which all that models and data sets have written is text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from srlib import visible

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

NO_MATHS = "tex2jax_ignore mathjax_ignore"  # a class that JupyterLab leaves alone: "$" is a dollar


def table(rows: Any, precision: int = 3, index: bool = True, warm: Sequence[str] = (), warmest: float = 1.0) -> Styler:
    """A table to be shown at the end of a cell; pandas' own styles would write cells and names as HTML.

    Args:
        rows: a data frame, or what one is made of.
        precision: decimals of a number that is not whole; thousands are set apart.
        index: whether the names of the rows are shown.
        warm: columns whose numbers are coloured, from white at 0 to orange at `warmest`.
    """
    frame = pd.DataFrame(rows).map(_text)
    frame.index, frame.columns = _names(frame.index), _names(frame.columns)
    shown = frame.style.format(precision=precision, thousands=" ").set_table_attributes(f'class="{NO_MATHS}"')
    if warm:
        shown = shown.background_gradient(subset=list(warm), cmap="Oranges", vmin=0, vmax=warmest)
    return shown if index else shown.hide(axis="index")


def escaped(text: str) -> str:
    """`text` for HTML, line ends and tabs as they are."""
    return html.escape(visible(text, but="\n\t"))


def _text(value: Any) -> Any:
    """A cell or a name: numbers and what is missing as they are, all else as text."""
    return value if pd.api.types.is_number(value) or value is None or value is pd.NaT else escaped(str(value))


def _names(names: pd.Index) -> pd.Index:
    """Of rows or columns, their own names too."""
    titles = [name if name is None else _text(name) for name in names.names]
    if isinstance(names, pd.MultiIndex):
        return pd.MultiIndex.from_tuples([tuple(map(_text, name)) for name in names], names=titles)
    return pd.Index(list(map(_text, names)), name=titles[0], dtype=None if len(names) else object)
