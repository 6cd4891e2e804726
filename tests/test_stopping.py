"""Early stopping: the rule, the loop's way back, kills, raised limits, and trials side by side that end apart."""

import math
import os
import signal

import jax
import numpy as np
import pytest
import test_train as lab

from mdiff import config
from mdiff.errors import UserError
from mdiff.objectives import ambient
from mdiff.train import side_by_side, state, stopping
from mdiff.train.trials import Program, Trial


def scripted(values, name="memorized"):
    """An evaluator that finds what it is told to find at each step."""

    def evaluate(params, step):
        evaluate.asked.append(step)
        return {f"eval/{name}": values[step], "eval/other": 1.0}

    evaluate.asked = []
    return evaluate


RISING = {5: 0.0, 10: 0.05, 15: 0.3, 20: 0.6, 25: 0.8, 30: 0.9}


def stopping_at(limit, **fields):
    return lab.training(eval_every=5, save_every=100, keep=1, stop_when={"memorized": limit}, **fields)


def evaluations(folder):
    rows = [row for row in lab.metrics.read(folder / "metrics.jsonl") if "eval/memorized" in row]
    return {row["step"]: row["eval/memorized"] for row in rows}


# ----------------------------------------------------------------------------------------- the rule


def test_the_first_limit_that_is_left_is_named():
    scalars = {"eval/memorized": 0.2, "eval/gap": 1.4}
    assert (
        stopping.exceeded({"memorized": 0.2, "gap": 1.5}, scalars, 7, 5) is None
    )  # at the limit is within it
    found = stopping.exceeded({"memorized": 0.3, "gap": 1.39}, scalars, 7, 5)
    assert found == stopping.Stopped(7, "gap", 1.4, 1.39, 5)
    assert str(found) == "gap 1.4 at step 7 is above 1.39: stopped early; the state of step 5 is kept"
    untrained = str(stopping.exceeded({"gap": 1.0}, scalars, 7, 0))
    assert untrained.endswith("step 0 is kept, the untrained one: lower train.eval_every")
    assert str(stopping.Stopped(7, "quality", 1.0, 0.5, 0)).endswith("raise train.eval_every")
    assert stopping.exceeded({"gap": 1.5}, {"eval/gap": math.nan}, 7, 5).measure == "gap"


def test_the_record_holds_until_its_limit_is_raised(tmp_path):
    stopping.save(tmp_path, stopping.Stopped(7, "gap", 1.4, 1.39, 5))
    for limits, stands in (
        ({"gap": 1.39}, True),
        ({"gap": 1.0, "memorized": 1.0}, True),
        ({"gap": 1.4}, False),
        ({}, False),
    ):
        assert (stopping.load(tmp_path, config.Train(stop_when=limits)) is not None) == stands
    stopping.save(tmp_path, stopping.Stopped(7, "gap", math.nan, 1.39, 5))
    assert math.isnan(stopping.load(tmp_path, config.Train(stop_when={"gap": 99.0})).value)
    stopping.forget(tmp_path)
    assert stopping.load(tmp_path, config.Train(stop_when={"gap": 1.0})) is None
    (tmp_path / stopping.FILE).write_text("{}")
    with pytest.raises(UserError, match=r"stopped.json: damaged .* delete it"):
        stopping.load(tmp_path, config.Train(stop_when={"gap": 1.0}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"stop_when": {"memorised": 0.1}},
            "train.stop_when: memorised: is not measured; there are memorized, control",
        ),
        ({"stop_when": {"gap@3": 1.5}}, "train.stop_when: gap@3: is not measured"),
        ({"stop_when": {"gap": 1.5}, "eval_levels": ()}, "gap: needs noise levels in train.eval_levels"),
        ({"stop_when": {"memorized": math.inf}}, "memorized inf: give a finite limit"),
        ({"stop_when": {"memorized": 0.1}, "eval_every": 0}, "nothing is measured while training"),
        ({"eval_levels": (0.5, -1.0)}, "train.eval_levels = (0.5, -1.0): noise levels are above 0"),
    ],
)
def test_bad_limits_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        state.check(config.Train(**{"eval_every": 5, **fields}))
    assert words in lab.one_line(caught)
    state.check(config.Train(eval_every=5, stop_when={"gap@0.5": 1.5, "memorized": 0.1}))


def test_limits_without_held_out_images():
    with pytest.raises(
        UserError, match=r"train.stop_when: gap: is measured against held-out images, of which there are 1"
    ):
        stopping.check_data(config.Train(stop_when={"memorized": 0.1, "gap": 2.0}), 1)
    stopping.check_data(config.Train(stop_when={"memorized": 0.1}), 0)


# ----------------------------------------------------------------------------------------- the loop


def test_the_last_state_within_the_limits_is_kept(tmp_path):
    watch, evaluate = lab.Watch(), scripted(RISING)
    found = lab.run(tmp_path / "early", stopping_at(0.1), watch, evaluate)
    assert (found.stopped, found.early) == ("", stopping.Stopped(15, "memorized", 0.3, 0.1, 10))
    assert evaluate.asked == [5, 10, 15]
    assert lab.saved(tmp_path / "early") == [10]
    assert int(found.state.step) == 10
    plain = lab.run(tmp_path / "plain", lab.training(steps=10))
    assert lab.same(found.state, plain.state)
    assert watch.said[-1].startswith(
        "memorized 0.3 at step 15 is above 0.1: stopped early; the state of step 10"
    )
    assert evaluations(tmp_path / "early") == {5: 0.0, 10: 0.05, 15: 0.3}  # what ended it stays on record


def test_the_same_command_again_does_not_train_on(tmp_path):
    cfg = stopping_at(0.1)
    first = lab.run(tmp_path, cfg, evaluator=scripted(RISING))
    before = lab.listing(tmp_path)
    watch, evaluate = lab.Watch(), scripted(RISING)
    again = lab.run(tmp_path, cfg, watch, evaluate)
    assert again.early == first.early and evaluate.asked == []
    assert lab.same(again.state, first.state)
    assert "raise train.stop_when to go on" in watch.said[-1]
    changed = {name for name, data in lab.listing(tmp_path).items() if before.get(name) != data}
    assert not {name for name in changed if not name.startswith(("ledger", "tensorboard"))}


def test_a_raised_limit_goes_on_as_if_never_stopped(tmp_path, whole):
    lab.run(tmp_path, stopping_at(0.1), evaluator=scripted(RISING))
    evaluate = scripted(RISING)
    found = lab.run(tmp_path, stopping_at(0.7), evaluator=evaluate)
    assert found.early == stopping.Stopped(25, "memorized", 0.8, 0.7, 20)
    assert evaluate.asked == [15, 20, 25]
    done = lab.run(tmp_path, lab.training(eval_every=5, save_every=100), evaluator=scripted(RISING))
    assert done.early is None
    assert lab.same(done.state, whole[1])
    assert evaluations(tmp_path) == RISING
    assert not (tmp_path / stopping.FILE).exists()


def test_nothing_within_the_limits_leaves_the_untrained_state(tmp_path):
    found = lab.run(tmp_path, stopping_at(0.1), evaluator=scripted({5: 0.5}))
    assert found.early.kept == 0 and lab.saved(tmp_path) == [0]
    assert int(found.state.step) == 0


def test_leaving_a_limit_at_the_very_end_counts(tmp_path):
    values = {**RISING, 15: 0.0, 20: 0.0, 25: 0.0}
    found = lab.run(tmp_path, stopping_at(0.1), evaluator=scripted(values))
    assert found.early.step == 30 and lab.saved(tmp_path) == [25]


@pytest.mark.parametrize("when", ["before the record", "before the discard"])
def test_killed_while_it_ends(when, tmp_path, monkeypatch):
    """Gone between any two of measuring, recording and discarding, the run ends as it would have."""
    cfg = stopping_at(0.1)

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        if when == "before the record":
            patch.setattr(stopping, "save", kill)
        else:
            patch.setattr(lab.checkpoint.Checkpoints, "discard_after", _after_two(kill))
        with pytest.raises(Killed):
            lab.run(tmp_path, cfg, evaluator=scripted(RISING))
    found = lab.run(tmp_path, cfg, evaluator=scripted(RISING))
    assert found.early == stopping.Stopped(15, "memorized", 0.3, 0.1, 10)
    assert lab.saved(tmp_path) == [10]


def _after_two(kill):
    original, calls = lab.checkpoint.Checkpoints.discard_after, []

    def discard(self, step):
        calls.append(step)
        return original(self, step) if len(calls) < 2 else kill()

    return discard


@pytest.mark.parametrize(("values", "kept"), [(RISING, 10), ({**RISING, 15: 0.0}, 15)])
def test_a_signal_that_comes_with_a_measurement_changes_nothing(values, kept, tmp_path):
    """The loop stops before it measures step 15; the next call does so first."""
    cfg = stopping_at(0.1)
    stop = lab.Watch(15, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found = lab.run(tmp_path, cfg, stop, scripted(values))
    assert (found.stopped, found.early, int(found.state.step)) == ("SIGTERM", None, 15)
    evaluate = scripted(values)
    found = lab.run(tmp_path, cfg, evaluator=evaluate)
    assert evaluate.asked[0] == 15 and found.early.kept == kept
    assert lab.saved(tmp_path)[-1] == kept


def test_a_signal_while_the_measurement_that_ends_it_runs_is_passed_on(tmp_path):
    """A sweep must hear of it."""

    def evaluate(params, step):
        if step == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval/memorized": RISING[step]}

    found = lab.run(tmp_path, stopping_at(0.1), evaluator=evaluate)
    assert found.stopped == "SIGTERM" and found.early.kept == 10 and lab.saved(tmp_path) == [10]


def test_killed_between_the_record_and_the_row(tmp_path, monkeypatch):
    cfg = stopping_at(0.1)
    write = lab.metrics.Metrics.write

    def killed(self, step, scalars):
        if step == 15 and "eval/memorized" in scalars:
            raise SystemExit
        write(self, step, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(lab.metrics.Metrics, "write", killed)
        with pytest.raises(SystemExit):
            lab.run(tmp_path, cfg, evaluator=scripted(RISING))
    evaluate = scripted(RISING)
    assert lab.run(tmp_path, cfg, evaluator=evaluate).early.kept == 10
    assert evaluate.asked == [] and lab.saved(tmp_path) == [10]


def test_a_run_that_is_beyond_its_new_limits_is_left_alone(tmp_path):
    lab.run(tmp_path, lab.training(steps=20, eval_every=5), evaluator=scripted(RISING))
    before = lab.listing(tmp_path)
    with pytest.raises(UserError) as caught:
        lab.run(tmp_path, stopping_at(0.5), evaluator=scripted(RISING))
    assert "memorized 0.5: the run in" in lab.one_line(caught)
    assert "is beyond it already (0.6 at step 20); raise the limit" in str(caught.value)
    assert lab.listing(tmp_path) == before
    found = lab.run(tmp_path, stopping_at(0.7), evaluator=scripted(RISING))
    assert found.early.kept == 20


def test_limits_that_are_younger_than_the_run(tmp_path):
    """The state they begin with is kept when the first measurement leaves them."""
    lab.run(tmp_path, lab.training(steps=12, save_every=100))
    found = lab.run(tmp_path, stopping_at(0.1), evaluator=scripted(RISING))
    assert found.early.kept == 12 and lab.saved(tmp_path) == [12]


# -------------------------------------------------------------------------------------- side by side


def test_a_trial_that_ends_early_disturbs_no_neighbour(tmp_path):
    """One after another through one program; each as `loop.train` would end it."""
    scripts = {"a": RISING, "b": dict.fromkeys(RISING, 0.0)}
    trials = [
        Trial(
            name, config.Config(**{**lab.CFG.__dict__, "seed": seed, "train": stopping_at(0.1).train}), lab.MODEL,
            ambient.make, lab.SUBSET, tmp_path / name, lab.Watch(), scripted(scripts[name]),
        )
        for seed, name in enumerate("ab")
    ]  # fmt: skip
    program = Program(trials, 1)
    clock = side_by_side.Clock()
    for trial in trials:
        stopped, (fate,) = side_by_side.train(program, [trial], 0, lambda line: None, clock)
        assert stopped == ""
        assert fate.diverged is None
        alone = lab.run(tmp_path / f"{trial.name}-alone", trial.cfg, evaluator=scripted(scripts[trial.name]))
        assert fate.early == alone.early
        kept = 10 if trial.name == "a" else 30
        assert lab.saved(trial.folder)[-1] == kept
        assert evaluations(trial.folder) == evaluations(tmp_path / f"{trial.name}-alone")
        restored = restore(trial.folder, trial.cfg, program.abstract)
        for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(alone.state), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6)


def restore(folder, cfg, abstract):
    with lab.checkpoint.open_run(folder, cfg.train) as found:
        return found.restore(abstract, print)[0]


compile_once = lab.compile_once
whole = lab.whole
