"""Make all that README.md shows, and keep it in outputs/reference/: the run, its bench, the sweeps that README.md names.

What is complete and would be the same again is left alone, so it goes on where it was ended; only the bench is measured
anew. `--check` makes nothing: it compares the code behind what is kept with that of the run in outputs/, and exits 1
where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import readme

PARAMS = "params/cpu.yaml"
OF_THE_RUN = ("manifest.json", "05_evaluate/results.json", "05_evaluate/accuracy_by_share.png", "bench.json")
OF_A_SWEEP = {"06_reward_ablation/table.json": ".json", "06_reward_ablation/front.png": "_front.png"}
MADE = readme.REFERENCE / "made.json"  # the run, its other seeds and each sweep: seconds, and digests of the code
OUTPUTS = readme.ROOT / "outputs"


def noted() -> dict[str, Any]:
    return json.loads(MADE.read_text()) if MADE.is_file() else {}


def stages(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Of a run, or of all runs of a sweep: each stage, with what its manifest says."""
    plan = folder / "sweep.json"
    runs = json.loads(plan.read_text())["runs"] if plan.is_file() else []
    folders = [folder, *(folder / Path(run["folder"]).name for run in runs)]
    manifests = [json.loads((of / "manifest.json").read_text()) for of in folders]
    return [stage for manifest in manifests for stage in manifest["stages"].items()]


def code(folder: Path) -> dict[str, str]:
    """By stage, a digest of the notebook and the code that made it, the same in all runs; else it is "several"."""
    found: dict[str, set[str]] = {}
    for name, stage in stages(folder):
        text = json.dumps([stage["notebook"], stage["code"]], sort_keys=True)
        found.setdefault(name, set()).add(hashlib.sha256(text.encode()).hexdigest()[:16])
    return {name: digests.pop() if len(digests) == 1 else "several" for name, digests in sorted(found.items())}


def keep(folders: dict[str, Path], files: dict[Path, str]) -> None:
    """Copy files under a name of their own, and note what made the folders, and how long it took."""
    for file, name in files.items():
        shutil.copyfile(file, readme.REFERENCE / name)
    for name, of in folders.items():
        note(name, sum(stage["seconds"] for _, stage in stages(of)), code(of))


def note(name: str, seconds: float, made_by: dict[str, str]) -> None:
    readme.REFERENCE.mkdir(parents=True, exist_ok=True)
    all_of_it = {**noted(), name: {"seconds": round(seconds, 1), "code": made_by}}
    MADE.write_text(json.dumps(dict(sorted(all_of_it.items())), indent=1) + "\n")


def estimate(sweeps: list[str]) -> str:
    """What there is to do, and how long it took the last time."""
    known = noted()
    hours = sum(made["seconds"] for made in known.values()) / 3600
    new = [name for name in ("run", "bench", *sweeps) if name not in known]
    return (
        f"The run, its bench and {len(sweeps)} sweeps ({', '.join(sweeps)}). What is complete and unchanged is left "
        f"alone. From nothing, and one run after another, it took {hours:.1f} hours the last time"
        + (f", without what has not been measured: {', '.join(new)}" if new else "")
    )


def stale(run: Path, sweeps: list[str]) -> str | None:
    """The first stage behind what is kept whose notebook or code is not that of this run."""
    if not (run / "manifest.json").is_file():
        return f"There is no run in {run} to compare with; make reproduce makes one"
    now, known = code(run), noted()
    for name in ("run", *(name for name in sweeps if readme.there(f"{name}.json"))):
        if name not in known:
            return f"outputs/reference/{MADE.name} does not say which code made the {name}; run make reference"
        for stage, digest in known[name]["code"].items():
            if stage in now and digest != now[stage]:
                return (
                    f"outputs/reference: {stage} of the {name} was made by other code than there is; run make reference"
                )
    return None


def main(run: str, jobs: int) -> None:
    sweeps, of_the_run = readme.named(), ["--set", f"run={run}"]
    base = f"{run}-one"  # several runs at a time have a core each, and in each both models share it
    print(estimate(sweeps), flush=True)
    of_the_sweeps = ["--set", f"run={base}", "--set", "pair.big.process=false"]
    srlib("run", PARAMS, *of_the_run)
    start = time.monotonic()
    srlib("bench", PARAMS, *of_the_run)
    note("bench", time.monotonic() - start, {})
    keep({"run": OUTPUTS / run}, {OUTPUTS / run / file: Path(file).name for file in OF_THE_RUN})
    for name in sweeps:
        srlib("sweep", f"params/ablations/{name}.yaml", "--jobs", str(jobs), *of_the_sweeps)
        folder = OUTPUTS / f"{base}-{name}"
        seeds = {of.name.removeprefix(f"{base}-"): of for of in OUTPUTS.glob(f"{base}-seed[0-9]*")}
        keep({name: folder, **seeds}, {folder / file: name + to for file, to in OF_A_SWEEP.items()})
    readme.main(check=False)


def srlib(*arguments: str) -> None:
    """A command of srlib; what goes wrong it tells itself."""
    done = subprocess.run([sys.executable, "-m", "srlib", *arguments], cwd=readme.ROOT)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="cpu", metavar="NAME", help="folder of outputs/ (default: cpu)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs of a sweep at the same time")
    parser.add_argument("--check", action="store_true", help="only compare the code")
    chosen = parser.parse_args()
    if chosen.check:
        sys.exit(stale(OUTPUTS / chosen.run, readme.named()))
    main(chosen.run, chosen.jobs)
