"""YAML as it is written: what a setting that is text takes, where YAML sees a number, a date or a truth."""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, JsonValue

from srlib import SrlibError


class Plain:
    """A number, or true or false, of a YAML text, with how it is `written` there: what a setting that is text takes."""

    written: str

    def __str__(self) -> str:
        return self.written

    def __repr__(self) -> str:
        return repr(typed(self))


class PlainInt(Plain, int):
    """Of a whole number; true is 1 and false 0, until `typed` says so."""


class PlainFloat(Plain, float):
    """Of another number."""


NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]{,99})(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,2})?", re.ASCII)
TRUTHS = {"true": True, "false": False}


def read_plain(written: str) -> PlainInt | PlainFloat | str | None:
    """What stands in YAML without quotes: empty, true or false, a number, else text; dates and `yes` are text."""
    found: PlainInt | PlainFloat
    if written.lower() in ("", "~", "null"):
        return None
    if written.lower() in TRUTHS:
        found = PlainInt(TRUTHS[written.lower()])
    elif not NUMBER.fullmatch(written):
        return written
    else:
        found = PlainFloat(written) if set(written) & set(".eE") else PlainInt(written)
    found.written = written
    return found


def typed(value: Any) -> Any:
    """`value` with plain numbers and truths in the place of `Plain` ones, lists and mappings through."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    if isinstance(value, PlainInt):
        return TRUTHS.get(value.written.lower(), int(value))
    return float(value) if isinstance(value, PlainFloat) else value


Anything = Annotated[JsonValue, BeforeValidator(typed)]  # a setting that is passed on as it is


def read_yaml(text: str, source: str) -> Any:
    """What YAML holds: mappings with text for keys, lists, text, `Plain` numbers and truths, and None.

    Raises:
        SrlibError: it is no YAML, a key stands twice in a mapping or is no text, or a value has a tag.
    """
    try:
        return _Reading().value(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.reader.ReaderError as error:
        held = f"the character {chr(error.character)!r} at {error.position + 1}"
        raise SrlibError(f"{source} is not valid YAML: {held} has no place in a text.") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        problem = error.problem.removeprefix("but ")
        raise SrlibError(f"{source} is not valid YAML: {where}: {problem}.") from None
    except RecursionError:
        raise SrlibError(f"{source} is not valid YAML: it nests too deep.") from None
    except ValueError as error:
        raise SrlibError(f"{source}: {error}.") from None


class _Reading:
    """The values of the nodes of one YAML text; a name for a value (`*x`) gives it anew."""

    def __init__(self) -> None:
        self.left = 100_000  # values; a text of a few lines can stand for billions

    def value(self, node: yaml.Node | None, path: str = "") -> Any:
        """
        Args:
            path: where it stands, dotted.
        """
        self.left -= 1
        if not self.left:
            raise ValueError("it stands for more than 100,000 values")
        if node is None:
            return None
        if not node.tag.startswith(("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:str")):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(f"line {node.start_mark.line + 1} has the tag {tag}; write the value without it")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each, f"{path}[{i}]") for i, each in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        try:
            text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")  # two halves make one
        except UnicodeDecodeError:
            raise ValueError(f"line {node.start_mark.line + 1} has half a character, {node.value!r}") from None
        if node.style is not None:  # in quotes, or a block
            return text
        return read_plain(text)

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        lines: dict[str, int] = {}
        found: dict[str, Any] = {}
        shared: dict[str, Any] = {}  # by `<<`
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line} has a list or a mapping for a key, where a name belongs")
            key = key_node.value
            name = f"{path}.{key}" if path else key
            if key in lines:
                where = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}"
                raise ValueError(f"{name} stands twice, in {where}; make one of the two")
            lines[key] = line
            value = self.value(value_node, name)
            if key != "<<" or key_node.style is not None:
                found[key] = value
                continue
            for each in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(each, dict):
                    raise ValueError(f"line {line} lays {each!r} under a mapping, and << takes mappings alone")
                shared |= each
        return shared | found
