"""Denoisers side by side: closed forms under every noise law, which images are asked about, and wrong input."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mdiff import cli, config
from mdiff.console import Monitor
from mdiff.data.source import Images
from mdiff.data.split import save_subset
from mdiff.errors import UserError
from mdiff.nets import closed_form
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.probes import gap as gaps
from mdiff.process.laws import make_process
from mdiff.recipes import answers, denoising, experiment
from mdiff.train import checkpoint, mesh, optim, state, workdir

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
LEVELS = (0.05, 0.7, 6.0)


@pytest.fixture(scope="module", autouse=True)
def haste():
    """Each program runs once: compiling is what takes time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What `answers` needs of a model, around a denoiser in closed form."""

    fn: object
    process: object
    damage: None = None

    def denoiser(self, params, seen=None):
        return from_sigma_fn(self.fn, self.process)

    def condition(self, params, batch, n=None):
        return None


def made(n, seed=0, first=0):
    x = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 1), np.uint8)
    return Images("made", x, np.arange(first, first + n, dtype=np.int32))


def shrink(x, sigma):
    return x / (1 + sigma[:, None, None, None] ** 2)


def float64(images):
    return images.x.astype(np.float64) / 127.5 - 1


def noise_of(ids, draw):
    return np.asarray(gaps.fixed_noise(0, draw, jnp.asarray(ids), (4, 4, 1)), np.float64)


# ------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("kind", KINDS)
def test_answers_by_brute_force_under_every_law(kind):
    images, model = made(3, first=7), Known(shrink, make_process(config.Process(kind=kind)))
    found = answers.answer_rows(model, None, images, LEVELS, 2, 0)
    x = float64(images)
    for i, sigma in enumerate(LEVELS):
        each = [(x + sigma * noise_of(images.id, d)) / (1 + sigma**2) for d in range(2)]
        wrong = np.mean([((e - x) ** 2).mean((1, 2, 3)) for e in each], 0)
        rows = np.mean([np.abs(e[:, 1:] - e[:, :-1]).mean((1, 2, 3)) for e in each], 0)
        columns = np.mean([np.abs(e[:, :, 1:] - e[:, :, :-1]).mean((1, 2, 3)) for e in each], 0)
        np.testing.assert_allclose(found["error"][i], wrong, rtol=1e-3)
        np.testing.assert_allclose(found["variation"][i], rows + columns, rtol=1e-3)
        np.testing.assert_allclose(found["all"][i], np.mean([e.var((1, 2, 3)) for e in each], 0), rtol=1e-3)
    shown, noisy = answers.pictures(model, None, images, LEVELS, 0)
    expected = np.stack([x + sigma * noise_of(images.id, 0) for sigma in LEVELS])
    np.testing.assert_allclose(noisy, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        shown, expected / (1 + np.array(LEVELS) ** 2)[:, None, None, None, None], atol=2e-3
    )


def test_an_answer_depends_on_its_image_alone():
    model, images = Known(shrink, make_process(config.Process())), made(answers.BATCH + 3)
    every = answers.answer_rows(model, None, images, LEVELS, 1, 0)
    last = answers.answer_rows(model, None, images.take(np.array([answers.BATCH + 1, 4])), LEVELS, 1, 0)
    assert every["error"].shape == (3, answers.BATCH + 3)
    for name in every:
        np.testing.assert_allclose(last[name], every[name][:, [answers.BATCH + 1, 4]], rtol=1e-5)


def test_who_knows_the_images_is_sharp_where_the_mean_is_blurred():
    """Of few distant images the empirical denoiser answers one; of very strong noise, with their mean."""
    train, new = made(6), made(6, seed=1, first=100)
    model = Known(closed_form.empirical(float64(train)), make_process(config.Process()))
    rows = {
        name: answers.answer_rows(model, None, side, (0.2, 200.0), 4, 0)
        for name, side in (("train", train), ("new", new))
    }
    real = {name: answers.clean_rows(side) for name, side in (("train", train), ("new", new))}
    found = gaps.gap(rows["train"]["error"], rows["new"]["error"], (0.2, 200.0))
    assert found.ratio[0].low > 100
    sharp = [np.mean(rows["new"]["variation"][i]) / np.mean(real["new"]["variation"]) for i in range(2)]
    mean = float64(train).mean(0)
    flat = np.abs(np.diff(mean, axis=0)).mean() + np.abs(np.diff(mean, axis=1)).mean()
    assert 0.8 < sharp[0] < 1.2
    np.testing.assert_allclose(rows["new"]["variation"][1], flat, rtol=0.02)
    assert sharp[1] < 0.6


# -------------------------------------------------------------------------------------------- whole runs

TOTAL = 40


def cfg(source, n, heldout=8, **fields):
    data = config.Data(source=str(source), size=8, n=n, heldout=heldout, **fields.pop("data", {}))
    net = config.Net(arch="dit", channels=16, blocks=1, patch=4, **fields.pop("net", {}))
    return config.Config(data=data, net=net, train=config.Train(steps=1), **fields)


def write_run(folder, each):
    """A run whose network has only zeros, so that D = x sd^2 / (sd^2 + sigma^2) under every law; nothing is trained."""
    made = experiment.prepare(each)
    folder.mkdir()
    workdir.write(folder, each, made.model.shape, 0)
    save_subset(folder / "subset.json", made.subset, each.data)
    _, abstract = state.plan_state(made.model, optim.make_optimizer(each.train), 0, mesh.make_mesh(each.mesh))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    with checkpoint.open_run(folder, each.train) as checkpoints:
        checkpoints.save(dataclasses.replace(zeros, step=jnp.int32(1)), {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 8x8 images: small and full nest, other has images of its own; vp is small under another law."""
    base = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (TOTAL, 8, 8, 1), np.uint8)
    np.savez(base / "images.npz", x=x, id=np.arange(TOTAL) + 500, label=np.arange(TOTAL) % 3)
    np.savez(base / "else.npz", x=x)
    source = base / "images.npz"
    every = {
        "small": cfg(source, 6),
        "full": cfg(source, 24, net={"classes": 3}),
        "vp": cfg(source, 6, process=config.Process(kind="vp_linear"), loss=config.Loss(cutoff=0.5)),
        "other": cfg(source, 6, data={"seed": 5}),
        "all": cfg(source, 39, heldout=1),
        "else": cfg(base / "else.npz", 6),
    }
    for name, each in every.items():
        write_run(base / name, each)
    return base


def run(capsys, *arguments):
    code = cli.main(["denoise", *(str(a) for a in arguments)])
    return code, capsys.readouterr()


def refused(capsys, *arguments):
    code, said = run(capsys, *arguments)
    assert code == 2, said
    assert said.err.count("\n") == 1, said.err
    return said.err


def ids(folder):
    return set(json.loads((folder / "subset.json").read_text())["train"]["ids"])


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "out"
    names = ("small, standard", "full", "$x_1")
    folders = [runs / name for name in ("small", "full", "vp")]
    code, said = run(capsys, *folders, "--out", out, "--names", *names, "--n", 5, "--images", 4, "--draws", 2,
                     "--levels", 2, 0.5)  # fmt: skip
    assert code == 0, said.err
    assert "of 5 images that all runs were trained on, and of 5 that none was" in said.out.replace("\n", " ")
    tree = json.loads((out / "denoising.json").read_text())
    assert tree["levels"] == [0.5, 2.0]
    assert [each["name"] for each in tree["runs"]] == list(names)
    assert [each["cutoffs"] for each in tree["runs"]] == [[], [], [0.5]]
    # Which images: those of the smallest set that are in all, and none that anyone saw.
    assert not set(tree["heldout_ids"]) & (ids(runs / "full") | ids(runs / "small"))
    assert len(set(tree["heldout_ids"])) == 5
    for each in tree["runs"]:
        assert set(each["train_ids"]) < ids(runs / "small") <= ids(runs / "full")
        assert each["train_ids"] == tree["runs"][0]["train_ids"]
    # A network that is 0 gives what is left of x by the preconditioning: in closed form, and under both laws alike.
    images = dict(
        zip(
            np.arange(TOTAL) + 500,
            np.load(runs / "images.npz")["x"].astype(np.float64) / 127.5 - 1,
            strict=True,
        )
    )
    for i, sigma in enumerate((0.5, 2.0)):
        errors = {}
        for side, chosen in (("train", tree["runs"][0]["train_ids"]), ("heldout", tree["heldout_ids"])):
            x, c = np.stack([images[k] for k in chosen]), 0.25 / (0.25 + sigma**2)
            noise = [np.asarray(gaps.fixed_noise(0, d, jnp.asarray(chosen), (8, 8, 1))) for d in range(2)]
            errors[side] = np.mean([((c * (x + sigma * n) - x) ** 2).mean((1, 2, 3)) for n in noise], 0)
        for each in tree["runs"]:
            for side, expected in errors.items():
                assert each[side]["error"][i]["value"] == pytest.approx(expected.mean(), rel=2e-3)
                assert each[side]["error_over_first"][i]["value"] == pytest.approx(1, abs=2e-3)
            assert each["gap"][i]["value"] == pytest.approx(
                errors["heldout"].mean() / errors["train"].mean(), rel=4e-3
            )
    for name in ("denoising.png", "denoising_images.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
    assert "</svg>" in (out / "denoising.svg").read_text()


def test_runs_that_share_no_images_get_their_own(runs):
    with Monitor(quiet=True) as monitor:
        found = denoising.compare(
            {"small": runs / "small", "other": runs / "other"}, denoising.Settings(draws=1, n=64), monitor
        )
    shared = ids(runs / "small") & ids(runs / "other")
    assert len(shared) < 2  # of the seeds chosen above
    assert not found.shared
    for each in found.runs:
        assert set(each.ids.tolist()) == ids(runs / each.name)
        assert each.train.over_first is None
        assert each.heldout.over_first is not None
    assert set(found.heldout.tolist()) == set(range(500, 540)) - ids(runs / "small") - ids(runs / "other")
    assert not found.trained.any()
    assert len(found.trained) == 8
    levels = found.settings.levels
    assert len(levels) == 12
    assert (levels[0], levels[-1]) == (0.02, 80.0)
    assert np.allclose(np.diff(np.log(levels)), math.log(4000) / 11, atol=0.01)


def test_the_choice_of_images_does_not_move_when_more_are_taken():
    images = made(30)
    few, more = (denoising._chosen(images, denoising.Settings(n=n)).id for n in (5, 12))
    np.testing.assert_array_equal(few, more[:5])
    assert len(set(more.tolist())) == 12


def test_twins_of_trained_images_are_not_held_out():
    images = dataclasses.replace(made(10), family=np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 6], np.int32))
    subset = type("S", (), {"origin": np.array([0, 6], np.int32)})()
    each = type("E", (), {"subset": subset, "config": config.Config(data=config.Data(source="s", size=4))})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising.source, "load", lambda *a, **k: images)
        found = denoising._unseen({"a": each}, denoising.Settings())
    assert set(found.id.tolist()) == {2, 3, 4, 5, 7, 8, 9}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("small", "else"), "data.source = "),
        (("small", "nowhere"), "no run here (no config.json); give a folder of mdiff train"),
        (("small", "small"), "RUNS: a folder is given twice"),
        (("small", "all"), "1 images were trained on by none of the runs, and 2 or more are needed"),
        (("small", "--levels", "0.5", "100"), "--levels 100: "),
        (("small", "--levels", "0.001"), "works from 0.002 to 80; give levels within"),
        (("small", "--levels", "-1"), "--levels -1: noise levels are above 0"),
        (("small", "--levels", "1", "1"), "--levels 1: is given twice"),
        (("small", "--draws", "0"), "--draws 0: give 1 or more"),
        (("small", "--images", "0"), "--images 0: give 1 or more"),
        (("small", "--n", "1"), "--n 1: give 2 or more"),
        (("small", "--n", "4", "--images", "5"), "--images 5: more than --n 4"),
        (("small", "--confidence", "1"), "--confidence 1: must be between 0 and 1"),
        (("small", "full", "--names", "a"), "--names: 1 for 2 runs; give one per run"),
        (("small", "full", "--names", "a", "a"), "--names a: is given twice"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_writes_nothing(runs, tmp_path, capsys, arguments, words):
    given = [str(runs / a) if a.isalpha() and a not in ("a",) else a for a in arguments]
    assert words in refused(capsys, *given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_is_no_place_inside_a_run(runs, tmp_path, capsys):
    assert "lies in the run" in refused(capsys, runs / "small", "--out", runs / "small" / "denoising")
    (tmp_path / "sweep.json").write_text("{}")
    assert "among the cells of a sweep" in refused(capsys, runs / "small", "--out", tmp_path / "cells" / "x")


def test_a_run_without_a_checkpoint(runs, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "subset.json"):
        (bare / name).write_text((runs / "small" / name).read_text())
    assert "no checkpoints; train it first" in refused(capsys, bare, "--out", tmp_path / "out")


def test_settings_by_hand_are_checked():
    with Monitor(quiet=True) as monitor, pytest.raises(UserError, match="--seed -1: give 0 or more"):
        denoising.compare({}, denoising.Settings(seed=-1), monitor)
