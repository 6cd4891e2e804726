"""One part of a plan, in a process of its own: `python -m mdiff.plan.child REQUEST.json RESULT.json`.

The parent sets the environment before jax starts. What libtpu prints stays in the child's log.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from mdiff import config
from mdiff.errors import UserError
from mdiff.files import strict, write_json
from mdiff.plan import chips, count, hlo, programs
from mdiff.plan.chips import GIB, Topology


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for: descriptions of a TPU's, or simulated ones of this machine.

    Raises:
      UserError: libtpu refuses the shape.
    """
    if topology.chip is None:
        return list(jax.devices())
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **topology.options()
        )
    except jax.errors.JaxRuntimeError as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"--topology {topology.name}: {line}; try such as {topology.chip.example}") from error
    found = list(described.devices)
    if len(found) != topology.devices:
        raise UserError(
            f"--topology {topology.name}: libtpu made {len(found)} devices of it; try another shape"
        )
    return found


def analyse(
    part: str, cfg: config.Config, channels: int, topology: Topology, sweep: programs.Sweep
) -> dict[str, Any]:
    """Compile one part and measure the program; every number is per device unless its name says otherwise."""
    program = programs.build(part, cfg, channels, devices(topology), sweep)
    found: dict[str, Any] = {
        "unit": program.unit,
        "units_per_call": program.per_call,
        "units": program.units,
        "calls": program.calls,
        "holds": {name: programs.held_bytes(tree) for name, tree in program.holds.items()},
        "flops": {
            "analytic": program.executed / topology.devices,
            "model": program.useful / topology.devices,
        },
    }
    start = time.perf_counter()
    lowered = program.jitted.lower(*program.args)
    found["lower_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found["too_big"] = _too_big(str(error))
    else:
        found |= measure(compiled)
    found["compile_seconds"] = time.perf_counter() - start
    found["compile_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def measure(compiled: Any) -> dict[str, Any]:
    """Memory, operations, traffic and messages of a compiled program, per device."""
    sizes, costs = compiled.memory_analysis(), compiled.cost_analysis()
    program = hlo.parse(compiled.as_text())
    counted, once = count.count(program), count.count(program, loops_once=True)
    return {
        "memory": {
            "arguments": sizes.argument_size_in_bytes,
            "outputs": sizes.output_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "program": sizes.generated_code_size_in_bytes,
        },
        "counted": {
            "flops": counted.flops,
            "flops_loops_once": once.flops,
            "bytes": counted.bytes,
            "bytes_loops_once": once.bytes,
            "collectives": {kind: asdict(each) for kind, each in sorted(counted.collectives.items())},
            "unknown_loops": counted.unknown_loops,
        },
        "compiler": {
            "flops_loops_once": costs.get("flops"),
            "bytes_loops_once": costs.get("bytes accessed"),
        },
    }


_SIZE = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40, "": 1}


def _too_big(message: str) -> dict[str, Any]:
    """What the compiler says when a program does not fit: the bytes it needs and the bytes there are."""
    patterns = (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            need, have = (float(match[i]) * _SIZE[match[i + 1]] for i in (1, 3))
            return {"needed": need, "usable": have}
    return {"needed": None, "usable": None}


def versions() -> dict[str, str | None]:
    """Versions of what decides about the program."""
    found: dict[str, str | None] = {}
    for name in ("jax", "jaxlib", "libtpu", "flax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main(request: Path, result: Path) -> int:
    """Answer `request`; a `UserError` is answered too."""
    asked = json.loads(request.read_text())
    try:
        found = analyse(
            asked["part"],
            config.from_json(config.Config, asked["config"]),
            asked["channels"],
            chips.parse(asked["topology"]),
            config.from_json(programs.Sweep, asked["sweep"], "sweep"),
        )
    except UserError as error:
        found = {"error": str(error)}
    write_json(result, strict(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
