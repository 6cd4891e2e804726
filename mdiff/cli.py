"""The command line: `mdiff COMMAND`; `COMMANDS` lists them. Libraries are imported where they are used."""

from __future__ import annotations

import errno
import hashlib
import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mdiff import commands, config, job
from mdiff.arguments import option, parse
from mdiff.errors import UserError
from mdiff.files import absolute, check_writable, locate

T = TypeVar("T")


def train(arguments: Sequence[str]) -> int:
    args = _parse_over_config(commands.TrainArgs, arguments, "train")
    from mdiff.recipes import experiment

    with job.join("train", args.processes, _settings(args), notices=True) as this:
        monitor = this.monitor
        made = this.prepare(args.workdir, lambda: experiment.prepare(args.fields))
        outcome = experiment.train(made, args.workdir, monitor, args.init_from, this.check)
        if outcome.stopped and outcome.early is None:
            monitor.say(
                f"{outcome.stopped}: saved step {int(outcome.state.step)} of {args.fields.train.steps}"
            )
            monitor.say(job.resume_line("train", arguments))
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

        stored = workdir.read(locate(folder)).config
        defaults = {"sample": stored.sample, "audit": stored.audit}
    args = parse(commands.EvalArgs, arguments, "mdiff eval", defaults)
    probes = _probes(args.probes)
    from mdiff.recipes import experiment

    with job.join("eval", args.processes, _settings(args)) as this:
        monitor = this.monitor
        made = this.prepare(
            args.workdir, lambda: experiment.reopen(args.workdir, args.sample, args.audit, args.mesh)
        )
        before = _digest(args.workdir / "samples.npz")
        experiment.sample(made, args.workdir, monitor)
        if before != _digest(args.workdir / "samples.npz"):
            _forget(args.workdir, monitor.say)
        if "audit" in args.probes:
            experiment.audit(made, args.workdir, monitor)
        for name in probes:
            experiment.probe(name, made, args.workdir, monitor)
        if "audit" not in args.probes:
            monitor.say(f"no page without the audit; next: mdiff report {args.workdir}")
    if "audit" in args.probes and this.first:
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

        defaults = {"sample": workdir.read(locate(folder)).config.sample}
    args = parse(commands.SampleArgs, arguments, "mdiff sample", defaults, flags=True)
    from mdiff.recipes import experiment

    with job.join("sample", args.processes, _settings(args)) as this:
        monitor = this.monitor
        made = this.prepare(
            args.workdir, lambda: experiment.reopen(args.workdir, args.sample, mesh_as=args.mesh)
        )
        before = _digest(args.workdir / "samples.npz")
        images = experiment.sample(made, args.workdir, monitor)
        if args.png:
            experiment.write_pngs(images, args.workdir / "generations")
        monitor.say(f"{len(images)} generations in {args.workdir / 'samples.npz'}")
        if (args.workdir / "audit.json").is_file() and before != _digest(args.workdir / "samples.npz"):
            monitor.say(
                f"its audit is of other generations; measure these: mdiff eval --workdir {args.workdir}"
            )
    return 0


def audit(arguments: Sequence[str]) -> int:
    args = parse(commands.AuditArgs, arguments, "mdiff audit")
    probes = _probes(args.probes)
    if "audit" not in args.probes:
        raise UserError(f"--probes {' '.join(args.probes)}: the page needs the audit; add audit")
    from mdiff.console import Monitor
    from mdiff.recipes import experiment

    if (args.out / "config.json").exists():
        raise UserError(f"--out {args.out}: holds a training run; choose another folder")
    check_writable(args.out, "--out")
    with Monitor() as monitor:
        heldout, before = None if args.heldout is None else str(args.heldout), _digest(args.out / "audit.npz")
        sets = experiment.load_folders(str(args.generated), str(args.train), heldout, args.out)
        experiment.audit_folders(sets, args.audit, args.out, monitor)
        if before != _digest(args.out / "audit.npz"):
            _forget(args.out, monitor.say)
        for name in probes:
            experiment.probe_folders(name, sets, args.audit, args.out, monitor)
    _report(
        args.out,
        {args.generated.name or "generated": args.out},
        f"Audit of {args.generated}",
        _command("audit", arguments),
    )
    return 0


def report(arguments: Sequence[str]) -> int:
    args = parse(commands.ReportArgs, arguments, "mdiff report")
    folders = [*args.runs, *args.workdir]
    if not folders:
        raise UserError("RUNS: 0 given; give one or more folders that hold an audit.json")
    if args.out is None and len(folders) != 1:
        raise UserError("--out: name a folder for the page of several runs")
    if args.out is not None:
        check_writable(args.out, "--out")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"RUNS {twice}: given twice; give each folder once")
    runs = dict(zip(names, folders, strict=True))
    _report(args.out or folders[0], runs, args.title, _command("report", arguments))
    return 0


def _parse_over_config(cls: type[T], arguments: Sequence[str], name: str) -> T:
    """The arguments of command `name`, whose `fields` begin as those of the file after --config."""
    path = option(arguments, "config")
    default = config.Config() if path is None else config.load(path)
    return parse(cls, arguments, f"mdiff {name}", {"fields": default})


def _settings(args: Any) -> dict[str, Any]:
    """What all processes of a job must have been started with: everything but which process it is."""
    return {name: tree for name, tree in config.to_json(args).items() if name not in ("config", "processes")}


def _probes(names: Sequence[str]) -> list[str]:
    """The probes beside the audit, each once; a wrong name costs nothing but the time to read one line."""
    if not names:
        raise UserError("--probes: 0 given; give audit, or other probes")
    if set(names) == {"audit"}:
        return []
    from mdiff.probes.registry import PROBES

    for name in names:
        if name not in PROBES and name != "audit":
            raise UserError(f"--probes {name}: unknown probe; there are audit, {', '.join(PROBES)}")
    return [name for name in dict.fromkeys(names) if name != "audit"]


def _digest(path: Path) -> str:
    from mdiff import processes

    return processes.from_first(
        lambda: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    )


def _forget(folder: Path, say: Callable[[str], None]) -> None:
    """Delete the results of probes on earlier generations, which the page would show beside new ones."""
    from mdiff import processes

    if not processes.is_first():
        return
    if stale := sorted(folder.glob("probe_*.json")):
        for path in stale:
            path.unlink()
            path.with_suffix(".npz").unlink(missing_ok=True)
        say(f"other generations than before: removed {', '.join(path.name for path in stale)}")


def _command(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    return {"command": shlex.join(["mdiff", name, *arguments])}


def _report(out: Path, runs: dict[str, Path], title: str, extra: dict[str, Any]) -> None:
    from rich.console import Console

    from mdiff.report.page import RESERVED, probe_tables, terminal_table, write_report

    named = {f"{name} (run)" if name in RESERVED else name: folder for name, folder in runs.items()}
    written = write_report(out, named, title=title, extra=extra)
    console = Console()
    for table in (terminal_table(written), *probe_tables(written)):
        console.print(table)
    for paragraph in written["verdict"]:
        console.print(paragraph, markup=False, highlight=False)
    console.print(f"page: {absolute(out / 'report.html')}", soft_wrap=True)


def compare(arguments: Sequence[str]) -> int:
    args = parse(commands.CompareArgs, arguments, "mdiff compare")
    from mdiff.report import compare_command

    return compare_command.execute(args)


def _of_report(
    name: str, takes: type[Any], *, job: bool = False, flags: bool = False
) -> Callable[[Sequence[str]], int]:
    """A command that `mdiff.report.NAME_command` executes.

    Args:
      name: of the command.
      takes: its class in `commands`.
      job: it may be run by several processes, which must agree on its settings.
      flags: its booleans are bare flags.
    """

    def run(arguments: Sequence[str]) -> int:
        args = parse(takes, arguments, f"mdiff {name}", flags=flags)
        module = importlib.import_module(f"mdiff.report.{name}_command")
        code: int = module.execute(
            args, *([_settings(args)] if job else []), _command(name, arguments)["command"]
        )
        return code

    return run


def watch(arguments: Sequence[str]) -> int:
    args = parse(commands.WatchArgs, arguments, "mdiff watch", flags=True)
    from mdiff.report.watch import watch as follow

    follow(args.runs, args.every, args.once)
    return 0


def judge(arguments: Sequence[str]) -> int:
    from mdiff.report import judge_command

    return judge_command.run(arguments)


def demo(arguments: Sequence[str]) -> int:
    args = parse(commands.DemoArgs, arguments, "mdiff demo", flags=True)
    from mdiff.recipes import demo as recipe

    spent = recipe.run(args.out, args.steps, args.again)
    if spent is not None:
        title = "mdiff demo: a standard and an ambient twin on 50 faces"
        extra = {**spent, **_command("demo", arguments)}
        _report(args.out, {name: args.out / name for name in recipe.TWINS}, title, extra)
        print(f"{spent['seconds']:.0f} s in all")
    return 0


def sweep(arguments: Sequence[str]) -> int:
    args = _parse_over_config(commands.SweepArgs, arguments, "sweep")
    from mdiff.recipes import cells
    from mdiff.recipes import sweep as recipe

    def value(field: str, words: list[str]) -> Any:
        given = parse(commands.SweepValue, [f"--{field}", *words], "mdiff sweep", {"fields": args.fields})
        return cells.get(given.fields, field)

    axes = cells.parse_over(args.over, args.fields, value)
    with job.join("sweep", args.processes, _settings(args), notices=True) as this:
        planned = this.prepare(
            args.workdir, lambda: recipe.plan(args.fields, axes, args.workdir, args.side_by_side)
        )
        return recipe.run(
            planned,
            this.monitor,
            mode=args.side_by_side,
            evaluate=args.eval,
            again_failed=args.again_failed,
            resume=job.resume_line("sweep", arguments),
        )


def plan(arguments: Sequence[str]) -> int:
    from mdiff.plan import command

    return command.execute(_parse_over_config(command.PlanArgs, arguments, "plan"))


class Command(NamedTuple):
    """What a command does, in code, in words, and as an example."""

    run: Callable[[Sequence[str]], int]
    does: str
    example: str


COMMANDS = {
    "train": Command(
        train, "train a model from a config, or resume it",
        "--config configs/faces.py --workdir runs/mine --train.steps 3000",
    ),
    "sweep": Command(
        sweep, "train and measure a run for every combination of some fields' values",
        "--config configs/faces.py --over loss.cutoff=0,0.5,1 seed=0,1 --workdir runs/sweep",
    ),
    "plan": Command(
        plan, "what a config needs and costs on chips that are not here",
        "--config configs/cifar10_ddpmpp.py --topology v5e:2x4",
    ),
    "watch": Command(watch, "follow runs on the terminal while they train", "runs/mine runs/other"),
    "eval": Command(
        evaluate, "sample a trained model and measure what it memorized",
        "--workdir runs/mine --probes audit quality",
    ),
    "sample": Command(sample, "only draw generations", "--workdir runs/mine --sample.n 1000 --png"),
    "audit": Command(
        audit, "audit images from any system, no model needed",
        "--generated samples/ --train training/ --heldout other/ --out runs/audit",
    ),
    "report": Command(
        report, "one page from the results of one or more runs", "runs/mine runs/other --out runs/both"
    ),
    "compare": Command(
        compare, "paired differences between two audited runs", "runs/mine runs/other --out diff.json"
    ),
    "front": Command(
        _of_report("front", commands.FrontArgs), "the front of quality and memorization over the cells of sweeps",
        "runs/sweep --out runs/sweep/front",
    ),
    "denoise": Command(
        _of_report("denoise", commands.DenoiseArgs), "what runs answer to the same noisy images: errors, sharpness, pictures",
        "runs/mine runs/other --out runs/denoising",
    ),
    "side": Command(
        _of_report("side", commands.SideArgs, job=True), "extract training images through a surrogate condition (SIDE), and measure what came out",
        "--workdir runs/mine --surrogate.clusters 20",
    ),
    "detect": Command(
        _of_report("detect", commands.DetectArgs, job=True, flags=True), "which prompts a text-to-image model knows by heart, by every detector",
        "--workdir runs/text",
    ),
    "nemo": Command(
        _of_report("nemo", commands.NemoArgs, job=True, flags=True), "find the neurons that make prompts recite their images, and switch them off (NeMo)",
        "--workdir runs/text",
    ),
    "leakage": Command(
        _of_report("leakage", commands.LeakageArgs), "how much noisy copies can tell about the images, at most, by cutoff",
        "--source faces --size 16 --n 100 --cutoff 0.4 1 2 4",
    ),
    "judge": Command(
        judge, "let people judge the most copy-like pairs, and read their answers",
        "export runs/mine --top 100",
    ),
    "demo": Command(demo, "the whole path on real faces, two models side by side", "--out runs/demo"),
}  # fmt: skip


def _usage() -> str:
    rows = "\n".join(
        f"  {name:<8} {command.does}\n{'':11}mdiff {name} {command.example}"
        for name, command in COMMANDS.items()
    )
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
        return COMMANDS[name].run(arguments[1:])
    except UserError as error:
        return job.fail(error)
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
