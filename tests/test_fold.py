"""A pruned network answers as the gated one."""

import jax
import numpy as np
import pytest
from test_text import TOKENS, T, world, xt

from mdiff.errors import UserError
from mdiff.nets.fold import fold
from mdiff.trees import map_named, named_leaves


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_folded_weights_answer_as_the_gates_do(arch):
    model, params = world(arch)
    rng = np.random.default_rng(0)
    gates = {"net": model.gates(), "text": model.text_gates()}

    @jax.jit
    def run(params, gates):
        cond = model.condition(params, {"tokens": TOKENS}, gates=gates["text"])
        return model.apply(params, xt(), T, cond, gates["net"])[0].x0

    whole = run(params, gates)
    kinds = (
        "cross/query",
        "cross/key",
        "cross/value",
        "attention/value",
        "feed/hidden",
        "/hidden",
        "/out",
        "text",
    )
    for kind in kinds:
        chosen = map_named(
            lambda name, leaf, kind=kind: (
                np.where(rng.random(leaf.shape) < 0.5, 0.3, 1.0).astype(np.float32)
                if kind in f"/{name}" and "emb" not in name
                else np.asarray(leaf)
            ),
            gates,
        )
        assert any((leaf != 1).any() for _, leaf in named_leaves(chosen)), kind
        gated = run(params, chosen)
        effect, error = (np.abs(gated - other).max() for other in (whole, run(fold(params, chosen), gates)))
        assert effect > 3e-6 and error < 0.05 * effect, (kind, effect, error)


def test_a_gate_that_no_map_carries_is_refused():
    model, params = world()
    gates = {"net": model.gates(), "text": {}}
    gates["net"]["emb1_gate"]["gate"] = gates["net"]["emb1_gate"]["gate"].at[0].set(0)
    with pytest.raises(UserError, match="emb1_gate"):
        fold(params, gates)
