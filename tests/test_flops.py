"""Operation counts by hand and by the compiler, and the generated table of sizes."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mdiff import config, flops
from mdiff.nets.denoiser import make_model

ROOT = Path(__file__).parent.parent
X = jax.ShapeDtypeStruct((3, 5), jnp.float32)
W = jax.ShapeDtypeStruct((5, 7), jnp.float32)


def dot(x, w):
    return x @ w


def test_products_by_hand():
    assert flops.count(dot, X, W) == flops.Flops(2 * 3 * 5 * 7, {"dot_general": 210}, 0)
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 4, 3, 5), (2, 4, 5, 6)))
    assert flops.count(jnp.matmul, a, b).total == 2 * (2 * 4) * 3 * 5 * 6
    assert flops.count(lambda x: jnp.exp(x) + x.sum(), X).total == 0


def test_gradients_cost_two_more_products():
    cost = flops.count(jax.grad(lambda x, w: dot(x, w).sum() ** 2, argnums=(0, 1)), X, W)
    assert cost.total == 3 * 210


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients_by_hand(stride):
    x, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 3), (3, 3, 3, 5)))

    def conv(x, k):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=dimensions)

    forward = 2 * (2 * (8 // stride) ** 2 * 5) * (9 * 3)
    assert flops.count(conv, x, k).total == forward
    both = flops.count(jax.grad(lambda x, k: conv(x, k).sum() ** 2, argnums=(0, 1)), x, k)
    assert both.total == 3 * forward


def test_loops_and_wrappers_are_entered():
    square = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    once = 2 * 3 * 5 * 5

    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=11)[0]

    assert flops.count(scanned, X, square).total == 11 * once
    nested = jax.jit(lambda x, w: jax.lax.scan(lambda c, _: (scanned(c, w), None), x, length=4)[0])
    assert flops.count(nested, X, square).total == 44 * once
    kept = jax.grad(lambda x, w: jnp.sin(jax.checkpoint(dot)(jnp.sin(x), w)).sum())
    assert flops.count(kept, X, square).total == 2 * once  # nothing but its inputs is needed again
    again = jax.grad(lambda x, w: jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)(x, w).sum())
    assert flops.count(again, X, square).total == 5 * once  # two, one of them again, two gradients
    either = flops.count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), X, square)
    assert either.total == 2 * once

    @jax.custom_vjp
    def custom(x, w):
        return x @ w

    custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, d: (d @ res[1].T, res[0].T @ d))
    assert flops.count(custom, X, square).total == once
    assert (
        flops.count(jax.grad(lambda x, w: custom(x, w).sum() ** 2, argnums=(0, 1)), X, square).total
        == 3 * once
    )


def test_open_loops_are_reported():
    cost = flops.count(
        lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x),
        X,
        jax.ShapeDtypeStruct((5, 5), jnp.float32),
    )
    assert cost == flops.Flops(150, {"dot_general": 150}, 1)


def test_a_network_agrees_with_the_compiler():
    """XLA counts elementwise work too and skips taps outside of the image: within a few per cent."""
    net = config.Net(channels=32, mults=(1,), blocks=1, attention=(16,))
    model = make_model(config.Config(data=config.Data(size=16), net=net), 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    lowered = jax.jit(lambda p, x, t: model.apply(p, x, t)[0].x0).lower(shapes, x, t)
    compiled = lowered.cost_analysis()["flops"]
    assert flops.forward(model, batch=2).total == pytest.approx(compiled, rel=0.05)


def test_work_grows_with_the_batch_and_depth():
    def dit(blocks):
        net = config.Net(arch="dit", channels=16, blocks=blocks, patch=2, head_channels=8)
        return make_model(config.Config(data=config.Data(size=8), net=net), 1)

    assert flops.forward(dit(2), batch=6).total == 6 * flops.forward(dit(2)).total
    tokens, c = 16, 16
    block = 2 * (12 * tokens * c * c + 2 * tokens * tokens * c + 6 * c * c)  # adaLN maps one vector
    assert flops.forward(dit(7)).total - flops.forward(dit(2)).total == 5 * block


def bench():
    spec = importlib.util.spec_from_file_location("bench_models", ROOT / "bench" / "models.py")
    module = sys.modules["bench_models"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_docs_is_what_the_code_gives():
    written = re.findall(
        r"^\| `(.+?)` \| (\w+) \| (\d+) \| ([\d.]+) \|", (ROOT / "docs/models.md").read_text(), re.M
    )
    made = [
        (row.name, row.arch, str(row.size), f"{row.parameters / 1e6:.3f}")
        for row in bench().rows(with_flops=False)
    ]
    assert written == made, "run python bench/models.py"
