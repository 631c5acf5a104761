"""Which of srlib's modules some code uses, and a digest of each: what tells that code is new.

Code is read, not imported, so that it costs little to ask. It uses what it imports, in functions
too, and the modules that it names in a string, as a command does that is started.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from srlib import SrlibError
from srlib.data import digests
from srlib.data.rows import write_json
from srlib.params.paths import ROOT


class Code:
    """The modules of srlib in the clone at `home`; the one that runs, if not said otherwise."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or ROOT
        # As Python keeps what it has compiled: parsing all of it again would take a third of a second.
        self._cache = self.home / "srlib" / "__pycache__" / f"modules.{sys.implementation.cache_tag}.json"
        self._known: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):
            self._known = json.loads(self._cache.read_text())

    def used(self, roots: Collection[str], without: str = "") -> dict[str, str]:
        """Digest of each module that those named in `roots` use, by name; they are among them.

        Comments and docstrings are not in it.

        Args:
            roots: full names; those that are no modules of srlib are passed over.
            without: a room that is not followed; its modules are left out but for those in `roots`.
        """
        todo, found, known = list(self._modules(roots)), {}, dict(self._known)
        while todo:
            name = todo.pop()
            if name not in found and (name in roots or not f"{name}.".startswith(f"{without}.")):
                found[name] = self._read(name)["digest"]
                todo += self._modules(self._read(name)["imports"])
        if known != self._known:
            with suppress(OSError, SrlibError):  # it is installed where nobody may write
                self._cache.parent.mkdir(exist_ok=True)
                write_json(self._cache, self._known)
        return dict(sorted(found.items()))

    def packages(self, modules: Iterable[str]) -> set[str]:
        """What some of srlib's modules import that is not of srlib, by its name in the code."""
        return {name.partition(".")[0] for module in modules for name in self._read(module)["imports"]} - {"srlib"}

    def _read(self, module: str) -> dict[str, Any]:
        """Digest and imports of a module, and of which version of its file and of this one."""
        file = self._file(module)
        version = [x for path in (file, Path(__file__)) for x in (path.stat().st_mtime_ns, path.stat().st_size)]
        if self._known.get(module, {}).get("version") != version:
            tree = ast.parse(file.read_bytes())
            found = _imports(tree, module if file.stem == "__init__" else module.rpartition(".")[0])
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    if ast.get_docstring(node, clean=False) is not None:
                        del node.body[0]
            digest = digests.of(ast.dump(tree))
            self._known[module] = {"version": version, "digest": digest, "imports": sorted(found)}
        return self._known[module]

    def _modules(self, names: Collection[str]) -> set[str]:
        """Those of `names` that are modules of srlib, and the packages they lie in, which are imported with them."""
        parts = [name.split(".") for name in names if name.partition(".")[0] == "srlib"]
        above = {".".join(each[:n]) for each in parts for n in range(1, len(each) + 1)}
        return {name for name in above if self._file(name).is_file()}

    def _file(self, module: str) -> Path:
        place = self.home.joinpath(*module.split("."))
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def of_notebook(notebook: Path) -> set[str]:
    """Full names of what the code of a notebook imports."""
    found: set[str] = set()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
        with suppress(SyntaxError):  # which is for the kernel to report
            found |= _imports(ast.parse("\n".join(x for x in lines if not x.lstrip().startswith(("%", "!")))))
    return found


def _imports(tree: ast.AST, package: str = "") -> set[str]:
    """Full names of what code imports, but for types alone; of `from a import b` both a and a.b, which may be one."""
    found: set[str] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("srlib."):
            found.add(node.value)
        todo += ast.iter_child_nodes(node)
    return found
