"""From a params file to checked values, and a sentence where it is wrong."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from srlib import SrlibError
from srlib.params.names import nearest, unknown
from srlib.params.paths import ROOT, find
from srlib.params.run import Params

Model = TypeVar("Model", bound=BaseModel)


def load(path: str | Path, **overrides: Any) -> Params:
    """Read a params file and check every value.

    Args:
        path: YAML file, relative to the working folder or to the clone.
        **overrides: values laid on top; a name may be dotted, as `**{"sft.epochs": 1}`, and a
            mapping replaces only the keys it names.

    Raises:
        SrlibError: the file is not there or not YAML, a key is unknown (the nearest valid one
            is named), a value has the wrong type or is impossible.
    """
    found = find(path)
    if found is None or not found.is_file():
        near = nearest(Path(path).name, [p.name for p in (ROOT / "params").glob("*.yaml")])
        raise SrlibError(f"There is no params file {path}{near and f'; did you mean params/{near}?'}")
    try:
        values = yaml.safe_load(found.read_text())
    except yaml.YAMLError as error:
        raise SrlibError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SrlibError(f"{path} holds {type(values).__name__}, but a params file is a mapping of sections.")
    for key, value in overrides.items():
        _lay(values, key.split("."), value)
    return build(values, str(path))


def build(values: dict[str, Any], source: str, model: type[Model] = Params) -> Model:
    """Check `values`; `source` is named in the error."""
    try:
        return model(**values)
    except ValidationError as error:
        raise SrlibError(f"{source}: {_explain(error.errors()[0], model)}") from None


def from_notebook(scope: dict[str, Any]) -> Params:
    """The parameters of a notebook, from what its `parameters` cell and papermill left in `scope`.

    By hand, `params_file` is read. papermill's `-f params/x.yaml` puts every key of that file
    into the notebook: as such a file always names its `run`, it is then used alone, and
    `params_file` is not read. Single values (`-p seed 1`) are laid on top of `params_file`.

    Raises:
        SrlibError: as `load`; also for a name papermill was given that is no parameter.
    """
    for cell in scope.get("In", []):
        if cell.startswith("# Parameters"):  # papermill's own cell: it only warns of unknown names
            names = [t.id for node in ast.parse(cell).body if isinstance(node, ast.Assign) for t in node.targets]
            for name in names:
                if name != "params_file" and name not in Params.model_fields:
                    raise SrlibError(f"papermill: {unknown(name, list(Params.model_fields))}")
    given = {name: scope[name] for name in Params.model_fields if scope.get(name) is not None}
    if "run" in given:
        return build(given, "papermill's parameters")
    return load(scope["params_file"], **given)


def parse_override(text: str, several: bool = False) -> tuple[str, Any]:
    """`"sft.epochs=1"` to `("sft.epochs", 1)`; the value is read as YAML, with `several` as a list of values."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SrlibError(f"--set {text!r} is not of the form section.key=value")
    return key, yaml.safe_load(f"[{value}]" if several else value)


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


def _explain(error: dict[str, Any], model: type[BaseModel]) -> str:
    """One sentence out of a pydantic error."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            *sections, key = error["loc"]
            for section in sections:
                model = model.model_fields[section].annotation
            return f"{unknown(key, list(model.model_fields))}{f' (in section {sections[-1]})' if sections else ''}"
        case "missing":
            return f"{where} is missing; give it a value."
        case "value_error":
            return f"{where}: {error['ctx']['error']}."
        case _:
            return f"{where} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."
