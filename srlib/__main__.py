"""The command line: `python -m srlib run params/cpu.yaml`, `python -m srlib sweep params/ablations/latency.yaml`."""

from __future__ import annotations

import argparse
import sys

from srlib import SrlibError, params, pipeline, sweep


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; a mistake in the input is one sentence and exit status 2, a failed stage is 1."""
    parser = argparse.ArgumentParser(prog="python -m srlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the notebooks of a params file in order")
    run.add_argument("params", help="params file, such as params/cpu.yaml")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value: sft.epochs=1")
    which = run.add_mutually_exclusive_group()
    which.add_argument("--from", dest="first", metavar="STAGE", help="redo this stage and all after it")
    which.add_argument("--only", metavar="STAGE", help="redo this stage alone")
    run.add_argument("--until", metavar="STAGE", help="end with this stage")
    many = commands.add_parser("sweep", help="run 03 and 05 for every combination of some values and seeds")
    many.add_argument("params", help="params file, or a file of params/ablations/")
    many.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values to vary: grpo.reward_weights.latency=0,1",
    )
    many.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], help="such as 0,1,2")
    many.add_argument("--name", help="the sweep's folder is outputs/<run>-<name>")
    many.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "sweep":
            return sweep.run(sweep.plan(chosen.params, chosen.set, chosen.seeds, chosen.name), max(1, chosen.jobs))
        p = params.load(chosen.params, **dict(map(params.parse_override, chosen.set)))
        return pipeline.run(p, chosen.first, chosen.only, chosen.until)
    except SrlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
