"""A classifier's run: held-out images, calibration, resuming, what is stored, and what it gives away of its images."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from mdiff import config, side
from mdiff.errors import UserError
from mdiff.nets.classifier import Classifier
from mdiff.probes import calibration
from mdiff.process.laws import make_process
from mdiff.recipes import classify
from mdiff.trees import named_leaves

RNG = np.random.default_rng(0)


# Calibration


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[labels]


def sampled(logits: np.ndarray, rng) -> np.ndarray:
    """Labels drawn from softmax(logits), one hot."""
    chosen = (rng.random(len(logits))[:, None] > softmax(logits, axis=1).cumsum(1)).sum(1)
    return one_hot(np.minimum(chosen, logits.shape[1] - 1), logits.shape[1])


def test_accuracy_by_hand():
    logits = np.array([[2.0, 1, 0], [0, 3, 1], [0, 1, 5], [1, 0, 0]])
    teacher = np.array([[0.5, 0.3, 0.2], [0, 0, 1.0], [0.1, 0.2, 0.7], [0, 1.0, 0]])
    found = calibration.accuracy(logits, teacher)
    assert (found.value, found.n) == (0.5, 4)
    assert found.low == pytest.approx(0.1500, abs=1e-4) and found.high == pytest.approx(0.8500, abs=1e-4)


def slow_ece(logits, teacher) -> float:
    """Expected calibration error, image by image."""
    sums = {}
    for row, labels in zip(logits, teacher, strict=True):
        p = np.exp(row - np.max(row))
        p /= p.sum()
        c = int(np.argmax(p))
        for b in range(15):
            if b / 15 < p[c] <= (b + 1) / 15 + (b == 14) * 1e-9:
                sums.setdefault(b, []).append((p[c], labels[c]))
    return sum(abs(sum(p - y for p, y in found)) for found in sums.values()) / len(logits)


def test_calibration_error_against_a_loop():
    logits = RNG.normal(size=(400, 5)) * 3
    for teacher in (one_hot(RNG.integers(0, 5, 400), 5), RNG.dirichlet(np.ones(5), 400)):
        found = calibration.calibration_error(logits, teacher)
        assert found.value == pytest.approx(slow_ece(logits, teacher), abs=1e-12)
        assert found.low < found.value < found.high and found.n == 400


def test_calibration_error_by_hand():
    """Always sure at 0.9 and right in 6 of 10: 0.3 off; sure at 1 and always right: 0."""
    logits = np.tile(np.log([0.9, 0.1]), (10, 1))
    teacher = one_hot(np.array([0] * 6 + [1] * 4), 2)
    assert calibration.calibration_error(logits, teacher).value == pytest.approx(0.3)
    sure = np.tile([100.0, -100.0], (10, 1))
    assert calibration.calibration_error(sure, one_hot(np.zeros(10, int), 2)).value == pytest.approx(0)


@pytest.mark.parametrize("planted", [0.4, 1.0, 2.5])
def test_planted_temperature_is_found(planted):
    """Logits that are `planted` times those the labels were drawn from need just that temperature."""
    truth = RNG.normal(size=(4000, 6)) * 2
    found = calibration.temperature(planted * truth, sampled(truth, RNG))
    assert found.low < planted < found.high and found.value == pytest.approx(planted, rel=0.08)
    soft = calibration.temperature(planted * truth, softmax(truth, axis=1))
    assert soft.value == pytest.approx(planted, rel=2e-3)


def test_temperature_is_the_best_of_a_grid():
    logits, teacher = RNG.normal(size=(3000, 4)) * 3, one_hot(RNG.integers(0, 4, 3000), 4)
    logits += teacher * 2
    grid = np.geomspace(0.5, 10, 1001)
    losses = [-np.mean(np.sum(teacher * log_softmax(logits / t, axis=1), 1)) for t in grid]
    assert calibration.temperature(logits, teacher).value == pytest.approx(grid[np.argmin(losses)], rel=5e-3)


def test_temperature_intervals_cover():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(300):
        truth = rng.normal(size=(250, 4)) * 2
        found = calibration.temperature(1.7 * truth, sampled(truth, rng))
        hits += found.low < 1.7 < found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_temperature_where_the_likelihood_has_no_maximum():
    """All right or all wrong: a finite temperature on the right side of 1, with an interval as wide as ignorance."""
    labels = one_hot(RNG.integers(0, 3, 40), 3)
    right = calibration.temperature(5 * labels, labels)
    wrong = calibration.temperature(5 * np.roll(labels, 1, axis=1), labels)
    assert 0.2 < right.value < 1 < 3 < wrong.value < 100
    assert right.high / right.low > 3
    silent = calibration.temperature(np.zeros((40, 3)), labels)
    assert silent.value == pytest.approx(1, abs=1e-4)
    assert silent.low == pytest.approx(math.exp(-1.96), rel=0.01)


# Training


LIKE = config.Config(data=config.Data(size=2), process=config.Process(sigma_max=20.0))
CFG = side.Classifier(width=4, blocks=(1,), steps=12, batch=8, lr=1e-2, heldout=0.25, seed=3)
LABELS = np.arange(60) % 2
IMAGES = np.clip(
    128 + 80 * np.where(LABELS, 1, -1)[:, None, None, None] + 20 * RNG.normal(size=(60, 2, 2, 1)), 0, 255
).astype(np.uint8)
TEACHER = one_hot(LABELS, 2).astype(np.float32)


class Watch:
    """A monitor that remembers, and sends SIGINT when training reaches a step."""

    def __init__(self, at: int = -1):
        self.said, self.at = [], at

    def progress(self, task, done, total, scalars):
        if task == "train" and done == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, message):
        self.said.append(message)


def train(folder: Path, cfg=CFG, images=IMAGES, teacher=TEACHER, like=LIKE, watch=None, guard=None):
    return classify.train(cfg, images, teacher, like, folder, watch or Watch(), guard)


class Linear(nn.Module):
    """Logits linear in the pixels: a run of it takes a second."""

    classes: int

    @nn.compact
    def __call__(self, x, c_noise, train=False):
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


@pytest.fixture
def linear(monkeypatch):
    def make(cfg, process, shape, classes, sigma_data):
        return Classifier(Linear(classes), process, sigma_data, shape, classes)

    monkeypatch.setattr(classify, "make_classifier", make)


def same(a, b) -> None:
    for (name, x), (other, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        assert name == other and np.array_equal(np.asarray(x), np.asarray(y)), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "classifier"
    return folder, train(folder, replace(CFG, norm="batch"))


def test_what_is_stored(whole):
    folder, trained = whole
    stored = json.loads((folder / "calibration.json").read_text())
    assert stored["levels"] == pytest.approx(np.geomspace(0.002, 20, 12))
    for name in ("accuracy", "ece", "temperature"):
        assert [set(each) for each in stored[name]] == [{"value", "low", "high", "n"}] * 12
    assert all(each["n"] == 15 for each in stored["accuracy"])  # a quarter of 60
    subset = json.loads((folder / "subset.json").read_text())
    train_ids, held = subset["train"]["ids"], subset["heldout"]["ids"]
    assert len(held) == 15 and sorted(train_ids + held) == list(range(60))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [3, 6, 9, 12]
    measured = [each["value"] for each in stored["temperature"]]
    np.testing.assert_allclose(np.exp(trained.params["temperature"]["log_temperature"]), measured, rtol=1e-5)
    assert set(trained.params) == {"net", "temperature", "batch_stats"}


def test_loaded_is_what_was_trained(whole):
    folder, trained = whole
    classifier, params = classify.load(folder)
    assert classifier == trained.classifier
    same(params, trained.params)


def test_stored_numbers_are_those_of_the_held_out_images(whole):
    """Accuracy and temperature from the loaded parameters, by the classifier's own call."""
    folder = whole[0]
    stored = json.loads((folder / "calibration.json").read_text())
    held = np.array(json.loads((folder / "subset.json").read_text())["heldout"]["ids"])
    classifier, params = classify.load(folder)
    plain = {name: part for name, part in params.items() if name != "temperature"}
    every = classify.answers(classifier, plain, IMAGES[held], stored["levels"])
    right = every.argmax(-1) == LABELS[held]
    assert [each["value"] for each in stored["accuracy"]] == pytest.approx(right.mean(1))
    level, scale = 5, stored["guide"]["temperature"][5]
    divided = classify.answers(classifier, params, IMAGES[held], stored["levels"][level : level + 1])[0]
    np.testing.assert_allclose(divided, every[level] / scale, rtol=1e-4, atol=1e-6)


def test_stopped_killed_and_longer_runs_end_bit_identical(linear, tmp_path):
    expected = train(tmp_path / "whole")
    calibrated = (tmp_path / "whole" / "calibration.json").read_text()

    first = train(tmp_path / "stopped", watch=Watch(at=6))
    assert first.stopped == "SIGINT" and first.calibration is None
    with pytest.raises(UserError, match="not finished; run the same"):
        classify.load(tmp_path / "stopped")
    watch = Watch()
    second = train(tmp_path / "stopped", watch=watch)
    assert "resuming at step 7" in watch.said
    same(second.params, expected.params)
    assert (tmp_path / "stopped" / "calibration.json").read_text() == calibrated

    train(tmp_path / "short", replace(CFG, steps=5))
    longer = train(tmp_path / "short")
    same(longer.params, expected.params)
    same(classify.load(tmp_path / "short")[1], expected.params)

    again = train(tmp_path / "whole")  # finished: nothing left to train
    same(again.params, expected.params)


def test_it_learns(linear, tmp_path):
    """Bright against dark: right where the noise lets it, guessing where it does not, and not on images it trained on."""
    trained = train(tmp_path / "run", replace(CFG, steps=150, lr=0.1))
    found = trained.calibration
    assert found.accuracy[0].value == 1 and found.accuracy[0].n == 15
    assert found.accuracy[-1].value < 0.95
    # Less noise, more confident: no temperature above what the noisiest level needs.
    label = np.zeros(2, np.int32)
    t = np.full(2, trained.classifier.process.time(0.1))
    pair = np.stack([np.full((2, 2, 1), -0.6), np.full((2, 2, 1), 0.6)]).astype(np.float32)
    dark = np.exp(trained.classifier.log_prob(trained.params, pair, t, label))
    assert dark[0] > 0.9 and dark[1] < 0.1


def test_uncalibrated_and_timeless_temperatures(linear, tmp_path):
    plain = train(tmp_path / "plain", replace(CFG, calibrate=False))
    assert not np.any(plain.params["temperature"]["log_temperature"])
    timeless = train(tmp_path / "timeless", replace(CFG, timed=False))
    assert np.unique(timeless.params["temperature"]["log_temperature"]).size == 1


def test_the_folder_of_another_classifier_is_refused(linear, tmp_path):
    folder = tmp_path / "run"
    train(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = IMAGES.copy()
    other[0, 0, 0, 0] ^= 1
    for fields, said in (
        ({"cfg": replace(CFG, lr=0.5)}, "classifier.lr was 0.01, is 0.5"),
        ({"teacher": TEACHER[:, ::-1].copy()}, "learned was"),
        ({"images": other}, "learned was"),
        ({"like": replace(LIKE, process=config.Process(kind="flow"))}, "process.kind was ve, is flow"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            train(folder, **fields)
        assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "classifier.json").unlink()
    with pytest.raises(UserError, match="holds a run that is no classifier's"):
        train(folder)


def test_a_guard_that_objects_leaves_the_classifier_unfinished(linear, tmp_path):
    def guard():
        if (tmp_path / "run" / "checkpoints").is_dir() and any((tmp_path / "run" / "checkpoints").glob("12")):
            raise UserError("the folder is no longer ours")

    with pytest.raises(UserError, match="no longer ours"):
        train(tmp_path / "run", guard=guard)
    assert not (tmp_path / "run" / "calibration.json").exists()


def test_load_names_what_is_missing(linear, tmp_path):
    with pytest.raises(UserError, match="no classifier here"):
        classify.load(tmp_path)
    train(tmp_path / "run")
    for name, text, said in (
        ("calibration.json", "{", "calibration.json: damaged"),
        ("calibration.json", "{}", "calibration.json: guide"),
        ("classifier.json", "[]", "classifier.json: damaged"),
        ("classifier.json", "{}", "classifier.json"),
    ):
        copy = tmp_path / said.replace(" ", "")
        shutil.copytree(tmp_path / "run", copy)
        (copy / name).write_text(text)
        with pytest.raises(UserError, match=said) as caught:
            classify.load(copy)
        assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="checkpoint 12 of its classifier is gone"):
        classify.load(tmp_path / "run")


def test_statistics_belong_to_their_calibration(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run" / "statistics.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"does not belong to calibration.json"):
        classify.load(tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match=r"statistics.npz: is missing"):
        classify.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cfg": replace(CFG, steps=0)}, "classifier.steps = 0"),
        ({"cfg": replace(CFG, batch=0)}, "classifier.batch = 0"),
        ({"cfg": replace(CFG, lr=0.0)}, "classifier.lr = 0"),
        ({"cfg": replace(CFG, lr=math.nan)}, "classifier.lr = nan"),
        ({"cfg": replace(CFG, weight_decay=-1.0)}, "classifier.weight_decay = -1"),
        ({"cfg": replace(CFG, seed=-1)}, "classifier.seed = -1"),
        ({"cfg": replace(CFG, heldout=0.0)}, "classifier.heldout = 0.0.*holds out 0"),
        ({"cfg": replace(CFG, heldout=1.0)}, "classifier.heldout = 1.0.*holds out 60"),
        ({"images": IMAGES.astype(np.float32)}, "float32"),
        ({"images": np.tile(IMAGES, (1, 2, 2, 1))}, r"4, 4, 1.*2x2 \(data.size\)"),
        ({"teacher": TEACHER[:-1]}, "labels .59, 2. for 60 images"),
        ({"teacher": LABELS}, r"labels .60,. for 60"),
        ({"teacher": 2 * TEACHER}, "labels of image 0.*sum 2"),
        ({"teacher": np.where(TEACHER > 0, np.nan, 0)}, "labels of image 0"),
        ({"teacher": TEACHER * 3 - 1}, "labels of image 0.*least -1"),
        ({"teacher": np.ones((60, 1), np.float32)}, "1 classes"),
    ],
)
def test_wrong_inputs_write_nothing(fields, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        train(tmp_path / "run", **fields)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


# Membership


class Brightness(nn.Module):
    """Surer of class 0 the brighter the image, never of class 1."""

    @nn.compact
    def __call__(self, x, c_noise, train=False):
        gain = self.param("gain", nn.initializers.ones, ())
        return jnp.stack([gain * nn.relu(3 + x.mean((1, 2, 3))), jnp.zeros(len(x))], axis=1)


def test_membership():
    classifier = Classifier(Brightness(), make_process(LIKE.process), 0.5, (2, 2, 1), 2)
    params = classifier.init(jax.random.key(0))
    bright, dark = (np.full((200, 2, 2, 1), value, np.uint8) for value in (230, 20))
    told = classify.membership(classifier, params, bright, dark)
    assert told.value > 0.99 and told.n == 400
    assert classify.membership(classifier, params, dark, bright).value < 0.01
    mixed = RNG.integers(0, 256, (600, 2, 2, 1)).astype(np.uint8)
    nothing = classify.membership(classifier, params, mixed[:300], mixed[300:])
    assert nothing.low < 0.5 < nothing.high and nothing.high - nothing.low < 0.12


def test_membership_of_wrong_images():
    classifier = Classifier(Brightness(), make_process(LIKE.process), 0.5, (2, 2, 1), 2)
    good = np.zeros((3, 2, 2, 1), np.uint8)
    for bad in (np.zeros((3, 4, 4, 1), np.uint8), good[:0]):
        with pytest.raises(UserError, match="the members are"):
            classify.membership(classifier, {}, bad, good)
