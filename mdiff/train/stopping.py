"""Early stopping: training ends when something that is measured along the way leaves its limit.

The rule sees scalars only. After a measurement above a limit the run goes back to the last state that was measured
within all limits (at first: the untrained one), and `stopped.json` says so. The same command then does not train on;
with higher limits it goes on from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mdiff import config
from mdiff.errors import UserError
from mdiff.files import write_json
from mdiff.train import metrics

FILE = "stopped.json"
MEASURES = ("memorized", "control", "excess", "quality", "gap")
"""What the evaluator of the recipes measures; above the limit is bad for all. Also gap@SIGMA for each of train.eval_levels."""


@dataclass(frozen=True)
class Stopped:
    """Why a run ended early.

    Attributes:
      step: where the limit was left.
      measure: which, such as "memorized".
      value: of the measure there.
      limit: it was above.
      kept: step of the last state measured within all limits; 0 is the untrained one.
    """

    step: int
    measure: str
    value: float
    limit: float
    kept: int

    def __str__(self) -> str:
        text = f"{self.measure} {self.value:.4g} at step {self.step} is above {self.limit:g}: stopped early; the state of "
        if self.kept:
            return f"{text}step {self.kept} is kept"
        fix = "raise" if self.measure == "quality" else "lower"  # it begins bad; the others end so
        return f"{text}step 0 is kept, the untrained one: {fix} train.eval_every"


def exceeded(
    limits: Mapping[str, float], scalars: Mapping[str, float], step: int, kept: int
) -> Stopped | None:
    """Which limit, if any, a measurement `{"eval/NAME": value}` at `step` leaves; the last good state was `kept`."""
    for measure, limit in limits.items():
        value = scalars[f"eval/{measure}"]
        if not value <= limit:  # a NaN is not within its limit
            return Stopped(step, measure, float(value), limit, kept)
    return None


def check_run(folder: Path, cfg: config.Train, step: int) -> None:
    """Raises UserError when the run in `folder`, which goes on from `step`, is known to be beyond its limits already.

    Ending it there would keep a state that is not within them; the older ones may be gone.
    """
    if not cfg.stop_when:
        return
    measured = [row for row in metrics.read(folder / "metrics.jsonl") if row["step"] <= step]
    measured = [row for row in measured if any(name.startswith("eval/") for name in row)]
    if not measured:
        return
    found = exceeded(
        {m: v for m, v in cfg.stop_when.items() if f"eval/{m}" in measured[-1]}, measured[-1], step, 0
    )
    if found is not None:
        raise UserError(
            f"train.stop_when: {found.measure} {found.limit:g}: the run in {folder} is beyond it already "
            f"({found.value:.4g} at step {measured[-1]['step']}); raise the limit, or train in a new --workdir"
        )


def save(folder: Path, stopped: Stopped) -> None:
    """Write `stopped.json`."""
    write_json(folder / FILE, {name: _plain(value) for name, value in asdict(stopped).items()})


def read(folder: Path) -> Stopped | None:
    """Why the run in `folder` ended early; None when it did not.

    Raises:
      UserError: the record is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text())
        return Stopped(**{**tree, "value": math.nan if tree["value"] is None else tree["value"]})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete it to let the run go on") from None


def load(folder: Path, cfg: config.Train) -> Stopped | None:
    """As `read`, as long as the limits are not raised."""
    stopped = read(folder)
    limit = None if stopped is None else cfg.stop_when.get(stopped.measure)
    return stopped if stopped is not None and limit is not None and not stopped.value <= limit else None


def forget(folder: Path) -> None:
    """The run goes on."""
    (folder / FILE).unlink(missing_ok=True)


def _plain(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def check(cfg: config.Train) -> None:
    """Raises UserError when the limits can never be met with a measurement."""
    for measure, limit in cfg.stop_when.items():
        known = [*MEASURES, *(f"gap@{level:g}" for level in cfg.eval_levels)]
        if measure not in known:
            raise UserError(f"train.stop_when: {measure}: is not measured; there are {', '.join(known)}")
        if measure.startswith("gap") and not cfg.eval_levels:
            raise UserError(f"train.stop_when: {measure}: needs noise levels in train.eval_levels; give some")
        if not math.isfinite(limit):
            raise UserError(f"train.stop_when: {measure} {limit}: give a finite limit")
    if cfg.stop_when and not cfg.eval_every:
        raise UserError(
            "train.stop_when: nothing is measured while training (train.eval_every = 0); set train.eval_every"
        )


def check_data(cfg: config.Train, heldout: int) -> None:
    """Raises UserError when a limit needs held-out images and there are fewer than 2."""
    for measure in cfg.stop_when:
        if measure != "memorized" and heldout < 2:
            raise UserError(
                f"train.stop_when: {measure}: is measured against held-out images, of which there are {heldout}; set "
                "data.heldout to 2 or more, or use memorized"
            )
