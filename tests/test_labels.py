"""What a labelled model is told: schemes of labels, and disjoint halves of a data set."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats

from mdiff import config
from mdiff.data import labels, source, stream
from mdiff.data.reader import make_reader
from mdiff.data.split import split
from mdiff.errors import UserError
from mdiff.recipes import experiment, sweep_plan

IMAGES = source.load("digits", 8)


def made(kind, classes, noise=0.0, seed=0, n=400, heldout=300, **data):
    cfg = config.Config(
        data=config.Data(
            source="digits", size=8, n=n, heldout=heldout, seed=seed, labels=kind, label_noise=noise, **data
        ),
        net=config.Net(classes=classes, channels=8, blocks=1, mults=(1,), attention=()),
    )
    labels.check(cfg)
    return cfg, labels.relabel(cfg, split(cfg.data, IMAGES))


def test_own_labels_are_the_digits():
    _, subset = made("own", 10)
    np.testing.assert_array_equal(subset.train.label, IMAGES.label[subset.train.id])
    np.testing.assert_array_equal(subset.heldout.label, IMAGES.label[subset.heldout.id])


def test_random_labels_are_uniform_fixed_and_know_nothing():
    _, subset = made("random", 7, n=1400)
    counts = np.bincount(subset.train.label, minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 1e-3
    table = np.zeros((7, 10))
    np.add.at(table, (subset.train.label, IMAGES.label[subset.train.id]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3  # independent of the digit
    again, other = made("random", 7, n=300)[1], made("random", 7, seed=1)[1]
    np.testing.assert_array_equal(again.train.label, subset.train.label[:300])  # of the image, not of the set
    common, ours, theirs = np.intersect1d(subset.train.id, other.train.id, return_indices=True)
    same = np.mean(subset.train.label[ours] == other.train.label[theirs])
    assert len(common) > 200 and same < 0.3  # another seed, other labels


def test_unique_labels_name_each_image_and_none_of_the_others():
    _, subset = made("unique", 400)
    assert sorted(subset.train.label) == list(range(400)) and subset.heldout.label is None


def test_clusters_part_the_images_as_a_k_means_does():
    _, subset = made("clusters", 5)
    rows = subset.train.x.reshape(400, -1) / 255.0
    centres = np.stack([rows[subset.train.label == k].mean(0) for k in range(5)])

    def nearest(x):
        return ((x[:, None] - centres) ** 2).sum(-1).argmin(1)

    np.testing.assert_array_equal(nearest(rows), subset.train.label)  # Lloyd's fixed point
    np.testing.assert_array_equal(nearest(subset.heldout.x.reshape(300, -1) / 255.0), subset.heldout.label)


def test_label_noise_replaces_its_share_and_grows_by_images():
    own = made("own", 10, n=1400)[1].train.label
    small, large, all_of_them = (made("own", 10, rho, n=1400)[1].train.label for rho in (0.2, 0.5, 1.0))
    for found, rho in ((small, 0.2), (large, 0.5), (all_of_them, 1.0)):
        changed = int(np.sum(found != own))  # one in ten new labels is the old one
        assert stats.binomtest(changed, 1400, 0.9 * rho).pvalue > 1e-3
    moved = small != own
    np.testing.assert_array_equal(large[moved], small[moved])


def test_redrawn_labels_change_at_every_visit_and_fixed_ones_never():
    seen = {}
    for kind in ("random", "redrawn"):
        cfg, subset = made(kind, 10, n=8, heldout=2)
        cfg = replace(cfg, train=config.Train(batch=8))
        reader = make_reader(cfg, subset)
        rows = []
        for step in range(40):
            raw = stream.gather(reader.resident, {k: np.asarray(v) for k, v in reader.batch(step).items()})
            batch = stream.finish(raw, jax.random.key(step), cfg)
            order = np.argsort(np.asarray(batch["id"]))
            rows.append(np.asarray(batch["label"])[order])
        seen[kind] = np.stack(rows)
    assert (seen["random"] == seen["random"][0]).all()
    counts = np.bincount(seen["redrawn"].ravel(), minlength=10)
    assert len(counts) == 10 and stats.chisquare(counts).pvalue > 1e-3
    assert all(len(np.unique(column)) > 4 for column in seen["redrawn"].T)


def test_halves_share_no_image():
    cfg = config.Data(source="digits", size=8, n=100, heldout=300)
    first, second = split(cfg, IMAGES), split(replace(cfg, skip=100), IMAGES)
    assert not set(first.train.id) & set(second.train.id)
    np.testing.assert_array_equal(first.heldout.id[:100], second.train.id)  # one order, read further on
    np.testing.assert_array_equal(first.heldout.id[100:], second.heldout.id[:200])


@pytest.mark.parametrize(
    ("kind", "classes", "noise", "words"),
    [
        ("random", 0, 0.0, ("data.labels = 'random'", "net.classes")),
        ("own", 0, 0.1, ("data.label_noise = 0.1", "net.classes")),
        ("own", 5, 0.0, ("net.classes = 5", "labels up to 9", "net.classes to 10")),
        ("unique", 10, 0.0, ("net.classes = 10", "net.classes to 400")),
        ("clusters", 401, 0.0, ("net.classes = 401", "to 400")),
        ("random", 10, 0.1, ("data.label_noise = 0.1", "random labels")),
        ("own", 10, 1.5, ("data.label_noise = 1.5", "[0, 1]")),
        ("new", 10, 0.0, ("data.labels = 'new'", "redrawn")),
    ],
)
def test_wrong_fields_are_one_line(kind, classes, noise, words):
    with pytest.raises(UserError) as caught:
        made(kind, classes, noise)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_skip_beyond_the_set_is_one_line():
    cfg = config.Data(source="digits", size=8, n=100, heldout=300, skip=1500)
    with pytest.raises(UserError, match=r"297 images after data.skip = 1500; set data.heldout to 197"):
        split(cfg, IMAGES)
    with pytest.raises(UserError, match="skip = -1"):
        split(replace(cfg, skip=-1), IMAGES)


def test_a_labelled_run_is_prepared_with_its_labels():
    cfg, subset = made("random", 10)
    np.testing.assert_array_equal(experiment.prepare(cfg).subset.train.label, subset.train.label)


def test_cells_of_a_sweep_have_labels_of_their_own_number(tmp_path):
    """Cells share their images in memory, but not labels that depend on net.classes."""
    cfg, _ = made("random", 3, n=60, heldout=20)
    planned = sweep_plan.plan(cfg, {"net.classes": (2, 30)}, tmp_path / "sweep")
    for name, cell in planned.made.items():
        classes = cell.config.net.classes
        assert name == f"classes={classes}"
        np.testing.assert_array_equal(cell.subset.train.label, made("random", classes, n=60)[1].train.label)
        assert cell.subset.train.label.max() >= classes / 2
