"""What noisy copies can tell: the bound against integrals, covariance algebra and an attacker, and the command."""

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special
from sklearn.covariance import ledoit_wolf
from sklearn.feature_selection import mutual_info_regression

from mdiff import cli, config
from mdiff.data import source
from mdiff.data.degrade import noise_keys, noisy_copy
from mdiff.data.split import Subset, save_subset, split
from mdiff.errors import UserError
from mdiff.probes import leakage
from mdiff.train import workdir
from mdiff.types import to_float

CUTOFFS = (0.1, 0.4, 1.0, 4.0)


def covariance(size=4, seed=0):
    """A covariance with correlations, and its eigenvalues."""
    a = np.random.default_rng(seed).normal(size=(size, size))
    sigma = a @ a.T / size
    return sigma, np.linalg.eigvalsh(sigma)


def gaussian_information(joint, first):
    """I of the first `first` variables and the others from their joint covariance: sums of log determinants."""
    logdet = [np.linalg.slogdet(block)[1] for block in (joint[:first, :first], joint[first:, first:], joint)]
    return 0.5 * (logdet[0] + logdet[1] - logdet[2])


def stack(sigma, *noises):
    """Joint covariance of x and x + each of these noises, given as matrices N: noise = N w with one white w."""
    size = len(sigma)
    a = np.concatenate([np.eye(size)] * (1 + len(noises)))
    width = max(n.shape[1] for n in noises)
    b = np.zeros((len(a), width))
    for i, n in enumerate(noises):
        b[size * (i + 1) : size * (i + 2), : n.shape[1]] = n
    return a @ sigma @ a.T + b @ b.T


# ---------------------------------------------------------------------------------- the formula (T12)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_one_value_against_the_integral(cutoff):
    """h(y) - h(y | x) of a normal x, by quadrature of -p ln p."""
    variance = 0.7
    total = math.hypot(math.sqrt(variance), cutoff)

    def entropy(std):
        def integrand(v):
            p = math.exp(-(v**2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
            return -p * math.log(p) if p > 0 else 0.0

        return integrate.quad(integrand, -12 * std, 12 * std, limit=200)[0]

    found = leakage.information(np.array([variance]), cutoff)
    assert found == pytest.approx(entropy(total) - entropy(cutoff), abs=1e-7)


def test_one_value_against_nearest_neighbours():
    """An estimate from samples alone that knows no Gaussian (Kraskov et al. 2004, in scikit-learn)."""
    rng = np.random.default_rng(0)
    x = 0.5 * rng.normal(size=4000)
    y = x + 0.4 * rng.normal(size=4000)
    estimate = mutual_info_regression(x[:, None], y, n_neighbors=5, random_state=0)[0]
    assert leakage.information(np.array([0.25]), 0.4) == pytest.approx(estimate, abs=0.05)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_several_values_against_the_joint_covariance(cutoff):
    sigma, values = covariance()
    joint = stack(sigma, cutoff * np.eye(4))
    assert leakage.information(values, cutoff) == pytest.approx(gaussian_information(joint, 4), rel=1e-9)


@pytest.mark.parametrize("draws", [2, 5])
def test_independent_draws_against_the_joint_covariance(draws):
    sigma, values = covariance()
    noise = 0.8 * np.eye(4 * draws)
    joint = stack(sigma, *(noise[4 * i : 4 * i + 4] for i in range(draws)))
    found = leakage.information(values, 0.8, draws)
    assert found == pytest.approx(gaussian_information(joint, 4), rel=1e-9)
    assert found == pytest.approx(leakage.information(values, 0.8 / math.sqrt(draws)))
    assert leakage.information(values, 0.8) < found < draws * leakage.information(values, 0.8)


@pytest.mark.parametrize("s", [0.05, 0.5, 0.9, 0.999])
def test_vp_against_the_joint_covariance(s):
    """y = sqrt(1 - s^2) x + s n."""
    sigma, values = covariance()
    alpha = math.sqrt(1 - s**2)
    joint = np.block([[sigma, alpha * sigma], [alpha * sigma, alpha**2 * sigma + s**2 * np.eye(4)]])
    assert leakage.information_vp(values, s) == pytest.approx(gaussian_information(joint, 4), rel=1e-9)


def test_published_constants():
    """Nats per value at variance 0.25."""
    found = [leakage.information(np.array([0.25]), cutoff) for cutoff in (0.1, 0.2, 0.4, 1, 2, 4)]
    np.testing.assert_allclose(found, [1.63, 0.99, 0.47, 0.112, 0.030, 0.0078], rtol=0.02)


def test_falls_with_the_cutoff_and_ends_at_the_ends():
    _, values = covariance()
    found = [leakage.information(values, cutoff) for cutoff in np.geomspace(1e-3, 1e3, 50)]
    assert np.all(np.diff(found) < 0)
    assert found[-1] == pytest.approx(values.sum() / 2e6, rel=1e-4)  # 1/2 tr Sigma / tn^2
    assert leakage.information(values, 0.0) == math.inf
    assert leakage.information(np.zeros(4), 0.5) == 0


@pytest.mark.parametrize("nats", [1e-6, 0.3, 5.0, 400.0])
def test_cutoff_for_is_the_inverse(nats):
    _, values = covariance()
    assert leakage.information(values, leakage.cutoff_for(values, nats)) == pytest.approx(nats, rel=1e-6)
    assert leakage.cutoff_for(np.zeros(3), nats) == 0


def test_other_laws_of_the_same_covariance_tell_less():
    """x = +-v: I = h(y) - h(n) by quadrature, below the Gaussian's and below ln 2; near both at their ends."""
    v = 0.8
    for cutoff, close in ((0.2, "ln 2"), (0.8, ""), (5.0, "gauss")):

        def density(y, cutoff=cutoff):
            return np.mean([np.exp(-((y - c) ** 2) / (2 * cutoff**2)) for c in (v, -v)]) / (
                cutoff * math.sqrt(2 * math.pi)
            )

        h = integrate.quad(lambda y: -special.xlogy(density(y), density(y)), -60, 60, points=(-v, v), limit=500)[0]  # fmt: skip
        exact = h - 0.5 * math.log(2 * math.pi * math.e * cutoff**2)
        bound = leakage.information(np.array([v**2]), cutoff)
        assert exact < min(bound, math.log(2)) + 1e-6
        if close == "gauss":
            assert exact == pytest.approx(bound, rel=0.02)
        if close == "ln 2":
            assert exact == pytest.approx(math.log(2), rel=0.01)
        assert bound <= leakage.unknown_law(1, cutoff)


# ---------------------------------------------------------------------- how copies hang together


def test_nested_noise_is_a_markov_chain():
    """I(x; y_s, y_t) = I(x; y_s) where y_t = y_s + more noise of its own."""
    sigma, values = covariance()
    s, t, eye = 0.5, 2.0, np.eye(4)
    walk = stack(sigma, np.hstack([s * eye, 0 * eye]), np.hstack([s * eye, math.sqrt(t**2 - s**2) * eye]))
    assert np.allclose(np.diag(walk)[8:], np.diag(sigma) + t**2)
    assert gaussian_information(walk, 4) == pytest.approx(leakage.information(values, s), rel=1e-9)


def test_fresh_noise_at_two_levels_tells_more():
    sigma, values = covariance()
    eye = np.eye(4)
    fresh = stack(sigma, np.hstack([0.5 * eye, 0 * eye]), np.hstack([0 * eye, 2.0 * eye]))
    both = gaussian_information(fresh, 4)
    assert both > leakage.information(values, 0.5)
    assert both == pytest.approx(leakage.information(values, 1 / math.sqrt(0.5**-2 + 2.0**-2)), rel=1e-9)


def left_of_x(joint, size):
    """Covariance of x given all the copies."""
    cross = joint[:size, size:]
    return joint[:size, :size] - cross @ np.linalg.pinv(joint[size:, size:], rcond=1e-10) @ cross.T


def test_the_same_noise_at_two_levels_gives_x_away():
    sigma, _ = covariance()
    same = stack(sigma, 0.5 * np.eye(4), 2.0 * np.eye(4))
    assert np.abs(left_of_x(same, 4)).max() < 1e-8
    assert left_of_x(stack(sigma, 0.5 * np.eye(4)), 4).trace() > 0.1


def test_the_same_noise_on_image_and_mirror_image_gives_half_of_x_away():
    """x + n and flip(x) + n: their difference has no noise, so x - flip(x) is known exactly."""
    sigma, _ = covariance()
    mirror = np.eye(4)[::-1]
    a, b = (
        np.concatenate([np.eye(4), np.eye(4), mirror]),
        np.concatenate([0 * np.eye(4), np.eye(4), np.eye(4)]),
    )
    left = left_of_x(a @ sigma @ a.T + b @ b.T, 4)
    odd = (np.eye(4) - mirror) / 2
    assert np.abs(odd @ left @ odd.T).max() < 1e-8 < np.abs(left).max()


def test_a_mirrored_copy_tells_nothing_new_and_a_copy_of_the_mirror_image_is_a_second_draw():
    sigma, values = covariance()
    mirror, zero, eye = np.eye(4)[::-1], 0 * np.eye(4), np.eye(4)
    a = np.concatenate([eye, eye, mirror])
    drawn = np.concatenate([zero, eye, mirror])  # flip(x + n)
    left = left_of_x(a @ sigma @ a.T + drawn @ drawn.T, 4)
    np.testing.assert_allclose(left, left_of_x(stack(sigma, eye), 4), atol=1e-8)
    anew = np.block([[zero, zero], [eye, zero], [zero, eye]])  # flip(x) + n'
    assert gaussian_information(a @ sigma @ a.T + anew @ anew.T, 4) == pytest.approx(
        leakage.information(values, 1.0, 2), rel=1e-9
    )


# ------------------------------------------------------------------------------------- covariances


@pytest.fixture(scope="module")
def faces():
    return source.load("faces", 16).x


def test_spectra_against_numpy_and_scikit_learn(faces):
    for x in (faces, faces[:, :8, :8]):  # fewer and more images than values
        rows = np.float64(to_float(x)).reshape(len(x), -1)
        found = leakage.spectra(x)
        n = len(rows)
        np.testing.assert_allclose(found.sample, np.linalg.eigvalsh(np.cov(rows.T)), atol=1e-6)
        shrunk, weight = ledoit_wolf(rows)  # with divisor n
        np.testing.assert_allclose(found.shrunk, np.linalg.eigvalsh(shrunk) * n / (n - 1), atol=1e-6)
        assert found.shrinkage == pytest.approx(weight, rel=1e-4)
        for name in leakage.COVARIANCES:
            assert found.of(name).sum() == pytest.approx(rows.var(0, ddof=1).sum(), rel=1e-6)
        for cutoff in CUTOFFS:
            three = [leakage.information(found.of(name), cutoff) for name in leakage.COVARIANCES]
            assert three == sorted(three) and len(set(three)) == 3


def test_few_images_tell_too_little_by_their_own_covariance():
    """Jensen: the sample covariance is unbiased, its log det is not; isotropic is above the truth."""
    rng = np.random.default_rng(0)
    values = np.geomspace(1e-3, 0.5, 48)
    truth = leakage.information(values, 0.4)
    found = [
        leakage.spectra(np.clip(np.sqrt(values) * rng.normal(size=(20, 48)), -9, 9).reshape(20, 4, 4, 3))
        for _ in range(30)
    ]
    sample = [leakage.information(each.sample, 0.4) for each in found]
    assert max(sample) < truth
    assert min(leakage.information(each.isotropic, 0.4) for each in found) > truth
    many = leakage.spectra((np.sqrt(values) * rng.normal(size=(20000, 48))).reshape(-1, 4, 4, 3))
    assert leakage.information(many.sample, 0.4) == pytest.approx(truth, rel=0.01)
    assert leakage.information(many.shrunk, 0.4) == pytest.approx(truth, rel=0.01)


def test_intervals_hold_the_truth_where_images_are_many():
    rng = np.random.default_rng(1)
    values = np.geomspace(0.01, 0.4, 12)
    truth, inside = leakage.information(values, 0.5), 0
    for _ in range(60):
        x = (np.sqrt(values) * rng.normal(size=(400, 12))).reshape(400, 2, 2, 3)
        nats = leakage.leakage(x, [0.5], covariance="sample").bounds[0].nats
        inside += nats.low <= truth <= nats.high
    assert inside >= 50


def test_images_without_variation_tell_nothing():
    found = leakage.leakage(np.full((5, 4, 4, 1), 9, np.uint8), [0.5], candidates=10)
    assert found.bounds[0].nats.value == found.bounds[0].nats.high == 0 == found.identifies_below
    assert (
        leakage.leakage(np.zeros((2, 2, 2, 1)), [0.5]).bounds[0].nats.high == math.inf
    )  # nothing to leave out


@pytest.mark.parametrize("cutoff", [0.4, 1.0, 2.0, 4.0, 8.0])
def test_an_attacker_with_all_images_learns_less_than_the_bound(faces, cutoff):
    """Exactly how much mdiff's own copies tell about which face it is: ln n less the entropy of the posterior."""
    x = jnp.asarray(to_float(faces))
    rows, keys = np.float64(x).reshape(100, -1), noise_keys(faces)
    told, right = [], []
    for seed in range(30):
        y = np.float64(noisy_copy(x, keys, cutoff, seed)).reshape(100, -1)
        logits = (y @ rows.T - (rows**2).sum(1) / 2) / cutoff**2  # less ||y||^2, the same for all
        posterior = special.softmax(logits, axis=1)
        told.append(math.log(100) - special.entr(posterior).sum(1).mean())
        right.append(np.mean(posterior.argmax(1) == np.arange(100)))
    nats = np.mean(told)
    bound = leakage.leakage(faces, [cutoff], covariance="sample", candidates=100).bounds[0]
    assert nats < bound.capped
    if cutoff >= 4:
        assert nats > 0.8 * bound.nats.value  # and the bound is close where the noise is wide
    if cutoff == 0.4:
        assert nats > 0.999 * bound.capped == pytest.approx(0.999 * math.log(100))
    # Fano: I of that little leaves at least so many mistaken.
    assert 1 - np.mean(right) >= 1 - (bound.capped + math.log(2)) / math.log(100)


# ------------------------------------------------------------------------------------- of a run


def run_of(loss=None, data=None, images=None, **fields):
    cfg = config.Config(
        data=replace(config.Data(n=10, heldout=5, size=8), **(data or {})),
        loss=replace(config.Loss(), **(loss or {})),
        train=config.Train(steps=100, batch=20),
        **fields,
    )
    return cfg, split(cfg.data, source.load("faces", 8) if images is None else images)


def test_budget_of_one_cutoff():
    cfg, subset = run_of({"cutoff": 0.4}, {"flip": True, "shift": 1})
    found = leakage.budget(cfg, subset)
    assert found.levels == ((0.4, 10),) and found.clean == found.exposed == 0
    assert found.epochs == 200 and found.isometries == 18 and not found.whole
    _, values = covariance()
    assert found.total(values) == pytest.approx(10 * leakage.information(values, 0.4))
    never, _ = run_of({"cutoff": 0.4, "clean": "never"})
    assert leakage.budget(never, subset).whole


def test_budget_of_cutoffs_by_image_and_by_stage():
    cfg, subset = run_of()
    first, second = (int(i) for i in subset.train.id[:2])
    cfg, subset = run_of({"cutoff": 1.0, "cutoff_of": {first: 0.5, second: 0.0}, "clean": "never"})
    found = leakage.budget(cfg, subset)
    assert found.levels == ((0.5, 1), (1.0, 8)) and found.clean == 1 and not found.whole
    cfg, subset = run_of({"cutoff_stages": {0: 4.0, 50: 0.5, 80: 2.0}})
    assert leakage.budget(cfg, subset).levels == ((0.5, 10),)
    cfg, subset = run_of({"cutoff_stages": {0: 4.0, 50: 0.0}})
    assert leakage.budget(cfg, subset).clean == 10
    cfg, subset = run_of({"cutoff": 1.0, "clean_share": 0.3})
    assert leakage.budget(cfg, subset).levels == ((1.0, 7),) and leakage.budget(cfg, subset).clean == 3
    for loss in ({}, {"cutoff": 1.0, "clean": "always"}):
        found = leakage.budget(*run_of(loss))
        assert found.levels == () and found.clean == 10


def test_budget_counts_pictures_not_ids():
    """Duplicates and mirror images share the noise; a crop has its own. One noise at two levels is exposed."""
    _, subset = run_of({"cutoff": 1.0})
    a, b, c = (int(i) for i in subset.train.id[:3])
    planted = {"duplicates": {a: 5}, "planted_flips": {b: 2}}
    assert leakage.budget(*run_of({"cutoff": 1.0}, planted)).levels == ((1.0, 10),)
    assert leakage.budget(*run_of({"cutoff": 1.0}, {"planted_crops": {c: 2}})).levels == ((1.0, 12),)
    images = source.load("faces", 8)
    twice = images.x.copy()
    twice[b] = twice[a][:, ::-1]
    both = replace(images, x=twice)
    assert leakage.budget(*run_of({"cutoff": 1.0}, images=both)).levels == ((1.0, 9),)
    found = leakage.budget(*run_of({"cutoff": 1.0, "cutoff_of": {a: 2.0}}, images=both))
    assert found.exposed == 1 and found.levels == ((1.0, 8),)


# ------------------------------------------------------------------------------------- the command


def mdiff(capsys, *arguments):
    code = cli.main(["leakage", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def stored_run(folder, loss, **data):
    """A run's record, without training it."""
    cfg, subset = run_of(loss, data)
    workdir.write(folder, cfg, (8, 8, 1), 1)
    save_subset(folder / "subset.json", subset, cfg.data)
    return cfg, subset


def test_command_of_a_source(faces, tmp_path, capsys):
    out = tmp_path / "deep" / "leakage.json"
    code, shown, _ = mdiff(
        capsys, "--source", "faces", "--size", 16, "--n", 100, "--cutoff", 0.4, 1, 4, "--draws", 10, "--out", out
    )  # fmt: skip
    assert code == 0
    tree = json.loads(out.read_text())
    assert [(b["cutoff"], b["draws"]) for b in tree["bounds"]] == [
        (level, m) for level in (0.4, 1.0, 4.0) for m in (1, 2, 10)
    ]
    rows = np.float64(to_float(faces)).reshape(100, -1)
    shrunk = ledoit_wolf(rows)[0] * 100 / 99
    first = tree["bounds"][0]
    assert first["nats"]["value"] == pytest.approx(
        0.5 * np.linalg.slogdet(np.eye(256) + shrunk / 0.4**2)[1], rel=1e-5
    )
    assert first["bits"] == pytest.approx(first["nats"]["value"] / math.log(2))
    assert first["per_value"] == pytest.approx(first["nats"]["value"] / 256)
    assert first["total"] == pytest.approx(100 * first["nats"]["value"])
    assert first["capped"] == pytest.approx(math.log(100))
    assert f"{first['nats']['value']:.4g}" in shown and "any law" in shown
    assert tree["run"] is None and tree["candidates"] == 100


def test_command_of_a_run(tmp_path, capsys):
    stored_run(tmp_path / "run", {"cutoff": 0.5})
    code, shown, _ = mdiff(capsys, "--workdir", tmp_path / "run", "--out", tmp_path / "l.json")
    tree = json.loads((tmp_path / "l.json").read_text())
    assert code == 0
    assert {b["cutoff"] for b in tree["bounds"]} == {0.5}
    assert {b["draws"] for b in tree["bounds"]} == {1, 2, 10, 100, 200}
    assert tree["run"]["levels"] == [[0.5, 10]] and tree["candidates"] == 100 and tree["images"] == 10
    assert "200" in shown and f"at most {tree['bounds'][0]['total']:.4g} nats" in " ".join(shown.split())


def test_command_says_what_has_no_bound(tmp_path, capsys):
    stored_run(tmp_path / "plain", {})
    code, _, err = mdiff(capsys, "--workdir", tmp_path / "plain")
    assert code == 2 and "without a cutoff" in err and "--cutoff" in err and len(err.splitlines()) == 1
    code, shown, _ = mdiff(capsys, "--workdir", tmp_path / "plain", "--cutoff", 1)
    assert code == 0 and "No bound for 10 images" in " ".join(shown.split())
    stored_run(tmp_path / "never", {"cutoff": 1.0, "clean": "never"})
    code, shown, _ = mdiff(capsys, "--workdir", tmp_path / "never")
    assert code == 0 and "never sees a clean image" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--source", "missing", "--workdir"]),
        (["--source", "faces", "--cutoff", "0"], ["cutoff 0", "plain training"]),
        (["--source", "faces", "--cutoff", "-1"], ["cutoff -1", "above 0"]),
        (["--source", "faces", "--cutoff", "nan"], ["cutoff nan", "above 0"]),
        (["--source", "faces", "--cutoff", "inf"], ["cutoff inf", "above 0"]),
        (["--source", "faces", "--cutoff", "x"], ["--cutoff x", "number"]),
        (["--source", "facs"], ["--source", "'facs'", "faces"]),
        (["--source", "faces", "--draws", "-3"], ["draws -3", "1 or more"]),
        (["--source", "faces", "--draws", "1.5"], ["--draws", "whole number"]),
        (["--source", "faces", "--n", "101"], ["--n 101", "100 images"]),
        (["--source", "faces", "--n", "1"], ["--n 1", "2 or more"]),
        (["--source", "faces", "--size", "0"], ["--source", "size to 1 or more"]),
        (["--source", "faces", "--candidates", "1"], ["--candidates 1", "2 or more"]),
        (["--source", "faces", "--confidence", "1"], ["--confidence 1", "0.95"]),
        (["--source", "faces", "--covariance", "true"], ["--covariance", "shrunk, sample, isotropic"]),
        (["--source", "faces", "--out", "l.txt"], ["--out l.txt", ".json"]),
        (["--source", "faces", "--workdir", "x"], ["--source faces", "--workdir"]),
        (["--workdir", "nowhere"], ["nowhere", "no run here"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown, err = mdiff(capsys, *arguments)
    assert code == 2 and not shown and len(err.splitlines()) == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_a_covariance_needs_two_images():
    with pytest.raises(UserError, match="1 given"):
        leakage.spectra(np.zeros((1, 4, 4, 1), np.uint8))


def test_disk_sets_are_not_hashed(monkeypatch):
    cfg, subset = run_of({"cutoff": 1.0})
    monkeypatch.setattr(leakage, "noise_keys", None)
    on_disk = replace(cfg, data=replace(cfg.data, reading="disk"))
    assert leakage.budget(on_disk, Subset(subset.train, subset.heldout, subset.slots)).levels == ((1.0, 10),)
