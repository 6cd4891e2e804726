"""Power-function averages: profiles by quadrature, the recurrence by its weights, averages made after training."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from test_train import MODEL, Watch, compile_once, run, saved, training  # noqa: F401

from mdiff import config
from mdiff.errors import UserError
from mdiff.recipes import runs
from mdiff.train import checkpoint, ema, loop, mesh, optim, snapshots, state
from mdiff.trees import named_leaves


def profile(gamma, t):
    """p(tau) on [0, t], written out."""
    return lambda tau: (gamma + 1) * tau**gamma / t ** (gamma + 1) if tau <= t else 0.0


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Programs here run for a second: optimizing them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.15, 0.25, 12**-0.5])
def test_gamma_gives_the_profile_its_width(sigma_rel):
    p = profile(ema.gamma(sigma_rel), 1.0)
    moments = [quad(lambda tau, k=k: tau**k * p(tau), 0, 1, epsabs=1e-13)[0] for k in range(3)]
    assert moments[0] == pytest.approx(1, abs=1e-9)
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(sigma_rel, rel=1e-6)


def test_gamma_of_the_paper():
    """arXiv 2312.02696, section 3.1: lengths of 5 % and 10 % of training."""
    assert ema.gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert ema.gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert ema.gamma(12**-0.5) == pytest.approx(0, abs=1e-9)


def test_inner_products_by_quadrature():
    for (t_a, g_a), (t_b, g_b) in [((3, 6.9), (3, 6.9)), ((2, 17.0), (5, 1.8)), ((7, 0.4), (4, 16.9))]:
        p, q = profile(g_a, t_a), profile(g_b, t_b)
        expected = quad(lambda tau, p=p, q=q: p(tau) * q(tau), 0, min(t_a, t_b), epsabs=1e-13)[0]
        assert float(ema.inner(t_a, g_a, t_b, g_b)) == pytest.approx(expected, rel=1e-8)


def test_recurrence_is_the_weighted_sum_of_the_history():
    rng = np.random.default_rng(0)
    steps, lengths = 400, (0.05, 0.1, 0.25)
    history = np.cumsum(rng.normal(size=(steps, 3)), 0).astype(np.float32)
    start = {ema.name(length): {"w": jnp.full(3, 1e4)} for length in lengths}  # must be forgotten at once

    def body(profiles, at):
        return ema.update(profiles, {"w": at[1]}, at[0], lengths), None

    averages, _ = jax.jit(lambda h: jax.lax.scan(body, start, (jnp.arange(1, steps + 1), h)))(history)
    for length in lengths:
        p = profile(ema.gamma(length), steps)
        weights = np.array([quad(p, i, i + 1)[0] for i in range(steps)])
        assert weights.sum() == pytest.approx(1, abs=1e-7)
        expected = weights @ history.astype(np.float64)
        np.testing.assert_allclose(averages[ema.name(length)]["w"], expected, rtol=1e-3, atol=5e-3)


def test_late_steps_keep_their_digits():
    """1 - (1 - 1/t)^(gamma + 1) at t = 3e6, where a float32 beta would round to 1 - k 6e-8."""
    for length in (0.05, 0.25):
        gamma, t = ema.gamma(length), 3_000_000
        got = float(jax.jit(lambda step, g=gamma: ema.share(step, g))(jnp.int32(t)))
        assert got == pytest.approx(1 - (1 - 1 / np.longdouble(t)) ** np.longdouble(gamma + 1), rel=1e-5)
    assert float(ema.share(jnp.int32(1), 6.9)) == 1.0


# --------------------------------------------------------------------------------- the weights


def on_grid(t, gamma, grid):
    """The profile's mean over each cell of a fine grid."""
    rise = np.minimum(grid, t) ** (gamma + 1) / t ** (gamma + 1)
    return np.diff(rise) / np.diff(grid)


def test_weights_are_those_of_a_constrained_least_squares_on_a_grid():
    times, gammas = np.repeat([200.0, 500.0, 700.0, 1000.0], 2), np.tile([16.97, 6.94], 4)
    time, target = 1000.0, ema.gamma(0.15)
    grid = np.linspace(0, 1000, 20_001)
    columns = np.stack([on_grid(t, g, grid) for t, g in zip(times, gammas, strict=True)], 1)
    wanted = on_grid(time, target, grid)
    # The constraint by elimination: w_0 = 1 - the others.
    rest = np.linalg.lstsq(columns[:, 1:] - columns[:, :1], wanted - columns[:, 0], rcond=None)[0]
    fit = ema.solve(times, gammas, time, target)
    np.testing.assert_allclose(fit.weights, np.append(1 - rest.sum(), rest), rtol=2e-3, atol=2e-3)
    misfit = np.linalg.norm(columns @ fit.weights - wanted) / np.linalg.norm(wanted)
    assert fit.misfit == pytest.approx(misfit, rel=1e-3)
    assert fit.weights.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_average_is_its_own_reconstruction():
    times, gammas = np.repeat(np.arange(1, 101) * 50.0, 2), np.tile([16.97, 6.94], 100)
    fit = ema.solve(times, gammas, 5000.0, 6.94)
    np.testing.assert_allclose(fit.weights, np.eye(200)[-1], atol=1e-6)
    assert fit.misfit < 1e-6


def test_misfit_is_the_error_under_independent_scatter():
    """What `solve` reports against simulated weights: noise about a mean, averaged and reconstructed."""
    rng = np.random.default_rng(0)
    every, steps = 100, 800
    times, gammas = np.repeat(np.arange(every, steps + 1, every), 2), np.tile([16.972, 6.937], steps // every)
    target = ema.gamma(0.2)
    fit = ema.solve(times, gammas, steps, target)
    edges = np.arange(steps + 1.0)
    stored = np.stack([on_grid(t, g, edges) for t, g in zip(times, gammas, strict=True)])
    history = 5.0 + rng.normal(size=(steps, 20_000))
    direct, made = on_grid(steps, target, edges) @ history, fit.weights @ stored @ history
    assert (made - direct).std() / (direct - 5.0).std() == pytest.approx(fit.misfit, rel=0.03)
    assert abs((made - 5.0).mean()) < 4 * made.std() / 20_000**0.5
    assert 0.03 < fit.misfit < 0.2


def test_more_snapshots_express_more():
    def misfit(count, length):
        times = np.repeat(np.arange(1, count + 1) * 10_000 / count, 2)
        return ema.solve(times, np.tile([16.972, 6.937], count), 10_000, ema.gamma(length)).misfit

    assert misfit(1, 0.15) > 0.2 and misfit(8, 0.15) < 0.04 and misfit(64, 0.15) < 0.001
    assert misfit(16, 0.25) > snapshots.MAX_MISFIT > misfit(32, 0.25)
    assert misfit(200, 0.02) < 0.01


# ------------------------------------------------------------------------------- a training run

TRACKED, THIRD, EVERY, STEPS = (0.05, 0.1), (0.075, 0.15, 0.2), 8, 240


def averaging(**fields):
    own = dict(
        steps=STEPS,
        ema_lengths=TRACKED,
        ema_every=EVERY,
        save_every=100,
        log_every=40,
        keep=5,
        warmup=3,
        lr=1e-2,
    )
    return training(**{**own, **fields})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that stores two averages, and the same run with all five tracked as it goes."""
    folder = tmp_path_factory.mktemp("kept")
    final = run(folder / "two", averaging()).state
    direct = run(folder / "all", averaging(ema_lengths=TRACKED + THIRD, ema_every=0)).state
    return folder / "two", final, direct


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.sqrt(sum(np.sum((np.float64(x) - np.float64(y)) ** 2) for x, y in pairs))


def test_tracking_changes_nothing_else(kept):
    _, two, everything = kept
    for part in ("params", "ema", "opt_state"):
        for a, b in zip(
            jax.tree.leaves(getattr(two, part)), jax.tree.leaves(getattr(everything, part)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("length", THIRD)
def test_a_third_length_is_reconstructed(length, kept):
    folder, two, everything = kept
    made = snapshots.load_average(folder, length, two, averaging(), print)
    direct = everything.profiles[ema.name(length)]
    # In units of what choosing the nearest tracked length instead would cost.
    nearest = min(distance(direct, two.profiles[ema.name(each)]) for each in TRACKED)
    assert distance(made, direct) < 0.02 * nearest
    assert distance(made, direct) < 1e-3 * distance(direct, jax.tree.map(jnp.zeros_like, direct))


def test_single_precision_is_needed(kept):
    """Why snapshots are float32: stored as float16 or bfloat16 the error is several times as large."""
    folder, two, everything = kept
    abstract = jax.eval_shape(lambda s: snapshots.snapshot(s), two)
    place = next(iter(jax.tree.leaves(two))).sharding
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    with snapshots.Snapshots(folder) as stored:
        parts = [stored.read(at, abstract)[0] for at in stored.steps()]
    direct = everything.profiles["0.15"]
    weights = snapshots._weights(list(range(EVERY, STEPS + 1, EVERY)), STEPS, ema.gamma(0.15), TRACKED, "")
    errors = {}
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        rounded = [jax.tree.map(lambda x, d=dtype: x.astype(d).astype(x.dtype), part) for part in parts]
        errors[dtype] = distance(snapshots.reconstruct(rounded, weights), direct)
    assert errors[jnp.float32] < errors[jnp.float16] < errors[jnp.bfloat16]


def test_a_tracked_length_is_returned_as_it_is(kept):
    folder, two, _ = kept
    assert snapshots.load_average(folder, 0.1, two, averaging(), print) is two.profiles["0.1"]


def test_loading_a_run_offers_every_length(kept, monkeypatch):
    folder, two, _ = kept
    monkeypatch.setattr(runs, "make_model", lambda cfg, channels: MODEL)
    said = Watch()
    for length in (0.1, 0.15):
        params, step = runs.load_params(folder, said, ema=length)
        expected = snapshots.load_average(folder, length, two, averaging(), print)
        assert step == STEPS and distance(params, expected) == 0
    assert distance(runs.load_params(folder, said)[0], two.ema) == 0


def test_an_earlier_checkpoint_uses_what_was_stored_until_then(kept):
    """At step 100: 12 snapshots and the checkpoint's own averages, nothing of the future."""
    folder = kept[0]
    at, length = 100, 0.15
    device_mesh = mesh.make_mesh(config.Mesh())
    plan = lambda cfg: state.plan_state(  # noqa: E731
        MODEL, optim.make_optimizer(cfg.train), cfg.seed, device_mesh, cfg.train.ema_lengths
    )[1]
    with checkpoint.open_run(folder, averaging().train) as stored:
        early = stored.restore(plan(averaging()), print, only=at)[0]
    made = snapshots.load_average(folder, length, early, averaging(), print)
    shorter = run(folder.parent / "short", averaging(steps=at, ema_lengths=(length,), ema_every=0)).state
    direct = shorter.profiles[ema.name(length)]
    nearest = min(distance(direct, early.profiles[ema.name(each)]) for each in TRACKED)
    assert distance(made, direct) < 0.05 * nearest


def message(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        snapshots.load_average(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_made_is_refused(kept, tmp_path):
    folder, two, _ = kept
    cfg = averaging()
    assert "sample.ema = 0.3: must be above 0 and at most 0.2887" in message(folder, 0.3, two, cfg, print)
    narrow = message(folder, 0.005, two, cfg, print)
    assert "sample.ema = 0.005" in narrow and "relative error of" in narrow and "0.05, 0.1" in narrow
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ema")
    assert "kept at 1 steps" in message(tmp_path / "run", 0.2, two, cfg, print)
    without = replace(two, profiles={})
    assert "without train.ema_lengths" in message(folder, 0.1, without, cfg, print)
    other = replace(cfg, seed=7)
    assert "belongs to another run" in message(folder, 0.15, two, other, print)


def test_a_damaged_snapshot_is_passed_over_and_said(kept, tmp_path):
    folder, two, everything = kept
    shutil.copytree(folder, tmp_path / "run")
    victim = max((tmp_path / "run/ema/120").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-9])
    said = []
    made = snapshots.load_average(tmp_path / "run", 0.15, two, averaging(), said.append)
    assert len(said) == 1 and "120" in said[0]
    direct = everything.profiles["0.15"]
    assert distance(made, direct) < 0.1 * distance(direct, two.profiles["0.1"])


# ---------------------------------------------------------------------------- resuming and folders


def snapshot_bytes(folder: Path):
    """Every leaf of every snapshot, as bytes."""
    found = {}
    with snapshots.Snapshots(folder) as stored:
        for at in stored.steps():
            tree = stored._manager.restore(at)["state"]
            found[at] = {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree)}
    return found


def test_cut_and_killed_runs_store_the_same_snapshots(tmp_path):
    """With muon, a schedule and averages; the last cut is between a checkpoint and a later snapshot."""
    fields = dict(steps=30, ema_every=4, optimizer="muon", weight_decay=0.01, schedule="cosine", decay_steps=30,
                  save_every=7, log_every=5)  # fmt: skip
    whole = jax.device_get(run(tmp_path / "whole", averaging(**fields)).state)
    assert sorted(whole.profiles) == ["0.05", "0.1"]

    class Death(BaseException):
        pass

    def die():
        raise Death

    run(tmp_path / "cut", averaging(**{**fields, "steps": 8}))
    with pytest.raises(Death):
        run(tmp_path / "cut", averaging(**fields), watch=Watch(20, die))
    with snapshots.Snapshots(tmp_path / "cut") as stored:
        assert stored.steps()[-1] == 16 and saved(tmp_path / "cut")[-1] == 14
    final = jax.device_get(run(tmp_path / "cut", averaging(**fields)).state)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    ours, theirs = snapshot_bytes(tmp_path / "cut"), snapshot_bytes(tmp_path / "whole")
    assert list(ours) == list(range(4, 29, 4)) and ours == theirs
    # A snapshot that a kill left unwritten is written by the next call, from the checkpoint of its step.
    shutil.rmtree(tmp_path / "cut/ema/28")
    shutil.rmtree(tmp_path / "cut/checkpoints/30")
    run(tmp_path / "cut", averaging(**fields))
    assert snapshot_bytes(tmp_path / "cut") == theirs


def test_divergence_discards_snapshots_too(tmp_path):
    fields = dict(steps=8, ema_every=1, save_every=4, log_every=1)
    run(tmp_path, averaging(**fields))
    with pytest.raises(loop.Diverged):
        run(tmp_path, averaging(**{**fields, "steps": 20, "lr": 1e30, "clip": 0.0}))
    with snapshots.Snapshots(tmp_path) as stored:
        assert stored.steps() == list(range(1, 9))


def test_the_tree_without_averages_is_the_old_one():
    plan = lambda lengths: state.plan_state(  # noqa: E731
        MODEL, optim.make_optimizer(config.Train()), 0, mesh.make_mesh(config.Mesh()), lengths
    )[1]
    names = [name for name, _ in named_leaves(plan(()))]
    assert {name.split("/")[0] for name in names} == {"step", "params", "ema", "opt_state"}
    assert [n for n, _ in named_leaves(plan((0.05,)))][: len(names)] == names
    # No branch at all: checkpoints record empty ones.
    paths = jax.tree_util.tree_structure(plan(())).num_nodes
    four = (1, 2, 3, 4)
    bare = jax.tree_util.tree_structure(state.TrainState(*four)).num_nodes
    assert bare == 5 and paths > bare


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "adamw"}, "train.optimizer = adam,"),
        ({"ema_lengths": (0.2,)}, "train.ema_lengths = (0.05, 0.1),"),
    ],
)
def test_a_run_keeps_its_optimizer_and_its_lengths(fields, words, kept, tmp_path):
    shutil.copytree(kept[0], tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", averaging(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_room_for_the_snapshots_is_asked_for_first(tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=10_000_000))
    with pytest.raises(UserError) as caught:
        run(tmp_path, averaging(steps=100_000, ema_every=1))
    assert "snapshots of train.ema_every" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ema_lengths": (0.05, 0.3)}, "train.ema_lengths = 0.3"),
        ({"ema_lengths": (0.0,)}, "train.ema_lengths = 0"),
        ({"ema_lengths": (-0.1,)}, "train.ema_lengths = -0.1"),
        ({"ema_lengths": (float("nan"),)}, "train.ema_lengths = nan"),
        ({"ema_lengths": (0.05, 0.05)}, "a length occurs twice"),
        ({"ema_every": -1}, "train.ema_every = -1"),
        ({"ema_every": 10}, "set train.ema_lengths"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        state.check(config.Train(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    state.check(config.Train(ema_lengths=(0.05, 0.1), ema_every=100))


def test_fine_tuning_starts_the_averages_too(tmp_path, kept):
    start = jax.device_get(kept[1].ema)
    final = run(tmp_path, averaging(steps=1, lr=1e-30, warmup=0, ema_every=0), init_from=start).state
    for weights in (final.ema, *final.profiles.values()):
        assert distance(weights, start) < 1e-6
