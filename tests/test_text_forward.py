"""Text encoder, cross-attention, feed-forward and the whole text U-Net against float64 numpy; gates as factors of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_text
import pytest

from mdiff import config
from mdiff.data.captions import END, PAD, START
from mdiff.nets.cross import CrossAttention, FeedForward
from mdiff.nets.denoiser import make_model
from mdiff.nets.text import TextEncoder
from mdiff.trees import map_named, named_leaves

LENGTH, VOCABULARY = 6, 300
TOKENS = np.array([[START, 7, 8, 9, END, PAD], [START, 9, END, PAD, PAD, PAD]], np.int32)
EMPTY = np.array([START, END, PAD, PAD, PAD, PAD], np.int32)
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # of the compiler's backend; the values are the same
RNG = np.random.default_rng(1)
XT = RNG.normal(size=(2, 8, 8, 2)).astype(np.float32)
SIGMA = np.array([0.3, 2.0])


def arbitrary(shapes, seed=0):
    """Parameters drawn with numpy: nothing to compile, and no path is near zero."""
    rng = np.random.default_rng(seed)
    return map_named(
        lambda name, s: np.float32(name.endswith("scale") + 0.3 * rng.normal(size=s.shape)), shapes
    )


def equal(ours, expected, within=1e-4):
    """To `within` of the largest number there is, or of 1."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=within * max(1.0, np.abs(expected).max()))


def factors(gates, seed=3):
    """Gates between -1 and 1, a third of them off."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda g: np.float32(rng.choice([0, 0.75, -1], g.shape)), gates)


def scale(p, entry, by, axis):
    """Multiplies a kernel, along its inputs (0) or outputs (1), and with the outputs its bias."""
    node = p[entry]["map"]
    node["kernel"] = node["kernel"] * (by if axis else by[:, None])
    if axis and "bias" in node:
        node["bias"] = node["bias"] * by


def cross_in_weights(params, gates):
    """Parameters with the gates multiplied in, so that nothing is left for a gate to do."""
    p = jax.tree.map(np.array, params)
    for name in ("query", "key", "value"):
        scale(p, f"to_{name}", gates[f"{name}_gate"]["gate"], 1)
    return p


def feed_in_weights(params, gates):
    p = jax.tree.map(np.array, params)
    scale(p, "mlp_out", gates["hidden_gate"]["gate"], 0)
    return p


def text_in_weights(params, gates):
    p = jax.tree.map(np.array, params)
    for name, block in gates.items():
        by = block["attention"]["value_gate"]["gate"]
        scale(p[name]["attention"], "qkv", np.concatenate([np.ones(2 * len(by)), by]), 1)
        scale(p[name], "mlp_out", block["hidden_gate"]["gate"], 0)
    return p


class Encoder:
    def __init__(self, width):
        self.module = TextEncoder(width, 2, LENGTH, VOCABULARY)
        variables = jax.eval_shape(
            lambda: self.module.init({"params": jax.random.key(0)}, {"tokens": TOKENS}, 2)
        )
        self.params, self.gates = arbitrary(variables["params"], width), variables["gates"]
        self.apply = jax.jit(
            lambda tokens, gates: self.module.apply(
                {"params": self.params, "gates": gates}, {"tokens": tokens}, len(tokens)
            )
        )
        self.on = jax.tree.map(lambda g: np.ones(g.shape, np.float32), self.gates)


@pytest.fixture(scope="module", params=[16, 64], ids=["one_head", "two_heads"])
def encoder(request):
    return Encoder(request.param)


def test_the_encoder_equals_numpy(encoder):
    ours = encoder.apply(TOKENS, encoder.on)
    assert ours.dtype == jnp.float32 and ours.shape == (2, LENGTH, encoder.module.width)
    equal(ours, numpy_text.encode(encoder.params, TOKENS))


def test_no_caption_and_a_dropped_one_are_the_empty_one(encoder):
    def call(tokens):
        apply = encoder.module.apply
        dropped = apply({"params": encoder.params}, {"tokens": tokens}, 2, jnp.array([False, True]))
        return dropped, apply({"params": encoder.params}, {}, 2)

    dropped, null = jax.jit(call)(TOKENS)
    nothing = numpy_text.encode(encoder.params, EMPTY[None])[0]
    equal(dropped, np.stack([numpy_text.encode(encoder.params, TOKENS)[0], nothing]))
    equal(null, np.stack([nothing] * 2))
    assert np.abs(null[0] - dropped[0])[1:].max(-1).min() > 1e-2


def test_a_token_changes_its_own_and_later_positions_alone(encoder):
    base = np.array([START, 5, 6, 7, 8, END], np.int32)
    changed = np.tile(base, (LENGTH + 1, 1))
    changed[np.arange(LENGTH), np.arange(LENGTH)] = 200  # row i differs at position i, the last row nowhere
    out = np.asarray(encoder.apply(changed, encoder.on))
    moved = np.abs(out[:-1] - out[-1]).max(-1)
    np.testing.assert_array_less(moved[np.tril_indices(LENGTH, -1)], 1e-6)
    assert moved[np.triu_indices(LENGTH)].min() > 1e-3


def test_encoder_gates_are_factors_of_weights(encoder):
    gates = factors(encoder.gates)
    ours = encoder.apply(TOKENS, gates)
    equal(ours, numpy_text.encode(text_in_weights(encoder.params, gates), TOKENS))
    assert np.abs(ours - encoder.apply(TOKENS, encoder.on)).max() > 0.1


def module_case(module, *given):
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *given))
    return arbitrary(variables["params"], 5), factors(variables["gates"])


@pytest.mark.parametrize(("head", "width"), [(0, 0), (4, 0), (0, 20), (4, 24)])
def test_cross_attention_equals_numpy(head, width):
    """Pixels of a map that is not square, and texts of another length and width than they have."""
    x, text = (
        RNG.normal(size=(2, 3, 5, 16)).astype(np.float32),
        RNG.normal(size=(2, 7, 12)).astype(np.float32),
    )
    module = CrossAttention(head, 1e-5, width=width)
    params, gates = module_case(module, x, text)
    assert all(gate.shape == (width or 16,) for gate in jax.tree.leaves(gates))
    apply = jax.jit(module.apply)
    equal(apply({"params": params}, x, text), numpy_text.cross_attention(params, x, text, head, 1e-5))
    weights = cross_in_weights(params, gates)
    expected = numpy_text.cross_attention(weights, x, text, head, 1e-5)
    equal(apply({"params": params, "gates": gates}, x, text), expected)
    assert np.abs(expected - numpy_text.cross_attention(params, x, text, head, 1e-5)).max() > 0.1


def test_a_bias_on_one_token_leaves_it_alone_to_be_seen():
    x, text = RNG.normal(size=(1, 2, 2, 8)).astype(np.float32), RNG.normal(size=(1, 4, 8)).astype(np.float32)
    module = CrossAttention()
    params, _ = module_case(module, x, text)
    bias = {"bias": np.float32([0, 0, 50, 0])}
    ours = jax.jit(module.apply)({"params": params, "attn_bias": bias}, x, text)
    equal(ours, numpy_text.cross_attention(params, x, text[:, 2:3], 0, 1e-6))


def test_feed_forward_equals_numpy():
    x = RNG.normal(size=(2, 3, 5, 12)).astype(np.float32)
    module = FeedForward()
    params, gates = module_case(module, x)
    apply = jax.jit(module.apply)
    equal(apply({"params": params}, x), numpy_text.feed_forward(params, x, 1e-6))
    expected = numpy_text.feed_forward(feed_in_weights(params, gates), x, 1e-6)
    equal(apply({"params": params, "gates": gates}, x), expected)


class Net:
    """A whole network with arbitrary parameters and one compiled call of it."""

    def __init__(self, arch, head, width):
        self.net = config.Net(
            arch=arch, channels=8, mults=(1, 2), blocks=1, attention=(4,), head_channels=head, cross=(8, 4),
            cross_channels=width, text=16, text_blocks=1, text_length=LENGTH, vocabulary=VOCABULARY,
        )  # fmt: skip
        self.model = make_model(config.Config(data=config.Data(size=8), net=self.net), 2)
        self.params = arbitrary(jax.eval_shape(self.model.init, jax.random.key(0)))
        t = self.model.process.time(jnp.float32(SIGMA))

        def call(tokens, text_gates, gates):
            cond = self.model.condition(self.params, {"tokens": tokens}, gates=text_gates)
            return self.model.apply(self.params, XT, t, cond, gates)[0].x0

        self.apply = jax.jit(call, compiler_options=FAST_COMPILE)

    def expected(self, params, tokens):
        return numpy_text.denoise(params, self.net, XT, SIGMA, tokens)


@pytest.fixture(scope="module", params=[("ddpmpp", 0, 0), ("adm", 4, 12)], ids=["ddpmpp", "adm"])
def net(request):
    return Net(*request.param)


def test_the_network_equals_numpy(net):
    on = net.model.text_gates(), net.model.gates()
    ours, expected = net.apply(TOKENS, *on), net.expected(net.params, TOKENS)
    equal(ours, expected)
    swapped = net.expected(net.params, TOKENS[::-1])
    assert np.abs(swapped - expected).max() > 0.01 * np.abs(expected).max()  # text matters here
    equal(net.apply(TOKENS[::-1], *on), swapped)


def test_blocks_with_cross_attention_are_those_of_down_middle_and_up(net):
    found = {name.split("/")[0] for name, _ in named_leaves(net.params["net"]) if "/cross/" in name}
    assert found == {"enc8_0", "enc4_0", "mid4_0", "dec4_0", "dec4_1", "dec8_0", "dec8_1"}


def test_gates_are_factors_of_weights(net):
    """A neuron of NeMo is off as if its column of `to_value` were zero, and so for keys, queries and hidden units."""
    gates, text_gates = net.model.gates(), factors(net.model.text_gates(), 4)
    params = jax.tree.map(np.array, net.params)
    changed = factors(gates)
    for name, block in gates.items():
        if "cross" in block:
            block.update({part: changed[name][part] for part in ("cross", "feed")})
            own = params["net"][name]
            own["cross"] = cross_in_weights(own["cross"], block["cross"])
            own["feed"] = feed_in_weights(own["feed"], block["feed"])
    params["embedding"] = text_in_weights(params["embedding"], text_gates)
    expected = net.expected(params, TOKENS)
    equal(net.apply(TOKENS, text_gates, gates), expected)
    assert np.abs(expected - net.expected(net.params, TOKENS)).max() > 0.01 * np.abs(expected).max()
