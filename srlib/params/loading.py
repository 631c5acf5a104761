"""From a params file or a notebook to checked values, and a sentence where they are wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from srlib import SrlibError
from srlib.params.models import Section, section_of
from srlib.params.names import nearest, unknown
from srlib.params.paths import ROOT, find
from srlib.params.run import Params
from srlib.params.written import Plain, read_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=Section)
PARAMETERS = re.compile(r"^params_file\s*=(?!=)", re.MULTILINE)  # is in the `parameters` cell
INJECTED = "# Parameters\n"  # is how papermill's own cell begins


def load(path: str | Path, /, **overrides: Any) -> Params:
    """Read a params file and check every value.

    Args:
        path: YAML file, relative to the working folder or to the clone.
        **overrides: values laid on top; a name may be dotted, as `**{"sft.epochs": 1}`, and a
            mapping replaces only the keys it names.

    Raises:
        SrlibError: the file is not there or not YAML, a key is unknown (the nearest valid one
            is named), a value has the wrong type or is impossible.
    """
    return build(_laid(read_file(path), overrides), str(path), Params)


def build(values: dict[str, Any], source: str, model: type[Model]) -> Model:
    """Check `values`; `source` is named in the error. Where text belongs, a number of a file is the text as written."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    texts = [each for each in errors if each["type"] == "string_type" and isinstance(each["input"], Plain)]
    if not texts:
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # may be all of it
        raise SrlibError(f"{source}: {_explain(first, model)}")
    for each in texts:
        place: Any = values
        for part in each["loc"][:-1]:
            place = place[part]
        place[each["loc"][-1]] = str(each["input"])
    return build(values, source, model)


def from_notebook(scope: dict[str, Any]) -> Params:
    """The parameters of a notebook, from what its `parameters` cell and papermill's own cell set.

    On top of `params_file` are laid, each over those before it: sections and settings that the
    `parameters` cell sets by name, `changes`, and what papermill was given (`-p seed 1`). Where that is
    a whole file (`-f params/x.yaml`: a `run` and some section) it stands in place of `params_file`, and
    `changes` alone are laid on top. papermill reads numbers into text that looks like one before it comes
    here (`-p run 0131` is 131, which is refused): give it as it is with `-r`, or in quotes in a file.

    Args:
        scope: the notebook's `globals()`. What other cells call by the name of a section is of no matter.

    Raises:
        SrlibError: as `load`; also for a name papermill was given that is no parameter.
    """
    cells = scope.get("In", [])  # as they were run, in order
    injected = _set_by([cell for cell in cells if cell.startswith(INJECTED)], scope)
    own = _set_by([cell for cell in cells if PARAMETERS.search(cell) and not cell.startswith(INJECTED)], scope)
    for name in injected:
        if name not in (known := ["params_file", "changes", *Params.model_fields]):
            raise SrlibError(f"papermill: {unknown(name, known)}")
    by_hand, given = ({k: v for k, v in some.items() if k in Params.model_fields} for some in (own, injected))
    path, changes = scope.get("params_file"), scope.get("changes") or {}
    if not isinstance(changes, dict):
        raise SrlibError(f'changes is {changes!r}; it must map names to values, as {{"seed": 1, "sft.epochs": 1}}.')
    if "run" in given and any(isinstance(value, dict) for value in given.values()):
        return build(_laid(given, changes), "papermill's parameters", Params)
    if path is None:
        raise SrlibError('No params file is named: set params_file = "params/cpu.yaml" in the parameters cell.')
    return build(_laid(read_file(path), by_hand, changes, given), str(path), Params)


def parse_override(text: str, several: bool = False) -> tuple[str, Any]:
    """`"sft.epochs=1"` to `("sft.epochs", 1)`; the value is read as YAML, with `several` as a list of values.

    Raises:
        SrlibError: it has no key, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SrlibError(f"--set {_short(text)} is not of the form section.key=value")
    return key, read_yaml(f"[{value}]" if several else value, f"--set {_short(text)}")


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping that a params file, or a file of `params/ablations/`, holds.

    Raises:
        SrlibError: it is not there, is not UTF-8, is not YAML, or holds something else.
    """
    found = find(path)
    if found is None or not found.is_file():
        near = nearest(Path(path).name, [p.name for p in (ROOT / "params").glob("*.yaml")])
        raise SrlibError(f"There is no params file {path}{near and f'; did you mean params/{near}?'}")
    try:
        text = found.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise SrlibError(f"{path} is not UTF-8: line {line} has the byte {byte:#04x}. Save it as UTF-8.") from None
    except OSError as error:
        raise SrlibError(f"{path} cannot be read: {error.strerror}.") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        held = {list: "a list", type(None): "nothing"}.get(type(values), f"{values!r} alone")
        raise SrlibError(f"{path} holds {held}, but a params file is a mapping of sections.")
    return values


def _set_by(cells: list[str], scope: dict[str, Any]) -> dict[str, Any]:
    """What the last of `cells` sets. It is run again, beside `scope`: by now a name may be that of a module."""
    found: dict[str, Any] = {}
    if cells:
        exec(cells[-1], dict(scope), found)
    return {name: value for name, value in found.items() if value is not None}


def _laid(values: dict[str, Any], *layers: dict[str, Any]) -> dict[str, Any]:
    """`values` with each of `layers` on top; the names in one may be dotted, or it may be nested."""
    for layer in layers:
        for key, value in layer.items():
            _lay(values, str(key).split("."), value)
    return values


def _lay(values: dict[str, Any], keys: list[str], value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _lay(values, [*keys, key], inner)
        return
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        if not isinstance(values[key], dict):
            raise SrlibError(f"{'.'.join(keys)} cannot be set: {key} is {values[key]!r}, not a section.")
        values = values[key]
    values[keys[-1]] = value


def _short(value: object) -> str:
    written = repr(value)
    return written if len(written) <= 200 else f"{written[:200]}…"


def _explain(error: ErrorDetails, model: type[Section]) -> str:
    """One sentence out of a pydantic error."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            *sections, key = map(str, error["loc"])
            for section in sections:
                model = section_of(model.model_fields[section].annotation) or model
            return f"{unknown(key, list(model.model_fields))}{f' (in section {sections[-1]})' if sections else ''}"
        case "string_type":
            given = "empty (null)" if error["input"] is None else _short(error["input"])
            return f"{where} is {given}, which is no text; put it in quotes."
        case "missing":
            return f"{where} is missing; give it a value."
        case "value_error":
            return f"{where}: {error['ctx']['error']}."
        case _:
            return f"{where} is {_short(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}."
