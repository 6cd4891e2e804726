"""Damaged training images: the operators, what reaches the loss, its minimum, and the sampler.

Against: scipy's Fourier blur, float64 loops, and Gaussian worlds whose conditional means are known.
"""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import image_set, noise_images, one_line, python
from scipy.ndimage import fourier_gaussian

from mdiff import config
from mdiff.data import damage as damages
from mdiff.data import stream
from mdiff.data.damage import Damage
from mdiff.data.degrade import noise_keys
from mdiff.data.reader import make_reader
from mdiff.data.split import split
from mdiff.keys import key, keys
from mdiff.nets.denoiser import Model, make_model
from mdiff.objectives import ambient, damaged
from mdiff.objectives.denoise import Draws
from mdiff.process.laws import VarianceExploding, make_process
from mdiff.recipes import experiment, generate
from mdiff.recipes.runs import check_fields
from mdiff.sample import sampler
from mdiff.train import mesh
from mdiff.types import to_uint8

KEY = jax.random.key(3)
MASK, BLOCKS, BLUR = Damage("mask", 0.4, 0.3), Damage("blocks", 0.4, 0.3), Damage("blur", 1.5, 0.5)


@pytest.fixture(scope="module", autouse=True)
def haste():
    """Programs here are small and run once or twice: compiling them costs more than running them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


fixed = jax.jit(Damage.fixed, static_argnums=(0, 3, 4))
more = jax.jit(Damage.more, static_argnums=0)
fresh = jax.jit(Damage.fresh, static_argnums=(0, 2, 3))
blur = jax.jit(damages.blur)


def blur64(x, std):
    """[H,W,C] in float64, by scipy."""
    planes = [np.fft.ifft2(fourier_gaussian(np.fft.fft2(plane), std)).real for plane in np.moveaxis(x, -1, 0)]
    return np.stack(planes, -1)


# ------------------------------------------------------------------------------- the operators


def test_blur_is_a_gaussian_with_a_cyclic_edge():
    x = np.random.default_rng(0).normal(size=(3, 12, 7, 2))
    std = np.array([0.0, 0.6, 2.0])
    found = blur(jnp.float32(x), jnp.float32(std))
    for got, image, s in zip(found, x, std, strict=True):
        np.testing.assert_allclose(got, blur64(image, s), atol=2e-6)
    # A point becomes a Gaussian bump of that variance along each axis.
    point = np.zeros((1, 32, 32, 1), np.float32)
    point[0, 16, 16] = 1.0
    bump = np.asarray(blur(point, jnp.float32([2.0])))[0, :, :, 0].astype(np.float64)
    away = np.arange(32) - 16
    assert bump.sum() == pytest.approx(1, abs=1e-5)
    assert (bump.sum(0) * away**2).sum() == pytest.approx(4, rel=1e-3)
    assert (bump.sum(1) * away**2).sum() == pytest.approx(4, rel=1e-3)


def test_blurs_compose():
    x = jax.random.normal(KEY, (5, 9, 8, 3))
    a, b = jnp.array([0.3, 1.0, 2.0, 0.0, 0.7]), jnp.array([0.4, 0.2, 1.0, 1.5, 0.0])
    twice = blur(blur(x, a), b)
    np.testing.assert_allclose(twice, blur(x, jnp.hypot(a, b)), atol=2e-6)
    np.testing.assert_allclose(blur(x, b).mean((1, 2)), x.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("harm", [MASK, BLOCKS], ids=lambda harm: harm.kind)
def test_masks_hide_their_share_and_belong_to_pixels(harm):
    images = noise_images(400, 16, 16, 3)
    words = noise_keys(images)
    seen = np.asarray(fixed(harm, words, 0, 16, 16))
    assert seen.shape == (400, 16, 16, 1) and set(np.unique(seen)) == {0.0, 1.0}
    cells = 16 * 16 if harm.kind == "mask" else 16
    assert seen.mean() == pytest.approx(0.6, abs=4 * (0.24 / cells / 400) ** 0.5)
    assert len({each.tobytes() for each in seen}) > 390  # 16 blocks: two may be hidden alike by chance
    # No place is hidden more often than another, and neighbours are independent (across the edge of a block).
    assert seen.mean(0) == pytest.approx(0.6, abs=5 * (0.24 / 400) ** 0.5)
    assert abs(np.corrcoef(seen[:, :, 3].ravel(), seen[:, :, 4].ravel())[0, 1]) < 0.1
    # Any order, any batch; another seed hides other pixels; the mirror image is hidden in mirrored places.
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(fixed(harm, words[order], 0, 16, 16), seen[order])
    assert (np.asarray(fixed(harm, words, 1, 16, 16)) != seen).any((1, 2, 3)).mean() > 0.99
    mirrored = fixed(harm, noise_keys(images[:, :, ::-1]), 0, 16, 16)
    np.testing.assert_array_equal(mirrored, seen[:, :, ::-1])


def test_blocks_are_blocks():
    seen = np.asarray(fresh(BLOCKS, jax.random.split(KEY, 50), 12, 8))[..., 0]
    for top in range(0, 12, 4):
        for left in range(0, 8, 4):
            block = seen[:, top : top + 4, left : left + 4]
            assert (block == block[:, :1, :1]).all()
    assert 0.3 < seen.mean() < 0.55


@pytest.mark.parametrize("harm", [MASK, BLOCKS], ids=lambda harm: harm.kind)
def test_further_masks_hide_more_and_anew(harm):
    seen = fixed(harm, noise_keys(noise_images(400, 16, 16, 1)), 0, 16, 16)
    told = [np.asarray(more(harm, jax.random.key(i), seen)) for i in range(2)]
    seen = np.asarray(seen)
    for each in told:
        assert (each <= seen).all()
        assert (each[seen > 0]).mean() == pytest.approx(0.7, abs=0.03)
    assert (told[0] != told[1]).any((1, 2, 3)).mean() > 0.9
    drawn = np.asarray(fresh(harm, keys(0, "s", jnp.arange(400)), 16, 16))
    assert drawn.mean() == pytest.approx(0.6 * 0.7, abs=0.03)


def test_further_blur():
    seen = fixed(BLUR, noise_keys(noise_images(200, 8, 8, 1)), 0, 8, 8)
    assert (np.asarray(seen) == 1.5).all()
    told = np.asarray(more(BLUR, KEY, seen))
    added = np.sqrt(told[:, 0, 0, 0].astype(np.float64) ** 2 - 1.5**2)
    assert (told == told[:, :1, :1]).all()
    assert added.min() < 0.05 and 0.7 < added.max() <= 0.7501
    assert added.mean() == pytest.approx(0.375, abs=4 * 0.75 / 12**0.5 / 200**0.5)
    # A~ x from A x alone is A~ x.
    x = np.random.default_rng(0).normal(size=(200, 8, 8, 1))
    went = BLUR.go_on(BLUR.apply(jnp.float32(x), seen), seen, jnp.asarray(told))
    for i in range(0, 200, 40):
        np.testing.assert_allclose(went[i], blur64(x[i], told[i, 0, 0, 0]), atol=3e-6)


# --------------------------------------------------------------------------------- in the stream


def made(kind="mask", by=0.4, size=8, channels=1, n=12, **fields):
    data = config.Data(n=n, heldout=0, size=size, degrade=kind, degrade_by=by, **fields)
    cfg = config.Config(data=data, train=config.Train(batch=5))
    return cfg, split(data, image_set(n + 3, size, size, channels))


def batches(cfg, subset, steps):
    reader = make_reader(cfg, subset)
    finish = jax.jit(lambda resident, rows, k: stream.finish(stream.gather(resident, rows), k, cfg))
    return [
        jax.tree.map(np.asarray, finish(reader.resident, reader.batch(step), key(cfg.seed, "batch", step)))
        for step in steps
    ]


@pytest.mark.parametrize("kind", ["mask", "blur"])
def test_an_image_is_damaged_alike_in_every_epoch_and_batch(kind):
    cfg, subset = made(kind, channels=3, size=16)
    found = {}
    for batch_size in (5, 7):
        for batch in batches(replace(cfg, train=config.Train(batch=batch_size)), subset, range(6)):
            assert batch["seen"].shape == batch["told"].shape == (batch_size, 16, 16, 1)
            assert "noise" not in batch
            for i, x, seen in zip(batch["id"], batch["x"], batch["seen"], strict=True):
                found.setdefault(int(i), (x, seen, []))
                np.testing.assert_array_equal(x, found[i][0])
                np.testing.assert_array_equal(seen, found[i][1])
            for i, told in zip(batch["id"], batch["told"], strict=True):
                found[int(i)][2].append(told)
    assert len(found) == 12
    clean = dict(zip(subset.train.id.tolist(), subset.train.x / 127.5 - 1, strict=True))
    for i, (x, seen, told) in found.items():
        expected = blur64(clean[i], 0.4) if kind == "blur" else np.where(seen > 0, clean[i], 0)
        np.testing.assert_allclose(x, expected, atol=1e-5)
        assert len({each.tobytes() for each in told}) > 1


def test_a_mask_moves_with_its_image():
    """Flips and shifts move x, A and A~ together, and the blocks of A~ stay those of A's grid."""
    cfg, subset = made("blocks", size=12, channels=3, flip=True, shift=3)
    cfg = replace(cfg, loss=config.Loss(further=0.4))
    masks = np.asarray(fixed(damages.make(cfg), noise_keys(subset.train.x), cfg.seed, 12, 12))
    clean = subset.train.x / np.float32(127.5) - 1
    place = {int(i): k for k, i in enumerate(subset.train.id)}
    moves = [(f, dy, dx) for f in (1, -1) for dy in range(-3, 4) for dx in range(-3, 4)]
    used = set()
    for batch in batches(cfg, subset, range(12)):
        for i, x, seen, told in zip(*(batch[name] for name in ("id", "x", "seen", "told")), strict=True):
            own, mask = clean[place[i]], masks[place[i]]
            undo = [
                (f, dy, dx)
                for f, dy, dx in moves
                if np.allclose(np.roll(np.where(mask > 0, own, 0)[:, ::f], (dy, dx), (0, 1)), x, atol=1e-6)
            ]
            assert len(undo) == 1
            f, dy, dx = undo[0]
            used.add(undo[0])
            np.testing.assert_array_equal(np.roll(seen, (-dy, -dx), (0, 1))[:, ::f], mask)
            back = np.roll(told, (-dy, -dx), (0, 1))[:, ::f]
            whole = np.repeat(np.repeat(back[::4, ::4], 4, 0), 4, 1)
            np.testing.assert_array_equal(back, whole)
    assert {move[0] for move in used} == {1, -1} and len(used) > 15


def test_another_process_hides_the_same_pixels():
    code = (
        "import numpy as np, jax; jax.config.update('jax_num_cpu_devices', 2)\n"
        "from mdiff.data.damage import Damage; from mdiff.data.degrade import noise_keys\n"
        "x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)\n"
        "print(np.packbits(np.asarray(Damage('mask', 0.4, 0.3).fixed(noise_keys(x), 5, 8, 8)) > 0).tobytes().hex())"
    )
    status, out, err = python(code)
    assert status == 0, err
    here = fixed(MASK, noise_keys(noise_images(6, 8, 8, 1)), 5, 8, 8)
    assert out.strip() == np.packbits(np.asarray(here) > 0).tobytes().hex()


# -------------------------------------------------------------------------------- model and loss


class Fixed(nn.Module):
    """F = 0.7 x + 0.2 seen + c_noise / 10 in each channel: a network whose answer can be written down."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        gain = self.param("gain", nn.initializers.constant(0.7), ())
        return gain * x + 0.2 * x[..., -1:] + c_noise[:, None, None, None] / 10


def fixed_model(harm, prediction="x0", kind="ve", channels=2, size=12):
    process = make_process(config.Process(kind=kind))
    model = Model(Fixed(), None, process, 0.5, (size, size, channels), prediction, None, harm)
    return model, jax.jit(model.init)(KEY)


def damaged_batch(harm, n=4, size=12, channels=2):
    """x0 in float64 and the batch that training sees of it."""
    x0 = np.random.default_rng(1).normal(size=(n, size, size, channels))
    seen = fixed(harm, noise_keys(noise_images(n, size, size, channels)), 0, size, size)
    told = more(harm, KEY, seen)
    batch = {"x": harm.apply(jnp.float32(x0), seen), "seen": seen, "told": told, "id": jnp.arange(n)}
    return x0, batch


SIGMA = np.array([0.02, 0.3, 1.0, 20.0])


@pytest.mark.parametrize("weight", ["edm", "v", "min_snr"])
@pytest.mark.parametrize("harm", [MASK, BLOCKS, BLUR], ids=lambda harm: harm.kind)
def test_the_loss_by_hand(harm, weight):
    model, params = fixed_model(harm)
    x0, batch = damaged_batch(harm)
    eps = np.random.default_rng(2).normal(size=x0.shape)
    cfg = config.Config(
        data=config.Data(degrade=harm.kind, degrade_by=harm.by), loss=config.Loss(level_weight=weight)
    )
    draws = Draws(jnp.float32(SIGMA), jnp.float32(eps), None, KEY)
    loss, aux = jax.jit(damaged.make(model, cfg).loss)(params, draws, batch)
    seen, told = (np.asarray(batch[name], np.float64) for name in ("seen", "told"))
    t = (SIGMA / 80) ** (1 / 7)
    for i, s in enumerate(SIGMA):
        if harm.kind == "blur":
            a, b = seen[i, 0, 0, 0], told[i, 0, 0, 0]
            xt = blur64(x0[i] + s * eps[i], b)
        else:
            xt = np.where(told[i] > 0, x0[i] + s * eps[i], 0)
        d = 0.7 * xt / np.sqrt(1 + s**2) + 0.2 * told[i] + 100 * t[i]
        lam = {"edm": 1 / s**2 + 4, "v": 1 + 1 / s**2, "min_snr": min(1 / s**2, 5)}[weight]
        total, count = 0.0, 0
        square = blur64(d - x0[i], a) ** 2 if harm.kind == "blur" else (d - x0[i]) ** 2
        for pixel in np.ndindex(12, 12):
            if harm.kind == "blur":
                total, count = total + min(lam, 4) * square[pixel].mean(), count + 1
            elif seen[i][pixel] > 0:
                total += (lam if told[i][pixel] > 0 else min(lam, 4)) * square[pixel].mean()
                count += 1
        assert float(loss[i]) == pytest.approx(total / count, rel=2e-5)
    assert (weight == "edm") == ("loss_edm" not in aux)


@pytest.mark.parametrize("harm", [MASK, BLOCKS], ids=lambda harm: harm.kind)
def test_hidden_pixels_never_reach_the_loss(harm):
    model, params = fixed_model(harm, "edm")
    x0, batch = damaged_batch(harm)
    cfg = config.Config(data=config.Data(degrade=harm.kind, degrade_by=harm.by))
    objective = damaged.make(model, cfg)
    draws = objective.draw(KEY, batch)

    def mean(params, x):
        return objective.loss(params, draws, {**batch, "x": x})[0].mean()

    both = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    loss, (by_params, by_x) = both(params, jnp.float32(x0))
    hidden = np.broadcast_to(np.asarray(batch["seen"]) == 0, x0.shape)
    assert hidden.any() and (np.asarray(by_x)[hidden] == 0).all()
    assert (np.asarray(by_x)[~hidden] != 0).all()
    broken = both(params, jnp.where(hidden, jnp.nan, jnp.float32(x0)))
    assert float(broken[0]) == float(loss)
    assert float(broken[1][0]["net"]["gain"]) == float(by_params["net"]["gain"])


CASES = [
    ("edm", "ve"),
    ("edm", "flow"),
    ("x0", "ve"),
    ("eps", "vp_cosine"),
    ("v", "vp_linear"),
    ("velocity", "flow"),
]


@pytest.mark.parametrize(("prediction", "kind"), CASES)
def test_what_the_output_stands_for(prediction, kind):
    """A seen pixel is completed as ever; a hidden one's estimate does not fade with the noise level."""
    model, params = fixed_model(MASK, prediction, kind)
    plain = replace(model, damage=None)
    _, batch = damaged_batch(MASK)
    told, sigma = batch["told"], jnp.float32([1e-3, 0.05, 0.8, 30.0])
    t = model.process.time(sigma)
    xt = MASK.apply(jax.random.normal(KEY, batch["x"].shape), told)
    x0 = np.asarray(model.apply(params, xt, t, seen=told)[0].x0)
    # The plain network sees no third channel: add its part, 0.2 seen, by hand through linearity in F.
    gain = [np.asarray(plain._complete(jnp.zeros_like(xt), jnp.full_like(xt, f), t).x0) for f in (0.0, 1.0)]
    gain = gain[1] - gain[0]
    x, c = (np.asarray(each) for each in model._inputs(xt, t, None))
    out = 0.7 * x + c[:, None, None, None] / 10
    shown = np.broadcast_to(np.asarray(told) > 0, x0.shape)
    usual = np.asarray(plain._complete(xt, jnp.float32(out + 0.2), t).x0)
    np.testing.assert_allclose(x0[shown], usual[shown], rtol=1e-4, atol=1e-5)
    least = 0.5 if prediction == "edm" else 1.0
    expected = np.sign(gain) * np.maximum(np.abs(gain), least) * out
    np.testing.assert_allclose(x0[~shown], expected[~shown], rtol=1e-3)


def test_without_damage_nothing_changes():
    cfg = config.Config(net=config.Net(channels=16, mults=(1,), blocks=1, attention=()))
    model = make_model(cfg, 1)
    assert model.damage is None
    shapes = jax.eval_shape(model.init, KEY)
    assert shapes["net"]["conv_in"]["kernel"].shape[-2] == 1
    batch = {"x": jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)}
    programs = [str(jax.make_jaxpr(m.make(model, cfg))(shapes, KEY, batch)) for m in (ambient, damaged)]
    assert programs[0] == programs[1]
    harmed = make_model(replace(cfg, data=config.Data(degrade="mask", degrade_by=0.5)), 1)
    assert harmed.damage == Damage("mask", 0.5, 0.1)
    assert jax.eval_shape(harmed.init, KEY)["net"]["conv_in"]["kernel"].shape[-2] == 2
    assert jax.tree.structure(harmed.gates()) == jax.tree.structure(model.gates())


# -------------------------------------------------------------------------------------- theory

COVARIANCE = np.array([[1.0, 0.8, 0.3], [0.8, 1.5, -0.4], [0.3, -0.4, 0.7]])
"""Of a world of images of three pixels in a row."""


def best(mask, sigma):
    """E[x0 | A~ xt] = K (A~ xt) of that world."""
    m = np.diag(mask)
    return COVARIANCE @ m @ np.linalg.inv(m @ COVARIANCE @ m + sigma**2 * np.eye(3))


class Table(nn.Module):
    """For each of the 8 masks a linear map: everything that a linear D(A~ xt, A~) can be at one noise level."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        maps = self.param("maps", nn.initializers.zeros, (8, 3, 3))
        which = (x[:, 0, :, 1] @ jnp.array([1.0, 2.0, 4.0])).astype(int)
        out = jnp.einsum("bpq,bq->bp", maps[which], x[:, 0, :, 0])
        return jnp.stack([out, out], -1)[:, None]


def test_the_minimum_is_the_conditional_mean_if_more_is_hidden():
    """The loss is quadratic in a linear D: one Newton step is its minimum."""
    n, sigma, harm = 100_000, 0.5, Damage("mask", 0.4, 0.3)
    rng = np.random.default_rng(0)
    x0 = jnp.float32(rng.multivariate_normal(np.zeros(3), COVARIANCE, n))[:, None, :, None]
    words = jnp.asarray(rng.integers(0, 2**32, (n, 3), np.uint32)).at[:, 2].set(0)
    seen = fixed(harm, words, 0, 1, 3)
    batch = {"x": harm.apply(x0, seen), "seen": seen, "told": more(harm, KEY, seen)}
    model = Model(Table(), None, VarianceExploding(), 0.5, (1, 3, 1), "x0", None, harm)
    params = model.init(KEY)
    objective = damaged.make(model, config.Config(data=config.Data(degrade="mask", degrade_by=0.4)))
    draws = Draws(jnp.full(n, sigma), jax.random.normal(KEY, x0.shape), None, KEY)

    def loss(maps, told):
        return objective.loss({"net": {"maps": maps}}, draws, {**batch, "told": told})[0].mean()

    maps = params["net"]["maps"]
    gradient = np.asarray(jax.jit(jax.grad(loss))(maps, batch["told"]), np.float64).ravel()
    curvature = np.asarray(jax.jit(jax.hessian(loss))(maps, batch["told"]), np.float64).reshape(72, 72)
    found = -np.linalg.lstsq(curvature, gradient, rcond=1e-9)[0].reshape(8, 3, 3) / np.sqrt(1 + sigma**2)
    for which in range(1, 8):
        mask = np.array([which & 1, which >> 1 & 1, which >> 2 & 1])
        np.testing.assert_allclose(found[which][:, mask > 0], best(mask, sigma)[:, mask > 0], atol=0.05)
    # With nothing hidden on top, the map to a hidden pixel is compared with nothing.
    left = np.asarray(jax.jit(jax.hessian(loss))(maps, seen), np.float64).reshape(8, 3, 3, 8, 3, 3)
    some = curvature.reshape(left.shape)
    for which in range(1, 8):
        for p in range(3):
            shown = which >> p & 1
            block, with_more = left[which, p, :, which, p], some[which, p, :, which, p]
            assert (block == 0).all() if not shown else np.trace(block) > 1e-3
            assert np.trace(with_more) > 1e-4


class Exact(nn.Module):
    """E[x0 | A~ xt, A~] of the world of three pixels at every noise level, as a network."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        sigma = 80.0 * (c_noise / 1000) ** 7
        told, cov = x[:, 0, :, 1], jnp.float32(COVARIANCE)
        visible = cov * told[:, :, None] * told[:, None, :] + sigma[:, None, None] ** 2 * jnp.eye(3)
        xt = x[:, 0, :, 0] * jnp.sqrt(1 + sigma**2)[:, None]
        weights = jnp.linalg.solve(visible, (told * xt)[..., None])[..., 0]
        out = (told * weights) @ cov
        return jnp.stack([out, out], -1)[:, None]


def test_samples_are_seen_pixels_of_the_law_and_the_mean_of_the_rest():
    harm = Damage("mask", 0.3, 0.2)
    model = Model(Exact(), None, VarianceExploding(), 0.5, (1, 3, 1), "x0", None, harm)
    cfg = config.Sample(steps=24)
    program, n = generate.sample_program(model, cfg), 6000
    x = np.asarray(program({"net": {}}, jnp.arange(n)), np.float64)[:, 0, :, 0]
    told = np.asarray(fresh(harm, keys(cfg.seed, "sample damage", jnp.arange(n)), 1, 3))[:, 0, :, 0]
    assert told.mean() == pytest.approx(0.56, abs=0.02)
    for which in range(1, 8):
        mask = np.array([which & 1, which >> 1 & 1, which >> 2 & 1])
        rows = x[(told == mask).all(1)]
        s, h = mask > 0, mask == 0
        assert len(rows) > 200
        covariance = COVARIANCE[np.ix_(s, s)]
        np.testing.assert_allclose(np.cov(rows[:, s].T), covariance, atol=7 / len(rows) ** 0.5)
        mean = rows[:, s] @ np.linalg.solve(covariance, COVARIANCE[np.ix_(s, h)])
        np.testing.assert_allclose(rows[:, h], mean, atol=0.02)
    nothing = x[(told == 0).all(1)]
    assert len(nothing) > 100 and np.abs(nothing).max() < 1e-4


# ------------------------------------------------------------------------------------ end to end


def tiny(kind, by, **fields):
    return config.Config(
        data=config.Data(source="faces", size=16, n=12, heldout=12, degrade=kind, degrade_by=by, flip=True),
        net=config.Net(arch="dit", channels=16, blocks=1, patch=4, **fields),
        train=config.Train(steps=4, batch=8, log_every=2, save_every=4, eval_samples=6, eval_levels=()),
        sample=config.Sample(n=6, steps=4, batch=6, method="euler"),
    )


class Watch:
    def __init__(self):
        self.rows, self.said = [], []

    def progress(self, task, done, total, scalars):
        self.rows.append(dict(scalars))

    def say(self, message):
        if "--init-from" in message:
            self.said.append(message)


def test_train_and_sample_faces(tmp_path):
    made = experiment.prepare(tiny("mask", 0.5))
    watch = Watch()
    outcome = experiment.train(made, tmp_path, watch)
    assert int(outcome.state.step) == 4
    losses = [row["loss"] for row in watch.rows if "loss" in row]
    assert losses and np.isfinite(losses).all()
    images = experiment.sample(made, tmp_path, watch)
    assert images.shape == (6, 16, 16, 1) and images.std() > 0
    assert not watch.said
    # A network of undamaged images has a channel less; another seed hides other pixels.
    cfg = made.config
    whole = make_model(replace(cfg, data=config.Data()), 1)
    with one_line("--init-from", "differs", "data.degrade mask"):
        experiment.load_params(tmp_path, watch, like=whole)
    experiment._say_what_was_seen(replace(cfg, seed=1), tmp_path, watch)
    assert any("hidden now" in line for line in watch.said)
    # A sample does not depend on its batch.
    again = generate.make_generator(made.model, sampler.settings(cfg), None, mesh.make_mesh(cfg.mesh))
    mixed = to_uint8(again(outcome.state.ema, np.array([4, 1, 9, 0, 5, 1], np.int32)))
    np.testing.assert_array_equal(mixed[[0, 3]], images[[4, 0]])


def test_hidden_pixels_of_the_state_are_not_looked_at():
    for kind in ("ve", "flow"):
        model, params = fixed_model(MASK, "edm", kind)
        _, batch = damaged_batch(MASK)
        told = batch["told"]
        denoise = jax.jit(model.denoiser(params, seen=told))
        xt, other = jax.random.normal(KEY, (2, *batch["x"].shape))
        t = jnp.full(4, 0.5)
        first, second = (denoise(jnp.where(told > 0, xt, rest), t) for rest in (xt, other))
        np.testing.assert_array_equal(first.x0, second.x0)
        # The pair still describes the whole state: xt = alpha x0 + sigma eps.
        np.testing.assert_allclose(model.process.corrupt(first.x0, first.eps, t), xt, atol=1e-4)


def test_pairs_are_looked_at_through_the_mask_of_each():
    """Guidance asks for each image twice, one after the other."""
    model, params = fixed_model(MASK)
    _, batch = damaged_batch(MASK)
    denoise = model.denoiser(params, seen=batch["told"])
    xt, t = jax.random.normal(KEY, batch["x"].shape), jnp.float32([0.2, 0.4, 0.6, 0.8])
    both = denoise(jnp.repeat(xt, 2, axis=0), jnp.repeat(t, 2))
    for part, once in zip(both, denoise(xt, t), strict=True):
        np.testing.assert_array_equal(part[::2], once)
        np.testing.assert_array_equal(part[1::2], once)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"degrade_by": 0.3}, ("data.degrade_by = 0.3", "set that to mask")),
        ({"loss": config.Loss(further=0.2)}, ("loss.further = 0.2", "data.degrade")),
        ({"degrade": "mask"}, ("data.degrade_by = 0", "above 0")),
        ({"degrade": "mask", "degrade_by": 1.0}, ("data.degrade_by = 1.0", "below 1")),
        ({"degrade": "blocks", "degrade_by": -0.1}, ("data.degrade_by = -0.1", "share hidden")),
        ({"degrade": "blur", "degrade_by": 4.1}, ("data.degrade_by = 4.1", "most", " 4")),
        ({"degrade": "blocks", "degrade_by": 0.5, "size": 10}, ("data.size = 10", "multiple of 4", "to 8")),
        ({"degrade": "blur", "degrade_by": -1.0}, ("data.degrade_by = -1.0", "above 0")),
        ({"degrade": "blur", "degrade_by": float("nan")}, ("data.degrade_by = nan", "finite")),
        ({"degrade": "mask", "degrade_by": 0.5, "loss": config.Loss(further=0.0)}, ("loss.further = 0.0",)),
        ({"degrade": "blur", "degrade_by": 1.0, "loss": config.Loss(further=1.0)}, ("loss.further = 1.0",)),
        ({"degrade": "mask", "degrade_by": 0.5, "loss": config.Loss(cutoff=1.0)}, ("cutoff", "leave out")),
        (
            {"degrade": "mask", "degrade_by": 0.5, "loss": config.Loss(cutoff_of={1: 1.0})},
            ("data.degrade = mask", "cutoff_of"),
        ),
        ({"degrade": "mask", "degrade_by": 0.5, "augment": 0.1}, ("data.augment = 0.1", "set it to 0")),
        ({"degrade": "mask", "degrade_by": 0.5, "reading": "disk"}, ("data.reading", "memory")),
    ],
)
def test_bad_fields(fields, parts):
    loss = fields.pop("loss", config.Loss()) if "loss" in fields else config.Loss()
    with one_line(*parts):
        check_fields(config.Config(data=config.Data(**fields), loss=loss))


def test_an_image_hidden_as_a_whole_is_named():
    cfg = config.Config(
        data=config.Data(source="digits", size=8, n=40, heldout=5, degrade="blocks", degrade_by=0.5),
        net=config.Net(channels=8, mults=(1,), blocks=1, attention=()),
    )
    subset = experiment.prepare(replace(cfg, data=replace(cfg.data, degrade_by=0.01))).subset
    seen = np.asarray(fixed(damages.make(cfg), noise_keys(subset.train.x), 0, 8, 8))
    blank = subset.train.id[~seen.any((1, 2, 3))]
    assert len(blank)
    with one_line("data.degrade_by = 0.5", f"image {blank[0]};", "lower"):
        experiment.prepare(cfg)
