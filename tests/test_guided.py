"""Guided generations of a network: the unguided ones at 0, one program for all, resumed runs, devices, ascent."""

from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import one_line, python

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import Model
from mdiff.nets.embeddings import Conditions
from mdiff.process import laws
from mdiff.recipes import generate, guided
from mdiff.recipes.ascent import ascent
from mdiff.train import mesh  # noqa: F401 - of the devices' test


class Tiny(nn.Module):
    """Two convolutions and a condition: compiles in no time."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        told = nn.Dense(8)(jnp.stack([c_noise, jnp.sin(3 * c_noise)], axis=1))
        told = told if cond is None else told + cond
        h = nn.silu(nn.Conv(8, (3, 3))(x) + told[:, None, None, :])
        return nn.Conv(x.shape[-1], (3, 3))(h)


MODEL = Model(Tiny(), None, laws.make_process(config.Process()), 0.5, (4, 4, 1))
CFG = config.Sample(method="ddim", steps=4, seed=5, n=10, batch=4)


def weights(model, seed=0):
    """Any parameters do, if every path is active."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(key(0, "init")))
    return jax.tree.map(lambda leaf: jnp.float32(0.15 * rng.normal(size=leaf.shape)), shapes)


@dataclass(frozen=True, eq=False)
class Centres:
    """Classes are normal laws around params [K,H,W,C]; counts how often it is traced. Each has its own programs."""

    process: object = MODEL.process
    shape: tuple = MODEL.shape
    classes: int = 3
    traces: list = field(default_factory=list)

    def log_prob(self, params, xt, t, label):
        self.traces.append(len(xt))
        u = xt / self.process.alpha(t)[:, None, None, None]
        spread = 0.05 + self.process.noise_level(t)[:, None] ** 2
        squared = jnp.sum((u[:, None] - params) ** 2, axis=(2, 3, 4))
        every = jax.nn.log_softmax(-0.5 * squared / spread)
        return jnp.take_along_axis(every, label[:, None], 1)[:, 0]


PARAMS = weights(MODEL)
CENTRES = jnp.float32(np.random.default_rng(1).uniform(-0.7, 0.7, (3, 4, 4, 1)))
INDEX, LABEL = np.arange(4), np.array([0, 2, 1, 0])


class Silent:
    def __init__(self):
        self.heard, self.said = [], []

    def progress(self, task, done, total, scalars):
        self.heard.append((done, total))

    def say(self, message):
        self.said.append(message)


# ------------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_scale_0_is_the_unguided_generator_bit_for_bit(method):
    cfg, guide = replace(CFG, method=method), Centres()
    plain = generate.make_generator(MODEL, cfg)(PARAMS, INDEX)
    for zero in (0, 0.0, np.float32(0)):
        made = guided.make_generator(MODEL, cfg, guide)(PARAMS, CENTRES, INDEX, LABEL, zero)
        np.testing.assert_array_equal(made.x, plain)
        assert np.isnan(made.gap).all() and made.gap.shape == (4,)
    assert guide.traces == []  # nobody was asked


def test_one_program_serves_all_strengths_classes_seeds_and_parameters():
    """DDIM's step is compiled once; weak guidance from the same noise stays near the unguided sample."""
    guide, rng = Centres(), np.random.default_rng(2)
    generator = guided.make_generator(MODEL, CFG, guide)
    plain = np.asarray(generator(PARAMS, CENTRES, INDEX, LABEL, 0).x)
    weak = generator(PARAMS, CENTRES, INDEX, LABEL, 1e-6)
    np.testing.assert_allclose(weak.x, plain, atol=1e-4)
    made = generator(PARAMS, CENTRES, INDEX, LABEL, 2.0)
    assert np.abs(made.x - plain).max() > 1e-2 and np.isfinite(made.gap).all()
    programs = guided._programs(MODEL, replace(CFG, seed=0, n=1, batch=1), guide, None)
    for scale, label, centres in ((7, rng.permutation(LABEL), CENTRES), (0.5, LABEL, CENTRES[::-1])):
        generator(weights(MODEL, 3), centres, INDEX + 9, label, scale)
    guided.make_generator(MODEL, replace(CFG, seed=77), guide)(PARAMS, CENTRES, INDEX, LABEL, 1.0)
    each = generator(PARAMS, CENTRES, INDEX, LABEL, [0.0, 2.0, 0.5, 2.0])
    assert guide.traces == [4] and programs.step._cache_size() == 1
    np.testing.assert_allclose(each.x[1], made.x[1], atol=1e-5)
    np.testing.assert_allclose(each.x[0], plain[0], atol=1e-4)


def test_guidance_goes_towards_the_class():
    guide = Centres()
    generator = guided.make_generator(MODEL, CFG, guide)
    label = np.repeat(np.arange(3), 4)

    def closest(scale):
        x = np.asarray(generator(PARAMS, CENTRES, np.arange(12), label, scale).x)
        gaps = np.sum((x[:, None] - np.asarray(CENTRES)) ** 2, axis=(2, 3, 4))
        return np.mean(gaps.argmin(1) == label)

    assert closest(3.0) == 1.0 and closest(0) < 0.8


@pytest.mark.parametrize("method", ["heun", "dpmpp2m"])
def test_forms_agree_and_a_sample_does_not_depend_on_its_batch(method):
    cfg, guide = replace(CFG, method=method), Centres()
    steps = guided.make_generator(MODEL, cfg, guide, form="steps")
    scan = guided.make_generator(MODEL, cfg, guide, form="scan")
    ours = steps(PARAMS, CENTRES, INDEX, LABEL, 2.0)
    assert len(guide.traces) == (3 if method == "heun" else 2)  # two calls a step, one in the last
    theirs = scan(PARAMS, CENTRES, INDEX, LABEL, 2.0)
    np.testing.assert_allclose(ours.x, theirs.x, atol=2e-4)
    np.testing.assert_allclose(ours.gap, theirs.gap, rtol=1e-3)
    turned = steps(PARAMS, CENTRES, INDEX[::-1], LABEL[::-1], 2.0)
    np.testing.assert_allclose(turned.x[::-1], ours.x, atol=1e-4)


def test_a_labelled_model_keeps_its_conditions():
    """Sample i has the class that it has without a guide, and classifier-free guidance beside the classifier's."""
    model = replace(MODEL, embedding=Conditions(3, 0, False, 8))
    params, guide, cfg = weights(model), Centres(), replace(CFG, guidance=2.0)
    generator = guided.make_generator(model, cfg, guide)
    weak = generator(params, CENTRES, INDEX, LABEL, 1e-7)
    np.testing.assert_allclose(weak.x, generate.make_generator(model, cfg)(params, INDEX), atol=2e-4)


def test_split_over_devices_and_filled_up():
    code = """
import jax, numpy as np
from test_guided import *
on = mesh.make_mesh(config.Mesh())
assert mesh.batch_devices(on) == 4
index, label = np.arange(6), np.arange(6) % 3
one = guided.make_generator(MODEL, CFG, Centres(), form="steps")
expected = {scale: one(PARAMS, CENTRES, index, label, scale) for scale in (2.0, 0)}
for form in ("steps", "scan"):
    four = guided.make_generator(MODEL, CFG, Centres(), on, form=form)
    for scale, a in expected.items():
        b = four(PARAMS, CENTRES, index, label, scale)
        assert b.x.shape == (6, 4, 4, 1) and b.gap.shape == (6,)
        np.testing.assert_allclose(a.x, b.x, atol=1e-4)
        np.testing.assert_allclose(a.gap, b.gap, rtol=1e-3)
"""
    tests = str(__import__("pathlib").Path(__file__).parent)
    env = {"JAX_NUM_CPU_DEVICES": "4"}
    done, _, errors = python(f"import sys; sys.path.insert(0, {tests!r})\n{code}", env=env)
    assert done == 0, errors


def test_what_does_not_fit_is_named():
    with one_line("classifier: is of images (8, 8, 1)", "(4, 4, 1)"):
        guided.make_generator(MODEL, CFG, Centres(shape=(8, 8, 1)))
    other = laws.make_process(config.Process(kind="flow"))
    with one_line("classifier: its process is RectifiedFlow"):
        guided.make_generator(MODEL, CFG, Centres(process=other))
    generator = guided.make_generator(MODEL, CFG, Centres())
    for scale in (-1, float("nan"), float("inf"), [1.0, 2.0, float("nan"), 1.0]):
        with one_line("scale = ", "0 (no guidance) or above"):
            generator(PARAMS, CENTRES, INDEX, LABEL, scale)
    with one_line("label: 2 of them for 4 samples"):
        generator(PARAMS, CENTRES, INDEX, LABEL[:2], 1.0)
    for bad in (3, -1):
        with one_line(f"label {bad}: the guide has classes 0 to 2"):
            generator(PARAMS, CENTRES, INDEX, np.array([0, bad, 1, 1]), 1.0)


# ------------------------------------------------------------------------------------------ to the disk


def fake(calls, breaks_at=None, bad=None):
    """A generator whose image says which sample, class and strength it is."""

    def generator(index, label, scale):
        if breaks_at is not None and len(calls) == breaks_at:
            raise KeyboardInterrupt
        calls.append((scale, index[0]))
        value = (np.asarray(index) + 100 * label) / 127.5 - 1 + scale / 1e5
        x = np.broadcast_to(value[:, None, None, None], (len(index), 2, 2, 1)).copy()
        if bad is not None and scale > 1:
            x[np.asarray(index) == bad, 0] = np.nan
        return guided.Guided(x, np.asarray(index) * (scale or np.nan))

    return generator


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_draw_resumes_to_the_same_files(tmp_path):
    cfg, scales, calls = config.Sample(n=10, batch=4, seed=3), (0.0, 1.0, 2.5), []
    whole = guided.draw(fake(calls), cfg, scales, 2, tmp_path / "whole", "a", Silent())
    assert len(calls) == 9 and sorted(whole) == [0.0, 1.0, 2.5]
    cut = tmp_path / "cut"
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            guided.draw(fake(again := [], 2), cfg, scales, 2, cut, "a", Silent())
        assert len(again) == 2
    monitor = Silent()
    guided.draw(fake(again := []), cfg, scales, 2, cut, "a", monitor)
    assert again == [(2.5, 8)]
    assert monitor.heard[-1] == (30, 30) and monitor.heard == sorted(monitor.heard)
    assert contents(cut) == contents(tmp_path / "whole")
    assert not any(path.is_dir() for path in cut.iterdir())

    stored = [guided.load(whole[scale]) for scale in scales]
    for each, scale in zip(stored, scales, strict=True):
        assert each["x"].shape == (10, 2, 2, 1) and each["x"].dtype == np.uint8
        np.testing.assert_array_equal(each["x"][:, 0, 0, 0], np.arange(10) + 100 * each["label"])
        np.testing.assert_array_equal(each["id"], np.arange(10))
        np.testing.assert_array_equal(each["gap"], np.arange(10) * np.float32(scale or np.nan))
        np.testing.assert_array_equal(each["label"], stored[0]["label"])  # strengths are paired
    # Finished files are not drawn again; those of other parameters are.
    guided.draw(fake(again := []), cfg, scales, 2, cut, "a", Silent())
    assert again == []
    guided.draw(fake(again := []), cfg, (1.0,), 2, cut, "b", Silent())
    assert len(again) == 3


def test_a_lost_folder_is_not_written(tmp_path):
    def guard():
        raise UserError("--workdir: taken over")

    with one_line("taken over"):
        guided.draw(fake([]), CFG, (1.0,), 2, tmp_path, "a", Silent(), guard)
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_not_finite_are_marked(tmp_path):
    monitor = Silent()
    files = guided.draw(fake([], bad=6), replace(CFG, n=10), (1.0, 4.0), 2, tmp_path, "a", monitor)
    fine, broken = guided.load(files[1.0]), guided.load(files[4.0])
    assert fine["finite"].all() and np.flatnonzero(~broken["finite"]).tolist() == [6]
    assert set(np.unique(broken["x"][6])) <= {127, 128}
    assert monitor.said == ["scale 4: 1 of 10 images are not finite; stored grey, `finite` says which"]


def test_labels_are_uniform_and_of_each_sample_alone():
    many = guided.labels(4, 7000, 7)
    np.testing.assert_array_equal(guided.labels(4, 50, 7), many[:50])
    counts = np.bincount(many, minlength=7)
    assert np.sum((counts - 1000) ** 2 / 1000) < 22.5  # chi-square of 6 degrees, p = 0.001
    assert np.mean(many == guided.labels(5, 7000, 7)) < 0.2


@pytest.mark.parametrize(
    ("scales", "words"),
    [((), "scales = ()"), ((1.0, float("nan")), "scale = nan"), ((2.0, 2.0000001), "both 2 in file names")],
)
def test_bad_scales_are_named(tmp_path, scales, words):
    with one_line(words):
        guided.draw(fake([]), CFG, scales, 2, tmp_path, "a", Silent())
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- ascent


class Sides(Centres):
    """Two classes, on either side of a plane through 0 with normal `params`."""

    def log_prob(self, params, xt, t, label):
        return jax.nn.log_sigmoid((1 - 2 * label) * jnp.sum(params * xt, axis=(1, 2, 3)))


@pytest.mark.parametrize("start", ["noise", "grey"])
def test_ascent_climbs_to_the_class_within_the_cube(start):
    """log p rises along the plane's normal without end, so every pixel ends at the cube's face on its side."""
    normal = np.where(np.random.default_rng(3).random((4, 4, 1)) < 0.5, -0.3, 0.3)
    guide, label = Sides(classes=2), np.array([0, 1, 1])
    sides = np.sign(normal) * np.where(label == 0, 1, -1)[:, None, None, None]

    def climb(index, label, **fields):
        return np.asarray(ascent(guide, jnp.float32(normal), index, label, **fields))

    made = climb(np.arange(3), label, steps=100, rate=0.06, level=0.5, start=start)
    np.testing.assert_allclose(made, sides, atol=1e-6)
    once = climb(np.arange(3), label, steps=1, rate=0.05, start="grey")
    np.testing.assert_allclose(once, 0.05 * sides, rtol=1e-4)
    alone = climb(np.array([2]), label[2:], steps=3, start=start)
    np.testing.assert_allclose(alone[0], climb(np.arange(3), label, steps=3, start=start)[2], atol=1e-5)


def test_ascent_names_bad_input():
    with one_line("label 5: the guide has classes 0 to 2"):
        ascent(Centres(), CENTRES, np.arange(1), np.array([5]))
    with one_line("ascent: steps = 0"):
        ascent(Centres(), CENTRES, np.arange(1), np.array([0]), steps=0)
