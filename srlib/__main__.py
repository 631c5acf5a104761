"""The command line: `python -m srlib run params/cpu.yaml`; or `bench`, `plan`, `sweep`, `compare`."""

from __future__ import annotations

import argparse
import sys

from srlib import SrlibError, params
from srlib.cost import memory
from srlib.evaluation import report
from srlib.run import pipeline, sweep


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; a mistake in the input is one sentence and status 2, a failed stage or what does not fit is 1."""
    parser = argparse.ArgumentParser(prog="python -m srlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = argparse.ArgumentParser(add_help=False)  # what the commands on one params file share
    one.add_argument("params", help="params file, such as params/cpu.yaml")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value: sft.epochs=1")
    run = commands.add_parser("run", parents=[one], help="run the notebooks of a params file in order")
    which = run.add_mutually_exclusive_group()
    which.add_argument("--from", dest="first", metavar="STAGE", help="redo this stage and all after it")
    which.add_argument("--only", metavar="STAGE", help="redo this stage alone")
    run.add_argument("--until", metavar="STAGE", help="end with this stage")
    commands.add_parser("bench", parents=[one], help="measure every policy's speed against what the models do alone")
    commands.add_parser("plan", parents=[one], help="say what each stage needs in memory, and whether it fits")
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
    beside = commands.add_parser("compare", help="compare two runs, paired by problem")
    beside.add_argument("a", help="folder of a run, such as outputs/cpu")
    beside.add_argument("b", help="folder of another")
    beside.add_argument("--policy", action="append", metavar="NAME", help="learned, or learned:grpo for A's and B's")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "compare":
            print(report.compare(chosen.a, chosen.b, chosen.policy))
            return 0
        if chosen.command == "sweep":
            return sweep.run(sweep.plan(chosen.params, chosen.set, chosen.seeds, chosen.name), max(1, chosen.jobs))
        p = params.load(chosen.params, **dict(map(params.parse_override, chosen.set)))
        if chosen.command == "bench":
            from srlib.run import bench  # here, as it takes seconds to import what it needs

            return bench.main(p)
        if chosen.command == "plan":
            table, all_fit = memory.table(p)
            print(table)
            return 0 if all_fit else 1
        return pipeline.run(p, chosen.first, chosen.only, chosen.until)
    except SrlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
