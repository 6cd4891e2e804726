"""`mdiff front`: known fronts from files made by hand, refusals, and the page."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from front_helper import BASE, GENERATIONS, add_probe, write_cell, write_sweep
from scipy import stats

from mdiff import cli, config
from mdiff.errors import UserError
from mdiff.probes.intervals import wilson
from mdiff.report import front_figures, front_json, front_samples, front_words
from mdiff.report.front import collect
from mdiff.report.front_cells import read_cells

SEEDS = (0, 1, 2)
MEMORIZED = {0.0: 0.6, 0.5: 0.3, 1.0: 0.1, 4.0: 0.6}
ENERGY = {0.0: 0.30, 0.5: 0.20, 1.0: 0.25, 4.0: 0.50}
"""By cutoff: 0.5 and 1 are the front; 0 loses to 0.5 in both; 4 loses to all."""
AXES = {"loss.cutoff": tuple(MEMORIZED), "seed": SEEDS}
LUCK = (-0.01, 0.02, 0.0)
"""What a seed adds to every energy distance."""


def numbers(cfg: config.Config) -> tuple[float, float]:
    return MEMORIZED[cfg.loss.cutoff], ENERGY[cfg.loss.cutoff] + LUCK[cfg.seed]


def course(cfg: config.Config) -> dict[int, tuple[float, float]]:
    """Memorization grows and quality improves with steps; standard training at step 100 copies nothing yet."""
    memorized, energy = numbers(cfg)
    return {100: (0.0, energy + 0.3), 200: (memorized / 2, energy + 0.1), 300: (memorized, energy)}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep, to be read and copied only."""
    folder = tmp_path_factory.mktemp("front") / "sweep"
    write_sweep(folder, AXES, numbers, along=course)
    return folder


@pytest.fixture
def sweep(swept, tmp_path):
    """A copy of it, to be spoiled."""
    return shutil.copytree(swept, tmp_path / "sweep")


def front(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["front", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def written(out):
    return json.loads((out / "front.json").read_text())


def tree_of(folder, **named):
    """`front.json` without the pictures, which take long."""
    found = collect(read_cells([folder]), **named)
    return front_json.as_json(found, [front_words.verdict(each, found) for each in found.fronts], "")


def by_name(rows):
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def made(swept, tmp_path_factory):
    """What the command writes about it."""
    out = tmp_path_factory.mktemp("out") / "front"
    assert cli.main(["front", str(swept), "--out", str(out)]) == 0
    return out


# ------------------------------------------------------------------------------------------ the numbers


def test_the_known_front(made):
    tree = written(made)
    settings = by_name(tree["settings"])
    assert {name for name, one in settings.items() if one["on_front"]} == {"cutoff 0.5", "cutoff 1"}
    assert tree["fronts"][0]["on_front"] == ["cutoff 0.5", "cutoff 1"]
    assert settings["cutoff 0"]["dominated_by"] == ["cutoff 0.5", "cutoff 1"]
    assert tree["fronts"][0]["baseline"] == ["cutoff 0"] and settings["cutoff 1"]["baseline"] == "cutoff 0"
    assert (
        settings["cutoff 0"]["probability_on_front"]
        < 0.05
        < 0.95
        < settings["cutoff 1"]["probability_on_front"]
    )
    assert tree["quality"] == {
        "measure": "energy_heldout",
        "label": "Energy distance to held-out",
        "unit": "",
        "better": "lower",
    }


def test_cells_hold_their_own_numbers(made):
    tree = written(made)
    cells = by_name(tree["cells"])
    assert len(cells) == 12
    one = cells["cutoff=0.5,seed=1"]
    assert (one["cutoff"], one["share"], one["n"], one["seed"]) == (0.5, 0.0, 24, 1)
    assert one["fields"] == {"loss.cutoff": 0.5, "seed": 1} and one["setting"] == "cutoff 0.5"
    assert one["state"] == "measured" and one["steps"] == 300 and one["reason"] is None
    rate = wilson(12, GENERATIONS)
    assert one["memorized"] == {"value": rate.value, "low": rate.low, "high": rate.high, "n": GENERATIONS}
    assert one["quality"]["value"] == pytest.approx(0.22) and one["quality"]["n"] == GENERATIONS
    assert set(one["control"]) == {"value", "low", "high", "n"}
    assert one["seconds"] == {"total": 5.5, "train": 4.0, "compile": 1.5} and tree["seconds"] == 12 * 5.5
    points = {name: (cell["quality"]["value"], cell["memorized"]["value"]) for name, cell in cells.items()}
    for name, cell in cells.items():  # among cells, by the definition
        worse = [
            other
            for other, (x, y) in points.items()
            if x <= points[name][0] and y <= points[name][1] and (x, y) != points[name]
        ]
        assert cell["on_front"] == (not worse), name
        assert set(cell["dominated_by"]) == {other for other in worse if cells[other]["on_front"]}
    assert {name for name, cell in cells.items() if cell["on_front"]} == {
        "cutoff=0.5,seed=0",
        "cutoff=1,seed=0",
    }


def test_settings_are_means_over_seeds_with_students_interval(made):
    one = by_name(written(made)["settings"])["cutoff 1"]
    values = [0.24, 0.27, 0.25]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert one["quality"] == pytest.approx({"value": np.mean(values), "low": low, "high": high, "n": 3})
    assert one["memorized"]["value"] == pytest.approx(0.1)
    assert one["memorized"]["high"] == pytest.approx(0.1 + (wilson(4, 40).high - 0.1) / math.sqrt(3))
    assert one["seeds"] == [0, 1, 2] and one["cells"][0] == "cutoff=1,seed=0"


def test_difference_to_standard_training_is_paired_by_seed(made):
    """The luck of a seed is common to both, so it cancels: only the cells' own noise is left, of 0.01 each."""
    change = by_name(written(made)["settings"])["cutoff 1"]["minus_baseline"]
    assert change["quality"]["value"] == pytest.approx(0.25 - 0.30)
    assert change["quality"]["high"] - change["quality"]["value"] == pytest.approx(0.01 * math.sqrt(2 / 3))
    assert change["memorized"]["value"] == pytest.approx(0.1 - 0.6) and change["memorized"]["n"] == 3
    assert by_name(written(made)["settings"])["cutoff 0"]["minus_baseline"] is None


def test_area_up_to_the_worst_cell_and_everything_memorized(made):
    area = written(made)["fronts"][0]["hypervolume"]
    assert area["reference"] == pytest.approx([0.52, 1.0])
    mean = sum(LUCK) / 3
    at = {cutoff: energy + mean for cutoff, energy in ENERGY.items()}
    whole = (at[1.0] - at[0.5]) * 0.7 + (0.52 - at[1.0]) * 0.9
    alone = (0.52 - at[0.0]) * 0.4
    assert area["all"]["value"] == pytest.approx(whole) and area["without"]["value"] == pytest.approx(alone)
    assert area["added"]["value"] == pytest.approx(whole - alone)
    for one in area.values():
        if isinstance(one, dict):
            assert one["low"] < one["value"] < one["high"]
    assert area["added"]["low"] > 0


def test_a_given_reference(swept):
    found = collect(read_cells([swept]), reference=(0.26, 0.2)).fronts[0].area
    assert found.reference == (0.26, 0.2)
    assert found.all.value == pytest.approx((0.26 - (0.25 + sum(LUCK) / 3)) * 0.1)  # of cutoff 1 alone


def test_along_training(made):
    along = written(made)["fronts"][0]["along"]
    assert along["generations"] == 32 and along["why_none"] is None and len(along["points"]) == 4 * 3
    n = BASE.train.eval_samples
    mean = sum(LUCK) / 3
    expected = {}
    for cutoff, energy in ENERGY.items():
        share = MEMORIZED[cutoff]
        expected[f"cutoff {cutoff:g}", 100] = (energy + 0.3 + mean, 0.0)
        expected[f"cutoff {cutoff:g}", 200] = (energy + 0.1 + mean, round(share / 2 * n) / n)
        expected[f"cutoff {cutoff:g}", 300] = (energy + mean, round(share * n) / n)
    for point in along["points"]:
        x, y = expected[point["setting"], point["step"]]
        assert (point["quality"]["value"], point["memorized"]["value"]) == pytest.approx((x, y))
        beaten = any(a <= x and b <= y and (a < x or b < y) for a, b in expected.values())
        assert point["on_front"] == (not beaten)
    assert along["standard_on_front"] == []


def test_early_stopped_standard_training_on_the_front(tmp_path):
    """Standard training passes through a place that nothing beats, and leaves it."""

    def early(cfg):
        memorized, energy = numbers(cfg)
        return {100: (0.0, 0.1 if cfg.loss.cutoff == 0 else 0.6), 300: (memorized, energy)}

    write_sweep(tmp_path / "s", AXES, numbers, along=early)
    tree = tree_of(tmp_path / "s")
    assert tree["fronts"][0]["along"]["standard_on_front"] == [{"setting": "cutoff 0", "step": 100}]
    said = next(text for text in tree["verdict"] if text.startswith("Along training"))
    assert "standard training is on it by the means: step 100 (memorized 0.0" in said
    assert "Stopped early, standard training is a point of it." in said
    assert any(text.startswith("Standard training is not on the front") for text in tree["verdict"])


# --------------------------------------------------------------------------------------------- verdicts


def test_verdict_says_what_the_numbers_do(made):
    members, standard, along, ends, area, cautions = written(made)["verdict"]
    assert (
        "4 settings, 12 cells, 3 seeds each" in members
        and "2 are on the front: “cutoff 0.5”, “cutoff 1”" in members
    )
    assert standard.startswith("Standard training is not on the front (memorized 60.0")
    assert "“cutoff 0.5” (memorized 30.0" in standard and "−30.0 [" in standard and "−0.100 [" in standard
    assert standard.count("(not zero)") == 2
    assert "no step of standard training is on it" in along
    assert "at 0.5 memorization and quality differ and at 4 quality differs" in ends
    assert "noisy copies add" in area and "do not tell" not in area
    assert "not measured" not in cautions


def test_verdict_where_standard_training_is_best(tmp_path):
    """The sign: now cutoffs cost quality and memorize more."""
    write_sweep(
        tmp_path / "s",
        {"loss.cutoff": (0.0, 1.0), "seed": SEEDS},
        lambda cfg: (0.1 + 0.4 * cfg.loss.cutoff, 0.1 + 0.2 * cfg.loss.cutoff),
    )
    tree = tree_of(tmp_path / "s")
    assert tree["fronts"][0]["on_front"] == ["cutoff 0"]
    assert by_name(tree["settings"])["cutoff 1"]["minus_baseline"]["memorized"]["value"] == pytest.approx(0.4)
    standard = tree["verdict"][1]
    assert standard.startswith("Standard training is on the front (memorized 10.0")
    assert standard.endswith("No setting on the front memorizes less.")
    area = tree["fronts"][0]["hypervolume"]
    assert area["added"]["value"] == 0 and "do not tell from nothing" in " ".join(tree["verdict"])
    assert tree["fronts"][0]["along"]["points"] == []
    assert "train.eval_every" in tree["fronts"][0]["along"]["why_none"]


def test_what_noise_alone_could_have_made_is_not_called_settled(tmp_path):
    write_sweep(
        tmp_path / "s",
        {"loss.cutoff": (0.0, 1.0), "seed": (0, 1)},
        lambda cfg: (0.3, 0.2 - 0.001 * cfg.loss.cutoff),
        width=0.05,
    )
    tree = tree_of(tmp_path / "s")
    assert tree["verdict"][1].startswith("Standard training is off the front by the means only")
    assert tree["verdict"][1].count("(zero is inside)") == 2
    assert 0.1 < by_name(tree["settings"])["cutoff 0"]["probability_on_front"] < 0.9


# ------------------------------------------------------------------------------- cells that are not there


def test_cells_not_measured_are_listed_and_shown(tmp_path):
    states = {"cutoff=1,seed=0": "failed", "cutoff=1,seed=1": "waiting", "cutoff=4,seed=2": "training"}
    states |= {f"cutoff=4,seed={i}": "waiting" for i in (0, 1)}
    write_sweep(tmp_path / "s", {**AXES, "loss.cutoff": (0.0, 1.0, 4.0)}, numbers, states=states)
    out = tmp_path / "out"
    assert cli.main(["front", str(tmp_path / "s"), "--out", str(out)]) == 0
    tree = written(out)
    cells, settings = by_name(tree["cells"]), by_name(tree["settings"])
    assert len(cells) == 9
    for name, state in (
        ("cutoff=1,seed=0", "failed"),
        ("cutoff=1,seed=1", "not run"),
        ("cutoff=4,seed=2", "unfinished"),
    ):
        one = cells[name]
        assert one["state"] == state
        for field in ("memorized", "quality", "control", "on_front", "dominated_by", "seconds", "steps"):
            assert one[field] is None, (name, field)
        assert (one["cutoff"], one["n"]) == (float(name[7]), 24)
    assert cells["cutoff=1,seed=0"]["reason"].startswith("loss.share")
    lone = settings["cutoff 1"]
    assert lone["seeds"] == [2] and lone["memorized"]["low"] is None and lone["memorized"]["value"] == 0.1
    assert lone["states"] == {"failed": 1, "not run": 1, "measured": 1}
    empty = settings["cutoff 4"]
    assert empty["seeds"] == [] and empty["quality"] is None and empty["on_front"] is None
    assert "5 of 9 cells are not measured (1 failed, 3 not run, 1 unfinished)" in tree["verdict"][-1]
    page = (out / "front.html").read_text()
    assert "not run" in page and "unfinished" in page and "needs a loss.cutoff above 0" in page


def test_standard_training_with_a_share_it_cannot_have_is_a_setting_of_its_own(tmp_path):
    """A sweep over cutoff and share has impossible cells at cutoff 0; the others keep their plain name."""
    states = {f"cutoff=0,share=0.5,seed={i}": "failed" for i in (0, 1)}
    axes = {"loss.cutoff": (0.0, 1.0), "loss.share": (0.5, 0.0), "seed": (0, 1)}
    write_sweep(
        tmp_path / "s",
        axes,
        lambda cfg: (0.3 - 0.2 * cfg.loss.cutoff - 0.1 * cfg.loss.share, 0.2),
        states=states,
    )
    found = collect(read_cells([tmp_path / "s"])).fronts[0]
    assert [one.name for one in found.settings] == [
        "cutoff 0",
        "cutoff 0, share 0.5",
        "cutoff 1, law's share",
        "cutoff 1, share 0.5",
    ]
    assert [one.baseline for one in found.settings] == ["", "", "cutoff 0", "cutoff 0"]
    assert [one.series for one in found.settings][2:] == ["law's share", "share 0.5"]
    assert [name for name, point in found.means.items() if point.on_front] == ["cutoff 1, share 0.5"]


# ------------------------------------------------------------------------------------------ what is compared


def test_each_set_of_training_images_has_its_own_front(tmp_path):
    axes = {"data.n": (12, 24), "loss.cutoff": (0.0, 1.0), "seed": (0, 1)}
    write_sweep(tmp_path / "s", axes, lambda cfg: (12 / cfg.data.n * (0.6 - 0.2 * cfg.loss.cutoff), 0.2))
    out = tmp_path / "out"
    assert cli.main(["front", str(tmp_path / "s"), "--out", str(out)]) == 0
    tree = written(out)
    assert [(part["name"], part["n"], part["on_front"]) for part in tree["fronts"]] == [
        ("n 12", 12, ["cutoff 1"]),
        ("n 24", 24, ["cutoff 1"]),
    ]
    assert {path.name for path in out.iterdir()} >= {"front_samples_1.png", "front_samples_2.png"}
    assert (
        cli.main(["front", str(tmp_path / "s"), "--select", "data.n=12", "--out", str(tmp_path / "one")]) == 0
    )
    assert len(written(tmp_path / "one")["cells"]) == 4


def test_images_of_which_nothing_is_measured_have_no_front_but_are_listed(tmp_path):
    axes = {"data.n": (12, 24), "loss.cutoff": (0.0, 1.0)}
    states = {"n=24,cutoff=0": "waiting", "n=24,cutoff=1": "failed"}
    write_sweep(tmp_path / "s", axes, numbers, states=states)
    tree = tree_of(tmp_path / "s")
    assert [part["n"] for part in tree["fronts"]] == [12]
    assert [(cell["state"], cell["setting"]) for cell in tree["cells"]][2:] == [
        ("not run", None),
        ("failed", None),
    ]
    assert "Of other training images no cell is measured (1 not run, 1 failed)." in tree["verdict"][-1]


def test_pictures_of_an_earlier_command_do_not_stay(swept, tmp_path):
    (tmp_path / "front_samples_2.png").write_bytes(b"old")
    assert cli.main(["front", str(swept), "--select", "seed=0", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*samples*")) == ["front_samples.png"]


def test_other_images_rules_and_numbers_are_refused(swept, tmp_path):
    def other(**changes):
        cfg = replace(
            BASE, **{name: changes[name] for name in changes if name not in ("heldout", "generations")}
        )
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        more = {name: changes[name] for name in ("heldout", "generations") if name in changes}
        write_cell(folder, cfg, 0.5, 0.2, **more)
        with pytest.raises(UserError) as error:
            collect(read_cells([swept, folder]))
        text = str(error.value)
        assert "\n" not in text and "other" in text
        return text

    assert other(data=replace(BASE.data, source="faces")).startswith(
        "data.source: 'digits' in cutoff=0,seed=0"
    )
    assert other(data=replace(BASE.data, seed=3)).startswith("data.seed: 0 in")
    assert other(data=replace(BASE.data, heldout=20)).startswith("data.heldout: 24 in")
    assert "its held-out images are not those of cutoff=0,seed=0" in other(heldout="changed")
    assert other(audit=config.Audit(ratio=0.5)).startswith("audit.ratio: 0.333")
    assert "of 40 generations in cutoff=0,seed=0 and of 60 in other" in other(generations=60)


def test_training_that_leaves_the_images_alone_shares_the_front(swept, tmp_path):
    """Shifts are a way of training: same images, another setting, whose baseline is not the unshifted one."""
    shifted = replace(BASE, data=replace(BASE.data, shift=2))
    write_cell(tmp_path / "shifted", shifted, 0.05, 0.1)
    found = collect(read_cells([swept, tmp_path / "shifted"])).fronts
    assert len(found) == 1 and "cutoff 0, shift 2" in found[0].means
    assert found[0].means["cutoff 0, shift 2"].on_front
    assert {one.baseline for one in found[0].settings if not one.standard} == {"cutoff 0, shift 0"}


def test_cells_of_one_name_in_two_sweeps(swept, tmp_path):
    second = shutil.copytree(swept, tmp_path / "again")
    cells = read_cells([swept, second])
    assert len({cell.name for cell in cells}) == 24 and cells[0].name == "sweep/cutoff=0,seed=0"
    single = read_cells([swept / "cells" / "cutoff=0,seed=0", swept / "cells" / "cutoff=1,seed=0"])
    assert [cell.name for cell in single] == ["cutoff=0,seed=0", "cutoff=1,seed=0"]


def test_a_measure_of_a_probe_where_more_is_better(tmp_path):
    """The sign of quality: the best recall and the least memorization are the front."""
    recall = {0.0: 0.9, 0.5: 0.8, 1.0: 0.7, 4.0: 0.75}
    names = write_sweep(
        tmp_path / "s", {"loss.cutoff": tuple(recall)}, lambda cfg: (MEMORIZED[cfg.loss.cutoff], 0.2)
    )
    for name in names:
        add_probe(
            tmp_path / "s" / "cells" / name,
            "quality",
            "recall_heldout",
            recall[float(name.split("=")[1])],
            "higher",
        )
    tree = tree_of(tmp_path / "s", quality="quality.recall_heldout")
    assert tree["fronts"][0]["on_front"] == ["cutoff 0", "cutoff 0.5", "cutoff 1"]
    assert tree["quality"]["better"] == "higher"
    area = tree["fronts"][0]["hypervolume"]
    assert area["reference"] == [0.7, 1.0]
    assert area["all"]["value"] == pytest.approx(0.1 * 0.7 + 0.1 * 0.4)
    assert "energy_heldout is" in tree["fronts"][0]["along"]["why_none"]


def test_other_measures_of_memorization(swept):
    found = collect(read_cells([swept]), memorized="calibrated_excess").fronts[0]
    value = json.loads((swept / "cells" / "cutoff=1,seed=0" / "audit.json").read_text())["estimates"]
    assert found.cells["cutoff=1,seed=0"].memorized.value == value["calibrated_excess"]["value"]
    assert found.along == () and "memorized is" in found.no_along


def test_different_numbers_of_generations_along_training_are_not_mixed(sweep):
    path = sweep / "cells" / "cutoff=1,seed=0" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"eval/n": 32.0', '"eval/n": 64.0'))
    found = collect(read_cells([sweep])).fronts[0]
    assert found.along == () and "32 and 64 generations" in found.no_along


def test_steps_that_some_seed_lacks_are_left_out(sweep):
    path = sweep / "cells" / "cutoff=1,seed=0" / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step": 200' not in line))
    found = collect(read_cells([sweep])).fronts[0]
    assert {point.step for point in found.along if point.name == "cutoff 1"} == {100, 300}


# ------------------------------------------------------------------------------------- pictures and page


def test_files_and_page(made):
    assert {path.name for path in made.iterdir()} == {
        "front.json",
        "front.html",
        "front.svg",
        "front.png",
        "front_samples.png",
    }
    assert (made / "front.svg").read_text().startswith("<?xml")
    assert (made / "front.png").read_bytes().startswith(b"\x89PNG")
    page = (made / "front.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and not re.search(
        r"https?:", re.sub(r"data:[^\"]*", "", page)
    )
    for text in written(made)["verdict"]:
        assert text in page
    assert "cutoff=4,seed=2" in page and 'class="on"' in page


def test_same_files_twice(swept, made, tmp_path):
    cells = collect(read_cells([swept]))
    figure = front_figures.svg(front_figures.plane(cells))
    assert figure == (made / "front.svg").read_text()


def test_staircase_of_the_picture_borders_what_is_dominated(swept):
    """Drawn by steps-post, the line's corners are the front's points; it goes up from the first and right from the last."""
    figure = front_figures.plane(collect(read_cells([swept])))
    axes = figure.subfigs[0].axes[0]
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    x, y = line.get_data()
    mean = sum(LUCK) / 3
    assert list(x)[:3] == pytest.approx([0.2 + mean, 0.2 + mean, 0.25 + mean]) and x[3] > 0.5
    assert y[0] > 0.6 and list(y)[1:] == pytest.approx([0.3, 0.1, 0.1])


def test_samples_show_standard_training_and_the_front(swept):
    cells = read_cells([swept])
    found = collect(cells)
    figure = front_samples.samples(found, found.fronts[0])
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert [title.split("\n")[0] for title in titles] == [
        "standard training (cutoff 0), dominated",
        "cutoff 0.5",
        "cutoff 1",
    ]
    arrays = next(cell.run.arrays for cell in cells if cell.run)
    copied = arrays["memorized"][arrays["random_index"][:16]]
    assert [len(axes.patches) for axes in figure.axes[:2]] == [copied.sum(), 0]
    picture = np.asarray(figure.axes[1].images[0].get_array())
    assert (picture[:8, :8] == arrays["random_nearest"][0, :, :, 0]).all()
    assert (picture[:8, 10:18] == arrays["random_nearest"][1, :, :, 0]).all()


# ------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_writes_nothing(capsys, swept, tmp_path):
    out = tmp_path / "out"
    cell = swept / "cells" / "cutoff=0,seed=0"
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "no sweep.json or config.json"),
        (
            [swept, "--quality", "fid"],
            "--quality fid: no cell has it; there are energy_heldout, energy_train",
        ),
        ([swept, "--quality", "memorized"], "--quality memorized: no cell has it"),
        (
            [swept, "--memorized", "quality.recall"],
            "--memorized quality.recall: no cell has it; there are memorized",
        ),
        ([swept, "--select", "loss.cutoff=7"], "none of the 12 cells"),
        ([swept, "--select", "loss.cutof=1"], "the nearest is --loss.cutoff"),
        ([swept, "--select", "seed"], "--select seed: give field=a,b,c"),
        ([swept, "--select", "seed=0", "seed=1"], "seed: is given twice"),
        ([swept, "--reference", "1", "nan"], "give two finite numbers"),
        ([swept, swept], "is given twice"),
        ([swept, cell], "is given twice"),
    ):
        code, said, error = front(capsys, *arguments, "--out", out)
        assert code == 2 and error.count("\n") == 1 and words in error, (arguments, error)
        assert not said and not out.exists()
    for place, words in (
        (cell, "lies in the run"),
        (cell / "deep" / "er", "lies in the run"),
        (swept / "cells" / "x", "among the cells"),
    ):
        code, _, error = front(capsys, swept, "--out", place)
        assert code == 2 and words in error and not (place / "front.json").exists()
    assert "--out: is missing" in front(capsys, swept)[2]


def test_nothing_measured_says_what_there_is(capsys, tmp_path):
    states = {"cutoff=0": "waiting", "cutoff=1": "failed"}
    write_sweep(tmp_path / "s", {"loss.cutoff": (0.0, 1.0)}, numbers, states=states)
    code, _, error = front(capsys, tmp_path / "s", "--out", tmp_path / "out")
    assert code == 2 and "no measured cells (1 not run, 1 failed)" in error


def test_damaged_files(capsys, sweep, tmp_path):
    path = sweep / "sweep.json"
    whole = path.read_text()
    for text in ("{", "[]", whole.replace('"measured"', '"melted"', 1), "{}"):
        path.write_text(text)
        code, _, error = front(capsys, sweep, "--out", tmp_path / "out")
        assert code == 2 and error.count("\n") == 1 and "sweep.json: damaged" in error, text
    path.write_text(whole)
    (sweep / "cells" / "cutoff=1,seed=0" / "audit.json").unlink()
    assert "has no audit.json" in front(capsys, sweep, "--out", tmp_path / "out")[2]


def test_a_measure_that_one_cell_lacks(capsys, sweep, tmp_path):
    add_probe(sweep / "cells" / "cutoff=1,seed=0", "quality", "frechet", 3.0, "lower")
    code, _, error = front(capsys, sweep, "--quality", "quality.frechet", "--out", tmp_path / "out")
    assert code == 2 and "cutoff=0,seed=0 does not have it" in error
