"""`mdiff plan`: compile what a config runs for hardware that is not here, and say what it needs and costs.

Each part is compiled in a process of its own and written as soon as it is done, so a long plan is resumed by the
same command.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from jax.sharding import AbstractMesh

from mdiff import config
from mdiff.config import Config
from mdiff.data import augment
from mdiff.errors import UserError
from mdiff.files import check_writable, write_json
from mdiff.plan import advice, chips, programs, roofline
from mdiff.plan.chips import Topology
from mdiff.recipes import runs
from mdiff.train import mesh as meshes

FORMAT = 1
GREY = ("faces", "digits", "mnist5k")  # built-in sets with one channel


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """Compile a config's programs for a TPU slice (or N CPU devices) that is not here; print needs and costs.

    Nothing is run and no data are read.
    """

    config: Path
    """Experiment file, such as configs/cifar10_ddpmpp.py."""
    topology: str
    """Chips and shape, such as v5e:4x4, v4:4x4x8, v5p:2x2x1, v6e:8x8, or cpu:8 for simulated devices."""
    parts: tuple[str, ...] = programs.PARTS
    """What to plan: train (a step), sample (a batch), sweep (over neurons)."""
    out: Path | None = None
    """The plan's .json file; plans/NAME_TOPOLOGY_DIGEST.json when not given. Parts it has are not made again."""
    channels: int = 0
    """Channels of the images; 0 is 1 for faces, digits and mnist5k, and 3 for everything else."""
    sweep: programs.Sweep = programs.Sweep()
    fields: Annotated[Config, tyro.conf.arg(name="")] = Config()


def execute(args: PlanArgs) -> int:
    """The command: make, print and store a plan."""
    from mdiff.console import Monitor
    from mdiff.plan import show

    plan, out = start(args)
    with Monitor() as monitor:
        make(plan, args.parts, out, monitor.say)
    show.show(plan, args.parts)
    print(f"plan: {out}")
    return 0


def start(args: PlanArgs) -> tuple[dict[str, Any], Path]:
    """The plan that `args` ask for, with the parts that are there already, and its file.

    Raises:
      UserError: an argument is out of range, or the file is another plan.
    """
    cfg, topology = args.fields, chips.parse(args.topology)
    for part in args.parts or [""]:
        if part not in programs.PARTS:
            raise UserError(f"--parts {part}: unknown; there are {', '.join(programs.PARTS)}")
    if not 0 <= args.channels <= 64:
        raise UserError(f"--channels {args.channels}: give 1 to 64, or 0 to take the source's")
    runs.check_fields(cfg)
    augment.check(cfg.data)
    if topology.chip is not None and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {topology.name}: needs the TPU compiler; pip install libtpu")
    asked = {
        "format": FORMAT,
        "topology": topology.name,
        "channels": args.channels or (1 if cfg.data.source in GREY else 3),
        "sweep": config.to_json(args.sweep),
        "config": config.to_json(cfg),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{cfg.name}_{topology.name.replace(':', '-')}_{digest}.json"
    out = args.out or Path("plans") / name
    if out.suffix != ".json":
        raise UserError(f"--out {out}: is no .json file; give one")
    on = AbstractMesh(meshes.mesh_shape(cfg.mesh, topology.devices), meshes.AXES)
    if "train" in args.parts:
        meshes.check_batch(cfg.train.batch, on, cfg.train.accumulate)
    check_writable(out.parent, "--out")
    return _earlier(out, asked) | asked, out


def _earlier(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    if not out.exists():
        return {"parts": {}}
    from mdiff.processes import first_difference

    try:
        stored = json.loads(out.read_text())
        assert isinstance(stored["parts"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"--out {out}: is no plan; choose another file") from None
    old = {name: stored.get(name) for name in asked}
    if difference := first_difference(old, json.loads(json.dumps(asked))):
        raise UserError(f"--out {out}: holds another plan ({difference}); choose another file or delete it")
    found: dict[str, Any] = stored
    return found


def make(plan: dict[str, Any], parts: Sequence[str], out: Path, say: Any) -> None:
    """Make the parts that `plan` lacks, each in its own process, and write the plan after each.

    Raises:
      UserError: a part cannot be made; the finished ones are kept.
    """
    topology = chips.parse(plan["topology"])
    cfg = config.from_json(Config, plan["config"])
    sweep = config.from_json(programs.Sweep, plan["sweep"], "sweep")
    for part in dict.fromkeys(parts):
        if part in plan["parts"]:
            say(f"{part}: already in {out}")
            continue
        say(f"{part}: compiling for {topology.name} ({topology.devices} devices)")
        begin = time.perf_counter()
        found = _in_child(part, plan, topology, out)
        found["estimate"] = roofline.estimate(found, topology)
        change = advice.first_change(part, found, cfg, topology, sweep)
        found["first_change"] = None if change is None else asdict(change)
        plan["parts"][part] = found
        plan["chip"] = None if topology.chip is None else asdict(topology.chip)
        plan["machine"] = {
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        write_json(out, plan)
        say(f"{part}: done in {time.perf_counter() - begin:.0f} s")


def _in_child(part: str, plan: dict[str, Any], topology: Topology, out: Path) -> dict[str, Any]:
    """Compile in a process of its own: libtpu wants to be alone, and a compilation's memory is given back."""
    # A program is compiled, no chip is used: the lock by which libtpu guards the chips of a machine is not needed.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment["JAX_NUM_CPU_DEVICES"] = str(topology.devices if topology.chip is None else 1)
    with tempfile.TemporaryDirectory(prefix="mdiff-plan-") as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.json"
        write_json(
            request, {**{k: plan[k] for k in ("config", "channels", "topology", "sweep")}, "part": part}
        )
        log = out.with_name(f"{out.stem}.{part}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            done = subprocess.run(
                [sys.executable, "-m", "mdiff.plan.child", str(request), str(result)],
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        if done.returncode or not result.is_file():
            raise UserError(
                f"plan {part}: the compiling process ended with code {done.returncode}; its output is in {log}"
            )
        found: dict[str, Any] = json.loads(result.read_text())
    log.unlink()
    if "error" in found:
        raise UserError(found["error"])
    return found
