"""Every claim about extraction with its interval and whether it holds: results/side/summary.json and summary.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_common import OUT, write

from mdiff.console import Monitor

Row = dict[str, Any]
STRENGTH = 8.0


def summary(runs: Path, monitor: Monitor) -> None:
    """Write both files from the results of the other parts; what was not run is marked so."""
    parts = {name: load(name) for name in ("crossed", "lambda", "controls", "evidence", "labels")}
    rows = [
        row
        for part, made in CLAIMS
        for row in ([missing(part)] if parts[part] is None else made(parts[part]))
    ]
    write("summary", {"claims": rows, "not run": NOT_RUN})
    lines = ["| claim | holds | measured | n | from |", "|---|---|---|---|---|"]
    for row in rows:
        measured = "" if row["value"] is None else f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
        lines.append(f"| {row['claim']} | {row['holds']} | {measured} | {row['n'] or ''} | {row['source']} |")
    (OUT / "summary.md").write_text("\n".join(lines) + "\n")
    picture()
    monitor.say(f"{len(rows)} claims")


def load(name: str) -> Row | None:
    """results/side/NAME.json, or None."""
    path = OUT / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def missing(part: str) -> Row:
    """A part that has no results."""
    return {
        "claim": f"all of {part}",
        "holds": "not run",
        "value": None,
        "low": None,
        "high": None,
        "n": None,
        "source": part,
    }


def claim(
    text: str,
    source: str,
    estimate: Row | None,
    holds: Callable[[float, float], bool],
    fails: Callable[[float, float], bool],
) -> Row:
    """Yes or no where the whole interval says so, else undecided."""
    found = {key: None if estimate is None else estimate[key] for key in ("value", "low", "high", "n")}
    low, high = found["low"], found["high"]
    verdict = (
        "not run"
        if low is None or high is None
        else "yes"
        if holds(low, high)
        else "no"
        if fails(low, high)
        else "undecided"
    )
    return {"claim": text, "holds": verdict, **found, "source": source}


def above(text: str, source: str, estimate: Row | None, limit: float = 0.0) -> Row:
    """The number lies above a limit."""
    return claim(text, source, estimate, lambda low, high: low > limit, lambda low, high: high < limit)


def below(text: str, source: str, estimate: Row | None) -> Row:
    """The number lies below 0."""
    return claim(text, source, estimate, lambda low, high: high < 0, lambda low, high: low > 0)


def within(text: str, source: str, estimate: Row | None, limit: float) -> Row:
    """The number lies within limit of 0."""
    return claim(
        text, source, estimate, lambda low, high: -limit < low and high < limit,
        lambda low, high: low > limit or high < -limit,
    )  # fmt: skip


def pick(tree: Row, **wanted: Any) -> Row:
    """The row of a table with these values."""
    return next(row for row in tree["rows"] if all(row.get(key) == value for key, value in wanted.items()))


def _crossed(tree: Row) -> list[Row]:
    rows = []
    for model, other in (("B", "A"), ("A", "B")):
        row = pick(tree, arm=f"{model} under {other}", scale=STRENGTH, against=other)
        rows.append(
            within(
                f"a classifier that knows {other} does not make a model that never saw {other} copy it (excess over C within 1 point)",
                "crossed",
                row["memorized_excess"],
                0.01,
            )
        )
        row = pick(tree, arm=f"{model} under {other}", scale=STRENGTH, against=model)
        rows.append(
            above(
                f"the model of {model} gives {model} away under the other half's classifier too (excess over C)",
                "crossed",
                row["memorized_excess"],
            )
        )
    return rows


def _lambda(tree: Row) -> list[Row]:
    at = {row["scale"]: row for row in tree["rows"]}
    gain = tree["gain"]
    return [
        above(f"guidance raises the share of copies (strength {STRENGTH:g} less unguided, paired by model)", "lambda", gain["memorized"]),
        above("... and the number of different training images copied (share of all)", "lambda", gain["coverage"]),
        above("it costs quality: energy distance to held-out images rises", "lambda", gain["energy"]),
        above("copies fall again at the highest strength (best less highest)", "lambda", tree["fall"]),
        above("what is copied unguided (excess over C)", "lambda", at[0.0]["memorized_excess"]),
    ]  # fmt: skip


def _controls(tree: Row) -> list[Row]:
    alone = pick(tree, attacker="ascent")
    rows = [
        within("the classifier alone, by gradient ascent, makes no copies (excess over C within 1 point)", "controls", alone["memorized_excess"], 0.01),
    ]  # fmt: skip
    for name, text in (
        ("clusters over shuffled", "clusters guide better than labels dealt at random"),
        ("clusters over untimed", "a classifier that knows the noise guides better than one that does not"),
        (
            "oracle over clusters",
            "the oracle, who has the training images' classes, gets more than the clusters",
        ),
    ):
        rows.append(
            above(
                f"{text} (share of copies at strength {STRENGTH:g}, paired by seed)",
                "controls",
                tree["differences"][name],
            )
        )
    membership = dict(tree["membership"]["clusters"])
    rows.append(
        above("the classifier tells members from non-members (AUROC above 0.5)", "controls", membership, 0.5)
    )
    shares = tree["shares of thresholds"]
    rows.append(
        above("guided beats unguided at 80 % or more of all cosine thresholds", "controls", shares, 0.8)
    )
    return rows


def _evidence(tree: Row) -> list[Row]:
    rows = []
    for name, one in tree["over seeds"]["returns"].items():
        rows.append(
            above(
                f"noised to sigma 1 and denoised without guidance, {name} come back in more than half of cases",
                "evidence",
                one,
                0.5,
            )
        )
    for name, one in tree["over seeds"]["detectors"].items():
        rows.append(above(f"{name} finds guided copies (AUROC above 0.5)", "evidence", one, 0.5))
    rows.append(
        above(
            "middle features tell digits apart better than noisy pixels at sigma 0.5 (accuracy)",
            "evidence",
            tree["over seeds"]["implicit"]["pixels"],
        )
    )
    rows.append(
        above(
            "... and better than those of an untrained network",
            "evidence",
            tree["over seeds"]["implicit"]["untrained"],
        )
    )
    rows.append(
        below(
            "models nearer to the empirical optimum memorize more (Spearman below 0)",
            "evidence",
            tree["optimum"]["memorized with distance"],
        )
    )
    rows.append(
        below(
            "Delta M beyond held-out goes with memorization (Spearman below 0)",
            "evidence",
            tree["optimum"]["memorized with delta_m excess"],
        )
    )
    return rows


def _labels(tree: Row) -> list[Row]:
    rows = [
        above(
            f"{name} labels raise the share of copies over no labels (paired by seed)",
            "labels",
            tree["over none"].get(name),
        )
        for name in ("own", "clusters", "random 2", "random 10", "random 50", "unique")
    ]
    rows.append(
        above(
            "fixed random labels memorize more than labels drawn anew at every visit",
            "labels",
            tree["random 10 over redrawn 10"],
        )
    )
    return rows


CLAIMS: list[tuple[str, Callable[[Any], list[Row]]]] = [
    ("crossed", _crossed),
    ("lambda", _lambda),
    ("controls", _controls),
    ("evidence", _evidence),
    ("labels", _labels),
]
NOT_RUN = [
    "images above 8x8, colour images and larger networks",
    "teachers from public data (no pretrained network is at hand offline) and the model itself as teacher (the targets have no classes)",
    "half_unet and batch-normalized classifiers, adapters, and the sampler with 250 steps: tested, not measured",
    "log-likelihood of each copy under model and classifier apart",
]  # fmt: skip


def picture() -> None:
    """results/side/lambda.png: copies under each classifier, and quality, over the strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from mdiff.report import figures

    crossed, curve = load("crossed"), load("lambda")
    if crossed is None or curve is None:
        return
    lines = (
        ("its own half's classifier", "A under A", "A"),
        ("the other half's classifier", "A under B", "A"),
        ("model never saw them, classifier knows them", "B under A", "A"),
    )
    with matplotlib.rc_context(figures.style()):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for place, (name, arm, against) in enumerate(lines):
            rows = [row for row in crossed["rows"] if row["arm"] == arm and row["against"] == against]
            band(left, [row["scale"] for row in rows], [row["memorized"] for row in rows], name, place)
        left.set(
            xlabel="strength of the guidance",
            ylabel="copies of half A, % of generations",
            title="What is copied",
        )
        for place, key in enumerate(("memorized", "precision", "recall")):
            rows = curve["rows"]
            name = "copies" if key == "memorized" else f"{key} against held-out"
            band(right, [row["scale"] for row in rows], [row[key] for row in rows], name, place)
        right.set(
            xlabel="strength of the guidance", ylabel="%", title="Copies and quality of the same generations"
        )
        for axes in (left, right):
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks([0, 1, 2, 4, 8, 16, 32], labels=["0", "1", "2", "4", "8", "16", "32"])
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
        figure.savefig(OUT / "lambda.png", dpi=110)


def band(axes: Any, x: list[float], rows: list[Row], name: str, place: int) -> None:
    """A line of shares in % with its interval."""
    from mdiff.report import figures

    value, low, high = ([100 * row[key] for row in rows] for key in ("value", "low", "high"))
    color = figures.COLORS[place]
    axes.plot(x, value, color=color, marker=figures.MARKERS[place], ms=4, label=name)
    axes.fill_between(x, [max(v, 0) for v in low], high, color=color, alpha=0.15, lw=0)
