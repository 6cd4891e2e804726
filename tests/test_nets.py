"""Every architecture against float64 numpy, and its contracts: gates, taps, biases, types, recomputation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_networks
import pytest

from mdiff import config, flops
from mdiff.errors import UserError
from mdiff.nets.denoiser import make_model
from mdiff.nets.layers import rematerialize
from mdiff.nets.sizes import SIZES
from mdiff.nets.unet import Block
from mdiff.trees import map_named, named_leaves

UNET = {"channels": 8, "mults": (1, 2), "blocks": 1, "attention": (4,), "head_channels": 4}
NETS = {
    "ddpmpp": {**UNET, "head_channels": 0},
    "ncsnpp": UNET,
    "adm": UNET,
    "dit": {"channels": 16, "blocks": 2, "patch": 2, "head_channels": 8},
}
ARCHS = tuple(NETS)
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # of the compiler's backend; the values are the same


def model_of(arch="ddpmpp", size=8, channels=2, **net):
    net = config.Net(arch=arch, **{**NETS[arch], "classes": 3, **net})
    return make_model(config.Config(data=config.Data(size=size), net=net), channels)


def arbitrary(model, seed=0):
    """Parameters drawn with numpy: nothing to compile, and no path is near zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return map_named(
        lambda name, s: np.float32(name.endswith("scale") + 0.3 * rng.normal(size=s.shape)), shapes
    )


def shallow(arch, **net):
    """The smallest network of its kind: a U-Net with a single level."""
    single = {} if arch == "dit" else {"mults": (1,), "attention": (8,), "scan_safe": True}
    return model_of(arch, **single, **net)


def x0_by_numpy(model, params, cond):
    """The preconditioned network at XT and SIGMA, in float64."""
    cfg, s = model.net.cfg, SIGMA[:, None, None, None]
    network = numpy_networks.dit if cfg.arch == "dit" else numpy_networks.unet
    raw = network(params["net"], cfg, XT / np.sqrt(s**2 + 0.25), np.log(SIGMA) / 4, cond)
    return 0.25 / (s**2 + 0.25) * XT + 0.5 * s / np.sqrt(s**2 + 0.25) * raw


XT = np.random.default_rng(1).normal(size=(2, 8, 8, 2)).astype(np.float32)
SIGMA = np.array([0.3, 2.0])
CHECKED = ("hidden", "branch", "value", "emb0", "emb1")


def per_example(name, gate):
    """A gate [C] (of a DiT's blocks [L,C]) as one with its own entry per example."""
    if name.startswith("emb"):
        return np.ones((2, *gate.shape), np.float32)
    if name.startswith("blocks"):
        return np.ones((gate.shape[0], 2, 1, gate.shape[1]), np.float32)
    middle = (1,) if "attention" in name else (1, 1)
    return np.ones((2, *middle, *gate.shape), np.float32)


def no_bias(arch, names):
    """Zero attention biases for every attention layer, as a tree."""
    tree = {}
    for name in names:
        if name.endswith("attention/map"):
            *path, _ = name.split("/")
            shape = (2, 1, 1, 16, 16) if arch == "dit" else (16, 16)
            node = functools.reduce(lambda t, part: t.setdefault(part, {}), path, tree)
            node["bias"] = np.zeros(shape, np.float32)
    return tree


class Case:
    """One architecture with arbitrary parameters and one compiled call that takes all it can be told."""

    def __init__(self, arch):
        self.arch, self.model = arch, model_of(arch)
        self.params = arbitrary(self.model)
        self.gates = map_named(per_example, self.model.gates())
        self.t = self.model.process.time(jnp.float32(SIGMA))
        shapes = jax.eval_shape(lambda: self.model.apply(self.params, XT, self.t, taps=("*",))[1])
        self.bias = no_bias(arch, shapes)
        self.cond = self.model.condition(self.params, {"label": jnp.array([0, 2])})

        def call(gates, cond, bias):
            out, tapped = self.model.apply(self.params, XT, self.t, cond, gates, bias, taps=("*",))
            return jnp.sum(out.x0 * XT), (out.x0, tapped)

        # Parameters are closed over, so that the compiler sees constants, and one compilation serves all tests.
        self.run = jax.jit(
            jax.value_and_grad(call, argnums=(0, 1), has_aux=True), compiler_options=FAST_COMPILE
        )
        (_, (self.x0, self.tapped)), self.gradients = self.run(self.gates, self.cond, self.bias)


@pytest.fixture(scope="module", params=ARCHS)
def case(request):
    return Case(request.param)


def test_network_equals_numpy(case):
    expected = x0_by_numpy(case.model, case.params, np.float64(case.cond))
    np.testing.assert_allclose(case.x0, expected, atol=1e-3 * np.abs(expected).max())


def test_every_gate_silences_its_neuron_for_its_example(case):
    for name, gate in named_leaves(case.gates):
        tap = name.replace("out_gate/gate", "branch").replace("_gate/gate", "")
        off = np.array(gate)
        first = (0, 0) if case.arch == "dit" and name.startswith("blocks") else (0,)
        off[(*first, ..., 0)] = 0  # example 0 (of block 0), channel 0
        gates = map_named(lambda n, g, name=name, off=off: off if n == name else g, case.gates)
        (_, (x0, tapped)), _ = case.run(gates, case.cond, case.bias)
        assert np.all(tapped[tap][(*first, ..., 0)] == 0), name
        before, after = np.asarray(case.tapped[tap])[first], np.asarray(tapped[tap])[first]
        np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=1e-5, err_msg=name)
        assert np.abs(before[..., 0]).max() > 0, name
        assert np.abs(x0[0] - case.x0[0]).max() > 1e-5, name
        np.testing.assert_allclose(x0[1], case.x0[1], atol=1e-5, err_msg=name)


def test_gradients_reach_every_gate_and_the_condition(case):
    gates, cond = case.gradients
    for name, gradient in named_leaves(gates):
        assert np.abs(gradient).max() > 0, name
    assert np.all(np.abs(cond).max(axis=1) > 0)


def test_gate_gradient_is_the_change_of_the_output(case):
    """d loss / d gate by central differences, in a random direction through all gates."""
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda g: rng.normal(size=g.shape).astype(np.float32), case.gates)
    step = 1e-2

    def loss(sign):
        gates = jax.tree.map(lambda g, d: g + sign * step * d, case.gates, direction)
        return float(case.run(gates, case.cond, case.bias)[0][0])

    inner = jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), case.gradients[0], direction)
    expected = sum(jax.tree.leaves(inner))
    assert (loss(1) - loss(-1)) / (2 * step) == pytest.approx(expected, rel=0.05, abs=0.05)


def test_attention_bias_masks_a_position(case):
    maps = [name for name in case.tapped if name.endswith("attention/map")]
    assert maps
    blocked = jax.tree.map(np.copy, case.bias)
    leaf = blocked
    for part in maps[0].split("/")[:-1]:
        leaf = leaf[part]
    leaf["bias"][(0, ..., 3) if case.arch == "dit" else (..., 3)] = -1e9
    (_, (_, tapped)), _ = case.run(case.gates, case.cond, blocked)
    masked = np.asarray(tapped[maps[0]])
    np.testing.assert_allclose(masked.sum(-1), 1.0, rtol=1e-5)
    if case.arch == "dit":  # the second block was not masked
        assert masked[1, ..., 3].max() > 0
        masked = masked[0]
    assert masked[..., 3].max() == 0


def test_taps_are_named_and_shaped(case):
    shapes = {name: leaf.shape for name, leaf in case.tapped.items()}
    layer = "blocks" if case.arch == "dit" else "mid4_0"
    lead = (2,) if case.arch == "dit" else ()
    heads = 1 if case.arch == "ddpmpp" else 2 if case.arch == "dit" else 4
    assert shapes[f"{layer}/attention/map"] == (*lead, 2, heads, 16, 16)
    assert shapes[f"{layer}/attention/value"] == (*lead, 2, 16, 16)
    assert {name.split("/")[-1] for name in shapes} == {*CHECKED, "map", "out", "in"}
    gates = {name.removesuffix("/gate"): leaf.shape for name, leaf in named_leaves(case.model.gates())}
    inputs = {name.removesuffix("/in"): shape for name, shape in shapes.items() if name.endswith("/in")}
    assert {name: shape[-1] for name, shape in inputs.items()} == {name: s[-1] for name, s in gates.items()}
    wanted = jax.eval_shape(lambda: case.model.apply(case.params, XT, case.t, taps=("emb1",))[1])
    assert list(wanted) == ["emb1"]
    assert jax.eval_shape(lambda: case.model.apply(case.params, XT, case.t)[1]) == {}


def test_absent_gates_and_taps_cost_nothing(case):
    """The program without gates and taps holds neither: fewer multiplications and fewer outputs."""
    model, params = case.model, case.params

    def text(fn):
        return jax.jit(fn).lower(jnp.asarray(XT), case.t).as_text()

    plain = text(lambda x, t: model.apply(params, x, t)[0].x0)
    gates = model.gates()
    gated = text(lambda x, t: model.apply(params, x, t, gates=gates)[0].x0)
    assert gated.count("stablehlo.multiply") == plain.count("stablehlo.multiply") + len(
        jax.tree.leaves(gates)
    )
    if case.arch != "dit":  # of a scan the compiler, not the tracer, drops what nobody reads
        assert text(lambda x, t: model.apply(params, x, t, taps=("*",))[0].x0) == plain


@pytest.mark.parametrize("arch", ARCHS)
def test_bfloat16_is_close_and_keeps_float32_parameters(arch):
    model = model_of(arch, dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params, t = arbitrary(model), model.process.time(jnp.float32(SIGMA))
    cond = model.condition(params, {}, n=2)
    traced = str(jax.make_jaxpr(lambda p: model.apply(p, XT, t, cond)[0].x0)(params))
    products = [line for line in traced.splitlines() if "dot_general" in line or "conv_general" in line]
    narrow = [line for line in products if "bf16" in line]
    assert len(narrow) > len(products) / 2  # all but those of the embedding
    assert all("bf16" in line for line in products if "conv_general" in line)

    out = jax.jit(lambda p: model.apply(p, XT, t, cond)[0].x0, compiler_options=FAST_COMPILE)(params)
    assert out.dtype == np.float32
    expected = x0_by_numpy(model, params, np.float64(cond))
    assert 0 < np.abs(out - expected).max() < 0.06 * np.abs(expected).max()


def same_gradients(losses, params):
    """Loss and gradients of the first function against those of the others."""
    run = [jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)(params) for loss in losses]
    for loss, gradients in run[1:]:
        assert loss == pytest.approx(float(run[0][0]), rel=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (run[0][1], gradients)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1e-3, np.abs(a).max()))


def test_recomputed_unet_blocks_have_the_same_gradients():
    cfg = config.Net(channels=8, scan_safe=True)
    x, emb = jnp.asarray(XT), jnp.ones((2, 5))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Block(cfg, 8, True).init, jax.random.key(0), x, emb)["params"]
    params = {"params": jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape)), shapes)}
    blocks = [rematerialize(Block, remat)(cfg, 8, True) for remat in ("none", "blocks", "dots")]
    same_gradients([lambda p, m=m: jnp.mean(m.apply(p, x, emb) ** 3) for m in blocks], params)


def test_a_recomputed_scan_has_the_same_gradients():
    models = [model_of("dit", remat=remat) for remat in ("none", "blocks")]
    t = models[0].process.time(jnp.float32(SIGMA))
    losses = [lambda p, m=m: jnp.mean((m.apply(p, XT, t)[0].x0 - XT) ** 2) for m in models]
    same_gradients(losses, arbitrary(models[0]))


@pytest.mark.parametrize("arch", ["ddpmpp", "dit"])
def test_recomputation_repeats_what_it_says(arch):
    """Blocks repeat nearly a whole forward pass; dots repeat attention alone."""
    costs = {
        remat: flops.train_step(shallow(arch, remat=remat)).by_primitive
        for remat in ("none", "blocks", "dots")
    }
    once = sum(flops.forward(shallow(arch)).by_primitive.values())
    total = {remat: sum(cost.values()) for remat, cost in costs.items()}
    assert total["none"] < total["dots"] < total["blocks"] <= total["none"] + once
    assert total["blocks"] > total["none"] + 0.5 * once
    assert costs["dots"].get("conv_general_dilated", 0) == costs["none"].get("conv_general_dilated", 0)


def test_dropout_needs_a_key_and_is_drawn_from_it():
    model = model_of("dit", dropout=0.5)
    params, t = arbitrary(model), model.process.time(jnp.float32(SIGMA))

    def call(key):
        return model.apply(params, XT, t, dropout_key=key)[0].x0

    run = jax.jit(call, compiler_options=FAST_COMPILE)
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert np.abs(first - second).max() > 1e-3
    assert "random_bits" not in str(jax.make_jaxpr(lambda: call(None))())


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("ddpmpp-cifar10", 32, 55.73),
        ("ddpmpp-ffhq64", 64, 61.80),
        ("ncsnpp-ffhq64", 64, 62.76),
        ("adm-imagenet64", 64, 295.90),
    ],
)
def test_unets_have_the_published_size(name, size, millions):
    model = make_model(config.Config(data=config.Data(size=size), net=SIZES[name]), 3)
    assert flops.parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("net", "image_size", "words"),
    [
        ({"mults": (1, 2, 2)}, 18, ("data.size = 18", "multiple of 4", "set data.size to 16")),
        ({"channels": 6}, 16, ("net.channels = 6", "multiple of 4")),
        ({"mults": ()}, 16, ("net.mults",)),
        ({"mults": (1, 0)}, 16, ("net.mults = (1, 0)",)),
        ({"blocks": 0}, 16, ("net.blocks = 0",)),
        ({"patch": 0}, 16, ("net.patch = 0",)),
        ({"classes": -1}, 16, ("net.classes = -1",)),
        ({"vector": -4}, 16, ("net.vector = -4",)),
        ({"dropout": 1.0}, 16, ("net.dropout = 1.0",)),
        ({"condition_dropout": 1.5, "classes": 3}, 16, ("net.condition_dropout = 1.5",)),
        ({"condition_dropout": 0.1}, 16, ("net.condition_dropout = 0.1", "net.classes")),
        ({"sigma_data": 0.0}, 16, ("net.sigma_data = 0.0",)),
        ({"sigma_data": 0.3, "prediction": "v"}, 16, ("net.sigma_data = 0.3", "edm")),
        ({"head_channels": 7, "mults": (1, 2)}, 16, ("net.head_channels = 7", "16 channels", "set it to 8")),
        ({"arch": "dit", "patch": 3}, 16, ("data.size = 16", "multiple of 3", "15")),
        ({"arch": "dit", "head_channels": 12}, 16, ("net.head_channels = 12", "16 channels")),
        ({"arch": "dit", "mults": (1, 2)}, 16, ("net.mults = (1, 2)", "DiT")),
        ({"arch": "dit", "attention": (8,)}, 16, ("net.attention = (8,)", "DiT")),
        ({"arch": "dit", "scan_safe": True}, 16, ("net.scan_safe = True", "DiT")),
    ],
)
def test_bad_networks_are_named(net, image_size, words):
    net = config.Net(**{"channels": 16, **net})
    with pytest.raises(UserError) as caught:
        make_model(config.Config(data=config.Data(size=image_size), net=net), 1)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
