"""Sweeps: cells and their names, the record, and whole sweeps in child processes on several simulated devices.

The truth for a cell is a plain run of its config, on one device, in its own process.
"""

from __future__ import annotations

import json
import random
import shlex
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_resume as shell
from child_env import child_env

from mdiff import config
from mdiff.errors import UserError
from mdiff.recipes import cells
from mdiff.recipes.cells import parse_over, product
from mdiff.recipes.sweep_train import at_one_step
from mdiff.train import trials

ROOT = Path(__file__).resolve().parents[1]
BASE = config.Config()
CONFIG = """
from mdiff.config import Audit, Config, Data, Loss, Net, Sample, Train

config = Config(
    data=Data(size=8, n=10, heldout=10),
    net=Net(channels=16, mults=(1,), blocks=1, attention=()),
    loss=Loss(cutoff=1.0),
    train=Train(
        steps=12, batch=8, lr=1e-2, warmup=3, save_every=5, log_every=4, eval_every=6, eval_samples=8,
        ema_lengths=(0.1,), ema_every=6,
    ),
    sample=Sample(n=16, batch=16, steps=2, method="euler"),
    audit=Audit(bootstrap=50),
)
"""


# --------------------------------------------------------------------------------- cells and the record


def read(kind):
    """A stand-in for the command line's own reading of one value."""
    return lambda field, words: kind(*words)


def over(*texts, kind=float):
    return parse_over(texts, BASE, read(kind))


def test_cells_are_the_product_in_order():
    axes = {"loss.cutoff": (0.0, 0.5, 1.0), "seed": (0, 1)}
    found = product(BASE, axes)
    assert [cell.name for cell in found] == [
        f"cutoff={c},seed={s}" for c in ("0", "0.5", "1") for s in (0, 1)
    ]
    third = found[2].config
    assert (third.loss.cutoff, third.seed, third.name) == (0.5, 0, "cutoff=0.5,seed=0")
    assert replace(third, loss=BASE.loss, name=BASE.name) == BASE


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ({"seed": (1,), "data.seed": (2,)}, "seed=1,data.seed=2"),
        ({"train.lr": (1e-3,)}, "lr=0.001"),
        ({"train.lr": (1e30,)}, "lr=1e+30"),
        ({"net.mults": ((1, 2, 2),)}, "mults=1_2_2"),
        ({"train.ema_lengths": ((),)}, "ema_lengths=none"),
        ({"data.duplicates": ({7: 5, 9: 3},)}, "duplicates=7_5_9_3"),
        ({"data.flip": (True,)}, "flip=True"),
    ],
)
def test_names(axes, name):
    assert [cell.name for cell in product(BASE, axes)] == [name]


def test_names_of_paths_stay_apart_and_inside_the_folder():
    values = ("../a/b", "../a-b", "~/é.npz", "x" * 300, "x" * 301)
    names = [cell.name for cell in product(BASE, {"data.source": values})]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name.encode()) < 200 and name.startswith("source=") for name in names)


def test_over_reads_values():
    assert over("loss.cutoff=0,.5,1e0", "train.lr=-2") == {
        "loss.cutoff": (0.0, 0.5, 1.0),
        "train.lr": (-2.0,),
    }
    assert over("--train.weight-decay=1") == {"train.weight_decay": (1.0,)}
    both = parse_over(["net.mults=1:2,2,none", "data.source=a:b"], BASE, lambda field, words: tuple(words))
    assert both == {"net.mults": (("1", "2"), ("2",), ()), "data.source": (("a:b",),)}


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ([], "nothing to vary"),
        (["seed"], "give field=a,b,c"),
        (["=1"], "give field=a,b,c"),
        (["seed=0,"], "a value is empty"),
        (["seed=1,2,1.0"], "1.0 is there twice"),
        (["seed=1", "seed=2"], "--over seed: is given twice"),
        (["sample.steps=1,2"], "does not change what is trained; give --sample.steps to all cells"),
        (["mesh.fsdp=1,2"], "does not change what is trained"),
        (["name=1,2"], "does not change what is trained"),
    ],
)
def test_over_refuses(texts, problem):
    with pytest.raises(UserError) as caught:
        over(*texts)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def open_record(path, axes, base=BASE):
    record = cells.Record(path, base, axes)
    record.save()
    return record


def test_record_takes_new_cells_and_no_other_sweep(tmp_path):
    path = tmp_path / "sweep.json"
    record = open_record(path, {"seed": (0, 1), "loss.cutoff": (0.0,)})
    record.set("seed=1,cutoff=0", state="failed", step=3, reason="why")
    more = open_record(
        path, {"loss.cutoff": (2.0, 0.0), "seed": (1,)}
    )  # the other way round, with a new value
    assert set(more.cells) == {"seed=0,cutoff=0", "seed=1,cutoff=0", "seed=1,cutoff=2"}
    assert more.cells["seed=1,cutoff=0"] == {
        "fields": {"seed": 1, "loss.cutoff": 0.0}, "state": "failed", "step": 3, "reason": "why", "steps": 2000,
    }  # fmt: skip
    longer = replace(BASE, train=replace(BASE.train, steps=9), sample=config.Sample(n=3))
    assert (
        open_record(path, {"seed": (0,), "loss.cutoff": (0.0,)}, longer).cells["seed=0,cutoff=0"]["steps"]
        == 9
    )
    before = path.read_bytes()
    for axes, base, problem in (
        ({"seed": (0,)}, BASE, "varies seed, loss.cutoff"),
        ({"seed": (0,), "loss.cutoff": (0.0,)}, replace(BASE, net=config.Net(channels=8)), "net.channels was 128, is 8"),
        ({"seed": (0,), "loss.cutoff": (0.0,)}, replace(BASE, train=config.Train(lr=0.5)), "train.lr was 0.001, is 0.5"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=problem):
            open_record(path, axes, base)
    assert path.read_bytes() == before
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match="damaged"):
        open_record(path, {"seed": (0,), "loss.cutoff": (0.0,)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run of mdiff train"):
        open_record(tmp_path / "run/sweep.json", {"seed": (0,)})


def test_cells_that_a_kill_left_at_two_saves_go_on_from_the_earlier():
    saved = {"a": [0, 10, 20], "b": [0, 10], "c": [0, 5, 10], "d": [0], "e": [0, 300], "f": [0, 20]}
    assert at_one_step("abcdef", saved, 10) == [
        (["d", "b", "c"], 0),  # b and c lose one save
        (["a", "f"], 20),
        (["e"], 300),
    ]
    assert at_one_step("ab", saved, 10) == [(["b", "a"], 10)]
    assert at_one_step("af", saved, 10) == [(["a", "f"], 20)]
    assert at_one_step("bf", saved, 100) == [(["b"], 10), (["f"], 20)]  # f no longer has step 10


def test_kinds_are_what_differs_in_the_program():
    same = [
        replace(BASE, seed=5, name="x"),
        replace(BASE, data=replace(BASE.data, n=7, seed=3, duplicates={1: 2}, source="digits")),
        replace(BASE, train=replace(BASE.train, save_every=3, log_every=2, eval_every=9)),
        replace(BASE, audit=config.Audit(seed=1), sample=config.Sample(n=1)),
    ]
    others = [
        replace(BASE, loss=replace(BASE.loss, cutoff=0.1)),
        replace(BASE, train=replace(BASE.train, lr=0.1)),
        replace(BASE, data=replace(BASE.data, flip=True)),
        replace(BASE, net=replace(BASE.net, dropout=0.1)),
    ]
    assert {trials.kind(cfg) for cfg in same} == {trials.kind(BASE)}
    assert len({trials.kind(cfg) for cfg in [BASE, *others]}) == 5


def test_communication_is_found_in_the_text_of_a_program():
    lines = """
      %all-reduce.1 = f32[8]{0} all-reduce(f32[8]{0} %x), replica_groups={}
      %ag = (f32[1]{0}, f32[4]{0}) all-gather-start(%x), dimensions={0}
      ROOT %r = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1}}
    """
    assert trials.collectives(lines) == ["all-gather", "all-reduce", "collective-permute"]
    quiet = '%fusion = f32[8]{0} fusion(%p), calls=%fused, metadata={op_name="all-reduce of nothing"}'
    assert trials.collectives(quiet) == []


# ------------------------------------------------------------------------------------------ whole sweeps


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    (shared / "small.py").write_text(CONFIG)
    return {
        **child_env(shared),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",  # compile faster
        "CONFIG": str(shared / "small.py"),
    }


def devices(env, n):
    return {**env, "JAX_NUM_CPU_DEVICES": str(n)}


def command(env, folder, *more):
    return [sys.executable, "-m", "sweep_helper", "sweep", "--config", env["CONFIG"], "--workdir", str(folder), *more]  # fmt: skip


def after_kill(process, code):
    """As `finish`; orbax warns of a checkpoint that it was deleting when it was killed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err, err
    return out + err


def states_of(folder):
    return {name: cell["state"] for name, cell in json.loads((folder / "sweep.json").read_text())["cells"].items()}  # fmt: skip


_READ = """
import os, sys, numpy as np
import sweep_helper
sweep_helper.install()
from pathlib import Path
from mdiff import cli, config
from mdiff.nets.denoiser import make_model
from mdiff.train import checkpoint, mesh, optim, state, workdir
from mdiff.trees import named_leaves
out, steps, *folders = sys.argv[1:]
for number, where in enumerate(map(Path, folders)):
    stored = workdir.read(where).config
    plain = Path(out) / str(number)
    fields = ["--seed", stored.seed, "--loss.cutoff", stored.loss.cutoff, "--data.n", stored.data.n]
    if not plain.exists():
        assert cli.main(list(map(str, ["train", "--config", os.environ["CONFIG"],
            "--workdir", plain, "--train.steps", steps, *fields]))) == 0
    theirs = workdir.read(plain).config
    assert config.digest(theirs) == config.digest(stored)
    for folder in (where, plain):
        model = make_model(stored, 1)
        abstract = state.plan_state(model, optim.make_optimizer(stored.train), 0, mesh.make_mesh(config.Mesh()), stored.train.ema_lengths)[1]
        with checkpoint.open_run(folder, stored.train) as found:
            restored, meta = found.restore(abstract, print)
        np.savez(folder / "state.npz", **{n.replace("/", "|"): np.asarray(x) for n, x in named_leaves(restored)})
"""


def check_equals_plain_runs(env, out, steps, folders):
    """Every leaf of each cell's newest checkpoint, and its logged numbers, against a plain run of its config."""
    shell.finish(
        shell.start([sys.executable, "-c", _READ, str(out), str(steps), *map(str, folders)], devices(env, 1))
    )
    kernels, compared = [], 0
    for number, folder in enumerate(folders):
        with np.load(folder / "state.npz") as ours, np.load(out / str(number) / "state.npz") as theirs:
            assert set(ours.files) == set(theirs.files) and int(ours["step"]) == steps
            for name in ours.files:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-6, err_msg=name)
            kernels.append(ours["params|net|b|kernel"])
        rows = [
            [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
            for each in (folder, out / str(number))
        ]
        if [row["step"] for row in rows[0]] != [
            row["step"] for row in rows[1]
        ]:  # a stop writes a row of its own
            continue
        compared += 1
        for mine, plain in zip(*rows, strict=True):
            assert mine.keys() == plain.keys()
            for name in mine.keys() & {"loss", "grad_norm", "lr", "eval/memorized", "eval/control"}:
                assert mine[name] == pytest.approx(plain[name], rel=1e-3), name
        assert sorted(p.name for p in (folder / "ema").iterdir()) == sorted(
            p.name for p in (out / str(number) / "ema").iterdir()
        )
    assert compared
    for a in range(len(kernels)):
        for b in range(a):
            assert np.abs(kernels[a] - kernels[b]).max() > 1e-2  # cells are not each other


def test_side_by_side_stopped_killed_and_resumed_equals_plain_runs(env, tmp_path):
    folder, two = tmp_path / "swéep", devices(env, 2)
    fields = ["--eval", "False", "--over", "seed=0,4294967295", "train.lr=0.01,1e30"]
    good, bad = ([f"seed={seed},lr={lr}" for seed in (0, 4294967295)] for lr in ("0.01", "1e+30"))
    first = folder / "cells" / good[0]

    process = shell.start(command(env, folder, *fields, "--train.steps", "3000"), two)
    shell.wait_for(lambda: shell.saved(first), process)
    process.send_signal(signal.SIGTERM)
    shown = shell.finish(process)
    assert (
        "SIGTERM: saved; 0 of 4 cells are trained" in shown and "4 cells side by side on 2 devices" in shown
    )
    line = next(line for line in shown.splitlines() if line.startswith("resume with: "))
    again = shlex.split(line.removeprefix("resume with: "))
    assert again[:2] == ["mdiff", "sweep"] and again[-2:] == ["--train.steps", "3000"]
    assert list(states_of(folder).values()) == ["training", "failed", "waiting", "waiting"]
    at = shell.saved(first)[-1]

    process = shell.start(command(env, folder, *fields, "--train.steps", "3000"), two)
    shell.wait_for(lambda: shell.saved(first)[-1] > at, process)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate()
    steps = str(shell.saved(first)[-1] + 4)

    shown = after_kill(shell.start(command(env, folder, *fields, "--train.steps", steps), two), code=1)
    assert [states_of(folder)[name] for name in good] == ["trained", "trained"]
    record = json.loads((folder / "sweep.json").read_text())["cells"]
    for name in bad:
        assert record[name]["state"] == "failed" and "at step 3: training diverged" in record[name]["reason"]
        assert f"failed: {name}: " in shown
        assert shell.saved(folder / "cells" / name) == []
    check_equals_plain_runs(env, tmp_path / "plain", int(steps), [folder / "cells" / name for name in good])

    before = (folder / "sweep.json").read_bytes()
    shown = shell.finish(shell.start(command(env, folder, *fields, "--train.steps", steps), two), code=1)
    assert "compiled" not in shown and (folder / "sweep.json").read_bytes() == before


def test_one_after_another_marks_impossible_cells_and_measures_the_rest(env, tmp_path):
    folder, one = tmp_path / "sweep", devices(env, 1)
    fields = ["--over", "data.n=10,99,8", "--train.ema-every", "0"]
    shown = shell.finish(shell.start(command(env, folder, *fields), one), code=1)
    assert "side by side" not in shown and "failed: n=99: data.n = 99 and data.heldout = 10:" in shown
    record = json.loads((folder / "sweep.json").read_text())["cells"]
    assert {name: cell["state"] for name, cell in record.items()} == {"n=10": "measured", "n=99": "failed", "n=8": "measured"}  # fmt: skip
    for name in ("n=10", "n=8"):
        audit = json.loads((folder / "cells" / name / "audit.json").read_text())
        for side in ("memorized", "control"):
            assert record[name][side] == audit["estimates"][side]
        assert record[name]["step"] == 12 and record[name]["loss"] > 0
    assert f"mdiff report {folder}/cells/* --out {folder}/report" in shown
    # The same with other generations: measured again, not trained again; a new value joins.
    audited = (folder / "cells/n=8/audit.json").stat().st_mtime_ns
    trained = (folder / "cells/n=8/checkpoints/12").stat().st_mtime_ns
    fields = ["--over", "data.n=8,9", "--train.ema-every", "0", "--sample.n", "20"]
    shell.finish(shell.start(command(env, folder, *fields), one))
    record = json.loads((folder / "sweep.json").read_text())["cells"]
    assert [record[name]["memorized"]["n"] for name in ("n=8", "n=9", "n=10")] == [20, 20, 16]
    assert (folder / "cells/n=8/audit.json").stat().st_mtime_ns > audited
    assert (folder / "cells/n=8/checkpoints/12").stat().st_mtime_ns == trained


_SEVERAL = """
import json, sys, sweep_helper
from mdiff import cli
sweep_helper.install()
for arguments in json.loads(sys.argv[1]):
    assert cli.main(arguments) == 2, arguments
"""


def test_nothing_is_written_when_no_cell_can_be(env, tmp_path):
    wrong = {
        "mdiff: data.n = 99": ["--over", "data.n=99,98"],
        "mdiff: --side-by-side yes: there is 1 device": ["--over", "seed=0,1", "--side-by-side", "yes"],
        "mdiff: --loss.cutof: unknown option; the nearest is --loss.cutoff": ["--over", "loss.cutof=0,1"],
        "mdiff: --seed x: 'x' does not fit; give a whole number": ["--over", "seed=0,x"],
        "mdiff: --over: is missing": [],
    }
    calls = [command(env, tmp_path / "s", *more)[3:] for more in wrong.values()]
    shown = shell.finish(shell.start([sys.executable, "-c", _SEVERAL, json.dumps(calls)], devices(env, 1)))
    lines = shown.splitlines()
    assert len(lines) == len(wrong)
    for line, problem in zip(lines, wrong, strict=True):
        assert line.startswith(problem)
    assert not (tmp_path / "s").exists()


def test_two_processes_share_the_cells(env, tmp_path):
    folder = tmp_path / "sweep"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"

    def job(*more):
        fields = ["--over", "seed=0,1,2,3,4", "--eval", "False", *more]
        join = ["--processes.coordinator", where, "--processes.count", "2", "--processes.index"]
        return [
            shell.start(command(env, folder, *fields, *join, str(index)), devices(env, 2))
            for index in range(2)
        ]

    first, second = job("--train.steps", "3000")
    shell.wait_for(lambda: shell.saved(folder / "cells/seed=3"), first)
    second.send_signal(signal.SIGTERM)
    outs = [process.communicate(timeout=200) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outs
    assert "resume with, each process with its own" in outs[0][1] and "resume with" not in outs[1][1]
    assert list(states_of(folder).values()) == ["training"] * 4 + ["waiting"]
    steps = {shell.saved(folder / f"cells/seed={seed}")[-1] for seed in range(4)}
    assert len(steps) == 1
    steps = steps.pop() + 3
    # On to the end in one process with four devices.
    more = ["--over", "seed=0,1,2,3,4", "--eval", "False", "--train.steps", str(steps)]
    shell.finish(shell.start(command(env, folder, *more), devices(env, 4)))
    assert set(states_of(folder).values()) == {"trained"}
    chosen = [folder / "cells/seed=1", folder / "cells/seed=4"]
    check_equals_plain_runs(env, tmp_path / "plain", steps, chosen)


_PROGRAM = """
import jax, numpy as np
from dataclasses import replace
from jax.sharding import PartitionSpec as P
import test_train as lab
from mdiff.objectives import ambient
from mdiff.train import trials
cfgs = [replace(lab.CFG, seed=seed, train=replace(lab.CFG.train, lr=lr)) for seed in (0, 7) for lr in (1e-3, 2e-3)]
plain, half, one = (replace(lab.CFG, loss=replace(lab.CFG.loss, cutoff=cutoff)) for cutoff in (0.0, 0.5, 1.0))
assert trials.kind(plain) != trials.kind(half) == trials.kind(one)  # cutoffs come with the batch
made = [trials.Trial(str(n), cfg, lab.MODEL, ambient.make, lab.SUBSET, None, None) for n, cfg in enumerate(cfgs)]
assert len({trials.shapes(each) for each in made}) == 1
noisy = replace(made[0], cfg=one)
assert trials.shapes(noisy) != trials.shapes(replace(made[0], cfg=plain))
wider = replace(made[0], model=replace(lab.MODEL, shape=(8, 8, 1)))
assert trials.shapes(wider) != trials.shapes(made[0])
program = trials.Program(made, 4)
numbers = program.numbers(made)
assert np.asarray(numbers[0]).tolist() == [0, 1, 0, 1]
states = program.fresh(*numbers)
from mdiff.train import mesh, optim, state
from mdiff import config
one = mesh.make_mesh(config.Mesh(), jax.devices()[:1])
for place, cfg in enumerate(cfgs):
    fresh = state.plan_state(lab.MODEL, optim.make_optimizer(cfg.train), cfg.seed, one)[0]()
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(fresh), strict=True):
        assert a.addressable_shards[place].data.shape == (1, *b.shape)
        np.testing.assert_array_equal(np.asarray(a)[place], np.asarray(b))
from mdiff.data.reader import make_reader
readers = [make_reader(each.cfg, each.subset) for each in made]
resident = program.stack(program.resident(readers[0]), lambda place: program.resident(readers[place]))
rows = program.stack(readers[0].batch(0), lambda place: readers[place].batch(0))
compiled = program.compiled(*numbers, states, resident, rows)
assert "conditional(" in compiled.as_text() and trials.collectives(compiled.as_text()) == []
mean = jax.jit(jax.shard_map(lambda x: x + jax.lax.pmean(x, "trial"), mesh=program.mesh, in_specs=P("trial"), out_specs=P("trial")))
assert trials.collectives(mean.lower(numbers[1].astype("float32")).compile().as_text()) == ["all-reduce"]
program = trials.Program(made, 4)
program.__dict__["step"] = mean
try:
    program.compiled(numbers[1].astype("float32"))
except RuntimeError as error:
    assert "must not communicate" in str(error) and "all-reduce" in str(error)
else:
    raise AssertionError("a program that communicates was let through")
trials.DEVICE_BYTES = 1000
try:
    trials.Program(made, 4).compiled(*numbers, states, resident, rows)
except trials.TooLarge as error:
    assert "one cell takes" in str(error)
else:
    raise AssertionError("a program that does not fit was let through")
"""


def test_program_starts_as_plain_runs_do_and_does_not_communicate(env):
    shell.finish(shell.start([sys.executable, "-c", _PROGRAM], devices(env, 4)))


def test_one_device_trains_all_cutoffs_by_one_program(env, tmp_path):
    folder = tmp_path / "sweep"
    fields = ["--over", "loss.cutoff=0.5,2", "seed=0,3", "--eval", "False"]
    shown = shell.finish(shell.start(command(env, folder, *fields), devices(env, 1)))
    assert "4 cells in turn, with one program" in shown and shown.count("train step") == 1
    assert set(states_of(folder).values()) == {"trained"}
    chosen = [folder / "cells/cutoff=0.5,seed=3", folder / "cells/cutoff=2,seed=0"]
    check_equals_plain_runs(env, tmp_path / "plain", 12, chosen)
