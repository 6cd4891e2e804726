"""The training loop in one process: resuming, checkpoints, divergence, averages, the run's folder.

A network of a few hundred weights stands in for the U-Net, so that a run takes about a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event

from mdiff import config
from mdiff.data.reader import make_reader
from mdiff.data.source import Images
from mdiff.data.split import split
from mdiff.data.stream import indices
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import Model
from mdiff.objectives import ambient
from mdiff.process.laws import make_process
from mdiff.recipes import runs
from mdiff.train import checkpoint, loop, mesh, metrics, optim, program, state, workdir
from mdiff.train.ledger import Ledger


class Tiny(nn.Module):
    """One hidden layer per pixel; 16 x 64 weights are too many for tensorstore to keep in its own nodes."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        h = nn.gelu(nn.Dense(16, name="a")(x) + nn.Dense(16, name="t")(c_noise[:, None])[:, None, None, :])
        return nn.Dense(x.shape[-1], name="c")(nn.gelu(nn.Dense(64, name="b")(h)))


CFG = config.Config(
    data=config.Data(n=10, heldout=5, size=4),
    train=config.Train(steps=30, batch=8, save_every=7, log_every=5, warmup=3, lr=1e-2, keep=3),
)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
SUBSET = split(CFG.data, Images("made", PIXELS, np.arange(20, dtype=np.int32)))
MODEL = Model(Tiny(), None, make_process(CFG.process), 0.5, (4, 4, 1))


class Watch:
    """A monitor that remembers, and acts when training reaches a step."""

    def __init__(self, at=None, act=None):
        self.said, self.at, self.act = [], at, act

    def progress(self, task, done, total, scalars):
        if task == "train" and done == self.at:
            self.act()

    def say(self, message):
        self.said.append(message)


def training(**fields) -> config.Config:
    return replace(CFG, train=replace(CFG.train, **fields))


def run(folder, cfg=CFG, watch=None, evaluator=None, init_from=None) -> loop.Outcome:
    objective = ambient.make(MODEL, cfg)
    return loop.train(cfg, MODEL, objective, SUBSET, Path(folder), watch or Watch(), evaluator, init_from)


def same(a, b) -> bool:
    """Bit for bit, in every leaf."""
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def loss_rows(folder: Path) -> list[int]:
    return [row["step"] for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and its final state."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, jax.device_get(run(folder).state)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------- cut and resumed


@pytest.mark.parametrize("cut", [1, 7, 13, 29])
def test_cut_anywhere_and_extended_is_bit_identical(cut, whole, tmp_path):
    run(tmp_path, training(steps=cut))
    assert saved(tmp_path)[-1] == cut
    watch = Watch()
    final = run(tmp_path, watch=watch).state
    assert f"resuming at step {cut}" in watch.said
    assert same(final, whole[1])
    rows = loss_rows(tmp_path)
    assert rows == sorted(set(rows)) and rows[-1] == 30


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_resumes_exactly(name, whole, tmp_path):
    before = signal.getsignal(signal.Signals[name])
    kill = lambda: os.kill(os.getpid(), signal.Signals[name])  # noqa: E731
    outcome = run(tmp_path, watch=Watch(10, kill))
    assert outcome.stopped == name and int(outcome.state.step) == 10
    assert signal.getsignal(signal.Signals[name]) is before
    final = run(tmp_path)
    assert final.stopped == "" and same(final.state, whole[1])


def test_signal_at_the_last_step_leaves_the_last_measurement_to_the_next_call(tmp_path):
    measured = []

    def evaluator(params, step):
        measured.append(step)
        return {"eval/memorized": 0.0}

    kill = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    cfg = training(steps=5)
    assert run(tmp_path, cfg, Watch(5, kill), evaluator).stopped == "SIGTERM"
    assert measured == [] and saved(tmp_path) == [5]
    for _ in range(2):  # the second call finds nothing left to do
        assert run(tmp_path, cfg, evaluator=evaluator).stopped == ""
    assert measured == [5]


def test_signal_while_evaluating_and_while_saving_last(tmp_path):
    def evaluator(params, step):
        if step in (4, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval/memorized": 0.0}

    cfg = training(steps=8, eval_every=4)
    first = run(tmp_path, cfg, evaluator=evaluator)
    assert first.stopped == "SIGTERM" and int(first.state.step) == 5
    assert run(tmp_path, cfg, evaluator=evaluator).stopped == ""  # nothing was left to do after step 8
    assert saved(tmp_path)[-1] == 8
    evaluated = [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl") if "eval/memorized" in row]
    assert evaluated == [4, 8]


def test_a_second_signal_kills(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job starts with Ctrl-C ignored, and "as usual" would then be nothing.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, watch=Watch(10, twice))
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved(tmp_path) == [7]


def test_death_between_checkpoints_loses_only_those_steps(whole, tmp_path):
    class Death(BaseException):
        pass

    def die():
        raise Death

    with pytest.raises(Death):
        run(tmp_path, watch=Watch(20, die))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 20, "lo')  # a line cut by the kill
    images = Ledger.load(tmp_path / "ledger.json").images
    (tmp_path / "checkpoints" / "21.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    watch = Watch()
    assert same(run(tmp_path, watch=watch).state, whole[1])
    assert "resuming at step 14" in watch.said
    assert loss_rows(tmp_path) == [5, 7, 10, 14, 15, 20, 21, 25, 28, 30]
    assert images == 14 * 8 and Ledger.load(tmp_path / "ledger.json").images == 30 * 8
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_order_evaluate_then_checkpoint_then_step(tmp_path):
    seen = []

    def evaluator(params, step):
        seen.append((step, saved(tmp_path)))
        return {"eval/x": float(np.sum(jax.device_get(params["net"]["b"]["kernel"])))}

    run(tmp_path, training(steps=8, save_every=4, eval_every=4), evaluator=evaluator)
    assert [step for step, _ in seen] == [4, 8]
    assert seen[0][1] == [] and 8 not in seen[1][1]
    row = next(r for r in metrics.read(tmp_path / "metrics.jsonl") if r["step"] == 4 and "eval/x" in r)
    with checkpoint.Checkpoints(tmp_path / "checkpoints", 3) as stored:
        restored = stored.restore(abstract(), print, only=4)
    assert restored is not None
    assert row["eval/x"] == float(np.sum(jax.device_get(restored[0].ema["net"]["b"]["kernel"])))


# ---------------------------------------------------------------------------------------- damage


def abstract():
    optimizer = optim.make_optimizer(CFG.train)
    return state.plan_state(MODEL, optimizer, CFG.seed, mesh.make_mesh(CFG.mesh))[1]


def restore(folder: Path):
    said: list[str] = []
    with checkpoint.Checkpoints(folder / "checkpoints", 3) as stored:
        return stored.restore(abstract(), said.append), said


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _garble(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _biggest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "cut array file": lambda c: _cut(_biggest(c)),
    "garbage array file": lambda c: _garble(_biggest(c)),
    "no array file": lambda c: _biggest(c).unlink(),
    "no manifest": lambda c: (c / "state/manifest.ocdbt").unlink(),
    "no tree": lambda c: (c / "state/_METADATA").unlink(),
    "garbage meta": lambda c: _garble(c / "meta/metadata"),
    "no meta": lambda c: shutil.rmtree(c / "meta"),
    "no state": lambda c: shutil.rmtree(c / "state"),
    "no sums": lambda c: (c / "sums.json").unlink(),
    "empty": lambda c: [shutil.rmtree(c), c.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over_and_said(damage, copy, capfd):
    DAMAGE[damage](copy / "checkpoints" / "30")
    capfd.readouterr()
    restored, said = restore(copy)
    assert int(restored[0].step) == 28
    assert len(said) == 2 and said[0].startswith("checkpoint 30 in") and "\n" not in said[0]
    assert said[1] == "using checkpoint 28 instead"
    assert "Traceback" not in capfd.readouterr().err


def test_every_changed_bit_is_noticed(copy):
    # Sampled over all files that hold state; tensorstore alone lets those inside large arrays pass.
    rng = np.random.default_rng(0)
    folder = copy / "checkpoints" / "30"
    files = [p for item in ("state", "meta") for p in (folder / item).rglob("*") if p.is_file()]
    assert checkpoint._damage(folder) == ""
    for file in files:
        good = file.read_bytes()
        for place in rng.integers(0, len(good), 5) if good else ():
            bad = bytearray(good)
            bad[place] ^= 1 << rng.integers(8)
            file.write_bytes(bad)
            assert file.name in checkpoint._damage(folder)
        file.write_bytes(good)
    assert checkpoint._damage(folder) == ""


def test_training_goes_on_from_the_older_one_and_ends_the_same(copy, whole):
    _garble(_biggest(copy / "checkpoints" / "30"))
    shutil.rmtree(copy / "checkpoints" / "28" / "meta")
    watch = Watch()
    assert same(run(copy, watch=watch).state, whole[1])
    assert [line.split(" in ")[0] for line in watch.said[:2]] == ["checkpoint 30", "checkpoint 28"]
    assert "resuming at step 21" in watch.said
    assert loss_rows(copy) == [5, 7, 10, 14, 15, 20, 21, 25, 28, 30]
    assert restore(copy)[1] == []  # the damaged ones are written anew


def test_none_whole_is_an_error_that_deletes_nothing(copy):
    for step in saved(copy):
        _garble(_biggest(copy / "checkpoints" / str(step)))
    before = listing(copy)
    with pytest.raises(UserError) as caught:
        run(copy)
    assert "[21, 28, 30]" in one_line(caught)
    assert listing(copy) == before


def test_unfinished_first_save_starts_over(tmp_path, whole):
    run(tmp_path, training(steps=3))
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp")
    assert same(run(tmp_path).state, whole[1])
    assert loss_rows(tmp_path)[0] == 5  # the row of step 3 is gone


def test_damaged_side_files_are_one_line(copy):
    good = (copy / "ledger.json").read_text()
    (copy / "ledger.json").write_text(good[:20])
    with pytest.raises(UserError) as caught:
        run(copy)
    assert "ledger.json: damaged" in one_line(caught)
    (copy / "ledger.json").write_text(good)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join([lines[0], "{nonsense\n", *lines[1:]]))
    with pytest.raises(UserError) as caught:
        run(copy)
    assert "metrics.jsonl: line 2" in one_line(caught)


# ---------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(CFG, seed=1), "seed was 0, is 1"),
        (replace(CFG, data=replace(CFG.data, n=9)), "data.n was 10, is 9"),
        (replace(CFG, net=replace(CFG.net, channels=64)), "net.channels was 128, is 64"),
        (replace(CFG, loss=replace(CFG.loss, cutoff=0.5)), "loss.cutoff was 0.0, is 0.5"),
        (
            replace(CFG, data=replace(CFG.data, duplicates={int(SUBSET.train.id[0]): 3})),
            "data.duplicates was {}",
        ),
    ],
)
def test_folder_of_another_run_names_the_field(other, named, copy):
    before = listing(copy)
    with pytest.raises(UserError) as caught:
        run(copy, other)
    assert named in one_line(caught)
    assert listing(copy) == before


def test_what_may_change(copy):
    cfg = replace(training(steps=32, log_every=3, keep=2), mesh=config.Mesh(data=1), name="other")
    assert int(run(copy, cfg).state.step) == 32


def test_a_run_of_before_the_newer_fields_is_the_same_run(copy, whole):
    """config.json of an older version lacks fields that now have defaults, and its digest is another one."""
    path = copy / "config.json"
    tree = json.loads(path.read_text())
    tree["config"]["loss"] = {"p_mean": -1.2, "cutoff": 0.0}
    tree["config"]["train"] = {"steps": 30, "lr": 0.01}
    path.write_text(json.dumps({**tree, "digest": "of an older version"}))
    assert same(run(copy).state, whole[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OldState:
    """The state before there were power-function averages."""

    step: jax.Array
    params: object
    ema: object
    opt_state: object


def test_a_checkpoint_of_before_the_averages_restores(tmp_path, whole):
    fresh = run(tmp_path / "new", training(steps=3)).state
    old = OldState(fresh.step, fresh.params, fresh.ema, fresh.opt_state)
    with checkpoint.Checkpoints(tmp_path / "checkpoints", 3) as stored:
        stored.save(old, {"ledger": {}})
    restored, said = restore(tmp_path)
    assert said == [] and same(restored[0], fresh) and restored[0].profiles == {}


def test_odd_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("a b/ünï çødé 漢字")
    run(folder, training(steps=2))
    assert saved(tmp_path / folder) == [2]
    (tmp_path / "file").write_text("")
    for where in ("file", "file/below", "/proc/mdiff"):
        with pytest.raises(UserError) as caught:
            run(where, training(steps=2))
        assert where in one_line(caught)


def test_read_only_folder(copy, whole):
    if subprocess.run(["mount", "--bind", copy, copy], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", copy], check=True)
        before = listing(copy)
        with pytest.raises(UserError) as caught:
            run(copy, training(steps=40))
        assert "cannot be written" in one_line(caught)
        assert same(restore(copy)[0][0], whole[1])  # reading works
        assert listing(copy) == before
    finally:
        subprocess.run(["umount", copy], check=True)


def test_no_room_for_a_checkpoint_keeps_the_last_one(tmp_path, monkeypatch, whole):
    real = shutil.disk_usage
    fill = lambda: monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=1 << 19))  # noqa: E731
    with pytest.raises(UserError) as caught:
        run(tmp_path, watch=Watch(10, fill))
    assert "checkpoints [7] are kept" in one_line(caught)
    monkeypatch.undo()
    assert same(run(tmp_path).state, whole[1])


def test_failed_write_is_one_line(tmp_path, monkeypatch, whole):
    real = checkpoint._sums

    def full(folder):
        if folder.name.startswith("14"):
            raise OSError(28, "No space left on device")
        return real(folder)

    monkeypatch.setattr(checkpoint, "_sums", full)
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    assert "No space left on device" in one_line(caught)
    monkeypatch.undo()
    assert saved(tmp_path) == [7]
    assert same(run(tmp_path).state, whole[1])


# ---------------------------------------------------------------------------------------- divergence


def test_divergence_stops_and_a_smaller_rate_resumes(tmp_path):
    run(tmp_path, training(steps=7))
    with pytest.raises(UserError) as caught:
        run(tmp_path, training(lr=1e30, clip=0.0))
    assert "diverged" in one_line(caught) and "train.lr (now 1e+30)" in str(caught.value)
    assert saved(tmp_path) == [7]
    assert int(run(tmp_path).state.step) == 30
    assert all(np.isfinite(row["loss"]) for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" in row)


def test_a_state_whose_next_step_diverges_is_not_kept(tmp_path):
    # Saving and logging at every step: the state a giant step made is saved while its own loss is unknown.
    run(tmp_path, training(steps=7))
    with pytest.raises(loop.Diverged) as caught:
        run(tmp_path, training(lr=1e30, clip=0.0, save_every=1, log_every=1))
    assert caught.value.step == 9 and saved(tmp_path) == [7]
    assert int(run(tmp_path).state.step) == 30


# ---------------------------------------------------------------------------------------- one step


def test_step_is_traced_once_and_donates(tmp_path):
    traces = []
    objective = ambient.make(MODEL, CFG)

    def counted(params, key, batch):
        traces.append(1)
        return objective(params, key, batch)

    loop.train(training(steps=6), MODEL, counted, SUBSET, tmp_path, Watch())
    assert len(traces) == 1

    device_mesh = mesh.make_mesh(CFG.mesh)
    optimizer = optim.make_optimizer(CFG.train)
    fresh, shapes = state.plan_state(MODEL, optimizer, 0, device_mesh)
    old = fresh()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), old) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    step = state.make_step(objective, optimizer, program.make_batch_fn(CFG), CFG.train, 0)
    pool = jax.device_put(make_reader(CFG, SUBSET).resident)
    rows = {"index": jnp.asarray(indices(0, 0, 8, SUBSET.slots))}
    jax.jit(step, donate_argnums=0)(old, pool, rows)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.ema)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(pool))


def test_batch_depends_on_seed_and_step_alone():
    slots = SUBSET.slots
    forward = [indices(3, step, 8, slots).tolist() for step in range(10)]
    backward = [indices(3, step, 8, slots).tolist() for step in reversed(range(10))][::-1]
    assert forward == backward and forward != [indices(4, step, 8, slots).tolist() for step in range(10)]
    assert sorted(np.concatenate(forward).tolist()) == sorted(slots.tolist() * 8)
    draws = {
        jax.random.key_data(key(seed, s, k)).tobytes()
        for seed in (0, 1)
        for s in ("batch", "train")
        for k in range(9)
    }
    assert len(draws) == 36


def test_average_halves_after_its_half_life():
    # Late: a deviation that is left alone halves every `halflife` images.
    batch, halflife = 8, 1000.0
    left = 1.0
    for step in range(5000, 5000 + int(halflife / batch)):
        left *= float(state.ema_rate(jnp.int32(step), batch, halflife))
    assert left == pytest.approx(0.5, rel=1e-4)
    # Early: the half-life is a twentieth of the images seen, so that doubling them leaves 2**-20 or so:
    # product over k = n+1..2n of 0.5**(20/k) = 0.5**(20 ln 2).
    left = np.prod([float(state.ema_rate(jnp.int32(k), batch, 1e9)) for k in range(1001, 2001)])
    assert np.log2(left) == pytest.approx(-20 * np.log(2), rel=1e-3)


def test_average_in_a_step_is_the_weighted_mean(whole):
    folder, _ = whole
    with checkpoint.Checkpoints(folder / "checkpoints", 3) as stored:
        before, _ = stored.restore(abstract(), print, only=28)
    seen = np.asarray(before.ema["net"]["b"]["kernel"], np.float64)
    cfg = training(steps=1)
    step = state.make_step(
        ambient.make(MODEL, CFG), optim.make_optimizer(cfg.train), program.make_batch_fn(CFG), cfg.train, 0
    )
    rows = {"index": jnp.asarray(indices(0, 28, 8, SUBSET.slots))}
    after, _ = jax.jit(step)(before, make_reader(CFG, SUBSET).resident, rows)
    new = np.asarray(after.params["net"]["b"]["kernel"], np.float64)
    rate = 0.5 ** (8 / (0.05 * 29 * 8))  # 5 % of the images seen is less than the half-life
    np.testing.assert_allclose(after.ema["net"]["b"]["kernel"], rate * seen + (1 - rate) * new, atol=1e-7)


@pytest.mark.parametrize(("warmup", "rates"), [(4, [0, 0.25, 0.5, 0.75, 1, 1]), (0, [1, 1, 1])])
def test_warm_up(warmup, rates):
    # Under a constant gradient Adam moves by exactly the learning rate, whatever the gradient's size.
    optimizer = optim.make_optimizer(config.Train(lr=0.1, warmup=warmup, clip=1.0))
    params, gradient = {"w": jnp.zeros(3)}, {"w": jnp.array([3.0, -40.0, 0.5])}
    memory = optimizer.init(params)
    for rate in rates:
        updates, memory = optimizer.update(gradient, memory, params)
        np.testing.assert_allclose(updates["w"], -0.1 * rate * np.sign(gradient["w"]), rtol=1e-4, atol=1e-9)
        params = optax.apply_updates(params, updates)


def test_clipping_bounds_the_gradient():
    # Before Adam: a gradient 1000 times as long leaves the same first moment when both are clipped.
    optimizer = optim.make_optimizer(config.Train(clip=1.0))
    gradient = {"w": jnp.array([3.0, 4.0])}
    _, memory = optimizer.update(gradient, optimizer.init(gradient), gradient)
    moment = next(leaf for leaf in jax.tree.leaves(memory) if leaf.shape == (2,))
    np.testing.assert_allclose(moment, 0.1 * np.array([0.6, 0.8]), rtol=1e-5)


# ---------------------------------------------------------------------------------------- fine-tuning


def test_starts_from_given_weights_and_ignores_them_on_resume(whole, tmp_path):
    given = jax.tree.map(jnp.asarray, whole[1].ema)
    kept = jax.device_get(given)
    start = run(tmp_path / "still", training(steps=1, lr=1e-30, warmup=0), init_from=given).state
    for weights in (start.params, start.ema):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-25), weights, kept)
    moved = run(tmp_path / "moved", training(steps=4), init_from=given).state
    assert same(given, kept)  # donation must not reach the caller's arrays
    assert not same(moved.params, moved.ema)
    fresh = run(tmp_path / "fresh", training(steps=4)).state
    assert not same(moved.params, fresh.params)
    assert same(run(tmp_path / "fresh", training(steps=4), init_from=given).state, fresh)


@pytest.fixture
def tiny_models(monkeypatch):
    monkeypatch.setattr(runs, "make_model", lambda cfg, channels: MODEL)


def test_load_params_of_a_run_and_of_one_checkpoint(whole, tiny_models, tmp_path, monkeypatch):
    folder, final = whole
    params, step = runs.load_params(folder, Watch(), like=MODEL)
    assert step == 30 and same(params, final.ema)
    older, step = runs.load_params(folder / "checkpoints" / "21", Watch(), like=MODEL)
    assert step == 21 and not same(older, params)
    monkeypatch.chdir(folder / "checkpoints")
    assert runs.load_params(Path("21"), Watch())[1] == 21
    for where, part in ((folder / "checkpoints" / "22", "22"), (tmp_path, "no run here")):
        with pytest.raises(UserError) as caught:
            runs.load_params(where, Watch())
        assert part in one_line(caught)
    other = replace(MODEL, net=_Wide())
    with pytest.raises(UserError) as caught:
        runs.load_params(folder, Watch(), like=other)
    assert "its network differs" in one_line(caught)


class _Wide(nn.Module):
    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        return nn.Dense(x.shape[-1], name="other")(x)


# ---------------------------------------------------------------------------------------- what is written


def _events(folder: Path) -> list[Event]:
    """TensorBoard records: length, its checksum, bytes, their checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_holds_the_same_numbers(tmp_path):
    run(tmp_path, training(steps=5))
    run(tmp_path, training(steps=10))
    events = _events(tmp_path)
    assert events[0].file_version == "brain.Event:2"
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [1, 6]
    board = {e.step: v.simple_value for e in events for v in e.summary.value if v.tag == "loss"}
    rows = {r["step"]: r["loss"] for r in metrics.read(tmp_path / "metrics.jsonl") if "loss" in r}
    assert board.keys() == rows.keys() == {5, 7, 10}
    assert all(board[step] == pytest.approx(rows[step], rel=1e-6) for step in rows)


def test_ledger_charges_inner_causes_once_and_accumulates(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 4.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    ledger = Ledger({"train": 10.0}, images=100)
    with ledger.time("train"), ledger.time("evaluate"):
        pass
    assert ledger.as_json()["seconds"] == {"train": 10.0 + 1.0 + 5.0, "evaluate": 3.0}
    assert ledger.as_json()["images_per_second"] == round(100 / 16, 2)


def test_ledger_survives_a_resume(tmp_path):
    run(tmp_path, training(steps=5))
    first = json.loads((tmp_path / "ledger.json").read_text())
    run(tmp_path, training(steps=10))
    second = json.loads((tmp_path / "ledger.json").read_text())
    assert (first["images"], second["images"]) == (40, 80)
    for cause in ("start", "compile", "train", "checkpoint"):
        assert second["seconds"][cause] > first["seconds"][cause] > 0


def test_stored_config_comes_back(whole):
    stored = workdir.read(whole[0])
    assert stored.config == CFG and stored.shape == (4, 4, 1) and stored.digest == config.digest(CFG)
