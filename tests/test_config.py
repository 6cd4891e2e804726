"""Floor 0: configs, digests, keys, named trees, conventions."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config, keys, trees
from mdiff.errors import UserError
from mdiff.types import to_float, to_uint8

BASE = config.Config()


def test_json_round_trip():
    made = replace(BASE, data=config.Data(duplicates={3: 10}), net=config.Net(mults=(1, 2)))
    text = json.dumps(config.to_json(made), allow_nan=False)
    assert config.from_json(config.Config, json.loads(text)) == made


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"seed": "a"}, ("seed", "'a'")),
        ({"net": {"chanels": 3}}, ("config.net", "chanels", "channels")),
        ({"train": {"steps": [1]}}, ("train.steps",)),
    ],
)
def test_bad_json_is_named(tree, words):
    with pytest.raises(UserError) as caught:
        config.from_json(config.Config, tree)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_config_file_with_a_wrong_type_is_refused(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from mdiff.config import Config, Train\nconfig = Config(train=Train(steps='many'))\n")
    with pytest.raises(UserError, match=r"train\.steps = 'many'"):
        config.load(path)


def test_digest_covers_model_data_and_objective_only():
    one = config.digest(BASE)
    same = [
        replace(BASE, train=config.Train(steps=9, batch=8)),
        replace(BASE, mesh=config.Mesh(fsdp=2)),
        replace(BASE, sample=config.Sample(n=5)),
        replace(BASE, name="other"),
    ]
    other = [
        replace(BASE, data=config.Data(n=49)),
        replace(BASE, net=config.Net(channels=64)),
        replace(BASE, loss=config.Loss(cutoff=1.0)),
        replace(BASE, process=config.Process(sigma_max=70.0)),
        replace(BASE, seed=1),
    ]
    assert all(config.digest(c) == one for c in same)
    assert len({config.digest(c) for c in other} | {one}) == len(other) + 1


def test_keys_depend_on_seed_stream_and_step_alone():
    def bits(k):
        return tuple(np.asarray(jax.random.key_data(k)).tolist())

    made = {bits(keys.key(s, name, i)) for s in (0, 1) for name in ("train", "sample") for i in range(3)}
    assert len(made) == 12
    assert bits(keys.key(3, "train", 7)) == bits(jax.jit(lambda i: keys.key(3, "train", i))(7))
    together = keys.keys(0, "sample", jnp.array([5, 2, 9]))
    alone = [keys.key(0, "sample", i) for i in (5, 2, 9)]
    for one, other in zip(together, alone, strict=True):
        assert bits(one) == bits(other)
        np.testing.assert_array_equal(jax.random.normal(one, (3,)), jax.random.normal(other, (3,)))


def test_named_leaves():
    tree = {"a": {"b": jnp.ones(2)}, "c": [jnp.zeros(3), jnp.zeros(1)]}
    assert [name for name, _ in trees.named_leaves(tree)] == ["a/b", "c/0", "c/1"]
    assert trees.mask(tree, "^c/") == {"a": {"b": False}, "c": [True, True]}
    assert trees.size(tree) == 6


def test_bytes_and_floats():
    u = np.arange(256, dtype=np.uint8)
    x = to_float(u)
    assert (x.min(), x.max(), x.dtype) == (-1.0, 1.0, np.float32)
    np.testing.assert_array_equal(to_uint8(x), u)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"train": config.Train(ema_halflife=float("inf"))},
            "train.ema_halflife = inf: give a finite number",
        ),
        ({"loss": config.Loss(p_mean=float("nan"))}, "loss.p_mean = nan: give a finite number"),
        ({"train": config.Train(ema_lengths=(0.1, float("inf")))}, "train.ema_lengths"),
        ({"seed": -1}, "seed = -1: give a seed from 0"),
        ({"data": config.Data(seed=2**32)}, "data.seed = 4294967296"),
    ],
)
def test_values_no_field_may_have(part, message):
    config.check_values(config.Config())
    with pytest.raises(UserError, match=re.escape(message)):
        config.check_values(config.Config(**part))
