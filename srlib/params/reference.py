"""Every setting in words, made of the classes that check it: what `python -m srlib params` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, NamedTuple

from srlib import SrlibError
from srlib.params.models import Section, section_of
from srlib.params.names import nearest
from srlib.params.run import Params

KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "empty"}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class Setting(NamedTuple):
    """A section or a setting of a params file."""

    key: str  # dotted
    values: str  # what may be given; empty: it is a section
    default: str
    about: str


def settings(model: type[Section] = Params, prefix: str = "", given: Section | None = None) -> Iterator[Setting]:
    """All sections and settings, those of a section behind it.

    Args:
        model: whose fields are listed.
        prefix: of their keys.
        given: has the defaults, where the section above sets them.
    """
    schema, sections = model.model_json_schema()["properties"], []
    for name, field in model.model_fields.items():
        default = field.default if given is None else getattr(given, name)
        inner = section_of(field.annotation)
        if inner is not None:
            sections.append((inner, f"{prefix}{name}", default, field.description or ""))
            continue
        shown = "required" if field.is_required() else _plain(default)
        yield Setting(f"{prefix}{name}", _words(schema[name]), shown, field.description or "")
    for inner, key, default, about in sections:
        yield Setting(key, "", "empty" if default is None else "", about)
        yield from settings(inner, f"{key}.", default)


def table(key: str | None = None) -> str:
    """The settings as a table; with `key`, a section or a setting, only those.

    Raises:
        SrlibError: there is no such section or setting.
    """
    every = list(settings())
    shown = [each for each in every if key is None or each.key == key or each.key.startswith(f"{key}.")]
    if not shown:
        near = nearest(str(key), [each.key for each in every])
        hint = f"did you mean {near!r}?" if near else f"the sections are {', '.join(_sections(every))}."
        raise SrlibError(f"There is no section or setting {key!r}; {hint}")
    blocks: list[list[Setting]] = [[]]
    for each in shown:
        if each.values:
            blocks[-1].append(each)
        else:
            blocks.append([each])
    width = min(max(get_terminal_size((110, 24)).columns, 100), 120)
    head = "key, default (what may be given), and what it is; empty is written as null, or left away"
    return "\n\n".join([head, *("\n".join(_block(block, width)) for block in blocks if block)])


def _sections(every: list[Setting]) -> list[str]:
    return [each.key for each in every if not each.values and "." not in each.key]


def _block(block: list[Setting], width: int) -> Iterator[str]:
    """The lines of one section: its heading, if it has one, and its settings in columns."""
    if not block[0].values:
        heading, *block = block
        yield f"{heading.key}: {heading.about}{'; empty unless it is given' if heading.default else ''}"
    if not block:
        return
    rows = [(each.key, f"{each.default} ({each.values})", each.about) for each in block]
    keys, values = (max(map(len, column)) for column in list(zip(*rows))[:2])
    columns = (keys, min(values, 28), width - keys - min(values, 28) - 6)
    for row in rows:
        cells = [wrap(text, size, break_on_hyphens=False) for text, size in zip(row, columns)]
        for parts in zip_longest(*cells, fillvalue=""):
            yield ("  " + "  ".join(f"{part:<{size}}" for part, size in zip(parts, columns))).rstrip()


def _words(schema: dict[str, Any]) -> str:
    """What may be given, from a field's JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(_words, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(schema["enum"])
    kind = schema.get("type")
    if kind is None:
        return "anything"
    if kind == "array":
        least = f", at least {schema['minItems']}" if "minItems" in schema else ""
        return f"list of {_words(schema['items'])}{least}"
    if kind == "object":
        names = _words(schema["propertyNames"]) if "propertyNames" in schema else "names"
        return f"mapping of {names} to {_words(schema['additionalProperties'])}"
    limits = [f"{sign} {schema[name]:g}" for name, sign in LIMITS.items() if name in schema]
    pattern = [f"like {schema['pattern']}"] if "pattern" in schema else []
    return f"{KINDS[kind]} {', '.join(limits + pattern)}".strip()


def _plain(default: Any) -> str:
    """A default as it would stand in the file."""
    if default is None:
        return "empty"
    return default if isinstance(default, str) and default else json.dumps(default)
