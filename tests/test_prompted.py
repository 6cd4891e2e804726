"""Detectors of memorized prompts on conditional denoisers known in closed form, and on a small text model."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mdiff import config
from mdiff.data.captions import END, PAD, START
from mdiff.errors import UserError
from mdiff.nemo import Detect, Similarity
from mdiff.nets.denoiser import make_model
from mdiff.probes import alike, prompted, prompted_run
from mdiff.probes.prompted_asked import Asked
from mdiff.probes.prompted_attention import AttentionEntropy, AttentionEntropyEnd, BrightEnding
from mdiff.process.laws import make_process
from mdiff.process.times import make_grid
from mdiff.train import mesh

SHAPE = (4, 4, 3)
SIZE = 48
PROMPTS, SEEDS, LENGTH = 3, 4, 6
BASE = Detect(seeds=SEEDS, steps=10, guidance=2.5, sigma=1.3, probes=0)
KINDS = ("ve", "vp_linear")


def process_of(kind, high=20.0):
    return make_process(config.Process(kind=kind, sigma_min=0.01, sigma_max=high))


def asked_of(look, *, kind="ve", cfg=BASE, shape=SHAPE, prompts=PROMPTS, **more):
    """Prompt k has the embedding k everywhere, the empty prompt -1."""
    each = jnp.repeat(jnp.arange(prompts, dtype=jnp.float32), cfg.seeds)
    values = {
        "look": look,
        "cond": jnp.broadcast_to(each[:, None, None], (len(each), LENGTH, 2)),
        "null": -jnp.ones((1, LENGTH, 2)),
        "length": jnp.repeat(jnp.arange(prompts) % 3 + 3, cfg.seeds),
        "seed": jnp.tile(jnp.arange(cfg.seeds), prompts),
        "shape": shape,
        "process": process_of(kind),
        "cfg": cfg,
    }
    return Asked(**(values | more))


def run(asked, *detectors):
    """What detectors say, compiled together, as float64: one array or a list."""
    fields = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    arrays = {name: fields.pop(name) for name in ("cond", "null", "length", "seed")}
    program = jax.jit(
        lambda a: [each(Asked(**fields, **a)) for each in detectors],
        compiler_options={"xla_backend_optimization_level": 0},  # compiling is what takes time here
    )
    found = program(arrays)
    every = [np.asarray(each, np.float64) for each in found]
    return every[0] if len(every) == 1 else every


class Gaussians:
    """p(x | k) = N(mean_k, covariance_k); row PROMPTS is the empty prompt's. Scores in float64, denoisers in float32."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.mean = rng.normal(size=(PROMPTS + 1, SIZE)) * np.array([1.0, 0.3, 2.0, 0.1])[:, None]
        roots = rng.normal(size=(PROMPTS + 1, SIZE, SIZE)) / SIZE**0.5
        self.covariance = roots @ roots.transpose(0, 2, 1) * np.array([0.05, 1.0, 0.5, 1.5])[:, None, None]
        self.roots, self.vectors = np.linalg.eigh(self.covariance)

    def precision(self, k, s):
        """(covariance_k + s^2)^-1."""
        return np.linalg.inv(self.covariance[k] + s**2 * np.eye(SIZE))

    def eps(self, k, u, s):
        return s * self.precision(k, s) @ (u.reshape(-1) - self.mean[k])

    def guided(self, k, u, s, weight):
        free = self.eps(PROMPTS, u, s)
        return free + weight * (self.eps(k, u, s) - free)

    def look(self, process):
        mean, roots, vectors = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.roots, self.vectors))

        def look(xt, t, cond, maps=False):
            k = jnp.where(cond[:, 0, 0] < 0, PROMPTS, cond[:, 0, 0].astype(int))
            s2 = process.noise_level(t) ** 2
            u = xt.reshape(len(xt), -1) / process.alpha(t)[:, None]
            along = jnp.einsum("bij,bi->bj", vectors[k], u - mean[k])
            shrunk = along * roots[k] / (roots[k] + s2[:, None])
            x0 = mean[k] + jnp.einsum("bij,bj->bi", vectors[k], shrunk)
            return process.from_x0(xt, x0.reshape(xt.shape), t), {}

        return look


LAW = Gaussians()


def rows(asked):
    """(place, prompt, unit noise [SIZE] in float64) of each row."""
    noise = np.asarray(asked.noise, np.float64).reshape(len(asked.seed), -1)
    return [(i, int(asked.cond[i, 0, 0]), noise[i]) for i in range(len(noise))]


def gaussian(kind="ve", cfg=BASE, **more):
    return asked_of(LAW.look(process_of(kind)), kind=kind, cfg=cfg, **more)


def trajectory(k, noise, weight, cfg, kind):
    """[(u, s)] before each step of DDIM in float64, which is Euler's step in the noise level."""
    process = process_of(kind)
    grid = make_grid(process, "karras", cfg.steps, process.sigma_min, process.sigma_max, process.rho)
    levels = np.asarray(process.noise_level(jnp.asarray(grid, jnp.float32)), np.float64)
    u, out = noise * levels[0], []
    for s, target in itertools.pairwise(levels):
        out.append((u, s))
        u = u + (target - s) * LAW.guided(k, u, s, weight)
    return out


# ---------------------------------------------------------------------------------- one step


def test_noise_is_of_seed_and_number_alone():
    asked = gaussian()
    noise = np.asarray(asked.noise).reshape(PROMPTS, SEEDS, -1)
    np.testing.assert_array_equal(noise[0], noise[2])
    assert abs(np.corrcoef(noise[0])[~np.eye(SEEDS, dtype=bool)]).max() < 0.6
    fewer = dataclasses.replace(asked, seed=asked.seed[1:3], cond=asked.cond[1:3], length=asked.length[1:3])
    np.testing.assert_array_equal(np.asarray(fewer.noise).reshape(2, -1), noise[0, 1:3])
    other = dataclasses.replace(asked, cfg=dataclasses.replace(BASE, seed=2))
    assert not np.allclose(other.noise, asked.noise)
    assert abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_noise_gap_of_one_step(kind):
    asked = gaussian(kind)
    found = run(asked, prompted.NoiseGap("g", 1))
    for i, k, n in rows(asked):
        u = 1.3 * n
        expected = np.linalg.norm(LAW.eps(k, u, 1.3) - LAW.eps(PROMPTS, u, 1.3))
        np.testing.assert_allclose(found[i], expected, rtol=2e-4)


def test_sigma_zero_is_the_samplers_first():
    asked = gaussian(cfg=dataclasses.replace(BASE, sigma=0.0))
    found = run(asked, prompted.NoiseGap("g", 1))
    for i, k, n in rows(asked):
        expected = np.linalg.norm(LAW.eps(k, 20 * n, 20.0) - LAW.eps(PROMPTS, 20 * n, 20.0))
        np.testing.assert_allclose(found[i], expected, rtol=1e-4)


@pytest.mark.parametrize(("kind", "weight"), [("ve", 2.5), ("vp_linear", 1.0)])
def test_confidence_and_score_norm(kind, weight):
    asked = gaussian(kind, dataclasses.replace(BASE, guidance=weight))
    confidence, norm = run(asked, prompted.DenoisingConfidence("c"), prompted.ScoreNorm("n"))
    for i, k, n in rows(asked):
        eps = LAW.guided(k, 1.3 * n, 1.3, weight)
        np.testing.assert_allclose(confidence[i], np.mean(eps**2) - np.mean(n**2), rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(norm[i], np.linalg.norm(eps), rtol=1e-4)


def test_confidence_keeps_digits_at_high_noise():
    """At s = 1e4 the difference to the noise's own energy is below the rounding of that energy."""
    asked = gaussian(process=process_of("ve", 1e4), cfg=dataclasses.replace(BASE, sigma=1e4))
    asked = dataclasses.replace(asked, look=LAW.look(asked.process))
    found = run(asked, prompted.DenoisingConfidence("c"))
    for i, k, n in rows(asked):
        removed = (1e4 * n - 1e4 * LAW.guided(k, 1e4 * n, 1e4, 2.5)) / 1e4
        expected = np.mean(removed**2 - 2 * n * removed)
        np.testing.assert_allclose(found[i], expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("kind", "weight"), [("ve", 1.0), ("vp_linear", 2.5)])
def test_flipd_is_the_closed_form(kind, weight):
    """d + s^2 (tr grad score + ||score||^2) of the guided score, both of whose Jacobians are known."""
    asked = gaussian(kind, dataclasses.replace(BASE, guidance=weight))
    found = run(asked, prompted.Flipd("f"))
    for i, k, n in rows(asked):
        free, given = (-np.trace(LAW.precision(j, 1.3)) for j in (PROMPTS, k))
        trace = free + weight * (given - free)
        score = -LAW.guided(k, 1.3 * n, 1.3, weight) / 1.3
        expected = SIZE + 1.3**2 * (trace + score @ score)
        np.testing.assert_allclose(found[i], expected, rtol=3e-4)


def test_flipd_by_sign_vectors_and_along_the_trajectory():
    cfg = dataclasses.replace(BASE, probes=400)
    asked = gaussian()
    exact, late = run(asked, prompted.Flipd("f"), prompted.Flipd("f", 0.8))
    estimated = run(gaussian(cfg=cfg), prompted.Flipd("f"))
    assert 0 < np.abs(exact - estimated).max() < 1.5
    for i, k, n in rows(asked):
        u, s = trajectory(k, n, 2.5, BASE, "ve")[8]
        free, given = (-np.trace(LAW.precision(j, s)) for j in (PROMPTS, k))
        eps = LAW.guided(k, u, s, 2.5)
        expected = SIZE + s**2 * (free + 2.5 * (given - free)) + eps @ eps
        np.testing.assert_allclose(late[i], expected, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_sharpness_is_the_closed_form(kind):
    asked = gaussian(kind)
    found = run(asked, prompted.Sharpness("s"))
    for i, k, n in rows(asked):
        hessian = LAW.precision(PROMPTS, 1.3) - LAW.precision(k, 1.3)
        score = (LAW.eps(PROMPTS, 1.3 * n, 1.3) - LAW.eps(k, 1.3 * n, 1.3)) / 1.3
        np.testing.assert_allclose(found[i], 1.3**3 * np.linalg.norm(hessian @ score), rtol=5e-4)


class Pairs:
    """p(x | k): two points of equal weight; its denoiser is curved. The empty prompt has all points."""

    def __init__(self):
        rng = np.random.default_rng(3)
        self.points = rng.normal(size=(PROMPTS, 2, SIZE))

    def of(self, k):
        return self.points.reshape(-1, SIZE) if k < 0 else self.points[k]

    def score(self, k, u, s):
        points = self.of(k)
        logits = -((u - points) ** 2).sum(1) / (2 * s**2)
        weights = np.exp(logits - logits.max())
        return (weights / weights.sum() @ points - u) / s**2

    def look(self, process):
        points = jnp.asarray(self.points, jnp.float32)

        def look(xt, t, cond, maps=False):
            s, k = process.noise_level(t)[:, None], cond[:, 0, 0]
            u = xt.reshape(len(xt), -1) / process.alpha(t)[:, None]
            far = jnp.sum((u[:, None] - points.reshape(1, -1, SIZE)) ** 2, -1)
            allowed = (k[:, None] < 0) | (jnp.repeat(jnp.arange(PROMPTS), 2) == k[:, None])
            weights = jax.nn.softmax(jnp.where(allowed, -far / (2 * s**2), -jnp.inf))
            x0 = (weights @ points.reshape(-1, SIZE)).reshape(xt.shape)
            return process.from_x0(xt, x0, t), {}

        return look


def test_derivatives_against_finite_differences():
    law, s, h = Pairs(), 4.0, 1e-4
    cfg = dataclasses.replace(BASE, sigma=s)
    asked = asked_of(law.look(process_of("ve")), cfg=cfg)
    sharp, dimension = run(asked, prompted.Sharpness("s"), prompted.Flipd("f"))
    for i, k, n in rows(asked):
        u = s * n

        def apart(v, k=k):
            return law.score(k, v, s) - law.score(-1, v, s)

        def guided(v, k=k):
            return law.score(-1, v, s) + 2.5 * apart(v, k)

        found = apart(u)
        along = (apart(u + h * found) - apart(u - h * found)) / (2 * h)
        np.testing.assert_allclose(sharp[i], s**3 * np.linalg.norm(along), rtol=2e-3)
        steps = h * np.eye(SIZE)
        trace = sum((guided(u + e) - guided(u - e)) @ e for e in steps) / (2 * h * h)
        np.testing.assert_allclose(dimension[i], SIZE + s**2 * (trace + guided(u) @ guided(u)), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_anisotropy(kind):
    detector = prompted.Anisotropy("a", norm=0.7, cosine=2.0, level=0.4)
    asked = gaussian(kind, sigma_data=0.6)
    found, cosines = run(asked, detector), []
    for i, k, n in rows(asked):
        norm = np.linalg.norm(LAW.eps(k, 1.3 * n, 1.3) - LAW.eps(PROMPTS, 1.3 * n, 1.3))
        u = np.hypot(0.6, 0.4) * n
        free = LAW.eps(PROMPTS, u, 0.4).reshape(-1, 3)
        delta = LAW.eps(k, u, 0.4).reshape(-1, 3) - free
        pixels = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(free, delta, strict=True)]
        cosines.append(np.mean(pixels))
        np.testing.assert_allclose(found[i], 0.7 * norm + 2 * np.mean(pixels), rtol=1e-3, atol=1e-4)
    assert np.abs(cosines).max() > 0.2  # a swapped pair or a wrong sign would show


def test_anisotropy_of_a_prompt_that_changes_nothing_is_zero():
    law = LAW.look(process_of("ve"))
    deaf = lambda xt, t, cond, maps=False: law(xt, t, 0 * cond, maps)  # noqa: E731
    asked = asked_of(deaf)
    found = run(asked, by_name("anisotropy"), by_name("noise_gap_all"), by_name("sharpness"))
    np.testing.assert_array_equal(found, 0)


# -------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize(("kind", "steps"), [("ve", 0), ("vp_linear", 5), ("flow", 0)])
def test_noise_gap_along_the_guided_trajectory(kind, steps):
    asked = gaussian(kind)
    found = run(asked, prompted.NoiseGap("g", steps))
    for i, k, n in rows(asked):
        path = trajectory(k, n, 2.5, BASE, kind)[: steps or None]
        gaps = [np.linalg.norm(LAW.eps(k, u, s) - LAW.eps(PROMPTS, u, s)) for u, s in path]
        np.testing.assert_allclose(found[i], np.mean(gaps), rtol=1e-3)


def test_one_step_is_the_first_of_all():
    asked = gaussian(cfg=dataclasses.replace(BASE, sigma=0.0))
    by_walk, _ = asked.walk(
        1, lambda given, free, s, _: jnp.sum((given - free) ** 2, axis=(1, 2, 3)) ** 0.5 / s
    )
    np.testing.assert_allclose(run(asked, prompted.NoiseGap("g", 1)), by_walk[0], rtol=1e-5)


# ------------------------------------------------------------------------------------ attention


LAYERS = ("enc4_0/cross/map", "enc4_1/cross/map", "enc2_0/cross/map", "mid2_0/cross/map", "dec4_0/cross/map")


class Attention:
    """The Gaussians, with random attention that is another one for each prompt, step and layer."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.logits = {
            name: 2 * rng.normal(size=(PROMPTS + 1, 11, 2, int(name[3]) ** 2, LENGTH)) for name in LAYERS
        }
        process = process_of("ve")
        self.grid = make_grid(process, "karras", 10, process.sigma_min, process.sigma_max, process.rho)

    def map(self, name, k, step):
        """[heads, Q, L] in float64."""
        weights = np.exp(self.logits[name][k, step])
        return weights / weights.sum(-1, keepdims=True)

    def look(self, xt, t, cond, maps=False):
        prediction, _ = LAW.look(process_of("ve"))(xt, t, cond)
        k = jnp.where(cond[:, 0, 0] < 0, PROMPTS, cond[:, 0, 0].astype(int))
        step = jnp.argmin(jnp.abs(t[:, None] - jnp.asarray(self.grid, jnp.float32)), axis=1)
        seen = {name: jax.nn.softmax(jnp.asarray(x, jnp.float32)[k, step]) for name, x in self.logits.items()}
        # As a network's: in the order of names.
        return prediction, dict(sorted(seen.items())) if maps else {}


def entropy(share, tokens):
    return -sum(share[i] * np.log(share[i]) for i in tokens)


def test_attention_entropy():
    law = Attention()
    asked = asked_of(law.look, cfg=dataclasses.replace(BASE, sigma=0.0), layers=LAYERS)
    mean, third = run(asked, AttentionEntropy("e"), AttentionEntropy("e", 3))
    for i, k, _ in rows(asked):
        each = [entropy(law.map(name, k, 0).mean((0, 1)), range(LENGTH)) for name in LAYERS]
        np.testing.assert_allclose(mean[i], np.mean(each), rtol=1e-5)
        np.testing.assert_allclose(third[i], each[3], rtol=1e-5)
    assert "6 cross-attention layers" in AttentionEntropy("e", 6).refuses(BASE, SHAPE, ("x",) * 6)


def test_attention_entropy_at_its_ends():
    """All attention on one token has none, even attention ln L."""
    for share, expected in ((jax.nn.one_hot(2, LENGTH), 0.0), (jnp.ones(LENGTH) / LENGTH, np.log(LENGTH))):

        def look(xt, t, cond, maps=False, share=share):
            prediction, _ = LAW.look(process_of("ve"))(xt, t, cond)
            return prediction, {"mid2_0": jnp.broadcast_to(share, (len(xt), 2, 4, LENGTH))}

        asked = asked_of(look, layers=("mid2_0",))
        np.testing.assert_allclose(run(asked, AttentionEntropy("e")), expected, atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_attention_entropy_at_the_end(signed):
    law = Attention()
    asked = asked_of(law.look, layers=LAYERS)
    found, moves = run(asked, AttentionEntropyEnd("e", signed)), []
    for i, k, _ in rows(asked):
        end = int(asked.length[i]) - 1

        def over_layers(step, tokens, k=k):
            return np.mean([entropy(law.map(name, k, step).mean((0, 1)), tokens) for name in LAYERS])

        every = np.mean([over_layers(step, range(LENGTH)) for step in (8, 9)])
        summary = [over_layers(step, range(end, LENGTH)) for step in (0, 8, 9)]
        moves.append(np.mean(summary[1:]) - summary[0])
        expected = every + (moves[-1] if signed else abs(moves[-1]))
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)
    assert min(moves) < -0.003


def test_bright_ending():
    law = Attention()
    asked = asked_of(law.look, layers=LAYERS)
    found = run(asked, BrightEnding("b"))
    for i, k, n in rows(asked):
        end = int(asked.length[i]) - 1
        mask = np.mean([law.map(name, k, 9)[:, :, end].mean(0) for name in LAYERS[:2]], axis=0).reshape(4, 4)
        scores = []
        for u, s in trajectory(k, n, 2.5, BASE, "ve"):
            delta = (LAW.eps(k, u, s) - LAW.eps(PROMPTS, u, s)).reshape(SHAPE)
            scores.append(np.linalg.norm(delta * mask[:, :, None]) / mask.mean())
        np.testing.assert_allclose(found[i], np.mean(scores), rtol=1e-3)


def test_bright_ending_at_a_lower_resolution():
    """Each pixel of a coarse mask stands for a patch: as the mask repeated."""
    law = Attention()

    def look(xt, t, cond, maps=False):
        prediction, seen = law.look(xt, t, cond, maps)
        return prediction, {name: x for name, x in seen.items() if "4" not in name}

    asked = asked_of(look, layers=LAYERS[2:4])
    found = run(asked, BrightEnding("b"))
    for i, k, n in rows(asked):
        coarse = law.map(LAYERS[2], k, 9)[:, :, int(asked.length[i]) - 1].mean(0).reshape(2, 2)
        mask = np.kron(coarse, np.ones((2, 2)))
        scores = []
        for u, s in trajectory(k, n, 2.5, BASE, "ve"):
            delta = (LAW.eps(k, u, s) - LAW.eps(PROMPTS, u, s)).reshape(SHAPE)
            scores.append(np.linalg.norm(delta * mask[:, :, None]) / mask.mean())
        np.testing.assert_allclose(found[i], np.mean(scores), rtol=1e-3)


# --------------------------------------------------------------------------- detectors over seeds


def test_edge_strength_is_sobels():
    image = np.random.default_rng(0).uniform(size=(2, 7, 9, 3)).astype(np.float32)
    found = np.asarray(prompted.edge_strength(jnp.asarray(image)))
    for one, strength in zip(image, found, strict=True):
        parts = [
            np.hypot(*(ndimage.sobel(one[..., c], axis, mode="nearest") for axis in (0, 1))) for c in range(3)
        ]
        np.testing.assert_allclose(strength, sum(parts), rtol=1e-5, atol=1e-6)


def test_edges_that_most_seeds_share():
    """Prompt 1 has the edge for all seeds, the others for three of five; images are clipped, so guidance does not matter."""
    step = np.where(np.arange(8) < 4, -1.0, 1.0) * np.ones((8, 1))
    pictures = jnp.asarray(np.stack([np.zeros((8, 8)), step])[..., None], jnp.float32)

    def look(xt, t, cond, maps=False):
        has = (xt[:, 0, 0, 0] > cut) | (cond[:, 0, 0] == 1)
        return process_of("ve").from_x0(xt, pictures[has.astype(int)], t), {}

    asked = asked_of(look, cfg=dataclasses.replace(BASE, seeds=5), shape=(8, 8, 1))
    cut = 1.3 * float(np.sort(np.asarray(asked.noise)[:5, 0, 0, 0])[1]) + 1e-4  # three of the five are above
    edges = prompted.EdgeConsistency
    # Sobel of a step of 1 in three equal channels is 4 each.
    settings = (edges("e", share=0.55), edges("e", share=0.65), edges("e", 12.1), edges("e", 11.9))
    most, few, above, below = (each.reshape(PROMPTS, 5) for each in run(asked, *settings))
    np.testing.assert_allclose(most, 2 / 8)
    np.testing.assert_allclose(few[[0, 2]], 0)
    np.testing.assert_allclose(few[1], 2 / 8)  # every seed has it
    assert above.max() == 0 and below.max() == 2 / 8


def test_seed_agreement():
    """Prompt 0 gives one image, prompt 1 one of two, prompt 2 another for each seed."""
    pictures = np.random.default_rng(0).normal(size=(10, 16, 16, 3))

    def look(xt, t, cond, maps=False):
        which = jnp.argmin(jnp.sum((xt[:, None] - xt[None, :SEEDS]) ** 2, (2, 3, 4)), axis=1)
        k = cond[:, 0, 0].astype(int)
        place = jnp.where(k == 0, 0, jnp.where(k == 1, which // 2, 2 + which))
        return process_of("ve").from_x0(xt, jnp.asarray(pictures, jnp.float32)[place], t), {}

    asked = asked_of(look, shape=(16, 16, 3))
    settings = (prompted.SeedAgreement("a", over) for over in ("max", "mean"))
    most, mean = (each.reshape(PROMPTS, SEEDS) for each in run(asked, *settings))
    np.testing.assert_allclose(most[:2], 1, atol=1e-5)
    np.testing.assert_allclose(mean[0], 1, atol=1e-5)

    def alikeness(a, b):
        return float(alike.similarity(jnp.asarray(-pictures[a]), jnp.asarray(-pictures[b]), Similarity()))

    np.testing.assert_allclose(mean[1], (2 + 4 * alikeness(0, 1)) / 6, atol=1e-4)
    each = [alikeness(2 + a, 2 + b) for a in range(4) for b in range(a)]
    np.testing.assert_allclose(most[2], max(each), atol=1e-4)
    np.testing.assert_allclose(mean[2], np.mean(each), atol=1e-4)


# ---------------------------------------------------------------------------------- a text model

NET = config.Net(
    channels=8, mults=(1,), blocks=1, patch=2, attention=(), text=8, text_blocks=1, text_length=LENGTH, vocabulary=300, cross=(4,), condition_dropout=0.1, scan_safe=True,
)  # fmt: skip
WIDE = make_model(
    config.Config(data=config.Data(size=16), net=dataclasses.replace(NET, mults=(1, 2), cross=(8, 4))), 3
)
TOKENS = np.array(
    [[START, 9, 12, END, PAD, PAD], [START, 40, END, PAD, PAD, PAD], [START, 7, 8, 9, 10, END]], np.int32
)
SMALL = Detect(seeds=2, steps=5, guidance=2.0, sigma=2.0, batch=4)


@pytest.fixture(scope="module")
def text_model():
    model = make_model(config.Config(data=config.Data(size=8), net=NET), 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    # Random everywhere: untrained networks start with last maps near zero, and would not hear the text.
    return model, jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes)


def test_layers_are_in_the_networks_order():
    names = prompted_run.layers(WIDE)
    assert names == tuple(
        f"{name}/cross/map" for name in ("enc8_0", "enc4_0", "mid4_0", "dec4_0", "dec4_1", "dec8_0", "dec8_1")
    )

    def seen(params):
        asked = prompted_run.ask(WIDE, params, jnp.asarray(TOKENS), SMALL)
        return asked.look(*asked.at(asked.noise, 1.0), asked.cond, True)[1], asked.length

    maps, length = jax.eval_shape(seen, jax.eval_shape(WIDE.init, jax.random.key(0)))
    assert set(maps) == set(names) and maps[names[0]].shape == (6, 1, 64, LENGTH) and length.shape == (6,)


def test_lengths_run_up_to_the_end(text_model):
    asked = prompted_run.ask(*text_model, jnp.asarray(TOKENS), SMALL)
    np.testing.assert_array_equal(asked.length, [4, 4, 3, 3, 6, 6])
    np.testing.assert_array_equal(asked.seed, [0, 1, 0, 1, 0, 1])


def by_name(name):
    return next(each for each in prompted.ALL if each.name == name)


@pytest.mark.parametrize("name", ["noise_gap_1", "sharpness", "bright_ending"])
def test_detectors_run_on_a_network(text_model, name):
    """A prompt has the same numbers wherever it stands, and the empty prompt says nothing."""
    model, params = text_model
    done: list[int] = []
    empty = np.array([[START, END, PAD, PAD, PAD, PAD]], np.int32)
    tokens = np.concatenate([TOKENS, TOKENS[1:2], empty])
    on = mesh.make_mesh(config.Mesh()) if name == "noise_gap_1" else None
    found = prompted_run.run(model, params, by_name(name), tokens, SMALL, on=on, advance=done.append)
    assert found.rows.shape == (5, 2) and done == [2, 2, 1] and 0 < found.seconds < found.first
    assert len(np.unique((found.mean / found.mean.max()).round(3)[:3])) == 3
    np.testing.assert_array_equal(found.suspicion, found.sign * found.rows.astype(np.float64).mean(1))
    np.testing.assert_allclose(found.rows[3], found.rows[1], rtol=1e-3)
    if name != "flipd":
        np.testing.assert_allclose(found.rows[4], 0, atol=1e-2 * found.rows[:3].min())
    if name == "noise_gap_1":
        each = prompted_run.run(
            model, params, by_name(name), tokens[:1], SMALL, on=mesh.make_mesh(config.Mesh())
        )
        np.testing.assert_allclose(each.rows[0], found.rows[0], rtol=1e-4)
        broken = jax.tree.map(lambda x: x * np.nan, params)
        with pytest.raises(UserError, match="5 of 5 prompts are not finite"):
            prompted_run.run(model, broken, by_name(name), tokens, SMALL, on=on)


def test_choose():
    model = WIDE
    chosen, left = prompted_run.choose(model, Detect(seeds=4))
    # 16 pixels hold the window of 11, seven layers have a number 3.
    assert chosen == prompted.ALL and not left
    chosen, left = prompted_run.choose(model, Detect(seeds=1, steps=4))
    assert set(left) == {"noise_gap_5", "seed_agreement", "seed_agreement_mean"}
    assert len(chosen) == len(prompted.ALL) - 3
    names = ("sharpness", "noise_gap_1")
    assert tuple(each.name for each in prompted_run.choose(model, Detect(detectors=names))[0]) == names


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (Detect(detectors=("nosie",)), "'nosie' is no detector; give some of noise_gap_1, "),
        (Detect(detectors=("flipd", "flipd")), "twice"),
        (Detect(detectors=("seed_agreement",), seeds=1), "detect.seeds = 1"),
        (Detect(detectors=("noise_gap_5",), steps=3), "detect.steps = 3: must be 5 or more"),
        (Detect(seeds=0), "detect.seeds = 0"),
        (Detect(steps=1), "detect.steps = 1"),
        (Detect(probes=-1), "detect.probes = -1"),
        (Detect(batch=0), "detect.batch = 0"),
        (Detect(guidance=-1.0), "detect.guidance = -1.0"),
        (Detect(guidance=float("nan")), "detect.guidance = nan"),
        (Detect(sigma=-1.0), "detect.sigma = -1.0: must be in"),
        (Detect(sigma=float("nan")), "detect.sigma = nan"),
        (Detect(sigma=100.0), "detect.sigma = 100.0"),
        (Detect(false_alarms=0.0), "detect.false_alarms = 0.0"),
        (Detect(confidence=1.0), "detect.confidence = 1.0"),
    ],
)
def test_wrong_settings(cfg, says):
    with pytest.raises(UserError) as raised:
        prompted_run.choose(WIDE, cfg)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_wrong_models_and_prompts():
    plain = make_model(
        config.Config(data=config.Data(size=16), net=dataclasses.replace(NET, text=0, condition_dropout=0.0)),
        3,
    )
    with pytest.raises(UserError, match="no prompts"):
        prompted_run.choose(plain, Detect())
    with pytest.raises(UserError, match="one prompt or more"):
        prompted_run.run(WIDE, {}, by_name("noise_gap_1"), TOKENS[:0], SMALL)


def test_needs_counts_calls():
    """Against the rows that a counting model was asked about."""
    cfg = dataclasses.replace(BASE, probes=2, steps=6)
    told = {each["name"]: each for each in prompted.needs(cfg)}
    json.dumps(list(told.values()))
    assert list(told) == [each.name for each in prompted.ALL] == list(dict.fromkeys(told))
    per_step = {"noise_gap_5", "noise_gap_all", "attention_entropy_end", "bright_ending", "flipd_late"}
    for detector in prompted.ALL:
        asked_rows, looked = [], []

        def look(xt, t, cond, maps=False, asked_rows=asked_rows, looked=looked):
            asked_rows.append(len(xt))
            looked.append(maps)
            prediction, _ = LAW.look(process_of("ve"))(xt, t, cond)
            shares = jnp.ones((len(xt), 1, 4, LENGTH)) / LENGTH
            return prediction, {name: shares for name in LAYERS}

        shape = (16, 16, 3) if "agreement" in detector.name else SHAPE
        if "agreement" in detector.name:
            assert told[detector.name]["calls"] == 1
            continue
        asked = asked_of(look, cfg=cfg, shape=shape, layers=LAYERS)
        jax.eval_shape(lambda d=detector, a=asked: d(a))
        assert any(looked) == told[detector.name]["attention"], detector
        if detector.name not in per_step:  # a scan traces its body more or less often
            calls = sum(asked_rows) / (PROMPTS * SEEDS)
            tangents = {"flipd": 2 * cfg.probes, "sharpness": 2}.get(detector.name, 0)
            assert calls + tangents == told[detector.name]["calls"], detector
    assert told["noise_gap_all"]["calls"] == 12 and told["flipd_late"]["calls"] == 10 + 6
    assert [name for name, each in told.items() if each["jvp"]] == ["flipd", "flipd_late", "sharpness"]
    assert [name for name, each in told.items() if not each["larger_is_memorized"]] == ["flipd", "flipd_late"]
    unguided = [name for name, each in told.items() if not each["guidance"]]
    assert unguided == [
        "noise_gap_1", "seed_agreement", "seed_agreement_mean", "attention_entropy", "attention_entropy_3", "sharpness", "anisotropy",
    ]  # fmt: skip
