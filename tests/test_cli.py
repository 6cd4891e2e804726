"""The command line as its users type it, wrong things included."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdiff import cli, commands, config
from mdiff.arguments import parse
from mdiff.data import source
from mdiff.data.split import save_subset
from mdiff.plan import command as plan_command
from mdiff.probes.records import Measure, ProbeResult
from mdiff.probes.registry import PROBES
from mdiff.recipes import experiment
from mdiff.train import workdir
from mdiff.types import Estimate

ROOT = Path(__file__).parent.parent
FACES = str(ROOT / "configs" / "faces.py")


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command; help exits by SystemExit."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line a refused command prints."""
    code, out, err = run(capsys, *arguments)
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("mdiff: ")
    return err


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Generated, training and held-out faces as PNG folders: half of the generations are copies."""
    base = tmp_path_factory.mktemp("folders")
    faces = source.load("faces", 16).x
    rng = np.random.default_rng(0)
    copies = np.clip(faces[:20].astype(int) + rng.integers(-3, 4, faces[:20].shape), 0, 255).astype(np.uint8)
    sets = {
        "train": faces[:40],
        "heldout": faces[40:80],
        "generated": np.concatenate([copies, faces[80:100]]),
    }
    for name, images in sets.items():
        (base / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[..., 0]).save(base / name / f"{i}.png")
        np.savez(base / f"{name}.npz", x=images)
    return base


def test_audit_of_folders(folders, tmp_path, capsys):
    code, out, _ = run(
        capsys, "audit", "--generated", folders / "generated", "--train", folders / "train",
        "--heldout", folders / "heldout", "--out", tmp_path / "a",
    )  # fmt: skip
    assert code == 0
    assert "Memorized" in out
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["run"]["memorized"]["value"] == 0.5
    assert report["run"]["memorized"]["n"] == 40
    assert report["run"]["control"]["value"] == 0.0
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000


def test_audit_of_npz_without_heldout_invents_no_control(folders, tmp_path, capsys):
    arguments = ("--generated", folders / "generated.npz", "--train", folders / "train.npz")
    code, _, _ = run(capsys, "audit", *arguments, "--out", tmp_path / "a")
    assert code == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["run"]["memorized"]["value"] == 0.5
    assert report["run"]["control"] is None
    assert report["run"]["excess"] is None


def test_compare_and_joint_report(folders, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0)):
        generated = folders / ("generated" if name == "a" else "train")
        run(capsys, "audit", "--generated", generated, "--train", folders / "train", "--out", tmp_path / name,
            "--audit.seed", seed)  # fmt: skip
    code, out, _ = run(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert "+0.5000" in out  # all of b are copies, half of a
    file = tmp_path / "new" / "difference.json"
    assert run(capsys, "compare", tmp_path / "a", tmp_path / "b", "--out", file)[0] == 0
    tree = json.loads(file.read_text())
    assert tree["second_minus_first"]["memorized"]["value"] == 0.5
    assert tree["second_minus_first"]["memorized"]["n"] == 40
    assert (tree["first"], tree["confidence"]) == (str(tmp_path / "a"), 0.95)
    both = tmp_path / "both"
    for folders_given in (
        ("--workdir", tmp_path / "a", tmp_path / "b"),
        (tmp_path / "a", tmp_path / "b"),
        (tmp_path / "a", "--workdir", tmp_path / "b"),
    ):
        assert run(capsys, "report", *folders_given, "--out", both)[0] == 0
        assert json.loads((both / "report.json").read_text())["runs"] == ["a", "b"]
    assert "no .json file" in refused(capsys, "compare", tmp_path / "a", tmp_path / "b", "--out", "x.txt")
    assert "given twice" in refused(capsys, "report", tmp_path / "a", tmp_path / "a", "--out", both)
    assert "--out" in refused(capsys, "report", tmp_path / "a", tmp_path / "b")
    assert "RUNS: 0 given" in refused(capsys, "report")


def test_probes_of_an_audit(folders, tmp_path, capsys):
    out = tmp_path / "a"
    arguments = ("audit", "--generated", folders / "generated", "--train", folders / "train", "--heldout",
                 folders / "heldout", "--out", out, "--audit.bootstrap", 20)  # fmt: skip
    code, printed, _ = run(capsys, *arguments, "--probes", "audit", "yields")
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    measures = {row["key"]: row["value"] for row in report["run"]["probes"]["yields"]["measures"]}
    assert 0.5 in measures.values()  # the share of copies
    assert "How many training images come out" in printed
    assert run(capsys, *arguments)[0] == 0  # the same images: the probe's results still hold
    assert (out / "probe_yields.json").exists()
    others = [str(folders / "heldout") if a == folders / "generated" else a for a in arguments]
    code, _, err = run(capsys, *others)
    assert code == 0
    assert "removed probe_yields.json" in err
    assert not list(out.glob("probe_*"))
    for probes, words in (
        (("audit", "yeilds"), ("--probes yeilds", "yields")),
        (("yields",), ("add audit",)),
        ((), ("--probes: 0 given",)),
    ):
        line = refused(capsys, *arguments, "--probes", *probes)
        assert all(word in line for word in words)


def test_probes_of_a_run(tmp_path, capsys, monkeypatch):
    """Probes get the run's own images and ids; results on earlier generations do not outlive them."""
    cfg = config.Config(
        data=config.Data(source="faces", size=16, n=30, heldout=30),
        net=config.Net(channels=32, mults=(1,), blocks=1, attention=(), patch=2),
        sample=config.Sample(n=40),
        audit=config.Audit(bootstrap=20),
    )
    made = experiment.prepare(cfg)
    workdir.write(tmp_path, cfg, made.model.shape, 1)
    save_subset(tmp_path / "subset.json", made.subset, cfg.data)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 40, 16, 16, 1), dtype=np.uint8)
    first[:10] = made.subset.train.x[:10]
    drawn = [first, first, second]

    def sample(experiment, folder, monitor):
        images = drawn.pop(0)
        np.savez(folder / "samples.npz", x=images, step=3)
        return images

    monkeypatch.setattr(experiment, "sample", sample)
    seen = []

    def probe(generated, train, heldout, rules, *, train_ids, heldout_ids, labels, progress):
        seen.append((generated, train, heldout, train_ids, heldout_ids, labels, rules))
        progress("all", 1, 1)
        share = Estimate(float(np.mean([(x == train).all((1, 2, 3)).any() for x in generated])), 0, 1, 40)
        return ProbeResult("exact", "Exact copies", "pixels", [Measure("exact", "exact", share, "%")])

    monkeypatch.setitem(PROBES, "exact", (probe, "copies bit for bit"))
    assert run(capsys, "eval", "--workdir", tmp_path, "--probes", "audit", "exact")[0] == 0
    generated, train, heldout, train_ids, heldout_ids, labels, rules = seen[0]
    np.testing.assert_array_equal(generated, first)
    np.testing.assert_array_equal(train, made.subset.train.x)
    np.testing.assert_array_equal(heldout, made.subset.heldout.x)
    np.testing.assert_array_equal(train_ids, made.subset.train.id)
    np.testing.assert_array_equal(heldout_ids, made.subset.heldout.id)
    assert labels is None
    assert rules.bootstrap == 20
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["run"]["probes"]["exact"]["measures"][0]["value"] == 0.25
    assert run(capsys, "eval", "--workdir", tmp_path)[0] == 0  # the same generations again
    assert (tmp_path / "probe_exact.json").exists()
    code, _, err = run(capsys, "eval", "--workdir", tmp_path)
    assert code == 0
    assert "removed probe_exact.json" in err
    assert json.loads((tmp_path / "report.json").read_text())["run"]["probes"] == {}


def test_help_lists_every_field_with_default(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    shown = out.replace("-", "_")
    tree = config.to_json(config.Config())
    for name, value in tree.items():
        for field in value if isinstance(value, dict) else ():
            assert f"{name}.{field}" in shown, field
    assert "(default: 2000)" in out
    assert run(capsys)[0] == 2
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert f"mdiff {name} {command.example}" in out


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_examples_of_the_usage_can_be_parsed(name):
    """Each example names options that exist; none of them is run."""
    words = cli.COMMANDS[name].example.split()
    kind = {"eval": "EvalArgs", "judge": "JudgeExportArgs"}.get(name, f"{name.capitalize()}Args")
    parse(
        plan_command.PlanArgs if name == "plan" else getattr(commands, kind),
        words[name == "judge" :],
        f"mdiff {name}",
        flags=name not in ("train", "eval"),
    )


def test_help_of_probes_names_them_all(capsys):
    assert set(PROBES) == {"similarity", "yields", "quality"}
    for command in ("eval", "audit"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert all(name in out for name in PROBES)


def test_help_starts_without_the_heavy_libraries():
    code = "import sys; from mdiff import cli; cli.main(['--help']); print(sorted({'jax', 'sklearn', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["audit"], ["--generated", "is missing", "a path"]),
        (["audit", "--generated"], ["--generated", "has no value"]),
        (["eval"], ["--workdir", "is missing"]),
        (["compare", "a"], ["RUNS", "1 given", "2 values"]),
        (["compare", "a", "b", "c"], ["'c'", "belongs to no option"]),
        (["demo", "--steps", "1.5"], ["--steps 1.5", "a whole number"]),
        (["demo", "--again", "yes"], ["'yes'", "belongs to no option"]),
        (["demo", "--agian"], ["--agian", "the nearest is --again"]),
        (["demo", "-q"], ["-q", "unknown option"]),
        (["judge", "exprt"], ["judge exprt", "judge export"]),
        (["judge", "export"], ["WORKDIR", "0 given"]),
        (["judge", "export", "nowhere", "--top", "ten"], ["--top ten", "a whole number"]),
        (["judge", "import", "nowhere", "a.json"], ["nowhere", "no audit.json"]),
        (["watch", "--every", "soon", "x"], ["--every soon", "a number"]),
        (["train", "--data.duplicates", "3"], ["--data.duplicates 3", "pairs such as 3 10"]),
        (["train", "--data.duplicates", "3", "x"], ["'x'", "pairs such as 3 10"]),
        (["train", "--data.flip", "maybe"], ["--data.flip maybe", "True or False"]),
        (["train", "--net.mults", "1", "b"], ["'b'", "a whole number"]),
        (["train", "--train.steps", "5", "6"], ["'6'", "belongs to no option"]),
        (["train", "--train.lr", "1e-3e"], ["--train.lr 1e-3e", "a number"]),
        (["train", "--train.steps", "5"], ["is missing", "--config"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_command_lines_that_cannot_be_read(arguments, words, capsys):
    """In our own words, with nothing of the parser's boxes or Python's types."""
    line = refused(capsys, *arguments)
    for word in words:
        assert word in line
    for leak in ("│", "╭", "§", "<class", "int()", "NoneType", "Expected"):
        assert leak not in line


def test_numbers_are_read_as_python_reads_them():
    for text in ("1e-3", "-2", ".5", "+3.", "1_000.5", "inf", "-inf", "nan", "NaN", "1E4"):
        made = parse(commands.WatchArgs, ["x", "--every", text], "mdiff watch", flags=True)
        assert made.every == pytest.approx(float(text), nan_ok=True)


def test_overrides_reach_the_config():
    made = parse(
        commands.TrainArgs,
        ["--config", "x.py", "--workdir", "w", "--train.steps", "7", "--net.mults", "1", "2",
         "--data.duplicates", "3", "10", "5", "2", "--data.flip", "True", "--train.log-every", "9"],
        "mdiff train",
        {"fields": replace(config.Config(), name="kept")},
    )  # fmt: skip
    assert made.fields.train.steps == 7
    assert made.fields.train.log_every == 9
    assert made.fields.net.mults == (1, 2)
    assert made.fields.data.duplicates == {3: 10, 5: 2}
    assert made.fields.data.flip is True
    assert made.fields.name == "kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stps", "5"], ["--train.stps", "--train.steps"]),
        (["--stepz", "5"], ["--stepz", "--train.steps"]),
        (["--train.steps", "x"], ["--train.steps", "'x'"]),
        (["--train.steps"], ["--train.steps"]),
        (["--loss.weight", "none"], ["--loss.weight", "'none'", "edm"]),
        (["--data.n", "80"], ["data.n = 80", "data.heldout = 50", "100 images", "20"]),
        (["--data.n", "200", "--data.heldout", "0"], ["data.n = 200", "100 images"]),
        (["--data.n", "1"], ["data.n = 1", "2 or more"]),
        (["--data.source", "facs"], ["data.source", "'facs'", "faces"]),
        (["--data.size", "18", "--net.mults", "1", "2", "2"], ["data.size = 18", "multiple of 8", "16"]),
        (["--loss.cutoff", "100"], ["loss.cutoff = 100", "(0.002, 80.0)"]),
        (["--loss.cutoff", "-1"], ["loss.cutoff = -1", "(0.002, 80.0)"]),
        (["--train.batch", "0"], ["train.batch = 0", "1 or more"]),
        (["--train.lr", "0"], ["train.lr = 0", "above 0"]),
        (["--train.lr", "nan"], ["train.lr = nan", "finite"]),
        (["--net.classes", "3"], ["net.classes = 3", "no labels", "net.classes to 0"]),
        (["--process.sigma-max", "0.001"], ["sigma_max = 0.001"]),
        (["--mesh.fsdp", "3"], ["mesh.fsdp = 3", "do not divide"]),
        (["--sample.steps", "1"], ["sample.steps = 1", "2 or more"]),
        (["--data.duplicates", "999", "3"], ["999"]),
        (["--init-from", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_training_input_is_one_line_and_writes_nothing(arguments, words, tmp_path, capsys):
    folder = tmp_path / "run"
    line = refused(capsys, "train", "--config", FACES, "--workdir", folder, *arguments)
    for word in words:
        assert word in line
    assert not folder.exists()


def test_bad_config_files(tmp_path, capsys):
    assert "no such file" in refused(
        capsys, "train", "--config", tmp_path / "no.py", "--workdir", tmp_path / "r"
    )
    (tmp_path / "empty.py").write_text("x = 1\n")
    line = refused(capsys, "train", "--config", tmp_path / "empty.py", "--workdir", tmp_path / "r")
    assert "config = Config(...)" in line
    (tmp_path / "typo.py").write_text("from mdiff.config import *\nconfig = Config(train=Train(stps=3))\n")
    line = refused(capsys, "train", "--config", tmp_path / "typo.py", "--workdir", tmp_path / "r")
    assert "stps" in line
    assert "typo.py" in line


def test_bad_commands_and_folders(folders, tmp_path, capsys):
    assert "audit" in refused(capsys, "adit")
    assert "--train" in refused(capsys, "audit", "--generated", folders / "train")
    (tmp_path / "none").mkdir()
    for command in (
        ("eval", "--workdir", tmp_path / "none"),
        ("report", "--workdir", tmp_path / "none"),
        ("compare", tmp_path / "none", tmp_path / "none"),
        ("audit", "--generated", tmp_path / "none", "--train", folders / "train", "--out", tmp_path / "o"),
        ("audit", "--generated", folders / "train", "--train", tmp_path / "missing", "--out", tmp_path / "o"),
    ):
        assert str(tmp_path) in refused(capsys, *command)
    assert not (tmp_path / "o").exists()
    assert not list((tmp_path / "none").iterdir())


def test_mixed_sizes_are_named(folders, tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (9, 8)).save(tmp_path / "b.png")
    line = refused(
        capsys, "audit", "--generated", tmp_path, "--train", folders / "train", "--out", tmp_path / "o"
    )
    assert "a.png" in line
    assert "b.png" in line
    small = tmp_path / "small"
    small.mkdir()
    Image.new("L", (8, 8), 3).save(small / "a.png")
    line = refused(
        capsys, "audit", "--generated", small, "--train", folders / "train", "--out", tmp_path / "o"
    )
    assert "16" in line
    assert "8" in line


def test_audits_that_would_mislead_are_refused(folders, tmp_path, capsys, monkeypatch):
    generated, train = folders / "generated", folders / "train"
    line = refused(capsys, "audit", "--generated", generated, "--train", train, "--out", train)
    assert "is one of the image folders" in line
    line = refused(capsys, "audit", "--generated", generated, "--train", train, "--audit.seed", "-1")
    assert "audit.seed = -1" in line
    both = tmp_path / "both"
    (both / "more").mkdir(parents=True)
    for path in (both / "a.png", both / "more" / "b.png"):
        Image.new("L", (16, 16)).save(path)
    line = refused(capsys, "audit", "--generated", both, "--train", train, "--out", tmp_path / "o")
    assert "'more'" in line
    one = tmp_path / "one"
    one.mkdir()
    Image.new("L", (16, 16)).save(one / "a.png")
    line = refused(capsys, "audit", "--generated", generated, "--train", one, "--out", tmp_path / "o")
    assert "--train" in line
    monkeypatch.chdir(folders)
    (folders / "faces").mkdir()
    line = refused(capsys, "audit", "--generated", generated, "--train", "faces", "--out", tmp_path / "o")
    assert "./faces" in line
    assert not (tmp_path / "o").exists()


def test_a_reserved_name_does_not_lose_the_audit(folders, tmp_path, capsys):
    (folders / "generated").rename(folders / "runs")
    try:
        code, out, _ = run(
            capsys,
            "audit",
            "--generated",
            folders / "runs",
            "--train",
            folders / "train",
            "--out",
            tmp_path / "o",
        )
    finally:
        (folders / "runs").rename(folders / "generated")
    assert code == 0
    assert "copies of a training image" in " ".join(out.split())
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["runs"] == ["runs (run)"]
    assert report["versions"]["mdiff"]


def test_python_example_of_the_readme_runs():
    """The ten lines under "Bring your own model" work as printed."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- tested -->")[1].split("```python\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "memorized" in done.stdout


def test_a_planted_image_given_twice_is_refused(tmp_path, capsys):
    told = ("--config", FACES, "--workdir", tmp_path / "r")
    code, _, err = run(capsys, "train", *told, "--data.duplicates", 7, 2, 8, 3, 7, 4)
    assert (code, err) == (2, "mdiff: --data.duplicates: 7 is given twice; give it once\n")
    assert not (tmp_path / "r").exists()
