"""Every setting does what it is for: the table of `tests/purposes`, run with each setting and without it."""

from importlib import import_module
from pkgutil import iter_modules

import pytest

from srlib.params.reference import settings
from tests import purposes
from tests.purposes import PURPOSES, UNSEEN, Case

for module in iter_modules(purposes.__path__):
    import_module(f"tests.purposes.{module.name}")


def test_every_setting_has_a_purpose_or_says_why_none_is_seen():
    known = {setting.key for setting in settings() if setting.values}
    assert known - PURPOSES.keys() - UNSEEN.keys() == set(), "add them to a module of tests/purposes"
    assert {*PURPOSES, *UNSEEN} - known == set(), "there are no such settings"
    assert PURPOSES.keys() & UNSEEN.keys() == set()


@pytest.mark.parametrize("key", sorted(PURPOSES))
def test_a_setting_does_what_it_is_for(key, request, tmp_path):
    (tmp_path / "set").mkdir()
    case = Case(key, tmp_path / "set", request)
    PURPOSES[key](case)
    assert case.varied, f"the purpose of {key} never sets it"


@pytest.mark.parametrize("key", sorted(PURPOSES))
def test_a_purpose_is_missed_where_its_setting_is_ignored(key, request, tmp_path):
    (tmp_path / "ignored").mkdir()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        PURPOSES[key](Case(key, tmp_path / "ignored", request, ignored=True))
