"""DiT: the scan over blocks, its gates, and what a fresh network does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config, flops
from mdiff.nets.denoiser import make_model
from mdiff.nets.dit import TransformerBlock
from mdiff.nets.layers import GATES
from mdiff.nets.sizes import SIZES
from mdiff.trees import map_named

NET = config.Net(arch="dit", channels=16, blocks=3, patch=2, head_channels=4)
MODEL = make_model(config.Config(data=config.Data(size=8), net=NET), 1)
RNG = np.random.default_rng(0)


def arbitrary(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return map_named(
        lambda name, s: np.float32(name.endswith("scale") + 0.3 * RNG.normal(size=s.shape)), shapes
    )


def test_scanned_blocks_equal_a_loop():
    """Tokens after every block, with gates: the scan's taps against one block applied three times."""
    params = arbitrary(MODEL)
    gates = jax.tree.map(lambda g: np.float32(1 + 0.5 * RNG.normal(size=g.shape)), MODEL.gates())
    xt, t = np.float32(RNG.normal(size=(2, 8, 8, 1))), jnp.array([0.4, 0.7])
    run = jax.jit(lambda: MODEL.apply(params, xt, t, gates=gates, taps=("blocks/out", "emb1", "*/map"))[1])
    tapped = run()
    assert tapped["blocks/out"].shape == (3, 2, 16, 16)
    assert tapped["blocks/attention/map"].shape == (3, 2, 4, 16, 16)

    one = jax.jit(lambda p, g, x, emb: TransformerBlock(NET).apply({"params": p, GATES: g}, x, emb)[0])
    for i in range(1, 3):
        p, g = (jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]) for tree in (params["net"], gates))
        after = one(p, g, tapped["blocks/out"][i - 1], tapped["emb1"])
        np.testing.assert_allclose(after, tapped["blocks/out"][i], rtol=1e-4, atol=1e-4)


def test_a_fresh_network_is_the_skip_path():
    """adaLN-zero: fresh blocks are the identity, and the output layer gives exactly zero."""
    fast = {"xla_backend_optimization_level": 0}
    params = jax.jit(MODEL.init, compiler_options=fast)(jax.random.key(0))
    xt, sigma = np.float32(RNG.normal(size=(2, 8, 8, 1))), np.array([0.3, 2.0])
    t = MODEL.process.time(jnp.float32(sigma))
    out, tapped = jax.jit(lambda p: MODEL.apply(p, xt, t, taps=("blocks/out",)))(params)
    np.testing.assert_array_equal(tapped["blocks/out"][0], tapped["blocks/out"][2])
    np.testing.assert_allclose(out.x0, xt * (0.25 / (sigma**2 + 0.25))[:, None, None, None], atol=1e-6)
    # Blocks start differently: the scan splits its key.
    kernel = params["net"]["blocks"]["mlp_in"]["map"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_normalized_queries_ignore_their_scale():
    """With qk-norm, queries and keys ten times as large give the same maps; values do not."""
    params = arbitrary(MODEL)
    xt, t = np.float32(RNG.normal(size=(1, 8, 8, 1))), jnp.array([0.5])
    run = jax.jit(lambda p: MODEL.apply(p, xt, t, taps=("*/map", "*/value"))[1])
    plain = run(params)
    grown = jax.tree.map(np.copy, params)
    for leaf in grown["net"]["blocks"]["attention"]["qkv"]["map"].values():
        leaf[..., : 2 * NET.channels] *= 10.0
    np.testing.assert_allclose(run(grown)["blocks/attention/map"], plain["blocks/attention/map"], atol=1e-4)
    for leaf in grown["net"]["blocks"]["attention"]["qkv"]["map"].values():
        leaf[..., 2 * NET.channels :] *= 10.0
    assert np.abs(run(grown)["blocks/attention/value"] - plain["blocks/attention/value"]).max() > 1


@pytest.mark.parametrize(
    ("name", "millions"), [("s", 33), ("b", 130.5), ("l", 458), ("xl", 675.129632)]
)  # table 1; of XL/2 the released network's exact number
def test_sizes_are_the_published_ones_up_to_what_differs(name, millions):
    """The published networks at 256 tokens of 4-channel latents; the differences are counted by hand."""
    net = SIZES[f"dit-{name}/2"]
    model = make_model(config.Config(data=config.Data(size=32), net=net), 3)
    c = net.channels
    more = 256 * c  # positions
    more += 4 * c  # four latent channels in, not three: 2 x 2 more inputs
    more += (32 - 12) * (c + 1)  # 2 x 2 x 8 outputs, with a variance, not 2 x 2 x 3
    more -= 2 * net.blocks * net.head_channels  # scales of queries and keys
    tolerance = 0.0 if name == "xl" else 0.15
    assert (flops.parameters(model) + more) / 1e6 == pytest.approx(millions, abs=tolerance)


def test_depth_does_not_grow_the_program():
    def lines(blocks):
        net = config.Net(arch="dit", channels=16, blocks=blocks, patch=2)
        model = make_model(config.Config(data=config.Data(size=8), net=net), 1)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        text = jax.make_jaxpr(lambda p: model.apply(p, jnp.ones((1, 8, 8, 1)), jnp.ones(1))[0].x0)(shapes)
        return len(str(text).splitlines())

    assert lines(2) == lines(20)
