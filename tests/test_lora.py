"""Low-rank adapters: nothing at first, anything at full rank, and trained like fine-tuning."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data_helpers import one_line
from flax import traverse_util

from mdiff import config, side
from mdiff.keys import key
from mdiff.nets import lora
from mdiff.nets.denoiser import Model, make_model
from mdiff.nets.embeddings import Conditions
from mdiff.objectives import denoise
from mdiff.process.laws import make_process
from mdiff.recipes import adapt, generate

DIT = config.Net(arch="dit", channels=16, blocks=1, patch=2, head_channels=8)
UNET = config.Net(channels=16, mults=(1,), blocks=1, attention=())
CFG = config.Config(data=config.Data(size=4), net=DIT)


def weights(model, seed=0):
    """Any parameters do, if every path is active."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(key(0, "init")))
    return jax.tree.map(lambda leaf: jnp.float32(0.15 * rng.normal(size=leaf.shape)), shapes)


def fresh(fitted, seed=0):
    return jax.jit(lambda: fitted.init(key(seed, "init")))()


class Silent:
    def progress(self, task, done, total, scalars):
        pass

    def say(self, message):
        pass


# -------------------------------------------------------------------------------------------- the tree


@pytest.mark.parametrize("net", [DIT, UNET], ids=["dit", "unet"])
def test_every_kernel_has_factors_of_the_rank_asked_for_or_its_own(net):
    shapes = jax.eval_shape(lambda: make_model(replace(CFG, net=net), 1).init(key(0, "init")))["net"]
    made = jax.eval_shape(lambda: lora.init(key(0, "init"), shapes, 8))
    kernels = {path for path in traverse_util.flatten_dict(shapes) if path[-1] == "kernel"}
    factors = traverse_util.flatten_dict(made)
    assert {path[:-1] for path in factors} == kernels and len(kernels) > 8
    for path in kernels:
        shape, a, b = (
            traverse_util.flatten_dict(shapes)[path].shape,
            factors[*path, "a"],
            factors[*path, "b"],
        )
        lead = shape[:1] if len(shape) == 3 else ()  # scanned blocks
        rows, columns = int(np.prod(shape)) // (shape[-1] * int(np.prod(lead))), shape[-1]
        assert a.shape == (*lead, rows, min(8, rows, columns)), path
        assert b.shape == (*lead, min(8, rows, columns), columns), path


def test_merged_kernels_are_sums_of_outer_products():
    """A convolution, a map and one of scanned blocks, entry by entry."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 5), "map": (4, 3), "blocks": (2, 4, 3)}
    net = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=3)} for name, shape in shapes.items()
    }
    net = jax.tree.map(jnp.float32, net)
    adapters = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), lora.init(key(0, "a"), net, 2))
    merged = lora.merge(net, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(net)
    conv, (a, b) = np.array(net["conv"]["kernel"]), (np.array(adapters["conv"]["kernel"][x]) for x in "ab")
    for i, j, c, o in np.ndindex(3, 3, 2, 5):
        conv[i, j, c, o] += sum(a[(i * 3 + j) * 2 + c, r] * b[r, o] for r in range(2))
    np.testing.assert_allclose(merged["conv"]["kernel"], conv, rtol=1e-5, atol=1e-6)
    for name, block in (("map", ()), ("blocks", (1,))):
        w, a, b = (
            np.array(x[block]) for x in (net[name]["kernel"], *(adapters[name]["kernel"][x] for x in "ab"))
        )
        np.testing.assert_allclose(merged[name]["kernel"][block], w + a @ b, rtol=1e-5, atol=1e-6)
    for name in shapes:
        np.testing.assert_array_equal(merged[name]["bias"], net[name]["bias"])


def test_full_rank_reaches_any_kernel():
    """The factors of an arbitrary change by singular values, in float64."""
    rng = np.random.default_rng(1)
    net, wanted = ({"c": {"kernel": jnp.float32(rng.normal(size=(3, 3, 2, 4)))}} for _ in range(2))
    u, s, v = np.linalg.svd(
        np.float64(wanted["c"]["kernel"] - net["c"]["kernel"]).reshape(18, 4), full_matrices=False
    )
    shapes = lora.init(key(0, "a"), net, 99)["c"]["kernel"]
    assert (shapes["a"].shape, shapes["b"].shape) == ((18, 4), (4, 4))
    adapters = {"c": {"kernel": {"a": jnp.float32(u * s), "b": jnp.float32(v)}}}
    np.testing.assert_allclose(lora.merge(net, adapters)["c"]["kernel"], wanted["c"]["kernel"], atol=1e-5)


# --------------------------------------------------------------------------------------- adapted model


@pytest.mark.parametrize("net", [DIT, UNET, replace(DIT, classes=3)], ids=["dit", "unet", "labelled"])
def test_a_fresh_adapted_model_is_the_frozen_one(net):
    model = make_model(replace(CFG, net=net), 1)
    frozen = weights(model)
    fitted = lora.adapted(model, frozen, 5, 4)
    params = fresh(fitted)
    assert params["table"].shape == (5, lora.condition_width(model)) and not params["table"].any()
    rng = np.random.default_rng(2)
    xt, t = jnp.float32(rng.normal(size=(4, 4, 4, 1))), jnp.float32([0.1, 0.4, 0.6, 0.9])
    label = {"label": jnp.array([0, 4, 1, 1])}

    @jax.jit
    def both(frozen, params, cond):
        return model.denoiser(frozen)(xt, t, None), fitted.denoiser(params)(xt, t, cond)

    plain, made = both(frozen, params, fitted.condition(params, label))
    for ours, theirs in zip(made, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # A row of the table is felt by its own label alone.
    params["table"] = params["table"].at[1].set(1.0)
    moved = np.abs(both(frozen, params, fitted.condition(params, label))[1].x0 - plain.x0).max(axis=(1, 2, 3))
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-4).all()


def test_what_cannot_be_adapted_is_named():
    model = make_model(CFG, 1)
    with one_line("adapter.rank = 0: must be 1 or more"):
        lora.adapted(model, {}, 3, 0)
    with one_line("adapter: 0 classes"):
        lora.adapted(model, {}, 0, 1)


# -------------------------------------------------------------------------------------------- training

X = np.stack([np.full((4, 4, 1), v, np.uint8) for v in (38, 217)])[np.arange(16) % 2]
LABEL = np.arange(16) % 2


class Tiny(nn.Module):
    """A perceptron of whole images, with a condition: compiles in no time."""

    cfg: config.Net

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        told = nn.Dense(8)(jnp.stack([c_noise, jnp.sin(3 * c_noise)], axis=1))
        told = nn.silu(told if cond is None else told + cond)
        h = nn.silu(nn.Dense(64)(jnp.concatenate([x.reshape(len(x), -1), told], axis=1)))
        return nn.Dense(x[0].size)(nn.silu(nn.Dense(64)(h))).reshape(x.shape)


TINY = Model(Tiny(config.Net(channels=8)), None, make_process(config.Process()), 0.5, (4, 4, 1))


def fit(model, params, cfg, steps=1000):
    """Adam on the two labelled images, and the mean loss before and after."""
    objective, optimizer = denoise.make(model, cfg), optax.adam(5e-3)
    batch = {"x": jnp.float32(X / 127.5 - 1), "label": jnp.int32(LABEL)}
    large = jax.tree.map(lambda leaf: jnp.tile(leaf, (32, *[1] * (leaf.ndim - 1))), batch)

    def step(carry, i):
        params, state = carry
        grads = jax.grad(lambda params: objective(params, key(0, "train", i), batch)[0].mean())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        (found, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return found, *(objective(each, key(1, "test"), large)[0].mean() for each in (params, found))

    return run(params)


def test_full_rank_fits_what_fine_tuning_fits():
    """Two images, one per label: both end at one loss, far below the frozen model's; labels give their image."""
    model = TINY
    frozen = jax.jit(lambda: model.init(key(0, "init")))()
    cfg = adapt.config_of(side.Adapter(rank=99), CFG, X, LABEL, 2, "it")
    fitted = lora.adapted(model, frozen, 2, 99)
    params, before, after = fit(fitted, fresh(fitted), cfg)
    # The same network with labels, all of it trained.
    free = replace(model, embedding=Conditions(2, 0, False, 8))
    table = {"table": jnp.zeros((3, 8))}
    _, started, tuned = fit(free, {"net": frozen["net"], "embedding": table}, cfg)
    assert before == pytest.approx(float(started), rel=1e-5)
    assert after < 0.1 * before and after < 1.5 * tuned, (before, after, tuned)

    # The label decides which image is drawn; at strength 0 it is the frozen model, bit for bit.
    sampling = config.Sample(method="ddim", steps=10, seed=1)
    index, label = np.arange(6), np.arange(6) % 2
    generator = adapt.make_generator(model, sampling)
    drawn = np.asarray(generator(frozen, params, index, label, 1.0).x)
    assert np.abs(drawn - (X[:2] / 127.5 - 1)[label]).max() < 0.15
    plain = generator(frozen, params, index, label, 0)
    np.testing.assert_array_equal(plain.x, generate.make_generator(model, sampling)(frozen, index))
    assert np.isnan(plain.gap).all()
    one = generator(frozen, params, index, label, 1.0 + 1e-6)  # through the extrapolation
    np.testing.assert_allclose(one.x, drawn, atol=1e-2)
    with one_line("label 2: the guide has classes 0 to 1"):
        generator(frozen, params, index, label + 1, 1.0)


def test_a_run_resumes_and_is_not_taken_for_another(tmp_path):
    frozen, short = weights(TINY), side.Adapter(rank=2, steps=6, batch=4)

    def train(folder, cfg=short, x=X, label=LABEL, identity="it"):
        return adapt.train(cfg, CFG, TINY, frozen, x, label, 2, tmp_path / folder, identity, Silent())[
            1
        ].state

    whole, half = train("a"), train("b", replace(short, steps=3))
    assert int(half.step) == 3 and half.params["table"].any()
    resumed = train("b")
    assert int(resumed.step) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    for change in (
        {"x": 255 - X},
        {"label": 1 - LABEL},
        {"identity": "other"},
        {"cfg": replace(short, rank=3)},
    ):
        with one_line("holds another run", "data.source"):
            train("b", **change)


def test_what_does_not_fit_is_named(tmp_path):
    model, frozen = TINY, weights(TINY)
    for x, label, words in (
        (X[:, :2], LABEL, "give 2 or more, uint8 [N, 4, 4, 1]"),
        (X / 255, LABEL, "float64"),
        (X, LABEL[:5], "5 labels for 16 images"),
        (X, LABEL - 1, "label -1: the guide has classes 0 to 1"),
    ):
        with one_line(words):
            adapt.train(
                side.Adapter(rank=4), CFG, model, frozen, x, label, 2, tmp_path / "none", "it", Silent()
            )
    assert not (tmp_path / "none").exists()
