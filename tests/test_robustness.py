"""Comparisons over thresholds and measures: generators built so that measures disagree, and rankings by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import one_line
from extraction_helper import copies, law, partial

from mdiff.config import Audit
from mdiff.probes import extraction, robustness

CFG = Audit(bootstrap=100)
TRAIN, HELDOUT = law(60, 1), law(60, 2)


def score(generated, config=CFG, train=TRAIN):
    return extraction.score(generated, {"train": train, "heldout": HELDOUT}, config, control="heldout")


def test_equal_percentiles_hide_how_many_images_are_copied():
    """A tenth of both generators' images are copies: of one image here, of many there."""
    fresh = law(180, 3)
    one = np.concatenate([fresh, np.repeat(TRAIN[:1], 20, axis=0)])
    many = np.concatenate([fresh, TRAIN[:20]])
    a, b = score(one), score(many)
    p, q = a["train"], b["train"]
    assert p.curves["cosine"]["ams"][-1] == q.curves["cosine"]["ams"][-1] == pytest.approx(0.1)
    np.testing.assert_array_equal(p.curves["cosine"]["ams"], q.curves["cosine"]["ams"])
    for key in ("p95", "area", "over_half", "memorized", "inauthentic"):
        assert p.estimates[key].value == q.estimates[key].value
    assert p.estimates["p95"].value == 1
    assert p.curves["cosine"]["ums"][-1] == pytest.approx(1 / 200)
    assert q.curves["cosine"]["ums"][-1] == pytest.approx(20 / 200)
    assert (p.estimates["coverage"].value, q.estimates["coverage"].value) == pytest.approx((1 / 60, 20 / 60))
    found = robustness.compare({"one": a, "many": b}, "one")
    assert found.metrics["unique"]["many"] > 10 * found.metrics["unique"]["one"]
    assert found.thresholds["many"]["cosine"].above == 0 == found.thresholds["many"]["cosine"].below
    assert math.isnan(found.agreement["ams_area", "memorized"])  # both rank the two alike: as equal


def test_a_better_attack_is_better_at_most_thresholds_and_never_worse():
    weak, strong = score(partial(TRAIN, 400, 0.05, 4)), score(partial(TRAIN, 400, 0.5, 5))
    found = robustness.compare({"weak": weak, "strong": strong}, "weak")
    cosine, rms = (found.thresholds["strong"][name] for name in ("cosine", "rms"))
    assert cosine.below == 0 == rms.below
    above = [d.low > 0 for d in cosine.difference]
    assert cosine.above == np.mean(above) and above[-10]
    np.testing.assert_allclose(
        [d.value for d in cosine.difference],
        np.array(strong["train"].curves["cosine"]["ams"]) - weak["train"].curves["cosine"]["ams"],
    )
    assert cosine.idle == np.mean(
        [
            a == b and a in (0, 1)
            for a, b in zip(
                weak["train"].curves["cosine"]["ams"], strong["train"].curves["cosine"]["ams"], strict=True
            )
        ]
    )
    assert found.thresholds["strong"]["cosine_excess"].above > 0.3
    turned = robustness.compare({"weak": weak, "strong": strong}, "strong")
    assert turned.thresholds["weak"]["cosine"].below == pytest.approx(cosine.above)
    assert turned.thresholds["weak"]["cosine"].above == 0
    alike = robustness.compare(
        {"a": score(partial(TRAIN, 400, 0.3, 6)), "b": score(partial(TRAIN, 400, 0.3, 7))}, "a"
    )
    assert alike.thresholds["b"]["cosine"].above <= 0.1


def test_measures_agree_on_a_ladder_of_planted_shares():
    methods = {f"{share}": score(partial(TRAIN, 300, share, 8)) for share in (0.0, 0.2, 0.5, 1.0)}
    found = robustness.compare(methods, "0.0")
    for pair in (("memorized", "unique"), ("ams_area", "memorized"), ("memorized", "inauthentic")):
        assert found.agreement[pair] == 1
    assert list(found.metrics) == list(robustness.METRICS)
    assert len(found.agreement) == 21


def test_kendall_by_hand():
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    second = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 4.0}  # one of six pairs is turned
    tied = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0}  # five agree, one is tied
    found = robustness.agreement({"x": first, "y": second, "z": tied})
    assert found["x", "y"] == pytest.approx(4 / 6)
    assert found["x", "z"] == pytest.approx(5 / math.sqrt(6 * 5))


def test_without_a_control_there_is_no_excess_and_json_is_strict():
    scores = {
        name: extraction.score(law(30, seed), {"train": TRAIN}, CFG) for name, seed in (("a", 1), ("b", 2))
    }
    found = robustness.compare(scores, "a")
    assert set(found.thresholds["b"]) == {"cosine", "rms"}
    tree = json.loads(json.dumps(robustness.to_json(found), allow_nan=False))
    assert set(tree["thresholds"]["b"]["rms"]["difference"][0]) == {"value", "low", "high", "n"}
    assert {"first", "second", "tau"} == set(tree["agreement"][0])


def test_wrong_inputs_are_one_line():
    a, b = score(law(20, 9)), score(copies(TRAIN, 20, 9))
    with one_line("methods: a", "baseline 'a'"):
        robustness.compare({"a": a}, "a")
    with one_line("baseline 'c'"):
        robustness.compare({"a": a, "b": b}, "c")
    with one_line("b: was scored against other images"):
        robustness.compare({"a": a, "b": score(law(20, 9), train=law(60, 5))}, "a")
    with one_line("b: was scored by other rules"):
        robustness.compare({"a": a, "b": score(law(20, 9), replace(CFG, ratio=0.4))}, "a")
    with one_line("'A'", "train, heldout"):
        robustness.compare({"a": a, "b": b}, "a", reference="A")
