"""Functions and classes of one's own, named in the params by the file they stand in: `path.py:name`.

What is named is looked at when a stage begins, not when the params are read: until then the file may be elsewhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_loader
from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import PlainSerializer, WrapValidator

from srlib import SrlibError
from srlib.params.paths import find

NAMED = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def named(text: object) -> bool:
    """Whether `text` names something in a file."""
    return isinstance(text, str) and NAMED.fullmatch(text) is not None


def _or_own(value: Any, handler: Callable[[Any], Any]) -> Any:
    return value if named(value) else handler(value)


# Beside the annotation of a setting that takes some names: it also takes `path.py:name`.
OR_OWN = (WrapValidator(_or_own), PlainSerializer(str))


def file(text: str) -> Path:
    """The file that `path.py:name` stands for, seen from here or from the clone.

    Raises:
        SrlibError: there is none.
    """
    path = text.rpartition(":")[0]
    found = find(path)
    if found is None or not found.is_file():
        raise SrlibError(f"{text}: there is no file {path}; its path is seen from here or from the clone.")
    return found


def load(text: str) -> Any:
    """What `path.py:name` names; its file is run, once for what stands in it.

    Raises:
        SrlibError: there is no such file, it fails, or has no such name.
    """
    path, name = file(text), text.rpartition(":")[2]
    source = path.read_bytes()
    module_name = f"own_{sha256(bytes(path.resolve()) + source).hexdigest()[:16]}"
    if module_name not in sys.modules:
        spec = spec_from_loader(module_name, None, origin=str(path))
        assert spec is not None
        module = sys.modules[module_name] = module_from_spec(spec)  # where dataclasses look for it
        module.__file__ = str(path)
        try:
            exec(compile(source, str(path), "exec"), vars(module))
        except Exception as error:
            del sys.modules[module_name]
            raise SrlibError(f"{text}: its file fails with {type(error).__name__}: {error}") from error
    found = vars(sys.modules[module_name])
    if name not in found:
        raise SrlibError(f"{text}: there is no {name} in {path}.")
    return found[name]


def takes(function: Any, what: str, *arguments: str) -> None:
    """Check that a function can be called with some arguments.

    Args:
        what: it is, in the error.

    Raises:
        SrlibError: it is no function, or takes others.
    """
    if not callable(function):
        raise SrlibError(f"{what} is {function!r}, which is no function.")
    try:
        signature(function).bind(*arguments)
    except TypeError:
        raise SrlibError(f"{what} takes {signature(function)}; it has to take ({', '.join(arguments)}).") from None
