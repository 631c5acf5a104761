"""The manifest of a run: what each stage was made of, and whether it would be the same again."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from srlib import SrlibError
from srlib.data.rows import write_json
from srlib.params.paths import find, here
from srlib.params.run import Params
from srlib.run.stages import NOTEBOOKS, STAGES, Stage, artefacts

IGNORED = {".ipynb_checkpoints", "merged"}  # folders; vLLM serves an adapter merged into its model
PACKAGES = ("torch", "transformers", "trl", "peft", "papermill", "srlib")


class Manifest:
    """`manifest.json` of a run: for each stage parameters, inputs, outputs, versions, seconds and state."""

    def __init__(self, p: Params) -> None:
        self.p = p
        self.path = p.run_dir / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.stages = json.loads(self.path.read_text())["stages"]
            except (json.JSONDecodeError, KeyError):
                raise SrlibError(f"{self.path} is damaged; remove it, and every stage is done again.") from None

    def complete(self, name: str) -> bool:
        """Whether the stage's last run went through."""
        return self.stages.get(name, {}).get("state") == "complete"

    def unchanged(self, name: str) -> bool:
        """Whether the stage is complete and would do the same again."""
        return self.complete(name) and self._same_key(name) and self.stages[name]["outputs"] == self._outputs(name)

    def resumable(self, name: str) -> bool:
        """Whether the stage's last run ended before its time, and would be the same again."""
        return name in self.stages and not self.complete(name) and self._same_key(name)

    def _same_key(self, name: str) -> bool:
        return all(self.stages[name].get(field) == value for field, value in self._key(name).items())

    def start(self, name: str) -> None:
        self.stages[name] = {"state": "running", **self._key(name)}
        self._write()

    def finish(self, name: str, state: str, seconds: float) -> None:
        record = self.stages[name]
        record.update(state=state, seconds=round(seconds, 1), versions={k: version(k) for k in PACKAGES})
        record["outputs"] = self._outputs(name)
        self._write()

    def _key(self, name: str) -> dict[str, Any]:
        """What decides whether a stage has to run again."""
        stage = STAGES[name]
        values = self.p.model_dump()
        sections = ("seed", "threads", "pair", "data", *stage.sections)
        return {
            "parameters": {section: values[section] for section in sections},
            "notebook": _digest(NOTEBOOKS / f"{name}.ipynb"),
            "inputs": {path: _digest(find(path)) for path in self._inputs(stage)},
        }

    def _inputs(self, stage: Stage) -> list[str]:
        """Files and folders a stage reads, as far as they are here."""
        found = artefacts(self.p)
        return [here(path) for name in stage.reads for path in found[name].paths if Path(path).exists()]

    def _outputs(self, name: str) -> dict[str, str]:
        """Digest of each file of a stage but its notebook and figures, which a hand may make again."""
        folder = self.p.stage_dir(name)
        files = [f for f in files_of(folder) if f.suffix not in (".ipynb", ".png")]
        return {str(f.relative_to(folder)): _digest(f) for f in files}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"run": self.p.run, "seed": self.p.seed, "stages": self.stages})


def fingerprint(p: Params, stage: str) -> str:
    """What a stage's results depend on, its notebook apart: parameters and what it reads, as 16 hex digits."""
    key = {name: value for name, value in Manifest(p)._key(stage).items() if name != "notebook"}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder and their names."""
    total = hashlib.sha256()
    for file in files_of(path) if path.is_dir() else [path]:
        total.update(str(file.relative_to(path)).encode())
        total.update(hashlib.file_digest(file.open("rb"), "sha256").digest())
    return total.hexdigest()[:16]


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, but for those in `IGNORED` ones."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and not IGNORED & set(f.relative_to(folder).parts))
