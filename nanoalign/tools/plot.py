"""Draw the curves of runs: python -m nanoalign.plot RUN [RUN ...] [--out curves.png]

It reads metrics.jsonl in each run's directory and draws what it finds (run/report.py).
"""

from pathlib import Path

from nanoalign import InputError
from nanoalign.run.command import command
from nanoalign.run.flags import Parser
from nanoalign.run.report import draw, read_run


@command("plot")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m nanoalign.plot", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of runs")
    parser.add_argument("--out", type=Path, help="default: curves.png in the first run")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {out}: expected .png, .pdf or .svg")
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        names = map(str, args.runs)
    try:
        if not draw({name: read_run(run) for name, run in zip(names, args.runs)}, out):
            raise InputError(f"{out}: nothing to draw: no metrics yet")
    except ImportError:
        raise InputError("matplotlib is not installed; pip install 'nanoalign[plot]'") from None
    print(out)


if __name__ == "__main__":
    main()
