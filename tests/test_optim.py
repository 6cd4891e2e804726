"""Optimizers and schedules against float64 numpy and singular values (`make parity`: against torch)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import make_model
from mdiff.train import optim, state
from mdiff.trees import named_leaves


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Programs here run once: optimizing them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def walk(cfg, params, gradients):
    """Parameters after each of the gradients."""
    optimizer = optim.make_optimizer(cfg)
    memory, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, memory = update(gradient, memory, params)
        params = optax.apply_updates(params, updates)
        seen.append(jax.device_get(params))
    return seen


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (5, 3), "bias": (3,)}, "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}}
    draw = lambda: jax.tree.map(  # noqa: E731
        lambda shape: jnp.float32(rng.normal(size=shape)), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return draw(), [draw() for _ in range(6)]


# ------------------------------------------------------------------------------------- schedules


def rates(**fields):
    cfg = config.Train(**fields)
    optim.check(cfg)
    return np.array([float(optim.make_schedule(cfg)(jnp.int32(t))) for t in range(cfg.steps)])


def test_schedules_by_hand():
    shared = dict(lr=0.2, warmup=4, steps=24)
    ramp = 0.2 * np.arange(4) / 4
    after = np.arange(20)
    cases = {
        "constant": np.full(20, 0.2),
        "linear": 0.2 * (1 - after / 20),
        "cosine": 0.1 * (1 + np.cos(np.pi * after / 20)),
        "inverse_sqrt": 0.2 / np.sqrt((after + 4) / 4),
    }
    for name, expected in cases.items():
        np.testing.assert_allclose(
            rates(schedule=name, **shared), np.append(ramp, expected), rtol=1e-5, atol=1e-7, err_msg=name
        )


def test_decay_steps_count_from_the_first_step():
    linear = rates(schedule="linear", lr=1.0, warmup=4, steps=20, decay_steps=12)
    np.testing.assert_allclose(linear[[4, 8, 12, 19]], [1, 0.5, 0, 0], atol=1e-6)
    cosine = rates(schedule="cosine", lr=1.0, warmup=4, steps=20, decay_steps=12)
    np.testing.assert_allclose(cosine[[4, 8, 12, 19]], [1, 0.5, 0, 0], atol=1e-6)
    # Flat until decay_steps; four times as late is half the rate.
    root = rates(schedule="inverse_sqrt", lr=1.0, warmup=4, steps=60, decay_steps=12)
    np.testing.assert_allclose(root[[4, 12, 27, 48]], [1, 1, 12**0.5 / 27**0.5, 0.5], rtol=1e-6)
    without = rates(schedule="inverse_sqrt", lr=1.0, warmup=0, steps=60, decay_steps=12)
    np.testing.assert_allclose(without[[0, 12, 48]], [1, 1, 0.5], rtol=1e-6)


# ------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_are_the_papers(name, made):
    """arXiv 1412.6980, algorithm 1, and 1711.05101, algorithm 2, in float64; decay of kernels alone."""
    params, gradients = made
    decay = 0.2 if name == "adamw" else 0.0
    cfg = config.Train(optimizer=name, lr=0.03, warmup=0, clip=0.0, b1=0.8, b2=0.95, weight_decay=decay)
    theirs = {n: np.float64(leaf) for n, leaf in named_leaves(params)}
    first = {n: np.zeros_like(leaf) for n, leaf in theirs.items()}
    second = {n: np.zeros_like(leaf) for n, leaf in theirs.items()}
    for t, (gradient, ours) in enumerate(zip(gradients, walk(cfg, params, gradients), strict=True), start=1):
        for n, leaf in named_leaves(gradient):
            slope = np.float64(leaf)
            first[n] = 0.8 * first[n] + 0.2 * slope
            second[n] = 0.95 * second[n] + 0.05 * slope**2
            step = first[n] / (1 - 0.8**t) / (np.sqrt(second[n] / (1 - 0.95**t)) + 1e-8)
            theirs[n] = theirs[n] - 0.03 * (step + (decay * theirs[n] if n.endswith("kernel") else 0.0))
        for n, leaf in named_leaves(ours):
            np.testing.assert_allclose(leaf, theirs[n], rtol=2e-5, atol=2e-6, err_msg=n)


def test_muon_updates_are_near_orthogonal_and_as_large_as_adams(made):
    params, _ = made
    rng = np.random.default_rng(1)
    gradient = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    (moved,) = walk(config.Train(optimizer="muon", lr=1.0, warmup=0, clip=0.0), params, [gradient])
    for part, rows in (("a", 5), ("conv", 18)):
        step = np.float64(moved[part]["kernel"] - params[part]["kernel"]).reshape(rows, -1)
        slope = np.float64(gradient[part]["kernel"]).reshape(rows, -1)
        # The polar factor of -gradient, up to the iteration's singular values in about [0.7, 1.2].
        u, _, v = np.linalg.svd(-slope, full_matrices=False)
        aligned = u.T @ step @ v.T
        size = 0.2 * math.sqrt(max(rows, step.shape[1]))
        assert np.all(np.diag(aligned) / size > 0.6) and np.all(np.diag(aligned) / size < 1.3)
        off = aligned - np.diag(np.diag(aligned))
        assert np.abs(off).max() < 0.05 * size
        assert np.sqrt(np.mean(step**2)) == pytest.approx(
            0.2 * math.sqrt(step.shape[1] / min(step.shape)), rel=0.2
        )
        # Vectors are Adam's: the first step is the sign.
        np.testing.assert_allclose(
            moved[part]["bias"] - params[part]["bias"], -np.sign(gradient[part]["bias"]), rtol=1e-4
        )


def test_muon_decays_matrices_alone(made):
    params, gradients = made
    shared = dict(optimizer="muon", lr=0.1, warmup=0, clip=0.0)
    with_decay = walk(config.Train(weight_decay=0.5, **shared), params, gradients[:1])[0]
    without = walk(config.Train(**shared), params, gradients[:1])[0]
    for part in ("a", "conv"):
        np.testing.assert_allclose(
            with_decay[part]["kernel"],
            np.asarray(without[part]["kernel"]) - 0.1 * 0.5 * np.asarray(params[part]["kernel"]),
            atol=1e-6,
        )
        np.testing.assert_array_equal(with_decay[part]["bias"], without[part]["bias"])


def test_stacked_blocks_are_orthogonalized_one_by_one():
    """Blocks under nn.scan have a leading axis; their biases and scales have two and are still vectors."""
    rng = np.random.default_rng(0)
    params = {
        "blocks": {
            "kernel": jnp.float32(rng.normal(size=(3, 6, 4))),
            "bias": jnp.float32(rng.normal(size=(3, 4))),
            "scale": jnp.float32(rng.normal(size=(3, 4))),
        }
    }
    gradient = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    cfg = config.Train(optimizer="muon", lr=1.0, warmup=0, clip=0.0)
    (stacked,) = walk(cfg, params, [gradient])
    for block in range(3):
        one = jax.tree.map(lambda x, block=block: x[block], (params, gradient))
        (alone,) = walk(cfg, one[0], [one[1]])
        for name in params["blocks"]:
            np.testing.assert_allclose(
                stacked["blocks"][name][block], alone["blocks"][name], rtol=1e-4, atol=1e-5
            )
    assert optim.decayed(params) == {"blocks": {"kernel": True, "bias": False, "scale": False}}


NETS = {
    "ddpmpp": config.Net(channels=16, mults=(1, 2), blocks=1, attention=(8,), classes=3),
    "dit": config.Net(arch="dit", channels=32, blocks=2, patch=4, head_channels=16, classes=3),
}


@pytest.mark.parametrize("arch", NETS)
def test_which_leaves_of_the_networks_are_matrices(arch):
    cfg = config.Config(data=config.Data(size=16), net=NETS[arch], loss=config.Loss(level_weight="learned"))
    shapes = jax.eval_shape(make_model(cfg, 3).init, key(0, "init"))
    labels = dict(named_leaves(optim.orthogonalized(shapes)))
    leaves = dict(named_leaves(shapes))
    assert {labels[n] for n in leaves if n.startswith(("embedding/", "uncertainty/"))} == {"adam"}
    assert all(not n.endswith(("bias", "scale")) for n, label in labels.items() if label == "muon")
    ends = ("conv_in", "conv_out") if arch == "ddpmpp" else ("patch_in", "patch_out")
    for end in ends:
        assert [labels[n] for n in leaves if f"/{end}/" in n and n.endswith("kernel")] == ["adam"]
    inside = sum(leaves[n].size for n, label in labels.items() if label == "muon")
    assert inside > 0.8 * sum(leaf.size for leaf in leaves.values())
    decayed = dict(named_leaves(optim.decayed(shapes)))
    assert all(decayed[n] for n, label in labels.items() if label == "muon")
    assert not any(decayed[n] for n in leaves if n.endswith(("bias", "scale")))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="b")(nn.tanh(nn.Dense(16, name="a")(x)))[:, 0]


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_each_learns(name):
    x = jax.random.normal(key(0, "x"), (64, 4))
    y = jnp.sin(x.sum(1))
    net = Two()
    params = jax.jit(net.init)(key(0, "init"), x)
    cfg = config.Train(optimizer=name, lr=0.02, warmup=5, steps=150, schedule="cosine",
                       weight_decay=0.0 if name == "adam" else 1e-3)  # fmt: skip
    optimizer = optim.make_optimizer(cfg)
    loss = lambda p: jnp.mean((net.apply(p, x) - y) ** 2)  # noqa: E731

    @jax.jit
    def step(params, memory):
        updates, memory = optimizer.update(jax.grad(loss)(params), memory, params)
        return optax.apply_updates(params, updates), memory

    before, memory = float(loss(params)), optimizer.init(params)
    for _ in range(150):
        params, memory = step(params, memory)
    assert float(loss(params)) < 0.25 * before


# ------------------------------------------------------------------------------------- bad fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"b1": 1.0}, "train.b1 = 1.0"),
        ({"b2": -0.1}, "train.b2 = -0.1"),
        ({"lr": 0.0}, "train.lr = 0.0"),
        ({"lr": float("nan")}, "train.lr = nan"),
        ({"lr": float("inf")}, "train.lr = inf"),
        ({"weight_decay": -1.0, "optimizer": "adamw"}, "train.weight_decay = -1.0"),
        ({"weight_decay": 0.1}, "adam has none; set train.optimizer"),
        ({"decay_steps": 10}, "a constant rate does not fall"),
        ({"decay_steps": -1, "schedule": "linear"}, "train.decay_steps = -1"),
        ({"schedule": "cosine", "steps": 100, "warmup": 100}, "train.steps = 100"),
        ({"schedule": "linear", "decay_steps": 50}, "train.decay_steps = 50"),
        ({"schedule": "inverse_sqrt", "warmup": 0}, "needs the step it falls from"),
        ({"schedule": "inverse_sqrt", "decay_steps": 50}, "set it to 100"),
        ({"clip": float("nan")}, "train.clip = nan"),
        ({"warmup": -1}, "train.warmup = -1"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        state.check(config.Train(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_good_fields_pass():
    for name in ("adamw", "muon"):
        state.check(config.Train(optimizer=name, weight_decay=0.1))
    state.check(config.Train())
    state.check(config.Train(schedule="inverse_sqrt", decay_steps=100))
    state.check(config.Train(schedule="linear", decay_steps=101))
