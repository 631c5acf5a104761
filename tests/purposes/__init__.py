"""What each setting is for: the smallest run that shows it, a module for some sections. `test_settings` runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from srlib.params import Params, load

Made = TypeVar("Made")
PURPOSES: dict[str, Callable[[Case], None]] = {}  # of each setting, by its dotted name
UNSEEN: dict[str, str] = {}  # those whose effect cannot be seen without a GPU or a server: why


def shows(*keys: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """The function below asserts what these settings are for; where one of them is ignored it fails."""

    def keep(purpose: Callable[[Case], None]) -> Callable[[Case], None]:
        for key in keys:
            assert key not in PURPOSES, f"{key} has a purpose already"
            PURPOSES[key] = purpose
        return purpose

    return keep


def unseen(why: str, *keys: str) -> None:
    """The effect of these cannot be seen on a CPU."""
    UNSEEN.update(dict.fromkeys(keys, why))


def once(kept: dict[str, Made], p: Params, make: Callable[[pytest.MonkeyPatch], Made]) -> Made:
    """What `make` gives for these params; what is `kept`, as it was made with the same before, is looked at again."""
    key = json.dumps(p.model_dump(exclude={"outputs"}), sort_keys=True)
    if key not in kept:
        with pytest.MonkeyPatch.context() as patch:
            kept[key] = make(patch)
    return kept[key]


class Case:
    """One run of a purpose: with its setting, or as if nothing read it.

    Args:
        key: the setting.
        folder: an empty folder.
        ignored: leave the setting as it is, whatever it is set to.
    """

    def __init__(self, key: str, folder: Path, request: pytest.FixtureRequest, ignored: bool = False) -> None:
        self.key, self.folder, self._request, self._ignored = key, folder, request, ignored
        self.varied = False

    def params(self, changes: dict[str, Any] | None = None, **sections: Any) -> Params:
        """`params/smoke.yaml` with changes by dotted names; every value of the setting has to come by this way."""
        changes = {**(changes or {}), **sections}
        if self.key in changes:
            self.varied = True
            if self._ignored:
                del changes[self.key]
        return load("params/smoke.yaml", **{"outputs": str(self.folder), **changes})

    def fixture(self, name: str) -> Any:
        """A fixture of the tests."""
        return self._request.getfixturevalue(name)
