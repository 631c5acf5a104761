"""The command line: `python -m srlib run params/cpu.yaml`."""

from __future__ import annotations

import argparse
import sys

from srlib import SrlibError, params, pipeline


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
    chosen = parser.parse_args(arguments)
    try:
        p = params.load(chosen.params, **dict(map(params.parse_override, chosen.set)))
        return pipeline.run(p, chosen.first, chosen.only)
    except SrlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
