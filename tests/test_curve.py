"""What is measured while training, on denoisers that are known: against the audit, float64 brute force and other devices."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from child_env import child_env
from scipy.spatial.distance import cdist

from mdiff import config
from mdiff.data.damage import Damage
from mdiff.data.source import Images
from mdiff.data.split import Subset, split
from mdiff.keys import keys
from mdiff.nets import closed_form
from mdiff.nets.denoiser import Model, from_sigma_fn
from mdiff.probes import audit as audits
from mdiff.probes import gap as gaps
from mdiff.process.laws import make_process
from mdiff.recipes.curve import _gap_measure, memorization_curve
from mdiff.recipes.generate import draw, make_generator
from mdiff.recipes.runs import Experiment
from mdiff.train import stopping

CFG = config.Config(
    data=config.Data(n=20, heldout=20, size=4),
    train=config.Train(eval_samples=24, eval_levels=(0.02, 0.5)),
    sample=config.Sample(batch=16, steps=10, method="euler"),
)


def pictures(n, seed=0):
    """uint8 [n,4,4,1], correlated pixels."""
    mix = np.random.default_rng(99).normal(size=(16, 16)) / 4
    rows = 127.5 + 50 * np.random.default_rng(seed).normal(size=(n, 16)) @ mix
    return np.clip(rows, 0, 255).astype(np.uint8).reshape(n, 4, 4, 1)


def scaled(x):
    return np.asarray(x, np.float64) / 127.5 - 1


@dataclass(frozen=True)
class Known(Model):
    """Any function of (x, sigma, cond, seen) as a model without parameters."""

    fn: Any = None
    labelled: bool = False

    def condition(self, params, batch, n=None, drop=None):
        return batch["label"].astype("float32")[:, None] if self.labelled else None

    def denoiser(self, params, gates=None, seen=None):
        def denoise(xt, t, cond=None):
            return from_sigma_fn(lambda x, sigma: self.fn(x, sigma, cond, seen), self.process)(xt, t)

        return denoise


@dataclass(frozen=True)
class Case:
    """An experiment whose network is a known function."""

    fn: Any
    cfg: config.Config = CFG
    x: np.ndarray = field(default_factory=lambda: pictures(60))
    label: np.ndarray | None = None
    more: dict = field(default_factory=dict)

    @functools.cached_property
    def subset(self) -> Subset:
        ids = np.arange(len(self.x), dtype=np.int32)
        return split(self.cfg.data, Images("made", self.x, ids, label=self.label))

    @functools.cached_property
    def experiment(self) -> Experiment:
        fn = self.fn(self.subset) if callable(self.fn) else None
        model = Known(None, None, make_process(self.cfg.process), 0.5, (4, 4, 1), fn=fn, **self.more)
        return Experiment(self.cfg, self.subset, model)


def plain(sigma_fn):
    return lambda x, sigma, cond, seen: sigma_fn(x, sigma)


def memorizer(subset):
    return plain(closed_form.empirical(scaled(subset.train.x)))


def generalizer(subset):
    return plain(closed_form.gaussian(scaled(pictures(4000, seed=7))))


def generations(experiment):
    cfg = experiment.config
    generate = make_generator(experiment.model, cfg.sample, None, None)
    return draw(functools.partial(generate, {}), cfg.train.eval_samples, cfg.sample.batch)


_noise = jax.jit(gaps.fixed_noise, static_argnums=3)


def brute_gap(experiment, fn, level):
    """The gap at one level in float64, from the noise of each image's own id."""

    def side(images):
        x = scaled(images.x)
        noise = [np.asarray(_noise(0, d, images.id, (4, 4, 1)), np.float64) for d in range(2)]
        return np.mean([np.mean((fn(x + level * n, images) - x) ** 2, axis=(1, 2, 3)) for n in noise], 0)

    ours, theirs = side(experiment.subset.train), side(experiment.subset.heldout)
    return theirs.mean() / ours.mean()


# --------------------------------------------------------------------------------- generations and the gap


def test_a_memorizer_in_every_measure_and_as_the_audit_has_it():
    case = Case(memorizer)
    found = memorization_curve(case.experiment)({}, 0)
    images, subset = generations(case.experiment), case.subset
    train, heldout = np.asarray(subset.train.x), np.asarray(subset.heldout.x)
    result = audits.audit(images, train, heldout, CFG.audit).estimates
    for name, theirs in (("memorized", "memorized"), ("control", "control"), ("quality", "energy_heldout")):
        each = result[theirs]
        assert found[f"eval/{name}"] == pytest.approx(each.value), name
        if name != "quality":  # fewer resamples there
            assert (found[f"eval/{name}_low"], found[f"eval/{name}_high"]) == pytest.approx(
                (each.low, each.high)
            )
    assert found["eval/memorized"] > 0.9 and found["eval/control"] < 0.2 and found["eval/n"] == 24
    flat = [scaled(x).reshape(len(x), -1) for x in (images, train, heldout)]
    to_train, to_heldout = (cdist(flat[0], other).min(1) / 4 / 2 for other in flat[1:])  # RMS on [0, 1]
    assert found["eval/excess"] == pytest.approx(np.mean(to_heldout - to_train), rel=1e-4)
    assert found["eval/excess_low"] > 0.01
    assert found["eval/gap@0.02"] > 1e4 and found["eval/gap_low"] > 10
    assert found["eval/gap"] == pytest.approx(np.sqrt(found["eval/gap@0.02"] * found["eval/gap@0.5"]))


def test_a_model_that_saw_other_images_has_no_excess_and_no_gap():
    found = memorization_curve(Case(generalizer).experiment)({}, 0)
    assert found["eval/memorized_low"] < 0.1
    assert found["eval/excess_low"] < 0 < found["eval/excess_high"]
    assert found["eval/gap_low"] < 1 < found["eval/gap_high"]


def test_excess_counts_mirrored_copies_when_they_are_trained_on():
    def mirrored(subset):
        return plain(closed_form.empirical(scaled(subset.train.x)[:, :, ::-1]))

    flipped = replace(CFG, data=replace(CFG.data, flip=True))
    plain_rule, both = (memorization_curve(Case(mirrored, cfg).experiment)({}, 0) for cfg in (CFG, flipped))
    assert both["eval/excess"] > plain_rule["eval/excess"] + 0.01
    assert both["eval/memorized"] > 0.9 > plain_rule["eval/memorized"]


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize(
    ("heldout", "levels", "names"),
    [
        (0, (0.5,), {"memorized"}),
        (1, (0.5,), {"memorized"}),
        (2, (), {"memorized", "control", "excess", "quality"}),
        (2, (0.5,), {"memorized", "control", "excess", "quality", "gap", "gap@0.5"}),
    ],
)
def test_what_can_be_measured_is_what_limits_may_name(heldout, levels, names):
    cfg = replace(
        CFG,
        data=replace(CFG.data, heldout=heldout),
        train=replace(CFG.train, eval_levels=levels, eval_samples=3, eval_every=5),
    )
    found = memorization_curve(Case(generalizer, cfg).experiment)({}, 0)
    ends = {f"{name}{end}" for name in names if "@" not in name for end in ("_low", "_high")}
    assert set(found) == {f"eval/{name}" for name in names | ends | {"n"}}
    assert all(np.isfinite(value) for value in found.values())
    limits = replace(cfg.train, stop_when=dict.fromkeys(names, 1.0))
    stopping.check(limits)
    stopping.check_data(limits, heldout)


def test_one_generation():
    cfg = replace(CFG, train=replace(CFG.train, eval_samples=1))
    found = memorization_curve(Case(memorizer, cfg).experiment)({}, 0)
    assert found["eval/memorized"] == 1 and found["eval/n"] == 1
    assert np.isnan(found["eval/quality"]) and np.isfinite(found["eval/gap"])


@pytest.mark.parametrize("batch", [7, 64])
def test_the_gap_is_of_the_right_images_whatever_the_batch(batch):
    """Labels say which image; parts of 7 do not divide 30 images."""
    x, label = pictures(60), np.arange(60) % 5
    means = np.stack([scaled(x)[label == k].mean(0) for k in range(5)]).astype(np.float32)

    def by_label(subset):
        table = jnp.asarray(means)
        return lambda noisy, sigma, cond, seen: 0.9 * table[cond[:, 0].astype("int32")] + 0.1 * noisy

    cfg = replace(CFG, data=replace(CFG.data, n=15, heldout=40), sample=replace(CFG.sample, batch=batch))
    case = Case(by_label, cfg, x, label, {"labelled": True})
    # Only as many held-out images as training images are looked at.
    subset = replace(case.subset, heldout=case.subset.heldout.take(np.arange(15)))
    found = _gap_measure(case.experiment)({})
    for level, ratio in zip(found.levels, found.ratio, strict=True):
        truth = brute_gap(
            replace(case.experiment, subset=subset),
            lambda z, images: 0.9 * means[images.label] + 0.1 * z,
            level,
        )
        assert ratio.value == pytest.approx(truth, rel=1e-3)


def test_a_model_of_damaged_images_is_asked_through_damage():
    def seen_part(subset):
        return lambda x, sigma, cond, seen: x * seen

    damage = Damage("mask", 0.5, 0.1)
    case = Case(seen_part, more={"damage": damage})
    found = _gap_measure(case.experiment)({})

    fresh = jax.jit(lambda ids: damage.fresh(keys(0, "gap damage", ids), 4, 4))

    def through(z, images):
        return z * np.asarray(fresh(images.id))

    for level, ratio in zip(found.levels, found.ratio, strict=True):
        assert ratio.value == pytest.approx(brute_gap(case.experiment, through, level), rel=1e-3)


# ---------------------------------------------------------------------------------------- many devices


_CHILD = """
import json
import test_curve as lab
print(json.dumps(lab.memorization_curve(lab.Case(lab.memorizer).experiment)({}, 0)))
"""


def test_three_devices_measure_the_same(tmp_path):
    """40 images and batches of 16 do not divide by 3."""
    env = {**child_env(tmp_path), "JAX_NUM_CPU_DEVICES": "3"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = memorization_curve(Case(memorizer).experiment)({}, 0)
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=0.02 if "gap" in name else 1e-3), name
