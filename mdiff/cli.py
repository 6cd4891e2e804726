"""The command line: `mdiff train | eval | sample | audit | report | compare | demo`."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mdiff import config
from mdiff.arguments import option, parse
from mdiff.config import Config
from mdiff.errors import UserError
from mdiff.files import check_writable


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Train a model, or go on training it."""

    config: Path
    """Experiment file, such as configs/faces.py."""
    workdir: Path
    """Folder of the run; an interrupted run in it is resumed."""
    init_from: Path | None = None
    """Fine-tune: start from the averaged weights of this run, or of one of its checkpoints/STEP."""
    fields: Annotated[Config, tyro.conf.arg(name="")] = Config()


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Sample a trained model and audit the samples against its training images."""

    workdir: Path
    """Folder of the run."""
    probes: tuple[str, ...] = ("audit",)
    """What to measure: audit."""
    sample: config.Sample = config.Sample()
    audit: config.Audit = config.Audit()


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Draw generations from a trained model into samples.npz."""

    workdir: Path
    """Folder of the run."""
    png: bool = False
    """Also write every generation as a PNG file into generations/."""
    sample: config.Sample = config.Sample()


@dataclass(frozen=True, kw_only=True)
class AuditArgs:
    """Audit images from any system: what they copy from the training images. Needs no model."""

    generated: Path
    """Generated images: a folder or an .npz file."""
    train: Path
    """Images the system was trained on: a folder or an .npz file."""
    heldout: Path | None = None
    """Images from the same source that it was not trained on: the control."""
    out: Path = Path("runs/audit")
    """Folder for audit.json, report.html and report.json."""
    audit: config.Audit = config.Audit()


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write one page from the result files of one or more runs, side by side."""

    workdir: tuple[Path, ...]
    """Folders that hold an audit.json."""
    out: Path | None = None
    """Folder for report.html and report.json; the run's own folder when there is one run."""
    title: str = "mdiff report"
    """Title of the page."""


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """Paired differences between two audited runs (second minus first), with intervals."""

    runs: tyro.conf.Positional[tuple[Path, Path]]
    """Two folders with an audit.json, sampled with the same seed and number of generations."""


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Train, sample and audit a standard and an ambient twin on the same few faces."""

    out: Path = Path("runs/demo")
    """Folder for both runs and the page; an interrupted demo in it is resumed."""
    steps: int | None = None
    """Training steps of both twins; the demo's own number when not given."""
    again: bool = False
    """Start over: delete an earlier demo in the folder first."""


def train(arguments: Sequence[str]) -> int:
    path = option(arguments, "config")
    default = config.Config() if path is None else config.load(path)
    args = parse(TrainArgs, arguments, "mdiff train", {"fields": default})
    from mdiff.console import Monitor
    from mdiff.recipes import experiment

    with Monitor() as monitor:
        made = experiment.prepare(args.fields)
        outcome = experiment.train(made, args.workdir, monitor, args.init_from)
        if outcome.stopped:
            monitor.say(
                f"{outcome.stopped}: saved step {int(outcome.state.step)} of {args.fields.train.steps}"
            )
            monitor.say(f"resume with: {shlex.join(['mdiff', 'train', *arguments])}")
        else:
            monitor.say(
                f"trained to step {int(outcome.state.step)}; next: mdiff eval --workdir {args.workdir}"
            )
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    folder = option(arguments, "workdir")
    defaults = {}
    if folder is not None:
        from mdiff.train import workdir

        stored = workdir.read(Path(folder)).config
        defaults = {"sample": stored.sample, "audit": stored.audit}
    args = parse(EvalArgs, arguments, "mdiff eval", defaults)
    unknown = [name for name in args.probes if name != "audit"]
    if unknown:
        raise UserError(f"--probes {unknown[0]}: unknown probe; there is: audit")
    from mdiff.console import Monitor
    from mdiff.recipes import experiment

    with Monitor() as monitor:
        made = experiment.reopen(args.workdir, args.sample, args.audit)
        experiment.sample(made, args.workdir, monitor)
        if "audit" in args.probes:
            experiment.audit(made, args.workdir, monitor)
    if "audit" in args.probes:
        _report(
            args.workdir,
            {made.config.name: args.workdir},
            f"mdiff: {made.config.name}",
            _command("eval", arguments),
        )
    return 0


def sample(arguments: Sequence[str]) -> int:
    folder = option(arguments, "workdir")
    defaults = {}
    if folder is not None:
        from mdiff.train import workdir

        defaults = {"sample": workdir.read(Path(folder)).config.sample}
    args = parse(SampleArgs, arguments, "mdiff sample", defaults, flags=True)
    from mdiff.console import Monitor
    from mdiff.recipes import experiment

    with Monitor() as monitor:
        made = experiment.reopen(args.workdir, args.sample)
        images = experiment.sample(made, args.workdir, monitor)
        if args.png:
            experiment.write_pngs(images, args.workdir / "generations")
        monitor.say(f"{len(images)} generations in {args.workdir / 'samples.npz'}")
    return 0


def audit(arguments: Sequence[str]) -> int:
    args = parse(AuditArgs, arguments, "mdiff audit")
    from mdiff.console import Monitor
    from mdiff.recipes import experiment

    if (args.out / "config.json").exists():
        raise UserError(f"--out {args.out}: holds a training run; choose another folder")
    check_writable(args.out, "--out")
    with Monitor() as monitor:
        heldout = None if args.heldout is None else str(args.heldout)
        experiment.audit_folders(str(args.generated), str(args.train), heldout, args.audit, args.out, monitor)
    _report(
        args.out,
        {args.generated.name or "generated": args.out},
        f"Audit of {args.generated}",
        _command("audit", arguments),
    )
    return 0


def report(arguments: Sequence[str]) -> int:
    args = parse(ReportArgs, arguments, "mdiff report")
    if args.out is None and len(args.workdir) != 1:
        raise UserError("--out: name a folder for the page of several runs")
    if args.out is not None:
        check_writable(args.out, "--out")
    names = [folder.resolve().name for folder in args.workdir]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in args.workdir]
    _report(
        args.out or args.workdir[0],
        dict(zip(names, args.workdir, strict=True)),
        args.title,
        _command("report", arguments),
    )
    return 0


def _command(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    return {"command": shlex.join(["mdiff", name, *arguments])}


def _report(out: Path, runs: dict[str, Path], title: str, extra: dict[str, Any]) -> None:
    from rich.console import Console

    from mdiff.report.page import RESERVED, terminal_table, write_report

    named = {f"{name} (run)" if name in RESERVED else name: folder for name, folder in runs.items()}
    written = write_report(out, named, title=title, extra=extra)
    console = Console()
    console.print(terminal_table(written))
    for paragraph in written["verdict"]:
        console.print(paragraph, markup=False, highlight=False)
    console.print(f"page: {(out / 'report.html').resolve()}", soft_wrap=True)


def compare(arguments: Sequence[str]) -> int:
    args = parse(CompareArgs, arguments, "mdiff compare")
    from rich.console import Console
    from rich.table import Table

    from mdiff.probes import results
    from mdiff.probes.compare import compare as paired

    first, second = (results.load(folder) for folder in args.runs)
    table = Table(
        title=f"{args.runs[1]} minus {args.runs[0]}", caption="paired over generations; 95 % intervals"
    )
    for column in ("measure", "difference", "low", "high", "n"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, value in paired(first, second).items():
        table.add_row(name, *(f"{x:+.4f}" for x in (value.value, value.low, value.high)), str(value.n))
    Console().print(table)
    return 0


def demo(arguments: Sequence[str]) -> int:
    args = parse(DemoArgs, arguments, "mdiff demo", flags=True)
    from mdiff.recipes import demo as recipe

    spent = recipe.run(args.out, args.steps, args.again)
    if spent is not None:
        title = "mdiff demo: a standard and an ambient twin on 50 faces"
        extra = {**spent, **_command("demo", arguments)}
        _report(args.out, {name: args.out / name for name in recipe.TWINS}, title, extra)
        print(f"{spent['seconds']:.0f} s in all")
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a model from a config, or resume it"),
    "eval": (evaluate, "sample a trained model and audit what it memorized"),
    "sample": (sample, "only draw generations"),
    "audit": (audit, "audit images from any system, no model needed"),
    "report": (report, "one page from the results of one or more runs"),
    "compare": (compare, "paired differences between two audited runs"),
    "demo": (demo, "the whole path on real faces, two models side by side"),
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: mdiff COMMAND [OPTIONS]\n\n{rows}\n\nmdiff COMMAND --help lists every option with its default."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a `UserError` is one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_usage())
            return 0 if arguments else 2
        name = arguments[0]
        if name == "--version":
            import mdiff

            print(mdiff.__version__)
            return 0
        if name not in COMMANDS:
            raise UserError(f"{name}: unknown command; there are {', '.join(COMMANDS)}")
        return COMMANDS[name][0](arguments[1:])
    except UserError as error:
        print(f"mdiff: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(
            f"mdiff: {error.filename or 'disk'}: {error.strerror}; free some space or choose another folder",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("mdiff: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
