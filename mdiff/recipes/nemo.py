"""NeMo (arXiv 2406.02366) on a text-to-image run, stage by stage, each resumable.

    calibrate   statistics of activations and the threshold tau, on prompts that the model does not know
    look        first-step differences of the prompts, and which of them look memorized (D1)
    search      the neurons behind each memorized prompt (D2 to D4), prompt by prompt
    verify      images with the found neurons off, beside those of the whole network, of random neurons, and of the union

What is found is a path from prompt to image that can be cut. Another prompt may reach the image on another path: the neurons say
where these prompts pass, not that the image is gone.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdiff import processes
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.fields import check_values, to_json
from mdiff.files import strict, write_json
from mdiff.nemo import Nemo
from mdiff.probes import intervals, localize, localize_fast
from mdiff.probes.first_step import FirstStep, Looked
from mdiff.probes.found import Found
from mdiff.probes.localize import Neurons
from mdiff.recipes.prompts import Prompts
from mdiff.train import loop
from mdiff.types import Estimate

FEWEST = 8
"""Prompts that calibration needs: half of them give statistics and threshold, half the false-positive rate."""
CALIBRATION, FOUND = "calibration.json", "found.jsonl"


def check(cfg: Nemo) -> None:
    """Raises UserError for the first field that is out of range."""
    check_values(cfg)
    for name, low in (("seeds", 2), ("batch", 1), ("top", 0), ("width", 0)):
        if getattr(cfg, name) < low:
            raise UserError(f"nemo.{name} = {getattr(cfg, name)}: must be {low} or more")
    if cfg.theta_step <= 0 or cfg.theta_min > cfg.theta:
        raise UserError(
            f"nemo.theta = {cfg.theta}, theta_step = {cfg.theta_step}, theta_min = {cfg.theta_min}: theta falls from the "
            "first to the last, in steps above 0"
        )
    if not 0 <= cfg.tau_quantile < 1:
        raise UserError(
            f"nemo.tau_quantile = {cfg.tau_quantile}: must be in [0, 1); 0 is mean + tau_sigmas std"
        )
    if not 0 <= cfg.tau < 1:
        raise UserError(f"nemo.tau = {cfg.tau}: is a similarity, in (0, 1); 0 calibrates it")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What ordinary prompts look like.

    Attributes:
      neurons: mean and standard deviation of each neuron's activation, over half of the prompts.
      tau: similarity above which seeds agree as those of a memorized prompt do.
      mean, std: of the calibration scores.
      scores: float [Q], of that half.
      fresh: float [R], scores of the other half.
      false_positives: share of the other half that tau takes for memorized.
    """

    neurons: Neurons
    tau: float
    mean: float
    std: float
    scores: np.ndarray
    fresh: np.ndarray
    false_positives: Estimate

    def to_json(self) -> dict[str, Any]:
        """For result files; without the neurons' statistics."""
        return {
            "tau": self.tau,
            "mean": self.mean,
            "std": self.std,
            "scores": self.scores.tolist(),
            "fresh": self.fresh.tolist(),
            "false_positives": asdict(self.false_positives),
        }


def threshold(scores: np.ndarray, cfg: Nemo) -> float:
    """tau by the calibration scores [Q]: as set, a quantile, or mean + tau_sigmas std (unbiased)."""
    if cfg.tau:
        return cfg.tau
    if cfg.tau_quantile:
        return float(np.quantile(scores, cfg.tau_quantile))
    return float(scores.mean() + cfg.tau_sigmas * scores.std(ddof=1))


def calibrate(first: FirstStep, ordinary: Prompts, cfg: Nemo, monitor: loop.Monitor) -> Calibration:
    """Statistics, tau and its false-positive rate on prompts that the model does not know.

    Args:
      first: the model.
      ordinary: such prompts; half of them, by seed, for statistics and tau, the others for the rate.
      cfg: the settings.
      monitor: told of progress.

    Raises:
      UserError: too few prompts.
    """
    if len(ordinary) < FEWEST:
        raise UserError(
            f"calibration: {len(ordinary)} ordinary prompts, and {FEWEST} are needed; give more with --ordinary"
        )
    order = permutation(cfg.seed, "calibration", 0, len(ordinary))
    looked = _look(first, ordinary.tokens[order], "calibrate", monitor)
    half = (len(ordinary) + 1) // 2
    one, other = (
        replace(looked, pairs=looked.pairs[part], activation=looked.activation[part])
        for part in (slice(0, half), slice(half, None))
    )
    scores = one.scores(cfg.calibrate_on)
    tau = threshold(scores, cfg)
    alarms = int((other.score > tau).sum())
    activation = one.activation.astype(np.float64)
    neurons = Neurons(activation.mean(0), activation.std(0, ddof=1), first.units.layer)
    return Calibration(
        neurons,
        tau,
        float(scores.mean()),
        float(scores.std(ddof=1)),
        scores,
        other.score,
        intervals.wilson(alarms, len(other.score)),
    )


def _look(first: FirstStep, tokens: np.ndarray, task: str, monitor: loop.Monitor) -> Looked:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        monitor.progress(task, done, len(tokens), {})

    return first.look(tokens, advance)


@dataclass(frozen=True, eq=False)
class Search:
    """Everything the search of neurons found.

    Attributes:
      looked: the prompts' first steps.
      kept: bool [P,S], seeds that count.
      found: one record for each prompt, in order.
      seconds: spent searching, in this call.
    """

    looked: Looked
    kept: np.ndarray
    found: tuple[Found, ...]
    seconds: float

    @property
    def memorized(self) -> np.ndarray:
        """bool [P]: prompts with a kept seed."""
        return np.asarray(self.kept.any(1))


def search(
    first: FirstStep,
    prompts: Prompts,
    calibration: Calibration,
    cfg: Nemo,
    monitor: loop.Monitor,
    record: Path | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Search:
    """Finds the neurons of all prompts; prompts already in `record` are not searched again.

    Args:
      first: the model.
      prompts: P prompts.
      calibration: from `calibrate`.
      cfg: the settings.
      monitor: told of progress.
      record: file of finished prompts, one JSON line each, appended to; None keeps none.
      guard: called before every write; raises when the file is no longer ours.
    """
    looked = _look(first, prompts.tokens, "look", monitor)
    kept = looked.kept(calibration.tau)
    first.prompts(looked, kept)
    identity = {"nemo": search_settings(cfg), "prompts": list(prompts.text), "tau": calibration.tau}
    found = _read(record, identity) if record is not None else {}
    if found:
        monitor.say(f"{len(found)} of {len(prompts)} prompts were searched before")
    begun, left = time.monotonic(), [i for i in range(len(prompts)) if i not in found]
    for each in _searches(first, looked, kept, calibration, cfg, left):
        found[each.prompt] = each
        if record is not None:
            guard()
            processes.from_first(functools.partial(_append, record, identity, each))
        monitor.progress("search", len(found), len(prompts), {})
    seconds = time.monotonic() - begun
    return Search(looked, kept, tuple(found[i] for i in range(len(prompts))), seconds)


def _searches(
    first: FirstStep,
    looked: Looked,
    kept: np.ndarray,
    calibration: Calibration,
    cfg: Nemo,
    left: Sequence[int],
) -> Iterator[Found]:
    memorized = np.asarray(kept.any(1))
    asked = first.evaluate, calibration.neurons, calibration.tau, cfg
    rows = cfg.batch * first.mesh.shape["trial"]
    which: dict[str, Any] = {"prompts": left, "memorized": memorized, "rows": rows}
    if cfg.mode == "gradient":
        importance = np.zeros_like(looked.activation)
        chosen = np.array([i for i in left if memorized[i]], dtype=np.int64)
        if len(chosen):
            importance[chosen] = first.gradient(chosen)
        return localize_fast.gradient(asked[0], importance, *asked[1:], **which)
    run = localize.exact if cfg.mode == "exact" else localize_fast.fast
    return run(asked[0], looked.activation, *asked[1:], **which)


def search_settings(cfg: Nemo) -> dict[str, Any]:
    """The fields that decide what is found: all but where and how fast it is computed, and what is done with it."""
    tree: dict[str, Any] = to_json(cfg)
    for name in ("mesh", "batch", "width", "control_seed", "factor"):
        del tree[name]
    return tree


def _append(path: Path, identity: dict[str, Any], found: Found) -> None:
    if not path.exists():
        path.write_text(json.dumps(strict(identity)) + "\n", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(strict(asdict(found))) + "\n")


def _read(path: Path, identity: dict[str, Any]) -> dict[int, Found]:
    """Finished prompts of a search with the same settings; a line cut by a kill is left out.

    Raises:
      UserError: the file is of another search.
    """
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8")
    lines = whole.splitlines()
    if whole and not whole.endswith("\n"):
        lines = lines[:-1]
        processes.from_first(
            lambda: path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        )
    if not lines:
        return {}
    try:
        first = json.loads(lines[0])
        found = [Found.load(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and the search begins anew") from None
    if first != json.loads(json.dumps(strict(identity))):
        raise UserError(f"{path}: is of another search; give another --out, or delete it")
    return {each.prompt: each for each in found}


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Writes `calibration.json`, with the neurons' statistics."""
    neurons = calibration.neurons
    write_json(
        folder / CALIBRATION,
        strict(
            {**calibration.to_json(), "neurons": {"mean": neurons.mean.tolist(), "std": neurons.std.tolist()}}
        ),
    )
