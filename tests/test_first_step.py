"""The first step with neurons on and off: batched, cut and sharded forms against plain calls of the network."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from child_env import child_env

from mdiff import config
from mdiff.data.captions import END, PAD, START
from mdiff.errors import UserError
from mdiff.nemo import Nemo, Similarity
from mdiff.nets.denoiser import make_model
from mdiff.probes import alike, units
from mdiff.probes.first_step import FirstStep, token_weights
from mdiff.train import mesh

NET = config.Net(
    channels=8,
    mults=(1, 2),
    blocks=1,
    attention=(8,),
    text=16,
    text_blocks=1,
    text_length=6,
    vocabulary=300,
    cross=(16, 8),
)
CFG = Nemo(layers="value_gate|hidden_gate", seeds=3, batch=2, similarity=Similarity(window=7))


def tokens(rows: int) -> np.ndarray:
    out = np.full((rows, 6), PAD, np.int32)
    for i, row in enumerate(out):
        row[: 3 + i % 2] = [START, 10 + i, *[20 + i] * (i % 2), END]
    return out


def world(cfg: Nemo = CFG, pattern: str = CFG.layers, on: config.Mesh = config.Mesh(data=1)):
    model = make_model(config.Config(data=config.Data(size=16), net=NET), 3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)  # fresh networks end in almost nothing; here the text has to matter
    params = jax.tree.unflatten(tree, [rng.normal(0, 0.15, leaf.shape).astype(np.float32) for leaf in leaves])
    return FirstStep(model, params, units.discover(model, pattern), cfg, mesh.make_mesh(on))


@pytest.fixture(scope="module")
def first():
    made = world()
    looked = made.look(tokens(4))
    kept = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], bool)
    made.prompts(looked, kept)
    return made


def gates_without(first: FirstStep, off: np.ndarray, factor: float = 0.0):
    """Gates built by hand, leaf by leaf."""
    gates = jax.tree.map(np.array, first.units.ones)
    for neuron in np.flatnonzero(off):
        name, index = first.units.place(int(neuron))
        leaf = gates
        for part in name.split("/"):
            leaf = leaf[part]
        leaf["gate"][index] = factor
    return gates


@pytest.fixture(scope="module")
def answer(first):
    """`(tokens [L], gates) -> Prediction` for every seed, by the network's own calls."""

    @jax.jit
    def call(row, gates):
        rows = jnp.repeat(row[None], first.cfg.seeds, axis=0)
        cond = first.model.condition(first.params, {"tokens": rows}, gates=gates["text"])
        return first.model.apply(first.params, first.xt, first.t, cond, gates["net"])[0]

    return call


def test_the_difference_is_that_of_noise_and_start(first, answer):
    """eps - xT / sigma, which is what delta is for noise of unit variance, up to what cancellation leaves of it."""
    eps = answer(tokens(1)[0], first.units.ones).eps
    noise = np.asarray(first.xt) / first.model.process.sigma_max
    assert noise.std() == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(first.looked.delta[0], np.asarray(eps) - noise, atol=2e-6)
    assert np.abs(first.looked.delta[0]).max() > 1e-4


def test_seeds_have_the_same_noise_for_every_prompt_and_any_number_of_them():
    few, many = world(), world(Nemo(layers=CFG.layers, seeds=5, similarity=CFG.similarity))
    np.testing.assert_array_equal(few.xt, many.xt[:3])
    assert np.abs(np.corrcoef(many.xt.reshape(5, -1)) - np.eye(5)).max() < 0.15


def test_pairs_and_what_is_kept(first):
    looked = first.looked
    for prompt in range(4):
        for i in range(3):
            for j in range(3):
                one = alike.similarity(looked.delta[prompt, i], looked.delta[prompt, j], CFG.similarity)
                assert looked.pairs[prompt, i, j] == pytest.approx(float(one), abs=1e-5)
    best = np.array([[max(p[i, j] for j in range(3) if j != i) for i in range(3)] for p in looked.pairs])
    tau = float(np.median(best))
    np.testing.assert_array_equal(looked.kept(tau), best > tau)
    assert looked.score == pytest.approx(best.max(1))
    assert len(looked.scores("pairs")) == 4 * 3


def test_every_ablation_scores_as_by_hand_in_any_company(first, answer):
    rng = np.random.default_rng(0)
    prompt = np.array([0, 2, 2, 1, 3, 0, 1])
    off = rng.random((7, len(first.units))) < rng.choice([0.02, 0.3, 0.7], (7, 1))
    off[4] = False
    got = first.evaluate(prompt, off)
    for k in range(7):
        whole = first.looked.delta[prompt[k]]
        ablated = (
            -answer(first.looked.tokens[prompt[k]], gates_without(first, off[k])).x0
            / first.model.process.sigma_max
        )
        each = np.asarray(alike.similarity(jnp.asarray(whole), jnp.asarray(ablated), CFG.similarity))
        assert got[k] == pytest.approx(each[first.kept[prompt[k]]].max(), abs=2e-5), k
    assert got[4] == pytest.approx(1, abs=1e-5)
    assert got.min() < 0.995  # far more than the tolerance
    np.testing.assert_allclose(first.evaluate(prompt[::-1], off[::-1]), got[::-1], atol=1e-6)


def test_a_cut_network_gives_the_same_scores(first):
    """Neurons switched on one after the other from the end of the network, as refinement does: prefixes are taken from memory."""
    off = np.random.default_rng(1).random(len(first.units)) < 0.4
    sets = []
    for neuron in np.flatnonzero(off)[::-25]:
        off = off.copy()
        off[neuron] = False
        sets.append(off)
    first.prompts(first.looked, first.kept)
    one_by_one = [float(first.evaluate(np.array([1]), each[None])[0]) for each in sets]
    assert first._carries  # some were cut
    for each, score in zip(sets, one_by_one, strict=True):
        first.prompts(first.looked, first.kept)  # forgets: the whole network
        assert float(first.evaluate(np.array([1]), each[None])[0]) == pytest.approx(score, abs=2e-6)


def test_the_search_switches_off_whatever_becomes_of_the_neurons_later(first):
    """`factor` is for images."""
    other = world(dataclasses.replace(CFG, factor=-1.0))
    other.prompts(first.looked, first.kept)
    off = np.random.default_rng(2).random((2, len(first.units))) < 0.4
    first.prompts(first.looked, first.kept)
    np.testing.assert_array_equal(other.evaluate(np.arange(2), off), first.evaluate(np.arange(2), off))


def test_gradient_is_the_slope_of_what_the_text_adds_halfway(first, answer):
    """Between all neurons on and all off."""
    got = first.gradient(np.array([1]))[0]
    row, sigma = first.looked.tokens[1], first.model.process.sigma_max
    nothing = np.array([START, END, PAD, PAD, PAD, PAD])
    added = first.looked.delta[1] + np.asarray(answer(nothing, first.units.ones).x0) / sigma

    def along(neuron: int, factor: float) -> float:
        gates = gates_without(first, first.units.off(np.arange(len(first.units))), 0.5)
        name, index = first.units.place(neuron)
        leaf = functools.reduce(lambda tree, part: tree[part], name.split("/"), gates)
        leaf["gate"][index] = factor
        x0 = answer(row, gates).x0
        each = np.sum(-np.asarray(x0, np.float64) / sigma * added, axis=(1, 2, 3))
        return float(each[first.kept[1]].sum())

    strongest = np.argsort(-np.abs(got))[:5]
    slack = 0.02 * float(np.abs(got).max())
    for neuron in [*strongest, 0, len(got) - 1]:
        slope = (along(neuron, 0.55) - along(neuron, 0.45)) / 0.1
        assert float(got[neuron]) == pytest.approx(slope, rel=0.02, abs=slack), neuron


def test_activations_are_those_of_the_value_projection(first):
    rows = tokens(4)
    cond = np.asarray(first.model.condition(first.params, {"tokens": rows}), np.float64)
    name = "net/enc8_0/cross/value_gate"
    kernel = np.asarray(first.params["net"]["enc8_0"]["cross"]["to_value"]["map"]["kernel"], np.float64)
    start = first.units.number(name, 0)
    want = np.abs(cond @ kernel).mean(1)
    np.testing.assert_allclose(first.looked.activation[:, start : start + want.shape[1]], want, rtol=1e-4)
    words = (
        world(Nemo(layers=name, tokens="words", seeds=3, similarity=CFG.similarity), name)
        .look(rows)
        .activation
    )
    want = np.stack([np.abs(c @ kernel)[1 : 2 + i % 2].mean(0) for i, c in enumerate(cond)])
    np.testing.assert_allclose(words, want, rtol=1e-4)


def test_token_groups():
    row = np.array([[START, 7, 8, END, PAD, PAD]])
    groups = {
        name: np.flatnonzero(token_weights(jnp.asarray(row), name)[0])
        for name in ("all", "words", "end", "padding")
    }
    assert [list(groups[name]) for name in groups] == [[0, 1, 2, 3, 4, 5], [1, 2], [3], [4, 5]]
    assert float(token_weights(jnp.asarray(row), "padding").sum()) == pytest.approx(1)


def test_layers_come_in_the_order_they_run(first):
    names = [name for name in first.units.names if name.endswith("cross/value_gate")]
    assert names == [f"net/{block}/cross/value_gate" for block in (
        "enc16_0", "enc8_0", "mid8_0", "dec8_0", "dec8_1", "dec16_0", "dec16_1")]  # fmt: skip
    assert first.units.names[0].startswith("text/")
    for neuron in (0, 17, len(first.units) - 1):
        assert first.units.number(*first.units.place(neuron)) == neuron


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda first: units.discover(first.model, "no such"), "matches no layer"),
        (lambda first: units.discover(first.model, "("), "no regular expression"),
        (lambda first: first.units.place(10**6), "numbered from 0"),
        (lambda first: first.units.number("net/nowhere", 0), "not among the layers"),
        (lambda first: first.units.number(first.units.names[0], 999), "the layer has"),
    ],
)
def test_wrong_words(first, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(first)
    assert "\n" not in str(error.value)


def test_a_model_without_text_has_no_cross_attention():
    model = make_model(
        config.Config(data=config.Data(size=16), net=config.Net(channels=8, mults=(1,), blocks=1)), 1
    )
    with pytest.raises(UserError, match="no cross-attention"):
        units.discover(model, Nemo().layers)


SHARDED = """
import json, jax, numpy as np
import test_first_step as t
from mdiff import config
first = t.world(on=config.Mesh(data=1, trial=8))
first.prompts(first.look(t.tokens(4)), np.ones((4, 3), bool))
rng = np.random.default_rng(0)
prompt, off = np.array([0, 2, 1, 3, 1]), rng.random((5, len(first.units))) < 0.3
lanes = [first.looked.tokens[prompt], first.looked.delta[prompt], first.kept[prompt], off]
rows = np.arange(16) % 5
text = first._program(0).lower(first.params, *first._spread([lane[rows] for lane in lanes])).compile().as_text()
words = [w for w in ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter") if w in text]
print(json.dumps({"scores": first.evaluate(prompt, off).tolist(), "collectives": words}))
"""


def test_eight_devices_score_alike_and_send_nothing(first, tmp_path):
    env = {**child_env(tmp_path), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["collectives"] == []
    first.prompts(first.looked, np.ones((4, 3), bool))
    rng = np.random.default_rng(0)
    off = rng.random((5, len(first.units))) < 0.3
    np.testing.assert_allclose(found["scores"], first.evaluate(np.array([0, 2, 1, 3, 1]), off), atol=2e-5)
