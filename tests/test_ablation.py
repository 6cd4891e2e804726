"""The sweep over neurons: against one call per ablation, on one device and on four, with a neuron planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import one_line

from mdiff import config
from mdiff.nets.denoiser import Model, make_model
from mdiff.nets.layers import Dense, Gate
from mdiff.probes import ablation
from mdiff.process.laws import VarianceExploding
from mdiff.train import mesh as meshes

ROOT = Path(__file__).resolve().parents[1]


def one_device():
    return meshes.make_mesh(config.Mesh(data=1, trial=-1), jax.devices()[:1])


@dataclass(frozen=True)
class Case:
    model: Model
    params: object
    xt: np.ndarray
    t: np.ndarray
    cond: np.ndarray


def make_case() -> Case:
    net = config.Net(arch="dit", channels=16, blocks=2, head_channels=8, patch=4, classes=3)
    model = make_model(config.Config(data=config.Data(size=8), net=net), 1)
    rng = np.random.default_rng(0)

    def draw(scale, shape):
        return scale * rng.standard_normal(shape, dtype=np.float32)

    # Not those of `init`, whose fresh blocks are the identity.
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: draw(0.2, leaf.shape), shapes)
    cond = draw(1.0, (2, net.channels))
    return Case(model, params, draw(1.0, (2, 8, 8, 1)), np.array([0.3, 0.7], np.float32), cond)


@pytest.fixture(scope="module")
def case():
    return make_case()


def by_hand(case: Case, gates_of) -> np.ndarray:
    """One call per ablation, compared in float64."""

    @jax.jit
    def eps(gates):
        return case.model.apply(case.params, case.xt, case.t, case.cond, gates=gates)[0].eps

    whole = np.asarray(eps(case.model.gates()), np.float64)
    changes = [np.asarray(eps(gates), np.float64) - whole for gates in gates_of]
    return np.array([[np.sqrt(np.mean(image**2)) for image in change] for change in changes])


def test_trees_of_gates_equal_one_call_each(case):
    """Any ablation, not only of single neurons; five of them in chunks of two."""
    rng = np.random.default_rng(7)
    gates = case.model.gates()
    trees = [jax.tree.map(lambda g: np.float32(rng.random(g.shape) < 0.7), gates) for _ in range(5)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    found = ablation.sweep(case.model, one_device(), chunk=2)(
        case.params, stacked, case.xt, case.t, case.cond
    )
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found, by_hand(case, trees), rtol=2e-4)


def neuron_trees(gates, numbers):
    """Gates with one entry zero, by a flat index."""
    leaves, tree = jax.tree.flatten(gates)
    flat = np.concatenate([np.ravel(leaf) for leaf in leaves])
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    for number in numbers:
        one = flat.copy()
        if number >= 0:
            one[number] = 0
        parts = [part.reshape(leaf.shape) for part, leaf in zip(np.split(one, cuts), leaves, strict=True)]
        yield jax.tree.unflatten(tree, parts)


NUMBERS = [-1, 0, 3, 17, 40, 41, 150]


def test_single_neurons_equal_one_call_each(case):
    gates = case.model.gates()
    sweep = ablation.sweep(case.model, one_device(), chunk=3, decode=ablation.one_off(gates))
    found = sweep(case.params, np.array(NUMBERS, np.int32), case.xt, case.t, case.cond)
    np.testing.assert_allclose(found, by_hand(case, neuron_trees(gates, NUMBERS)), rtol=2e-4, atol=1e-9)
    assert (found[0] == 0).all() and (found[1:] > 0).all()  # nothing ablated: exactly nothing changes


def test_another_statistic(case):
    def sign(ablated, whole):
        return (ablated - whole).mean(axis=(1, 2, 3))

    gates = case.model.gates()
    decode = ablation.one_off(gates)
    sweep = ablation.sweep(case.model, one_device(), chunk=2, decode=decode, statistic=sign)
    found = sweep(case.params, np.array([5]), case.xt, case.t, case.cond)
    eps = jax.jit(lambda g: case.model.apply(case.params, case.xt, case.t, case.cond, gates=g)[0].eps)
    whole, ablated = eps(gates), eps(decode(jnp.int32(5)))
    np.testing.assert_allclose(found[0], np.mean(ablated - whole, axis=(1, 2, 3)), rtol=1e-3, atol=1e-7)


FOUR = """
import json, jax, numpy as np
from mdiff import config
from mdiff.plan import count, hlo
from mdiff.probes import ablation
from mdiff.train import mesh as meshes
from test_ablation import NUMBERS, make_case
case, mesh = make_case(), meshes.make_mesh(config.Mesh(data=1, trial=-1))
decode = ablation.one_off(case.model.gates())
found = ablation.sweep(case.model, mesh, chunk=2, decode=decode)(case.params, np.array(NUMBERS), case.xt, case.t, case.cond)
program = ablation.program(case.model, mesh, chunk=2, decode=decode)
text = program.lower(case.params, np.arange(16), case.xt, case.t, case.cond).compile().as_text()
print(json.dumps([len(jax.devices()), found.tolist(), list(count.count(hlo.parse(text)).collectives), text.count("all-reduce")]))
"""


def test_four_devices_and_no_messages(case):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run([sys.executable, "-c", FOUR], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    devices, found, collectives, mentions = json.loads(done.stdout.splitlines()[-1])
    assert devices == 4 and collectives == [] and mentions == 0
    sweep = ablation.sweep(case.model, one_device(), chunk=2, decode=ablation.one_off(case.model.gates()))
    alone = sweep(case.params, np.array(NUMBERS), case.xt, case.t, case.cond)
    np.testing.assert_allclose(found, alone, rtol=2e-4, atol=1e-9)


class Planted(nn.Module):
    """A network whose output is that of its hidden unit 5 alone."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        hidden = Gate(name="hidden_gate")(jnp.tanh(Dense(8, name="in")(x)))
        Gate(name="idle_gate")(x)
        return hidden[..., 5:6]


def test_a_planted_neuron_is_found():
    model = Model(Planted(), None, VarianceExploding(0.002, 80.0, 7.0), 0.5, (4, 4, 1), "eps")
    params = jax.jit(model.init)(jax.random.key(0))
    gates = model.gates()
    numbers = ablation.neurons(gates)
    sweep = ablation.sweep(model, one_device(), chunk=4, decode=ablation.one_off(gates))
    found = sweep(params, numbers, jax.random.normal(jax.random.key(1), (3, 4, 4, 1)), jnp.full(3, 0.5))
    (moved,) = np.nonzero(found.any(axis=1))
    assert [ablation.place(gates, int(numbers[i])) for i in moved] == [("hidden_gate/gate", (5,))]


def test_numbers_and_places():
    gates = {"a": {"gate": jnp.ones((2, 3))}, "b": {"gate": jnp.ones(4)}}
    np.testing.assert_array_equal(ablation.neurons(gates, "^b/"), [6, 7, 8, 9])
    assert ablation.place(gates, 4) == ("a/gate", (1, 1)) and ablation.place(gates, 6) == ("b/gate", (0,))
    one = ablation.one_off(gates)(jnp.int32(4))
    assert float(one["a"]["gate"][1, 1]) == 0 and sum(float(leaf.sum()) for leaf in jax.tree.leaves(one)) == 9
    with one_line("pattern 'xyz'", "a/gate"):
        ablation.neurons(gates, "xyz")
    with one_line("neuron 10", "10 neurons"):
        ablation.place(gates, 10)


def test_bad_chunk(case):
    with one_line("chunk = 0"):
        ablation.sweep(case.model, one_device(), chunk=0)
