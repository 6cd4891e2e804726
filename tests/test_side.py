"""SIDE as a whole: closed-form models through the chain, resumption, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mdiff import config
from mdiff.cli import main
from mdiff.console import Monitor
from mdiff.data import source
from mdiff.errors import UserError
from mdiff.nets import closed_form
from mdiff.recipes import guided, side, side_scores
from mdiff.side import Classifier, Side, Surrogate
from mdiff.types import to_float

IMAGES = source.load("digits", 8).x
TRAIN, HELDOUT = IMAGES[:12], IMAGES[100:112]
CFG = Side(
    surrogate=Surrogate(n=96, clusters=6, min_size=3, cohesion=0.3, restarts=2),
    classifier=Classifier(width=16, blocks=(1,), steps=200, batch=32, lr=1e-2),
    scales=(0.0, 60.0),
    sample=config.Sample(n=48, batch=48, method="ddim", steps=8),
    audit=config.Audit(bootstrap=50),
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Both closed-form models, attacked: the memorizer, and a normal law with the same mean and spread."""
    found = {}
    laws = {
        "memorizer": closed_form.empirical(to_float(TRAIN)),
        "normal": closed_form.gaussian(to_float(IMAGES[200:600])),
    }
    for name, law in laws.items():
        folder = tmp_path_factory.mktemp(name)
        target = side.of_denoiser(law, (8, 8, 1), name=name)
        with Monitor(quiet=True) as monitor:
            labelled, files = side.attack(target, CFG, folder, monitor)
        unguided = np.load(folder / "synthetic.npz")["x"]
        strengths = side_scores.measure(
            files, unguided, {"train": TRAIN, "heldout": HELDOUT}, "heldout", CFG.audit
        )
        found[name] = folder, target, labelled, strengths
    return found


def test_a_memorizer_gives_all_away_at_every_strength(chain):
    _, _, labelled, strengths = chain["memorizer"]
    assert 2 <= labelled.classes <= 6
    for one in strengths:
        found = one.scores["train"].estimates
        assert found["memorized"].value == 1.0 and found["memorized_excess"].low > 0.8
        assert found["coverage"].value > 0.7


def test_guidance_leads_a_memorizer_to_the_cluster_asked_for(chain):
    """Images of a memorizer are training images; guided to a cluster they are of that cluster more often than not guided."""
    folder, target, labelled, strengths = chain["memorizer"]
    clusters = labelled.clusters
    hits = {}
    for one in strengths:
        rows, _ = side.features(target, CFG, np.load(folder / "synthetic.npz")["x"])
        nearest = ((one.images[:, None].astype(float) - labelled.images[None].astype(float)) ** 2).sum(
            (2, 3, 4)
        )
        own = clusters.labels[clusters.labels >= 0][nearest.argmin(1)]
        hits[one.scale] = float(np.mean(own == one.label))
        assert len(rows) == CFG.surrogate.n
    assert hits[60.0] > hits[0.0] + 0.15, hits


def test_a_normal_law_gives_nothing_away(chain):
    for one in chain["normal"][3]:
        found = one.scores["train"].estimates
        assert (
            found["memorized"].value <= 0.05
            and found["memorized_excess"].low <= 0 <= found["memorized_excess"].high
        )


def test_strength_zero_is_the_model_alone(chain):
    from mdiff.recipes.generate import draw, make_generator

    folder, target, _, strengths = chain["memorizer"]
    sampling = side._sampling(target, CFG.sample)
    generate = make_generator(target.model, sampling)
    np.testing.assert_array_equal(strengths[0].images, draw(lambda i: generate({}, i), 48, 48))
    np.testing.assert_array_equal(guided.load(folder / "guided" / "scale_0.npz")["x"], strengths[0].images)


def test_the_attack_does_not_depend_on_the_training_images(chain, tmp_path):
    """Nothing of the first four stages takes a training image: their only input is the model."""
    import inspect

    for stage in (side.synthesize, side.distil, side.extract):
        assert not {"train", "heldout", "references", "known"} & set(inspect.signature(stage).parameters)


def test_what_is_there_is_not_made_again_and_what_is_lost_is_made_equal(chain):
    folder, target, _, strengths = chain["normal"]
    before = (folder / "synthetic.npz").stat().st_mtime_ns
    (folder / "guided" / "scale_60.npz").unlink()
    with Monitor(quiet=True) as monitor:
        _, files = side.attack(target, CFG, folder, monitor)
    assert (folder / "synthetic.npz").stat().st_mtime_ns == before
    np.testing.assert_array_equal(guided.load(files[60.0])["x"], strengths[1].images)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"surrogate": replace(CFG.surrogate, clusters=5)},
            ("surrogate.clusters = 6", "this one has 5", "--out"),
        ),
        ({"classifier": replace(CFG.classifier, lr=1.0)}, ("classifier.lr = 0.01", "--out")),
        ({"sample": replace(CFG.sample, steps=9)}, ("sample.steps = 8",)),
    ],
)
def test_a_folder_holds_one_attack(chain, changed, words):
    folder, target, _, _ = chain["normal"]
    with pytest.raises(UserError) as caught:
        side.open_folder(folder, target, replace(CFG, **changed))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    side.open_folder(
        folder, target, replace(CFG, scales=(0.0, 1.0, 5.0), quality_floor=0.5)
    )  # these may change


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (replace(CFG, scales=(0.0, -1.0)), ("-1",)),
        (replace(CFG, scales=()), ("scales",)),
        (replace(CFG, scales=(2.0, 4.0)), ("scales = (2.0, 4.0)", "add it")),
        (replace(CFG, quality_floor=1.5), ("quality_floor = 1.5",)),
        (replace(CFG, surrogate=replace(CFG.surrogate, n=4)), ("surrogate.n = 4", "clusters = 6")),
        (replace(CFG, surrogate=replace(CFG.surrogate, level=0.0)), ("surrogate.level = 0",)),
        (
            replace(
                CFG,
                surrogate=replace(CFG.surrogate, features="network"),
                adapter=CFG.adapter,
                scales=(float("nan"),),
            ),
            ("scales",),
        ),
    ],
)
def test_wrong_settings_are_one_line(cfg, words):
    with pytest.raises(UserError) as caught:
        side.check(cfg)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_no_cohesive_cluster_is_one_line(chain, tmp_path):
    _, target, _, _ = chain["normal"]
    cfg = replace(CFG, surrogate=replace(CFG.surrogate, cohesion=0.999))
    with pytest.raises(UserError, match=r"cohesion") as caught:
        side.label(target, cfg, np.load(chain["normal"][0] / "synthetic.npz")["x"], tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- the command

TINY = [
    "--surrogate.n", "64", "--surrogate.clusters", "4", "--surrogate.min-size", "2", "--surrogate.cohesion", "0.1",
    "--classifier.width", "8", "--classifier.blocks", "1", "--classifier.steps", "6", "--classifier.batch", "16",
    "--scales", "0", "3", "--sample.n", "32", "--sample.batch", "32", "--sample.steps", "4", "--audit.bootstrap", "20",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("side") / "run"
    made = tmp_path_factory.mktemp("config") / "tiny.py"
    made.write_text(
        "from mdiff.config import *\n"
        "config = Config(data=Data(source='digits', size=8, n=12, heldout=12), "
        "net=Net(channels=16, mults=(1,), blocks=1, attention=(), patch=2), "
        "train=Train(steps=4, batch=8, eval_levels=(), eval_samples=8), sample=Sample(n=8, batch=8, steps=4))\n"
    )
    assert main(["train", "--config", str(made), "--workdir", str(folder)]) == 0
    return folder


def test_the_command_writes_all_its_files_and_runs_again_from_them(run, capsys):
    assert main(["side", "--workdir", str(run), *TINY]) == 0
    out = run / "side"
    tree = json.loads((out / "side.json").read_text())
    assert [one["scale"] for one in tree["strengths"]] == [0.0, 3.0] and tree["chosen"] in (0.0, 3.0)
    rate = tree["strengths"][1]["scores"]["references"]["train"]["estimates"]["memorized"]
    assert set(rate) == {"value", "low", "high", "n"} and rate["n"] == 32
    assert (out / "side.html").is_file() and tree["verdict"]
    before = (out / "guided" / "scale_3.npz").read_bytes()
    capsys.readouterr()
    assert main(["side", "--workdir", str(run), *TINY, "--scales", "0", "3", "5"]) == 0  # one strength more
    assert (out / "guided" / "scale_3.npz").read_bytes() == before
    assert (out / "guided" / "scale_5.npz").is_file()


def test_adapters_are_the_second_way(run, tmp_path, capsys):
    words = [
        "--adapter.rank",
        "2",
        "--adapter.steps",
        "4",
        "--adapter.batch",
        "8",
        "--out",
        str(tmp_path / "lora"),
    ]
    assert main(["side", "--workdir", str(run), *TINY, *words]) == 0
    tree = json.loads((tmp_path / "lora" / "side.json").read_text())
    assert tree["classifier"] is None and [one["scale"] for one in tree["strengths"]] == [0.0, 3.0]
    one, other = (guided.load(tmp_path / "lora" / "guided" / f"scale_{k}.npz")["x"] for k in (0, 3))
    assert (one != other).any()
    np.testing.assert_array_equal(one, guided.load(run / "side" / "guided" / "scale_0.npz")["x"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--surrogate.clusters", "8"], "surrogate.clusters"),
        (["--scales", "0", "inf"], "scales"),
        (["--surrogate.teacher", "model"], "net.classes"),
        (["--classifier.blocks", "1", "1", "1", "1", "1"], "classifier.blocks"),
    ],
)
def test_wrong_words_are_one_line(run, capsys, tmp_path, words, expected):
    out = [] if words[0] == "--surrogate.clusters" else ["--out", str(tmp_path / "new")]
    capsys.readouterr()
    assert main(["side", "--workdir", str(run), *TINY, *words, *out]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0]


def test_a_folder_without_a_run_is_one_line(capsys, tmp_path):
    assert main(["side", "--workdir", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_a_damaged_attack_has_no_page(run, tmp_path):
    import shutil

    from mdiff.report import side_page

    with pytest.raises(UserError, match="run mdiff side"):
        side_page.write(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run / "side", copy)
    page = side_page.write(copy).read_text()
    assert "<script src" not in page and "http" not in page.replace("http-equiv", "")
    (copy / "side.npz").write_bytes(b"other")
    with pytest.raises(UserError, match=r"side\.npz") as caught:
        side_page.write(copy)
    assert "\n" not in str(caught.value)
    (copy / "side.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        side_page.write(copy)
