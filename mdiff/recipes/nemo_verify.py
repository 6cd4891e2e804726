"""Do the found neurons carry the images? Images with neurons off, beside the whole network and beside random neurons.

Four networks draw the same prompts from the same starting noises, with another seed than the search:

    whole    nothing off
    own      each prompt's found neurons off
    union    the found neurons of all prompts off, as if pruned for good
    random   as many random neurons as the prompt's own, none of them among its own

`random` is drawn from the same layers and apart from the union where there is room, else apart from the prompt's own neurons, else
from any of the searched layers; how is recorded for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.errors import UserError
from mdiff.nemo import Nemo, Similarity
from mdiff.nets.denoiser import Model
from mdiff.probes import alike, found, intervals, recited
from mdiff.probes.units import Units
from mdiff.recipes import recite
from mdiff.recipes.prompts import Prompts
from mdiff.train import loop
from mdiff.types import Estimate, Params, to_float

ARMS = ("whole", "own", "union", "random")
BESIDE = ("union", "own", "any layer", "none")
"""How random neurons are drawn: in the same layers and apart from the union; in the same layers; in any layer; or, with more than
half of all neurons found, not at all."""


@dataclass(frozen=True, eq=False)
class Verified:
    """Images of prompts from four networks.

    Attributes:
      arms: name -> uint8 [P,G,H,W,C].
      off: name -> bool [P,N], the neurons off.
      changed: name -> float [P,G], SSIM with the whole network's image of the same noise.
      share: name -> float [P], share of images that copy the prompt's own; NaN for prompts without.
      nearest: name -> float [P], share of images to which the prompt's own is nearer than any other training image: a spoiled
        copy is no copy by the ratio of distances, and still of its image.
      beside: [P] of `BESIDE`, how each prompt's random neurons were drawn.
    """

    arms: dict[str, np.ndarray]
    off: dict[str, np.ndarray]
    changed: dict[str, np.ndarray]
    share: dict[str, np.ndarray]
    nearest: dict[str, np.ndarray]
    beside: tuple[str, ...]


def verify(
    model: Model,
    params: Params,
    units: Units,
    prompts: Prompts,
    records: Sequence[found.Found],
    train: np.ndarray,
    cfg: Nemo,
    sample: config.Sample,
    audit: config.Audit,
    images: int,
    monitor: loop.Monitor,
    union: np.ndarray | None = None,
) -> Verified:
    """Draws `images` of each prompt from each of the four networks, and compares.

    Args:
      model: the model.
      params: its parameters.
      units: the neurons searched.
      prompts: P prompts.
      records: of the search, one for each.
      train: uint8 [R,H,W,C], the training images that `prompts.own` are indices of.
      cfg: uses control_seed, factor and similarity.
      sample: the sampler, and the seed of the starting noises.
      audit: the rules of a copy.
      images: G.
      monitor: told of progress.
      union: bool [N], other neurons for "union" than those of these prompts.
    """
    layer, none = units.layer, np.zeros(len(units), bool)
    if union is None:
        union = found.frequency(records, len(units)) > 0
    own = np.stack([units.off(each.refined) for each in records])
    random, beside = controls(records, layer, union, cfg.control_seed)
    off = {
        "whole": np.broadcast_to(none, own.shape),
        "own": own,
        "union": np.broadcast_to(union, own.shape),
        "random": random,
    }
    done, total = 0, len(prompts) * len(ARMS)

    def advance(more: int) -> None:
        nonlocal done
        done += more
        monitor.progress("images", done, total, {})

    draw = recite.make(model, units, sample, advance)
    seeds = np.arange(images)
    arms: dict[str, np.ndarray] = {}
    for name in ARMS:
        todo = np.flatnonzero(
            off[name].any(1) | (name == "whole")
        )  # nothing off gives the whole network's images
        arms[name] = np.array(arms["whole"]) if name != "whole" else np.zeros(0, np.uint8)
        if len(todo):
            factor = np.where(off[name][todo], cfg.factor, 1.0)
            drawn = draw(params, prompts.tokens[todo], factor, seeds)
            arms[name] = drawn if name == "whole" else arms[name]
            arms[name][todo] = drawn
        advance(len(prompts) - len(todo))
    changed = {name: compare(arms["whole"], arms[name], cfg.similarity) for name in ARMS}
    share, nearest = _shares(arms, prompts, train, audit)
    for each in (share, nearest):
        each["random"][np.array(beside) == BESIDE[-1]] = np.nan
    return Verified(arms, off, changed, share, nearest, beside)


def controls(
    records: Sequence[found.Found], layer: np.ndarray, union: np.ndarray, seed: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Random neurons for each prompt bool [P,N], and how each prompt's were drawn, of `BESIDE`."""
    out, beside = np.zeros((len(records), len(layer)), bool), []
    anywhere = np.zeros_like(layer)
    none = np.zeros(0, int)
    draws = {"union": (layer, np.flatnonzero(union)), "own": (layer, none), "any layer": (anywhere, none)}
    for row, each in enumerate(records):
        drawn: dict[str, tuple[int, ...]] = {}
        for name, (where, avoid) in draws.items():
            try:
                drawn[name] = found.random_control(
                    each.refined, where, seed + each.prompt, avoid=avoid.tolist()
                )
            except UserError:
                continue
            break
        beside.append(next(iter(drawn), BESIDE[-1]))
        out[row, list(next(iter(drawn.values()), ()))] = True
    return out, tuple(beside)


def compare(a: np.ndarray, b: np.ndarray, cfg: Similarity) -> np.ndarray:
    """SSIM of images uint8 [P,G,H,W,C] and [P,G,H,W,C], as they are, on [0, 1]; float [P,G]."""
    maps = [jnp.asarray(to_float(x.reshape(-1, *x.shape[2:])) / 2 + 0.5) for x in (a, b)]
    return np.asarray(alike.images(maps[0], maps[1], cfg)).reshape(a.shape[:2])


def _shares(
    arms: Mapping[str, np.ndarray], prompts: Prompts, train: np.ndarray, audit: config.Audit
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    known = np.array([bool(own) for own in prompts.own])
    own = [own for own in prompts.own if own]
    share, nearest = ({name: np.full(len(prompts), np.nan) for name in arms} for _ in range(2))
    for name, images in arms.items() if own else ():
        found = recited.verdicts(images[known], own, train, audit)
        share[name][known] = found.share
        nearest[name][known] = (found.ratio < 1).mean(1)
    return share, nearest


def rates(share: Mapping[str, np.ndarray], chosen: np.ndarray, audit: config.Audit) -> dict[str, Any]:
    """Over the chosen prompts [P]: share of images that are copies in each network, and paired differences from the whole.

    Prompts without a share, or without random neurons, are left out. Intervals resample prompts; where all have the same share, 0 or
    1, they are Wilson's.
    """
    out: dict[str, Estimate] = {}
    for name, values in share.items():
        here = values[chosen]
        if (known := np.isfinite(here)).any():
            out[name] = _mean(here[known], audit, 0.0)
            if name != "whole":
                out[f"{name} - whole"] = _mean((here - share["whole"][chosen])[known], audit, -1.0)
    return out


def _mean(values: np.ndarray, audit: config.Audit, low: float) -> Estimate:
    """Of values in [low, 1], with an interval."""
    n, width = len(values), 1.0 - low
    if np.ptp(values) == 0 and values[0] in (low, 1.0):
        found = intervals.wilson(n if values[0] == 1.0 else 0, n, audit.confidence)
        return Estimate(low + width * found.value, low + width * found.low, low + width * found.high, n)
    return intervals.bootstrap(
        intervals.mean(values), n, n_resamples=audit.bootstrap, confidence=audit.confidence, seed=audit.seed
    )
