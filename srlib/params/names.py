"""A name that is none: the nearest one that is."""

from __future__ import annotations


def nearest(name: str, names: list[str]) -> str:
    """The one of `names` most like `name`, or an empty string if none is alike."""
    from rapidfuzz import fuzz, process  # here, as it takes a tenth of the time of `--help` to import

    match = process.extractOne(name, names, scorer=fuzz.WRatio, score_cutoff=60)
    return match[0] if match else ""


def unknown(key: str, names: list[str]) -> str:
    near = nearest(str(key), names)
    return f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else f"; there are {', '.join(names)}.")
