"""The text-conditional U-Net: what reaches the pixels, by which way, and what its gates and cuts do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config
from mdiff.data import captions
from mdiff.data.captions import END, PAD, START
from mdiff.data.source import Images
from mdiff.data.split import load_subset, save_subset, split
from mdiff.errors import UserError
from mdiff.nets import unet
from mdiff.nets.denoiser import make_model

T = np.array([0.3, 0.8], np.float32)
TOKENS = np.array([[START, 7, 8, END, PAD, PAD], [START, 9, END, PAD, PAD, PAD]], np.int32)


def world(arch="ddpmpp"):
    net = config.Net(
        arch=arch, channels=8, mults=(1, 2), blocks=1, attention=(8,), text=16, text_blocks=1, text_length=6,
        vocabulary=300, cross=(16, 8),
    )  # fmt: skip
    model = make_model(config.Config(data=config.Data(size=16), net=net), 3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)  # fresh networks end in almost nothing
    params = jax.tree.unflatten(tree, [rng.normal(0, 0.15, leaf.shape).astype(np.float32) for leaf in leaves])
    return model, params


@pytest.fixture(scope="module", params=["ddpmpp", "ncsnpp", "adm"])
def case(request):
    return world(request.param)


@pytest.fixture(scope="module")
def plain():
    return world()


def xt():
    return np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)


def test_text_reaches_the_pixels_through_values_alone(plain):
    model, params = plain
    run = jax.jit(lambda cond, gates: model.apply(params, xt(), T, cond, gates)[0].x0)
    text = jax.jit(lambda tokens: model.condition(params, {"tokens": tokens}))
    gates = model.gates()
    assert np.abs(run(text(TOKENS), gates) - run(text(TOKENS[::-1]), gates)).max() > 1e-3
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (0 if "cross" in str(path) and "value" in str(path) else 1), gates
    )
    np.testing.assert_array_equal(run(text(TOKENS), silent), run(text(TOKENS[::-1]), silent))


def test_a_position_sees_none_behind_it(plain):
    model, params = plain
    text = jax.jit(lambda tokens: model.condition(params, {"tokens": tokens}))
    other = TOKENS.copy()
    other[0, 2] = 50
    a, b = text(TOKENS), text(other)
    np.testing.assert_allclose(a[0, :2], b[0, :2], atol=1e-6)
    assert np.abs(a[0, 2:] - b[0, 2:]).max(axis=-1).min() > 1e-3  # words, end and padding do
    np.testing.assert_allclose(a[0, 0], a[1, 0], atol=1e-6)  # the start is the same for all


def test_a_dropped_caption_is_the_empty_one(plain):
    model, params = plain
    dropped = model.condition(params, {"tokens": TOKENS}, drop=np.array([False, True]))
    empty = model.condition(params, {"tokens": np.array([[START, END, PAD, PAD, PAD, PAD]] * 2)})
    null = model.condition(params, {}, n=1)
    np.testing.assert_allclose(dropped[1], empty[1], atol=1e-6)
    np.testing.assert_allclose(null[0], empty[0], atol=1e-6)
    assert np.abs(dropped[0] - empty[0]).max() > 1e-2


def test_a_gate_is_a_column_of_the_value_projection(plain):
    model, params = plain
    cond = model.condition(params, {"tokens": TOKENS})
    gates = model.gates()
    gates["enc8_0"]["cross"]["value_gate"]["gate"] = (
        gates["enc8_0"]["cross"]["value_gate"]["gate"].at[:8].set(0)
    )
    cut = jax.tree.map(np.array, params)
    cut["net"]["enc8_0"]["cross"]["to_value"]["map"]["kernel"][:, :8] = 0
    run = jax.jit(lambda params, gates: model.apply(params, xt(), T, cond, gates)[0].x0)
    gated, whole = run(params, gates), run(params, model.gates())
    np.testing.assert_allclose(gated, run(cut, model.gates()), atol=1e-6)
    assert np.abs(gated - whole).max() > 1e-5


def test_text_gates_act_in_the_encoder(plain):
    model, params = plain
    gates = model.text_gates()
    on = model.condition(params, {"tokens": TOKENS}, gates=gates)
    np.testing.assert_allclose(on, model.condition(params, {"tokens": TOKENS}), atol=1e-6)
    off = jax.tree.map(jnp.zeros_like, gates)
    alone = model.condition(params, {"tokens": TOKENS}, gates=off)
    # Without attention and MLP a position is its token and place alone.
    again = model.condition(params, {"tokens": np.where(TOKENS == 8, 51, TOKENS)}, gates=off)
    np.testing.assert_allclose(np.delete(alone, 2, axis=1), np.delete(again, 2, axis=1), atol=1e-6)


def test_a_network_cut_anywhere_goes_on_to_the_same_end(case):
    model, params = case
    cond = model.condition(params, {"tokens": TOKENS})
    run = jax.jit(lambda: model.apply(params, xt(), T, cond)[0].x0)()
    stages = [stage.name for stage in unet.stages(model.net.cfg, 16)]

    def all_cuts():
        out = []
        for name in stages:
            carry = model.carry(params, xt(), T, cond, name)
            out.append(model.apply(params, xt(), T, cond, resume=(name, carry))[0].x0)
        return out

    for name, again in zip(stages, jax.jit(all_cuts)(), strict=True):
        np.testing.assert_allclose(again, run, atol=2e-5, err_msg=name)


def test_tokens_there_and_back():
    tokenizer = captions.learn(["a red apple", "a green apple tree", "red tree"], 300, 8)
    rows = tokenizer(["Red  apple ", "Δx"])
    assert rows.dtype == np.int32 and list(rows[:, 0]) == [START] * 2
    assert captions.lengths(rows)[0] == list(rows[0]).index(END) + 1
    again = captions.from_json(tokenizer.to_json())
    np.testing.assert_array_equal(again(["Red  apple ", "Δx"]), rows)
    np.testing.assert_array_equal(tokenizer(["red apple"])[0], tokenizer(["RED apple"])[0])
    assert "".join(tokenizer.decode(tokenizer(["green tree"])[0])[1:3]).replace(" ", "") == "greentree"
    with pytest.raises(UserError, match=r"has \d+ tokens, and the model takes 6"):
        tokenizer(["xylophone quartz by jukebox"])
    cut = tokenizer(["xylophone quartz by jukebox"], truncate=True)
    assert cut.shape == (1, 8) and cut[0, -1] == END
    np.testing.assert_array_equal(tokenizer([""])[0], captions.empty(8))


def emoji_like(seed=0):
    """60 families of 1 and 6 of 5 images, noise of one colour each, under captions of two words."""
    rng = np.random.default_rng(seed)
    family = np.concatenate([np.arange(60), np.repeat(np.arange(60, 66), 5)]).astype(np.int32)
    x = rng.integers(0, 256, (90, 8, 8, 3)).astype(np.uint8)
    x[1] = x[0]  # two that look the same
    names = [f"thing {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
    names += [f"tool {chr(97 + f)}" + " dark" * k for f in range(6) for k in range(5)]
    names[5] = "number 5"
    return Images("made", x, np.arange(90, dtype=np.int32), caption=tuple(names), family=family)


LADDER = config.Data(
    source="emoji", size=8, n=40, heldout=10, ladder={20: 2, 5: 3}, templates=2, template_copies=4
)


def test_a_ladder_holds_what_it_says(tmp_path):
    images = emoji_like()
    subset = split(LADDER, images)
    copies = subset.copies
    assert list(copies) == [20] * 2 + [5] * 3 + [4] * 10 + [1] * 25
    assert len(subset.slots) == copies.sum() and len(subset.heldout) == 10
    sides = set(subset.train.id) & set(subset.heldout.id)
    assert not sides and not {0, 1} <= {
        *subset.train.id,
        *subset.heldout.id,
    }  # of near-duplicates one at most
    assert 5 not in {*subset.train.id, *subset.heldout.id}  # its name is a number
    for template in subset.templates:
        own = [subset.train.caption[i] for i, image in enumerate(subset.train.id) if image in template.ids]
        assert own == [template.caption] * 5 and "dark" not in template.caption
    cfg = config.Net(text=16, text_length=12, vocabulary=300)
    subset = captions.tokenize(cfg, subset)
    save_subset(tmp_path / "subset.json", subset, LADDER)
    again = captions.tokenize(cfg, load_subset(tmp_path / "subset.json", images))
    np.testing.assert_array_equal(again.slots, subset.slots)
    np.testing.assert_array_equal(again.train.tokens, subset.train.tokens)
    assert again.train.caption == subset.train.caption and again.templates == subset.templates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ladder": {1: 2}}, "copies, 2 or more"),
        ({"n": 10}, "take 15 images"),
        ({"templates": 9}, "has 6 families"),
        ({"n": 80}, "without near-duplicates"),
        ({"duplicates": {3: 2}}, "plants copies itself"),
        ({"ladder": {}}, "set data.ladder too"),
        ({"template_copies": 0}, "1 or more"),
    ],
)
def test_a_ladder_that_cannot_be(change, message):
    import dataclasses

    with pytest.raises(UserError, match=message) as error:
        split(dataclasses.replace(LADDER, **change), emoji_like())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "dit"}, "reads no text"),
        ({"classes": 3}, "only condition"),
        ({"text": 6}, "multiple of 4"),
        ({"text_length": 2}, "3 or more"),
        ({"vocabulary": 100}, "259 or more"),
        ({"cross": (5,)}, "choose from 16 8"),
        ({"cross_channels": -4}, "must be 1 or more, or 0"),
        ({"cross_channels": 20, "head_channels": 8, "attention": ()}, "20 channels.*set it to 10"),
        ({"text_blocks": 0}, "1 or more"),
    ],
)
def test_wrong_text_fields(change, message):
    fields = {"channels": 8, "mults": (1, 2), "blocks": 1, "text": 16, **change}
    with pytest.raises(UserError, match=message):
        make_model(config.Config(data=config.Data(size=16), net=config.Net(**fields)), 3)
