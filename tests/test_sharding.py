"""Accumulation, and states and batches over simulated devices, which need a process of their own."""

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

from mdiff import config
from mdiff.data.degrade import noise_keys
from mdiff.errors import UserError
from mdiff.nets.denoiser import make_model
from mdiff.objectives import ambient
from mdiff.train import mesh, optim, state
from mdiff.train.program import train_program

ROOT = Path(__file__).resolve().parents[1]
CFG = config.Config(
    data=config.Data(size=8, n=6, flip=True),
    net=config.Net(arch="dit", channels=16, head_channels=8, blocks=1, patch=4, classes=3, condition_dropout=0.3),
    loss=config.Loss(cutoff=0.7),
    train=config.Train(batch=8, warmup=0, optimizer="adam"),
)  # fmt: skip
MODEL = make_model(CFG, 1)


def arrays(n: int = 6):
    rng = np.random.default_rng(0)
    resident = {
        "x": rng.integers(0, 256, (n, 8, 8, 1), np.uint8),
        "id": np.arange(n, dtype=np.int32),
        "label": rng.integers(0, 3, n).astype(np.int32),
    }
    resident["noise"] = noise_keys(resident["x"])
    rows = {"index": rng.integers(0, n, 8).astype(np.int32), "cutoff": np.full(8, 0.7, np.float32)}
    return resident, rows


def one_step(cfg, objective=None, unroll=False):
    from mdiff.train.program import make_batch_fn

    optimizer = optim.make_optimizer(cfg.train)
    step = state.make_step(
        objective or ambient.make(MODEL, cfg), optimizer, make_batch_fn(cfg), cfg.train, 3, unroll=unroll
    )
    fresh, _ = state.plan_state(MODEL, optimizer, 3, mesh.make_mesh(cfg.mesh))
    start = fresh()
    # Away from the zeros of a fresh network, where most gradients vanish.
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), start.params
    )
    return jax.jit(step)(replace(start, params=params), *arrays())


def accumulated(parts: int) -> config.Config:
    return replace(CFG, train=replace(CFG.train, accumulate=parts))


@pytest.fixture(scope="module")
def whole_batch():
    return one_step(CFG)


@pytest.mark.parametrize(("parts", "unroll"), [(2, True), (4, False)])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(whole_batch, parts, unroll):
    """The same noise, levels and dropped conditions, so the same numbers up to rounding."""
    whole, metrics = whole_batch
    split, others = one_step(accumulated(parts), unroll=unroll)
    for name in metrics:
        assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    # Adam's mean of gradients after one step is (1 - b1) times the gradient.
    for old, new in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(split.opt_state), strict=True):
        scale = max(1e-6, float(jnp.abs(old).max()))
        np.testing.assert_allclose(new, old, atol=2e-5 * scale)


def test_an_objective_that_draws_inside_gets_a_key_per_part():
    seen = []

    def objective(params, key, batch):
        seen.append(batch["x"].shape[0])
        noise = jax.random.normal(key, batch["x"].shape)
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        return total * noise.mean((1, 2, 3)), {}

    _, metrics = one_step(accumulated(4), objective)
    assert set(seen) == {2}
    drawn = jax.random.key(3, impl="threefry2x32")  # the documented key of (seed 3, "train", step 0)
    import zlib

    drawn = jax.random.fold_in(jax.random.fold_in(drawn, zlib.crc32(b"train")), 0)
    means = [jax.random.normal(jax.random.fold_in(drawn, part), (2, 8, 8, 1)).mean() for part in range(4)]
    slope = abs(float(np.mean(means)))
    count = sum(leaf.size for leaf in jax.tree.leaves(MODEL.init(jax.random.key(0))))
    assert float(metrics["grad_norm"]) == pytest.approx(slope * count**0.5, rel=1e-4)


def test_what_does_not_divide_is_one_line():
    with pytest.raises(UserError, match=r"train.accumulate = 3: .* divide train.batch = 8"):
        state.check(config.Train(batch=8, accumulate=3))
    with pytest.raises(UserError, match=r"train.accumulate = 0"):
        state.check(config.Train(accumulate=0))


_MANY = """
import json, sys
import jax, numpy as np
from dataclasses import replace
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
from test_sharding import CFG, MODEL, arrays, config
from mdiff.objectives import ambient
from mdiff.train import mesh
from mdiff.train.program import train_program
from mdiff.trees import named_leaves
from mdiff.errors import UserError

found = {}
for name, sizes, more in (
    ("one", None, {}),
    ("data", dict(data=4), {}),
    ("fsdp", dict(fsdp=4), {}),
    ("both", dict(data=2, fsdp=2), dict(accumulate=2)),
):
    cfg = replace(CFG, train=replace(CFG.train, **more))
    devices = jax.devices()[:1] if sizes is None else jax.devices()[:4]
    cfg = replace(cfg, mesh=config.Mesh(shard_above=0, **(sizes or {})))
    on = mesh.make_mesh(cfg.mesh, devices)
    program = train_program(cfg, MODEL, ambient.make(MODEL, cfg), on)
    resident, rows = arrays()
    current = program.fresh()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(current))
    first = jax.devices()[0]
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(current) for s in leaf.addressable_shards if s.device == first)
    made = program.fresh.lower().compile().memory_analysis()  # compiled once: the cache is on
    for step in range(3):
        batch = mesh.place_batch(rows, mesh.batch_places(on, 8), 8, on)
        current, metrics = program.step(current, mesh.place(resident, mesh.replicated(on)), batch)
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(current.params)])
    found[name] = {"params": flat.tolist(), "loss": float(metrics["loss"]), "held": held / whole,
                   "made": made.output_size_in_bytes / whole}

# Devices in an order that is no range, as make_mesh picks on a real torus.
order = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(2, 4, 1)
odd = Mesh(order, mesh.AXES)
x = np.arange(16, dtype=np.int32) * 10
placed = mesh.place_batch({"index": x}, mesh.batch_places(odd, 16), 16, odd)["index"]
found["odd"] = np.asarray(placed).tolist() == x.tolist()

# A process that holds every other part of the batch.
class Half:
    def __init__(self, sharding, mine): self.sharding, self.mine = sharding, mine
    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in self.mine}
whole = mesh.batch_sharding(odd)
mesh_batch, mesh.batch_sharding = mesh.batch_sharding, lambda on: Half(whole, set(order.ravel()[::2]))
places = mesh.batch_places(odd, 16)
mesh.batch_sharding = mesh_batch
found["places"] = places.tolist()

def refusal(fn):
    try: fn()
    except UserError as error: return str(error)
found["mesh"] = refusal(lambda: mesh.make_mesh(config.Mesh(fsdp=3)))
on = mesh.make_mesh(config.Mesh(data=2, fsdp=4))
found["batch"] = refusal(lambda: mesh.check_batch(12, on))
found["batch_parts"] = refusal(lambda: mesh.check_batch(24, on, 2))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """What several of eight devices did, in a process of their own."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    script = [sys.executable, "-c", _MANY, str(ROOT / "tests")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["data", "fsdp", "both"])
def test_every_mesh_trains_the_same_model(many, name):
    alone, found = many["one"], many[name]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    # Adam turns rounding of tiny gradients into steps of size lr; three of them bound what may differ.
    apart = np.abs(np.array(found["params"]) - alone["params"])
    assert apart.max() < 4e-3 and np.quantile(apart, 0.99) < 1e-4


@pytest.mark.parametrize(("name", "share"), [("one", 1), ("data", 1), ("fsdp", 1 / 4), ("both", 1 / 2)])
def test_a_device_holds_its_part_of_the_state_only(many, name, share):
    """Also while it is made: the program that makes a state puts out no more per device than that."""
    assert share <= many[name]["held"] < share + 0.05
    assert many[name]["made"] == pytest.approx(many[name]["held"], rel=0.05)


def test_rows_go_where_the_devices_are(many):
    assert many["odd"]
    assert many["places"] == [0, 1, 4, 5, 8, 9, 12, 13]


def test_meshes_that_do_not_divide_are_one_line(many):
    assert many["mesh"].startswith("mesh.data = -1, mesh.fsdp = 3") and "8 devices" in many["mesh"]
    assert "train.batch = 12: does not divide over 8 devices; set it to 16" in many["batch"]
    assert (
        "train.batch = 24: does not divide over 8 devices in train.accumulate = 2 parts"
        in many["batch_parts"]
    )


def test_rules_name_leaves():
    """A leaf's name decides; one that no rule matches is a mistake."""
    on = mesh.make_mesh(config.Mesh())
    shapes = {"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(ValueError, match="params/w"):
        mesh.shardings(shapes, on, rules=((r"^ema/", "fsdp"),))
    program = train_program(CFG, MODEL, ambient.make(MODEL, CFG), on)
    assert jax.tree.structure(program.abstract) == jax.tree.structure(jax.eval_shape(program.fresh))
