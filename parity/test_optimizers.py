"""Optimizers against torch's (`make parity`)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mdiff import config
from mdiff.train import optim
from mdiff.trees import named_leaves

SHAPES = {"a": {"kernel": (5, 3), "bias": (3,)}, "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_are_torchs(name):
    rng = np.random.default_rng(0)

    def draw():
        return jax.tree.map(
            lambda shape: jnp.float32(rng.normal(size=shape)), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
        )

    decay = 0.2 if name == "adamw" else 0.0
    cfg = config.Train(optimizer=name, lr=0.03, warmup=0, clip=0.0, b1=0.8, b2=0.95, weight_decay=decay)
    params = draw()
    theirs = {n: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for n, leaf in named_leaves(params)}
    groups = [
        {"params": [p for n, p in theirs.items() if n.endswith(end)], "weight_decay": share}
        for end, share in (("kernel", decay), ("bias", 0.0))
    ]
    torchs = torch.optim.AdamW(groups, lr=0.03, betas=(0.8, 0.95), eps=1e-8)
    ours = optim.make_optimizer(cfg)
    memory = ours.init(params)
    for _ in range(6):
        gradient = draw()
        updates, memory = jax.jit(ours.update)(gradient, memory, params)
        params = optax.apply_updates(params, updates)
        for n, leaf in named_leaves(gradient):
            theirs[n].grad = torch.tensor(np.asarray(leaf))
        torchs.step()
        for n, leaf in named_leaves(params):
            np.testing.assert_allclose(leaf, theirs[n].detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=n)
