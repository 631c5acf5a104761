"""The command line: `srlib run params/cpu.yaml`, or `python -m srlib run params/cpu.yaml`.

What takes seconds to import is imported by the command that needs it, so that help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from srlib import SrlibError, __version__, visible

if TYPE_CHECKING:
    from srlib.params import Params

EXIT_CODES = """\
exit codes:
  0    done
  1    a stage failed, or something does not fit
  2    a mistake in the input; one sentence says which
  130  interrupted; what is finished is kept"""


class Command(NamedTuple):
    """What follows `srlib`: a line of help, its arguments, and what it does, giving the exit code."""

    help: str
    arguments: Callable[[ArgumentParser], None]
    do: Callable[[Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Parse and do; returns the exit code, as `EXIT_CODES` tells them."""
    try:
        chosen = _parser().parse_args(arguments)
        return COMMANDS[chosen.command].do(chosen)
    except SrlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, or may not be written
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; mend that, and run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept: run again to go on", file=sys.stderr)
        return 130


class _Parser(ArgumentParser):
    """A mistake is one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {visible(message)}; see {self.prog} --help\n")


def _parser() -> ArgumentParser:
    from srlib.run.stages import STAGES

    stages = "stages, in order:\n" + "".join(f"  {name}\n" for name in STAGES)
    layout = argparse.RawDescriptionHelpFormatter
    about = "A small reasoning model that hands the hard parts of its thinking to a big one."
    parser = _Parser(prog="srlib", description=about, epilog=f"{stages}\n{EXIT_CODES}", formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"srlib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        epilog = f"{stages}\n{EXIT_CODES}" if name == "run" else EXIT_CODES
        made = commands.add_parser(
            name, help=command.help, description=command.help, epilog=epilog, formatter_class=layout
        )
        command.arguments(made)
    return parser


def _on_a_file(parser: ArgumentParser) -> None:
    parser.add_argument("params", help="params file, such as params/cpu.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value: sft.epochs=1"
    )


def _for_run(parser: ArgumentParser) -> None:
    _on_a_file(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--from", dest="first", metavar="STAGE", help="redo this stage and all after it")
    which.add_argument("--only", metavar="STAGE", help="redo this stage alone")
    parser.add_argument("--until", metavar="STAGE", help="end with this stage")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run, and why")


def _for_sweep(parser: ArgumentParser) -> None:
    parser.add_argument("params", help="params file, or a file of params/ablations/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values to vary: grpo.reward_weights.latency=0,1",
    )
    parser.add_argument("--seeds", type=_whole_numbers, metavar="S1,S2", help="such as 0,1,2")
    parser.add_argument("--name", help="the sweep's folder is outputs/<run>-<name>")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time")


def _for_compare(parser: ArgumentParser) -> None:
    parser.add_argument("a", help="folder of a run, such as outputs/cpu")
    parser.add_argument("b", help="folder of another")
    parser.add_argument("--policy", action="append", metavar="NAME", help="learned, or learned:grpo for A's and B's")


def _for_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run, such as outputs/cpu")
    parser.add_argument("--policy", choices=["learned", "grpo"], help="the fine-tuned or the reinforced model")
    parser.add_argument("--to", metavar="FOLDER", help="made for model/ and dataset/; without: export, in the run's")
    parser.add_argument("--push", metavar="OWNER/NAME", help="put the model on the hub; what is new there is private")
    parser.add_argument("--push-data", metavar="OWNER/NAME", help="put the annotated traces there, too")


def _for_params(parser: ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="a section or a setting: grpo, grpo.beta; without: all")


def _run(chosen: Namespace) -> int:
    p = _params(chosen)
    from srlib.run import pipeline

    return pipeline.run(p, chosen.first, chosen.only, chosen.until, dry=chosen.dry_run)


def _sweep(chosen: Namespace) -> int:
    from srlib.run import sweep

    return sweep.run(sweep.plan(chosen.params, chosen.set, chosen.seeds, chosen.name), max(1, chosen.jobs))


def _compare(chosen: Namespace) -> int:
    from srlib.evaluation import report

    print(report.compare(chosen.a, chosen.b, chosen.policy))
    return 0


def _bench(chosen: Namespace) -> int:
    p = _params(chosen)
    from srlib.run import bench

    return bench.main(p)


def _plan(chosen: Namespace) -> int:
    p = _params(chosen)
    from srlib.cost import memory

    table, all_fit = memory.table(p)
    print(table)
    if p.data.traces is not None and not p.annotate.tries and "01_annotate" not in p.left_out:
        from srlib.annotation import traces

        print(traces.foreseen(p, memory.contexts(p)))
    if "worth" in p.annotate.methods and "01_annotate" not in p.left_out:
        from srlib.annotation import worth

        print(worth.foreseen(p))
    if p.hardware.gpus:
        from srlib.cost import hours

        print(f"\n{hours.table(p)}")
    return 0 if all_fit else 1


def _rehearse(chosen: Namespace) -> int:
    p = _params(chosen)
    from srlib.run import rehearse

    return rehearse.run(p, chosen.params)


def _export(chosen: Namespace) -> int:
    from srlib.run import export

    return export.run(chosen.run, chosen.policy, chosen.to, chosen.push, chosen.push_data)


def _settings(chosen: Namespace) -> int:
    from srlib.params import reference

    print(reference.table(chosen.key))
    return 0


def _params(chosen: Namespace) -> Params:
    from srlib import params

    return params.load(chosen.params, **dict(map(params.parse_override, chosen.set)))


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,1,2") from None


COMMANDS = {
    "run": Command("run the notebooks of a params file in order", _for_run, _run),
    "sweep": Command("run 03 and 05 for every combination of some values and seeds", _for_sweep, _sweep),
    "compare": Command("compare two runs, paired by problem", _for_compare, _compare),
    "bench": Command("measure every policy's speed against what the models do alone", _on_a_file, _bench),
    "plan": Command("say what each stage needs in memory, and whether it fits", _on_a_file, _plan),
    "rehearse": Command("run every stage with tiny twins of the models, on this machine", _on_a_file, _rehearse),
    "export": Command("save a run's tuned model for vLLM and transformers", _for_export, _export),
    "params": Command("list every setting of a params file: default, limits, what it is", _for_params, _settings),
}


if __name__ == "__main__":
    sys.exit(main())
