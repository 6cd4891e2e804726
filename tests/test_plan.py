"""Plans: the reading of compiled programs, counts against closed forms, memory against measured memory, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import one_line

from mdiff import cli, config, flops
from mdiff.plan import advice, chips, command, count, hlo, programs, roofline, show

ROOT = Path(__file__).resolve().parents[1]
UNET = config.Config(
    name="unet",
    data=config.Data(source="digits", size=8, n=20),
    net=config.Net(channels=8, mults=(1, 1), blocks=1, attention=(), classes=3, condition_dropout=0.1),
    train=config.Train(batch=8),
    sample=config.Sample(n=20, batch=8, steps=3, guidance=2.0),
)

QUICK = {"xla_backend_optimization_level": 0}  # of the machine code, which is not looked at
# ------------------------------------------------------------------------------------ the text, by hand

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8, entry_computation_layout={(f32[4,6]{1,0})->f32[4,6]{1,0}}

%cond.1 (p: (s32[], f32[4,6])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4,6]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%chained (a: f32[2,6]) -> f32[8,6] {
  %a = f32[2,6]{1,0} parameter(0)
  %ag.1 = f32[8,6]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]T(1,0)) {'x'}, dimensions={0}
  ROOT %cc = f32[8,6]{1,0} custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%chained.2 (a.2: f32[2,6]) -> f32[8,6] {
  %a.2 = f32[2,6]{1,0} parameter(0)
  ROOT %ag.2 = f32[8,6]{1,0} all-gather(%a.2), channel_id=7, replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]T(1,0)) {'x'}, dimensions={0}
}

%all-reduce-scatter.3 (b: f32[8,6]) -> f32[4,6] {
  %b = f32[8,6]{1,0} parameter(0)
  %ar.3 = f32[8,6]{1,0} all-reduce(%b), channel_id=9, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %ds = f32[4,6]{1,0} dynamic-slice(%ar.3, %z, %z), dynamic_slice_sizes={4,6}
}

%body.1 (p.1: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %p.1 = (s32[]{:T(128)}, f32[4,6]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,6]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %w = f32[6,6]{1,0:T(8,128)S(1)} constant({...})
  %d = f32[4,6]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %s = f32[2,6]{1,0} slice(%d), slice={[0:2], [0:6]}
  %f1 = f32[8,6]{1,0} fusion(%s), kind=kCustom, calls=%chained
  %f2 = f32[8,6]{1,0} fusion(%s), kind=kCustom, calls=%chained.2
  %f3 = f32[4,6]{1,0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.3
  %i.0 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %one = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)} add(%i.0, %one)
  ROOT %t = (s32[]{:T(128)}, f32[4,6]{1,0:T(8,128)}) tuple(%i.1, %d)
}

ENTRY %main.1 (q: f32[4,6]) -> f32[4,6] {
  %q = f32[4,6]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %pair = (s32[], f32[4,6]{1,0:T(8,128)}) tuple(%zero, %q)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[4,6]{1,0:T(8,128)}) while(%pair), condition=%cond.1, body=%body.1, metadata={op_name="jit(f)/while"}
  %y = f32[4,6]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %ar = (f32[4,6]{1,0}, bf16[10]{0}) all-reduce(%y, %h), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %h = bf16[10]{0} constant({...})
  %cp = (f32[4,6]{1,0}, f32[4,6]{1,0}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=2, source_target_pairs={{0,1},{1,2}}
  %cpd = f32[4,6]{1,0} collective-permute-done(%cp)
  ROOT %out = f32[4,6]{1,0:T(8,128)} copy(%cpd)
}
"""


def test_program_by_hand():
    program = hlo.parse(TEXT)
    assert program.entry == "main.1" and program.devices == 8
    main = program.computations["main.1"]
    loop = main.by_name["loop"]
    assert [leaf.dims for leaf in loop.shape] == [(), (4, 6)] and hlo.trips(program, main, loop) == 28
    weight = program.computations["body.1"].by_name["w"].shape[0]
    assert weight.space == 1 and weight.bytes == 144
    found = count.count(program)
    assert found.flops == 28 * 2 * 4 * 6 * 6 and found.unknown_loops == 0
    assert count.count(program, loops_once=True).flops == 2 * 4 * 6 * 6
    gather, reduce, scatter, permute = (
        found.collectives[kind]
        for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")
    )
    # Written in two fused groups, sent once per round; over the 4 devices of axis x.
    assert gather == count.Messages(28, 28 * 192, 28 * 192 * 3 / 4)
    assert reduce == count.Messages(1, 96 + 20, 2 * 116 * 7 / 8)
    assert scatter == count.Messages(28, 28 * 192, 28 * 192 / 2)
    assert permute == count.Messages(1, 96, 96)


def test_traffic_by_hand():
    """Main memory only: the weight in space 1 is not read from it, a slice reads what it keeps."""
    found = count.count(hlo.parse(TEXT))
    dot, counter = 2 * 96, 3 * 4
    slice_, gathers, scatter = 2 * 48, 2 * (48 + 192), 192 + 96
    reduce, start, copy = 2 * (96 + 20), 3 * 96, 2 * 96
    assert found.bytes == 28 * (dot + counter + slice_ + gathers + scatter) + reduce + start + copy


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}, x", 3),
        ("replica_groups=[16,4]<=[64], x", 4),
        ("replica_groups=mesh['a'=16,'b'=1,'c'=16], device_ids=([16,16]T(1,0)) {'a'}, x={1}", 16),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", 8),
        ("replica_groups={}, x", 8),
    ],
)
def test_groups(attributes, size):
    assert hlo.group_size(attributes, 8) == size


def rounds(text):
    """How often the loop of an altered text runs."""
    program = hlo.parse(text)
    main = program.computations["main.1"]
    return hlo.trips(program, main, main.by_name["loop"])


FUSED = """
%step (a.9: s32[], b.9: s32[]) -> s32[] {
  %a.9 = s32[] parameter(0)
  %b.9 = s32[] parameter(1)
  ROOT %sum.9 = s32[] add(%a.9, %b.9)
}

%body.1 ("""


def test_counters_start_and_step_as_the_program_says():
    """Products that the compiler spreads over devices count by two: a body counted per unit would count twice."""
    two = TEXT.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")
    assert rounds(two) == 14
    assert rounds(TEXT.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(5)")) == 23
    assert rounds(two.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(5)")) == 12  # 5, 7, …, 27
    fused = TEXT.replace("\n%body.1 (", FUSED).replace(
        "%i.1 = s32[]{:T(128)} add(%i.0, %one)",
        "%i.1 = s32[]{:T(128)} fusion(%i.0, %one), kind=kLoop, calls=%step",
    )
    assert rounds(fused) == 28 and rounds(fused.replace("constant(1)", "constant(4)")) == 7
    assert rounds(TEXT.replace("add(%i.0, %one)", "multiply(%i.0, %one)")) is None
    assert rounds(TEXT.replace("add(%i.0, %one)", "subtract(%i.0, %one)")) is None


def test_a_loop_by_twos_against_the_compiler():
    """The same product four times, in two rounds."""

    def looped(x, w):
        def body(carry):
            i, y = carry
            return i + 2, (y @ w) @ w

        return jax.lax.while_loop(lambda carry: carry[0] < 4, body, (0, x))[1]

    counted = count.count(hlo.parse(compiled(looped, (8, 16), (16, 16)).as_text()))
    assert counted.flops == 4 * 2 * 8 * 16 * 16 and counted.unknown_loops == 0


def test_loops_without_a_known_length_are_reported():
    program = hlo.parse(TEXT.replace("direction=LT", "direction=NE"))
    assert count.count(program).unknown_loops == 1
    noted = TEXT.replace("direction=LT", "direction=NE").replace(
        "body=%body.1,", 'body=%body.1, backend_config={"known_trip_count":{"n":"5"}},'
    )
    assert count.count(hlo.parse(noted)).flops == 5 * 2 * 4 * 6 * 6


def brute_pairs(n, out, size, stride, low, spread, dilation):
    """Over an axis of zeros and ones: ones where inputs are, correlated with all-one taps."""
    axis = np.zeros(10_000, int)
    axis[1000 : 1000 + (n - 1) * spread + 1 : spread] = 1
    return sum(axis[1000 - low + o * stride + k * dilation] for o in range(out) for k in range(size))


@pytest.mark.parametrize(
    "case",
    [
        (8, 8, 3, 1, 1, 1, 1),  # SAME
        (8, 4, 3, 2, 0, 1, 1),  # strided
        (4, 8, 3, 1, 2, 2, 1),  # dilated input: a strided convolution's gradient
        (16, 16, 16, 15, 0, 16, 1),  # batch axis of a matrix product, as TPU programs write it
        (1, 16, 16, 1, 15, 1, 1),  # outer product, as TPU programs write it
        (32, 3, 32, 1, 1, 1, 1),  # gradient of a kernel
        (9, 5, 3, 1, 0, 1, 2),  # dilated taps
    ],
)
def test_pairs(case):
    assert flops.pairs(*case) == brute_pairs(*case)


def compiled(fn, *shapes):
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_scans_count_fully():
    """Against arithmetic; the compiler itself counts the body once."""

    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]

    program = hlo.parse(compiled(scanned, (33, 64), (64, 64)).as_text())
    assert count.count(program).flops == 7 * 2 * 33 * 64 * 64
    assert count.count(program, loops_once=True).flops == 2 * 33 * 64 * 64
    traffic = count.count(program).bytes
    assert 7 * (64 * 64 + 2 * 33 * 64) * 4 <= traffic <= 3 * 7 * (64 * 64 + 2 * 33 * 64) * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_without_their_padding(stride):
    def loss(x, k):
        out = jax.lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(out**2)

    shapes = (2, 8, 8, 3), (3, 3, 3, 5)
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    axis = 22 if stride == 1 else 11  # taps of an axis of 8 that meet a pixel; SAME pads a strided one behind
    assert flops.count(loss, *structs, padding=False).total == 2 * 2 * 5 * 3 * axis**2
    both = jax.grad(loss, argnums=(0, 1))
    counted = flops.count(both, *structs, padding=False).total
    assert counted == 3 * 2 * 2 * 5 * 3 * axis**2
    assert count.count(hlo.parse(compiled(both, *shapes).as_text())).flops == counted


# -------------------------------------------------------------------------- whole programs, real processes


def child(code: str, devices: int) -> dict:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed leaves the process at once
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


MEASURE = """
import json, sys, time
import jax, numpy as np
from mdiff import config
from mdiff.files import strict
from mdiff.plan import child, programs

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def measure(fsdp, remat):
    # A plan of a training step; then the bytes of a device's arguments, and by how much the process grows for each
    # device while the program runs.
    cfg = config.Config(
        data=config.Data(size=16, n=50),
        net=config.Net(arch="dit", channels=192, blocks=6, head_channels=64, patch=4, remat=remat),
        train=config.Train(batch=32), mesh=config.Mesh(fsdp=fsdp),
    )
    program = programs.build("train", cfg, 3, jax.devices(), programs.Sweep())
    compiled = program.jitted.lower(*program.args).compile({"xla_backend_optimization_level": 0})
    found = child.measure(compiled)
    n = len(jax.devices())
    found["flops"] = {"analytic": program.executed / n, "model": program.useful / n}
    found["holds"] = {name: programs.held_bytes(tree) for name, tree in program.holds.items()}
    found["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(program.holds["parameters"]))
    zeros = lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)
    state, resident, rows = jax.tree.map(zeros, program.args)
    shards = [part for leaf in jax.tree.leaves((state, resident, rows)) for part in leaf.addressable_shards]
    found["held"] = sum(part.data.nbytes for part in shards if part.device == jax.devices()[0])
    state, _ = compiled(state, resident, rows)  # now the state is the program's own, and is donated
    growth = []
    for _ in range(6):
        jax.block_until_ready(state)
        time.sleep(0.3)  # results are ready before the thread that made them frees its temporaries
        open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
        before = status("VmRSS")
        state, _ = compiled(state, resident, rows)
        jax.block_until_ready(state)
        growth.append((status("VmHWM") - before) / n)
    found["growth"] = max(growth)
    return found

print(json.dumps(strict({f"{fsdp}/{remat}": measure(fsdp, remat) for fsdp, remat in CASES})))
"""


@pytest.fixture(scope="module")
def measured():
    """(devices, fsdp, remat) -> a planned and measured training step."""
    cases = {1: [(1, "none")], 4: [(1, "blocks"), (4, "none")]}
    found = {n: child(f"CASES = {each}\n{MEASURE}", n) for n, each in cases.items()}
    return {(n, *case): found[n]["{}/{}".format(*case)] for n, each in cases.items() for case in each}


def test_operations_agree_with_the_jaxpr(measured):
    for case, found in measured.items():
        assert found["counted"]["unknown_loops"] == 0, case
        assert found["counted"]["flops"] == pytest.approx(found["flops"]["analytic"], rel=0.05), case
        assert found["counted"]["flops_loops_once"] < 0.5 * found["counted"]["flops"], case  # scanned blocks
    assert measured[4, 1, "blocks"]["flops"]["model"] == pytest.approx(
        measured[1, 1, "none"]["flops"]["model"] / 4
    )
    again = measured[4, 1, "blocks"]["flops"]
    assert 1.2 < again["analytic"] / again["model"] < 1.4  # recomputed blocks: 4 passes for 3


def test_traffic_agrees_with_the_compiler(measured):
    for found in measured.values():
        assert found["counted"]["bytes_loops_once"] == pytest.approx(
            found["compiler"]["bytes_loops_once"], rel=0.05
        )


def test_memory_agrees_with_measured_memory(measured):
    """Arguments to the byte; temporaries within 10 % of how much the process grows."""
    for case, found in measured.items():
        sizes = found["memory"]
        assert sizes["arguments"] == pytest.approx(found["held"], abs=1000), case  # an unused one is dropped
        assert sum(found["holds"].values()) + 4 == found["held"], case  # and the step's number
        assert found["growth"] == pytest.approx(sizes["temporaries"], rel=0.1), case
    whole, shared = measured[4, 1, "blocks"], measured[4, 4, "none"]
    modulation = 4 * 6 * 192 * (6 * 192)  # the one leaf above 4 MiB is split in 4, in both of Adam's moments
    assert whole["holds"]["optimizer"] - shared["holds"]["optimizer"] == 2 * modulation * 3 // 4


def test_data_parallel_sends_the_gradient(measured):
    found = measured[4, 1, "blocks"]
    kinds = found["counted"]["collectives"]
    assert set(kinds) == {"all-reduce"}
    gradient = 4 * found["parameters"]
    assert gradient <= kinds["all-reduce"]["payload"] <= gradient * 1.01
    assert kinds["all-reduce"]["wire"] == pytest.approx(2 * 3 / 4 * gradient, rel=0.01)
    assert measured[1, 1, "none"]["counted"]["collectives"] == {}


def test_fsdp_gathers_parameters(measured):
    kinds = measured[4, 4, "none"]["counted"]["collectives"]
    assert "all-gather" in kinds and {"all-reduce", "reduce-scatter"} & set(kinds)


def test_unet_and_sampling_agree_with_the_jaxpr():
    """Guided sampling in a scan, and a U-Net's training step with its border pixels, on one device."""
    for part in ("train", "sample", "sweep"):
        sweep = programs.Sweep(images=2, chunk=4, pattern="hidden")
        program = programs.build(part, UNET, 1, jax.devices()[:1], sweep)
        counted = count.count(hlo.parse(program.jitted.lower(*program.args).compile(QUICK).as_text()))
        assert counted.flops == pytest.approx(program.executed, rel=0.05), part
        assert counted.unknown_loops == 0 and not counted.collectives, part


def test_guided_steps_cost_two_networks():
    guided = programs.build("sample", UNET, 1, jax.devices()[:1], programs.Sweep())
    plain = replace(UNET, sample=replace(UNET.sample, guidance=1.0))
    one = programs.build("sample", plain, 1, jax.devices()[:1], programs.Sweep())
    assert 1.9 < guided.executed / one.executed < 2.01
    assert guided.calls == 3 and guided.units == 20  # 8 + 8 + 4


# ------------------------------------------------------------------------------------- what follows from it


def part(**changes):
    base = {
        "unit": "images", "units_per_call": 256, "units": 2560, "calls": 10,
        "holds": {"parameters": 4e9, "optimizer": 8e9, "averages": 4e9, "data": 1e8},
        "flops": {"analytic": 2e12, "model": 1.5e12},
        "memory": {"arguments": 16.1e9, "outputs": 16e9, "aliased": 16e9, "temporaries": 4e9, "program": 1e8},
        "counted": {
            "flops": 1.97e12, "bytes": 8.19e9,
            "collectives": {"all-reduce": {"count": 1, "payload": 2e9, "wire": 3e9}}, "unknown_loops": 0,
        },
        "compile_seconds": 1.0, "compile_rss": 1e9, "lower_seconds": 1.0,
    }  # fmt: skip
    return base | changes


def test_roofline_by_hand():
    found = roofline.estimate(part(), chips.parse("v5e:4x4"))
    assert found["seconds"]["compute"] == pytest.approx(0.01)
    assert found["seconds"]["hbm"] == pytest.approx(0.01)
    assert found["seconds"]["ici"] == pytest.approx(0.015) and found["seconds"]["bound"] == "ici"
    assert found["mfu"] == pytest.approx(1.5e12 / (0.015 * 197e12))
    assert found["units_per_second"] == pytest.approx(256 / 0.015)
    assert found["chip_hours"] == pytest.approx(10 * 0.015 * 16 / 3600)
    assert found["peak"] == pytest.approx(20.2e9) and not found["fits"]
    assert "seconds" not in roofline.estimate(part(), chips.parse("cpu:8"))


def test_first_change():
    """16 GB of state and 4 GB of temporaries on chips of 16.9 GB: halving the state is enough; if most are
    temporaries it is not, and recomputation comes next, then accumulation."""
    topology, cfg, sweep = (
        chips.parse("v5e:4x4"),
        config.Config(train=config.Train(batch=256)),
        programs.Sweep(),
    )
    change = advice.first_change("train", part(), cfg, topology, sweep)
    assert change.flags == "--mesh.data -1 --mesh.fsdp 2" and change.fits
    assert change.peak == pytest.approx(8e9 + 0.1e9 + 4.1e9)
    held = {"parameters": 1e9, "optimizer": 2e9, "averages": 1e9, "data": 0}
    sizes = {"arguments": 4e9, "outputs": 0, "aliased": 0, "temporaries": 20e9, "program": 0}
    change = advice.first_change("train", part(holds=held, memory=sizes), cfg, topology, sweep)
    assert change.flags == "--net.remat dots" and change.fits and change.peak == pytest.approx(16e9)
    sizes["temporaries"] = 120e9
    change = advice.first_change("train", part(holds=held, memory=sizes), cfg, topology, sweep)
    assert change.flags == "--train.accumulate 16" and change.fits
    sampled = advice.first_change("sample", part(holds=held, memory=sizes), cfg, topology, sweep)
    assert sampled.flags == "--sample.batch 16" or not sampled.fits
    swept = advice.first_change("sweep", part(holds=held, memory=sizes), cfg, topology, sweep)
    assert swept.flags == "--sweep.chunk 1" or swept.flags.startswith("--sweep.chunk")
    assert advice.first_change("train", part(), cfg, chips.parse("v6e:4x4"), sweep) is None
    assert advice.first_change("train", part(), cfg, chips.parse("cpu:4"), sweep) is None


def test_first_change_of_a_program_the_compiler_refused():
    topology, cfg = chips.parse("v5e:4x4"), config.Config(train=config.Train(batch=256))
    refused = part(too_big={"needed": 40e9, "usable": 16.9e9})
    del refused["memory"], refused["counted"]
    assert roofline.estimate(refused, topology)["fits"] is False
    change = advice.first_change("train", refused, cfg, topology, programs.Sweep())
    assert "--" in change.flags


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [("v5e:2x4", 8, 2), ("v5e:1x1", 1, 1), ("v4:4x4x8", 128, 32), ("cpu:8", 8, 1)],
)
def test_topologies(name, devices, hosts):
    found = chips.parse(name)
    assert (found.devices, found.hosts) == (devices, hosts)


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5e", "v5e:3x5", "v5e:32x32", "v4:2x2", "v5p:2x2", "cpu:0", "cpu:2x2", "v5e:axb", ""]
)
def test_bad_topologies(name):
    with one_line(f"--topology {name}:"):
        chips.parse(name)


def test_unknown_topology_lists_the_known():
    with one_line("v4:", "v5e:", "v5p:", "v6e:", "cpu:8"):
        chips.parse("a100:8")


# -------------------------------------------------------------------------------------------- the command


def write_config(folder: Path) -> Path:
    path = folder / "tiny.py"
    path.write_text(
        "from mdiff.config import *\n"
        "config = Config(name='tiny', data=Data(source='digits', size=8, n=20), train=Train(batch=8),\n"
        "    net=Net(arch='dit', channels=16, blocks=2, head_channels=8, patch=4), sample=Sample(n=8, batch=4, steps=2))\n"
    )
    return path


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out, cfg = tmp_path / "plan.json", str(write_config(tmp_path))
    line = ["--config", cfg, "--topology", "cpu:2", "--out", str(out), "--parts"]
    assert cli.plan([*line, "sweep"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100 and "peak" in shown and "collectives" in shown
    plan = json.loads(out.read_text())
    assert set(plan["parts"]) == {"sweep"} and plan["channels"] == 1
    assert plan["parts"]["sweep"]["counted"]["collectives"] == {}
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".py", ".json")] in (
        [],
        ["__pycache__"],
    )
    assert cli.plan([*line, "sweep"]) == 0 and "already in" in capsys.readouterr().err
    assert json.loads(out.read_text()) == plan
    with one_line("train.lr was", "choose another file"):
        cli.plan([*line, "sweep", "--train.lr", "0.5"])
    with one_line("train.batch = 9", "does not divide"):  # said by the child
        cli.plan(
            [
                "--config",
                cfg,
                "--topology",
                "cpu:2",
                "--parts",
                "train",
                "--train.batch",
                "9",
                "--out",
                str(tmp_path / "b.json"),
            ]
        )


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--parts", "evaluate"], ("--parts evaluate", "train, sample, sweep")),
        (["--topology", "v5e:3x5"], ("--topology v5e:3x5",)),
        (["--out", "plan.txt"], ("--out plan.txt", ".json")),
        (["--channels", "-1"], ("--channels -1",)),
        (["--net.chanels", "4"], ("--net.chanels", "nearest")),
        (["--sample.guidance", "3"], ("sample.guidance",)),
    ],
)
def test_bad_input(tmp_path, monkeypatch, extra, parts):
    monkeypatch.chdir(tmp_path)
    line = ["--config", str(write_config(tmp_path))]
    if "--topology" not in extra:
        line += ["--topology", "cpu:1"]
    with one_line(*parts):
        cli.plan([*line, *extra])
    assert not (tmp_path / "plans").exists()


def test_without_libtpu(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with one_line("pip install libtpu"):
        cli.plan(["--config", str(write_config(tmp_path)), "--topology", "v5e:2x2"])


def test_a_file_that_is_no_plan(tmp_path):
    out = tmp_path / "x.json"
    out.write_text("[]")
    with one_line("is no plan"):
        cli.plan(["--config", str(write_config(tmp_path)), "--topology", "cpu:1", "--out", str(out)])
    assert out.read_text() == "[]"


def test_numbers_for_people():
    assert (
        show.size(1_020_231_680) == "1.02 GB" and show.size(999_999) == "1.00 MB" and show.size(12) == "12 B"
    )
    assert show.size(None) == "unknown" and show.size(123_456_789) == "123 MB"
    assert (
        show.duration(0.0214) == "21.4 ms"
        and show.duration(7200) == "2.00 h"
        and show.duration(2e-7) == "0.2 us"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "plans").glob("*_*.json")), ids=lambda p: p.stem)
def test_committed_plans(path):
    """Each is of a config that is there, is whole, and its operations agree with the jaxpr's within 5 %."""
    plan = json.loads(path.read_text())
    topology = chips.parse(plan["topology"])
    assert topology.chip is not None and plan["parts"]
    config.from_json(config.Config, plan["config"])
    for name, found in plan["parts"].items():
        counted, analytic = found["counted"]["flops"], found["flops"]["analytic"]
        repeats = name == "sample" and plan["config"]["mesh"]["fsdp"] > 1  # see docs/guides/plan.md
        assert counted > 0.95 * analytic and (counted < 1.05 * analytic or repeats), name
        assert found["counted"]["unknown_loops"] == 0
        assert found["estimate"] == roofline.estimate(found, topology), name
