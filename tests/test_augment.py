"""The one noisy copy of each image, and augmentations on the right side of its noise."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import noise_images, one_line, python
from scipy import stats

from mdiff import keys
from mdiff.config import Config, Data, Loss
from mdiff.data import augment, degrade, stream

# The fixed noisy copy (T7, T8)

SIGMA = 0.7
X = noise_images(40, 6, 6, 1)
IDS = np.arange(100, 140, dtype=np.int32)


@pytest.fixture(scope="module")
def batch_of():
    @functools.partial(jax.jit, static_argnames="cfg")
    def compute(x, ids, noise, index, key, cfg):
        resident, rows = {"x": x, "id": ids}, {"index": index}
        if cfg.value.loss.cutoff:
            resident["noise"] = noise
            rows["cutoff"] = jnp.full(len(index), cfg.value.loss.cutoff)
        return stream.finish(stream.gather(resident, rows), key, cfg.value)

    def make(index, key=None, *, x=X, ids=IDS, cutoff=SIGMA, noise_seed=1, **data):
        key = jax.random.key(0) if key is None else key
        cfg = Config(seed=noise_seed, data=Data(**data), loss=Loss(cutoff=cutoff))
        noise = jnp.asarray(degrade.noise_keys(x))
        out = compute(jnp.asarray(x), jnp.asarray(ids), noise, jnp.asarray(index, np.int32), key, Static(cfg))
        return {name: np.asarray(value) for name, value in out.items()}

    return make


class Static:
    """A config as a static argument: dataclasses with dictionaries have no hash."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return hash(repr(self.value))

    def __eq__(self, other):
        return repr(self.value) == repr(other.value)


def test_clean_batch(batch_of):
    out = batch_of([3, 1, 3], cutoff=0.0)
    assert set(out) == {"x", "id"}
    assert out["x"].dtype == np.float32
    np.testing.assert_allclose(out["x"], X[[3, 1, 3]].astype(np.float64) / 255 * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(out["id"], [103, 101, 103])
    resident = {"x": X, "id": IDS, "label": np.arange(40) * 2, "vector": np.arange(80.0).reshape(40, 2)}
    rows = {"index": np.array([3, 1])}
    raw = stream.gather(jax.tree.map(jnp.asarray, resident), jax.tree.map(jnp.asarray, rows))
    np.testing.assert_array_equal(raw["label"], [6, 2])
    np.testing.assert_array_equal(raw["vector"], [[6, 7], [2, 3]])
    assert raw["x"].dtype == np.uint8
    assert set(stream.finish(raw, jax.random.key(0), Config())) == {"x", "id", "label", "vector"}


def test_without_cutoff_nothing_is_drawn():
    raw = {"x": jnp.asarray(X), "id": jnp.asarray(IDS)}
    trace = jax.make_jaxpr(lambda key: stream.finish(raw, key, Config()))(jax.random.key(0))
    assert not re.search("random|erf|threefry", str(trace))


def test_copy_is_fixed_per_image(batch_of):
    """T7: bit for bit the same in any epoch, order, batch size and share of the batch."""
    whole = batch_of(np.arange(40))["y"]
    rng = np.random.default_rng(0)
    index = rng.integers(0, 40, 64)
    np.testing.assert_array_equal(batch_of(index, jax.random.key(5))["y"], whole[index])
    for step in (0, 1, 50):
        index = stream.indices(0, step, 40, np.arange(40, dtype=np.int32))
        np.testing.assert_array_equal(batch_of(index)["y"], whole[index])
        shares = np.concatenate([batch_of(index[:1])["y"], batch_of(index[1:])["y"]])
        np.testing.assert_array_equal(shares, whole[index])
    # The pixels decide, neither the place in the training set nor the id.
    order = rng.permutation(40)
    np.testing.assert_array_equal(batch_of(np.arange(40), x=X[order])["y"], whole[order])
    other = batch_of(np.arange(40), noise_seed=2)["y"]
    assert (other != whole).mean() > 0.99


def test_copy_is_fixed_across_processes():
    code = (
        "import jax, numpy as np, jax.numpy as jnp, hashlib\n"
        "from mdiff.data.degrade import noisy_copy\n"
        "noise = jnp.array([[9, 1, 0], [2, 4, 0], [5, 3, 1]], jnp.uint32)\n"
        "y = noisy_copy(jnp.zeros((3, 4, 4, 1)), noise, 1.0, 7)\n"
        "print(np.asarray(y).tobytes().hex())\n"
    )
    status, out, err = python(code, env={"PYTHONHASHSEED": "12345"})
    assert status == 0, err
    noise = jnp.array([[5, 3, 1], [9, 1, 0]], jnp.uint32)
    here = degrade.noisy_copy(jnp.zeros((2, 4, 4, 1)), noise, 1.0, 7)
    there = np.frombuffer(bytes.fromhex(out.strip()), np.float32).reshape(3, 4, 4, 1)
    np.testing.assert_array_equal(there[[2, 0]], here)


def test_noise_is_unit_gaussian_and_independent():
    images = noise_images(400, 8, 8, 1)
    noise_of = degrade.noise_keys(images)
    noise = np.asarray(degrade.noisy_copy(jnp.zeros((400, 8, 8, 1)), noise_of, SIGMA, 0)).reshape(400, -1)
    assert stats.kstest(noise.ravel() / SIGMA, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise)[np.triu_indices(400, 1)]
    # 79,800 correlations of 64 independent normals: standard deviation 1/8, and none near 1.
    assert abs(correlation.std() * 8 - 1) < 0.05
    assert np.abs(correlation).max() < 0.75
    # Its own stream: not the numbers another use draws from the same seed.
    other = jax.random.normal(keys.key(0, "train", 5), (8, 8, 1)).reshape(-1)
    assert np.abs(np.corrcoef(noise, other[None])[-1, :-1]).max() < 0.75
    x = jnp.full((2, 8, 8, 1), 0.25)
    shifted = degrade.noisy_copy(x, noise_of[[3, 3]], SIGMA, 0)
    np.testing.assert_allclose(np.asarray(shifted).reshape(2, -1), noise[[3, 3]] + 0.25, atol=1e-6)


def test_the_noise_belongs_to_the_picture():
    """The same pixels under two ids are one image with one copy; its mirror image has the mirrored copy."""
    x = noise_images(3, 6, 6, 3)
    x[2] = x[2, :, [0, 1, 2, 2, 1, 0]].transpose(1, 0, 2)  # its own mirror image
    twice = np.concatenate([x, x[:1], x[:1, :, ::-1], x[1:2, :, ::-1]])
    assert (x[2] == x[2, :, ::-1]).all()
    floats = jnp.asarray(twice / 127.5 - 1, jnp.float32)
    y = np.asarray(degrade.noisy_copy(floats, degrade.noise_keys(twice), SIGMA, 3))
    np.testing.assert_array_equal(y[3], y[0])
    np.testing.assert_allclose(y[4], y[0][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(y[5], y[1][:, ::-1], atol=1e-6)
    noise = (y - floats)[:3].reshape(3, -1) / SIGMA
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.4


def test_copies_at_several_levels_are_a_random_walk():
    """Steps of the noise are independent of each other and of lower levels, of variance t^2 - s^2; a copy is its own."""
    images, ladder = noise_images(50, 8, 8, 1), (0.3, 0.5, 1.3)
    noise_of = degrade.noise_keys(images)
    zero = jnp.zeros((50, 8, 8, 1))
    at = {
        level: np.asarray(degrade.noisy_copy(zero, noise_of, jnp.full(50, level), 0, ladder)).ravel()
        for level in (0.0, *ladder)
    }
    assert (at[0.0] == 0).all()
    steps = np.stack([at[0.3], at[0.5] - at[0.3], at[1.3] - at[0.5]])
    variances = np.array([0.09, 0.25 - 0.09, 1.69 - 0.25])
    np.testing.assert_allclose(steps.var(1), variances, rtol=0.1)
    assert np.abs(np.corrcoef(steps) - np.eye(3)).max() < 0.06
    # A batch of mixed levels gives each image the copy it has at its own level.
    mixed = jnp.asarray([ladder[i % 3] for i in range(50)])
    found = np.asarray(degrade.noisy_copy(zero, noise_of, mixed, 0, ladder)).reshape(50, -1)
    for i in range(50):
        np.testing.assert_array_equal(found[i], at[ladder[i % 3]].reshape(50, -1)[i])


def test_flip_moves_the_finished_copy(batch_of):
    """T8: x and y are mirrored together, and y is the mirror of the one copy bit for bit."""
    index = np.arange(40)
    plain = batch_of(index)
    flips = []
    for seed in range(25):
        out = batch_of(index, jax.random.key(seed), flip=True)
        flipped = (out["x"] != plain["x"]).any(axis=(1, 2, 3))
        for name in ("x", "y"):
            expected = np.where(flipped[:, None, None, None], plain[name][:, :, ::-1], plain[name])
            np.testing.assert_array_equal(out[name], expected)
        flips.append(flipped)
    coins = np.array(flips)
    assert stats.binomtest(int(coins.sum()), coins.size, 0.5).pvalue > 1e-3
    # One coin per example: neither shared by a batch nor fixed for an image.
    assert coins.mean(0).min() > 0
    assert coins.mean(0).max() < 1
    assert coins.mean(1).min() > 0
    assert coins.mean(1).max() < 1


@pytest.mark.parametrize(("cutoff", "edges"), [(SIGMA, "wrap"), (0.0, "reflect")])
def test_shift_moves_the_finished_copy(batch_of, cutoff, edges):
    """Each example is moved by whole pixels, its noisy copy likewise: no pixel of a copy is seen twice."""
    index, reach = np.arange(40), 2
    plain = batch_of(index, cutoff=cutoff)
    names = ("x", "y") if cutoff else ("x",)
    padded = {
        name: np.pad(plain[name], ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode=edges)
        for name in names
    }
    counts = np.zeros((5, 5))
    for seed in range(25):
        out = batch_of(index, jax.random.key(seed), cutoff=cutoff, shift=reach)
        for i in index:
            fits = [
                (down, right)
                for down in range(5)
                for right in range(5)
                if (out["x"][i] == padded["x"][i, down : down + 6, right : right + 6]).all()
            ]
            ((down, right),) = fits
            counts[down, right] += 1
            for name in names:
                moved = padded[name][i, down : down + 6, right : right + 6]
                np.testing.assert_array_equal(out[name][i], moved)
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_averaging_the_copies_reveals_nothing(batch_of):
    """T8, leak: over many epochs, augmentations undone, the noise of the mean stays sigma; late noise averages out."""
    index, clean = np.arange(40), batch_of(np.arange(40), cutoff=0.0)["x"]
    noise = batch_of(index)["y"] - clean
    middle = (slice(None), slice(2, 4), slice(2, 4))  # what shifts by up to 2 never push out
    right, wrong = [], []
    for seed in range(32):
        out = batch_of(index, jax.random.key(seed), flip=True, shift=2)
        late = out["x"] + noise  # what the released code does: augment, then add the stored noise
        for i in index:
            down, across, mirrored = where_from(out["x"][i, ..., 0], clean[i, ..., 0])
            for images, kept in ((out["y"], right), (late, wrong)):
                image = images[i, ..., 0]
                back = np.roll(image, (-down, -across), (0, 1))
                kept.append(back[:, ::-1] if mirrored else back)
    truth = clean[..., 0][middle]
    for kept, low, high in ((right, 0.94, 1.06), (wrong, 0, 0.45)):
        mean = np.reshape(kept, (32, 40, 6, 6)).mean(0)
        assert low < np.std(mean[middle] - truth) / SIGMA < high


def where_from(image, clean):
    """By how many rows and columns `clean`, or its mirror image, was moved to give `image`."""
    for mirrored in (False, True):
        origin = clean[:, ::-1] if mirrored else clean
        for down in range(-2, 3):
            for across in range(-2, 3):
                if (np.roll(origin, (down, across), (0, 1))[2:4, 2:4] == image[2:4, 2:4]).all():
                    return down, across, mirrored
    raise AssertionError("not a shift of the image")


# EDM's non-leaky augmentation

NOTHING = np.zeros(9, np.float32)
non_leaky = jax.jit(augment.non_leaky, static_argnums=2)
warp = jax.jit(lambda x, row: augment.warp(x, *augment.inverse_map(row, *x.shape[1:3])))


def told(**entries: float) -> jnp.ndarray:
    """One row of parameters, the named ones set."""
    row = NOTHING.copy()
    for name, value in entries.items():
        row[augment.PARAMETERS.index(name.replace("_", " "))] = value
    return jnp.asarray(row)[None]


def turned(degrees: float) -> jnp.ndarray:
    row = NOTHING.copy()
    row[3], row[4] = np.cos(np.radians(degrees)) - 1, np.sin(np.radians(degrees))
    return jnp.asarray(row)[None]


def warped(image: np.ndarray, row: jnp.ndarray) -> np.ndarray:
    return np.asarray(warp(jnp.asarray(image, jnp.float32)[None], row))[0]


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 7, 3), (6, 10, 1)])
def test_moves_by_whole_pixels_are_exact(shape):
    height, width, _ = shape
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(warped(image, told()), image, atol=1e-6)
    np.testing.assert_allclose(warped(image, told(flip_x=1)), image[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(warped(image, told(flip_y=1)), image[::-1], atol=1e-6)
    # Two pixels right and one up: what is seen comes from the left and from below.
    moved = warped(image, told(u=2 / (width / 8), v=-1 / (height / 8)))
    np.testing.assert_allclose(moved[:-1, 2:], image[1:, :-2], atol=1e-5)
    np.testing.assert_allclose(moved[:-1, 1], image[1:, 1], atol=1e-5)  # mirrored at the edge pixel
    if height == width:
        # Counterclockwise on screen is from +y (down) to +x: theta = -90 degrees in (x right, y down).
        np.testing.assert_allclose(warped(image, turned(-90)), np.rot90(image, 1), atol=1e-4)
        np.testing.assert_allclose(warped(image, turned(90)), np.rot90(image, -1), atol=1e-4)


def test_warp_of_a_smooth_image_is_the_formula():
    """Against the image's own formula at the positions the definition gives, in float64 with numpy.linalg."""
    size, rng = 24, np.random.default_rng(0)
    place = np.arange(size) - (size - 1) / 2

    def picture(x, y):
        return np.sin(0.21 * x + 0.4) + np.cos(0.17 * y - 0.3 * x) + 0.02 * x

    image = picture(place[None, :], place[:, None]).astype(np.float32)[..., None]
    for _ in range(40):
        flip_x, flip_y = rng.integers(0, 2, 2)
        s, b, u, v = rng.normal(size=4)
        b = abs(b)
        theta, phi = rng.uniform(-np.pi, np.pi, 2)

        def turn(angle):
            return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

        flips = np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
        stretch = turn(phi) @ np.diag([2 ** (0.2 * b), 2 ** (-0.2 * b)]) @ turn(-phi)
        forward = stretch @ turn(theta) @ flips * 2 ** (0.2 * s)
        to = np.stack(np.meshgrid(place, place), -1) - size / 8 * np.array([u, v])
        origin = to @ np.linalg.inv(forward).T
        row = [flip_x, flip_y, s, np.cos(theta) - 1, np.sin(theta), b * np.cos(phi), b * np.sin(phi), u, v]
        got = warped(image, jnp.asarray([row], jnp.float32))[..., 0]
        inside = (np.abs(origin) < (size - 1) / 2 - 2).all(-1)
        assert inside.sum() > 20
        np.testing.assert_allclose(got[inside], picture(*origin[inside].T), atol=3e-3)


def test_nothing_is_told_where_nothing_was_done():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(400, 6, 6, 1)), jnp.float32)
    out, rows = non_leaky(jax.random.key(0), x, 0.12)
    untouched = (np.asarray(rows) == 0).all(1)
    # Half are not mirrored; each of five is left out with probability 0.88; a flip along y does nothing half of the time.
    assert stats.binomtest(int(untouched.sum()), 400, 0.5 * 0.88**4 * 0.94).pvalue > 1e-3
    np.testing.assert_array_equal(np.asarray(out)[untouched], np.asarray(x)[untouched])
    assert (np.abs(np.asarray(out - x)).max((1, 2, 3)) > 1e-3)[~untouched].all()
    assert not augment.draw(jax.random.key(0), 30, 0.0)[:, 1:].any()


def test_law_of_what_is_done():
    n = 20_000
    rows = np.asarray(jax.jit(lambda key: augment.draw(key, n, 0.3))(jax.random.key(1)), np.float64)
    assert set(np.unique(rows[:, :2])) == {0.0, 1.0}
    for column, chance in ((0, 0.5), (1, 0.15)):
        assert stats.binomtest(int(rows[:, column].sum()), n, chance).pvalue > 1e-3
    for column in (2, 7):  # translations are drawn together
        done = rows[rows[:, column] != 0]
        assert stats.binomtest(len(done), n, 0.3).pvalue > 1e-3
        assert stats.kstest(done[:, column], "norm").pvalue > 1e-3
    done = rows[rows[:, 7] != 0]
    assert stats.kstest(done[:, 8], "norm").pvalue > 1e-3
    angle = np.arctan2(rows[:, 4], rows[:, 3] + 1)
    np.testing.assert_allclose(np.hypot(rows[:, 3] + 1, rows[:, 4]), 1, atol=1e-5)
    assert stats.kstest(angle[angle != 0], stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    stretched = rows[np.hypot(rows[:, 5], rows[:, 6]) > 0]
    assert stats.kstest(np.hypot(stretched[:, 5], stretched[:, 6]), stats.halfnorm.cdf).pvalue > 1e-3
    direction = np.arctan2(stretched[:, 6], stretched[:, 5])
    along, up = np.isclose(direction, 0, atol=1e-6), np.isclose(direction, np.pi / 2, atol=1e-6)
    for straight in (along, up):
        assert stats.binomtest(int(straight.sum()), len(direction), 0.25).pvalue > 1e-3
    other = direction[~along & ~up]
    assert stats.kstest(other, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    # Independent of one another, so uncorrelated; and unbiased but for the flips and the cosine.
    correlation = np.corrcoef(rows.T)
    correlation[5, 6] = 0  # stretches along x and along y exclude each other
    assert np.abs(correlation[np.triu_indices(9, 1)]).max() < 5 / np.sqrt(n)
    signed = rows[:, [2, 4, 7, 8]]
    assert (np.abs(signed.mean(0)) < 4 * signed.std(0) / np.sqrt(n)).all()


def test_warp_keeps_a_flat_image_and_the_centre_of_mass():
    x = np.zeros((2000, 17, 17, 1), np.float32)
    np.testing.assert_allclose(non_leaky(jax.random.key(0), x + 0.3, 0.5)[0], 0.3, atol=1e-5)
    # Over many draws a spot in the middle stays in the middle.
    x[:, 8, 8] = 1
    mean = np.asarray(non_leaky(jax.random.key(2), x, 0.5)[0]).mean(0)
    place = np.arange(17) - 8
    assert abs((mean[..., 0].sum(0) * place).sum() / mean.sum()) < 0.15
    assert abs((mean[..., 0].sum(1) * place).sum() / mean.sum()) < 0.15


def test_non_leaky_moves_the_clean_image_alone(batch_of):
    """The flip moves x and its copy together; then x alone is warped, and the parameters tell by how much."""
    plain, out = batch_of(np.arange(40)), batch_of(np.arange(40), augment=0.1, flip=True)
    mirrored = (out["y"] != plain["y"]).any((1, 2, 3))[:, None, None, None]
    flipped = {name: np.where(mirrored, plain[name][:, :, ::-1], plain[name]) for name in ("x", "y")}
    np.testing.assert_array_equal(out["y"], flipped["y"])
    assert out["augment"].shape == (40, 9)
    touched = (out["augment"] != 0).any(1)
    assert touched.any() and not touched.all()
    np.testing.assert_array_equal((out["x"] != flipped["x"]).any((1, 2, 3)), touched)
    expected = np.concatenate([warp(flipped["x"][i : i + 1], out["augment"][i : i + 1]) for i in range(40)])
    np.testing.assert_allclose(out["x"], expected, atol=1e-5)


def test_bad_augmentations():
    for shift in (-1, 16):
        with one_line(f"data.shift = {shift}", "16"):
            augment.check(Data(shift=shift))
    for probability in (-0.1, 1.5):
        with one_line(f"data.augment = {probability}", "0..1"):
            augment.check(Data(augment=probability))
    augment.check(Data(shift=15, augment=1.0))
