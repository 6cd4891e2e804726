"""Detectors run on a text-to-image model: one compiled program each, over prompts times seeds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from mdiff.data.captions import END
from mdiff.errors import UserError
from mdiff.nemo import Detect
from mdiff.nets import unet
from mdiff.nets.denoiser import Model
from mdiff.probes.prompted import ALL
from mdiff.probes.prompted_asked import Asked, Detector, Maps, each_seed
from mdiff.train import mesh as meshes
from mdiff.types import Array, Params, Prediction

MAPS = "*/cross/map"
"""Names of attention maps among a network's taps."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What one detector says of prompts.

    Attributes:
      name: of the detector.
      sign: 1 where larger numbers speak for memorization, -1 where smaller ones do.
      rows: float32 [P,S], of each prompt and seed; detectors that compare seeds repeat the prompt's number.
      seconds: for each prompt, all its seeds, once compiled; of the whole job, over all its devices.
      first: seconds of the first call, which compiles unless the program was there.
    """

    name: str
    sign: int
    rows: np.ndarray
    seconds: float
    first: float

    @property
    def mean(self) -> np.ndarray:
        """float64 [P], means over seeds."""
        return np.asarray(self.rows.mean(1, dtype=np.float64))

    @property
    def suspicion(self) -> np.ndarray:
        """float64 [P], larger for memorized prompts: what `rates.evaluate` takes."""
        return self.sign * self.mean


def layers(model: Model) -> tuple[str, ...]:
    """Names of a text model's attention maps in the network's order; none for a model without cross-attention."""
    cfg = getattr(model.net, "cfg", None)
    if cfg is None or not cfg.text:
        return ()
    return tuple(
        f"{stage.name}/cross/map" for stage in unet.stages(cfg, model.shape[0] // cfg.patch) if stage.cross
    )


def choose(
    model: Model, cfg: Detect, known: tuple[Detector, ...] = ALL
) -> tuple[tuple[Detector, ...], dict[str, str]]:
    """The detectors asked for, or all that the model and the settings allow, and why others are left out.

    Args:
      model: a text-conditional one.
      cfg: uses `detectors`; the rest decides what is allowed.
      known: detectors that have names.

    Returns:
      Detectors in the order asked for, and name -> reason of those left out (none when names were given).

    Raises:
      UserError: settings out of range, a model without cross-attention, an unknown name, or one that cannot be run.
    """
    check(model, cfg)
    named, found = {each.name: each for each in known}, layers(model)
    for place, name in enumerate(cfg.detectors):
        if name not in named:
            raise UserError(f"detect.detectors: {name!r} is no detector; give some of {', '.join(named)}")
        if name in cfg.detectors[:place]:
            raise UserError(f"detect.detectors: {name!r} is given twice; give each once")
    wanted = [named[name] for name in cfg.detectors] or list(known)
    refused = {each.name: reason for each in wanted if (reason := each.refuses(cfg, model.shape, found))}
    if cfg.detectors and refused:
        raise UserError(next(iter(refused.values())))
    return tuple(each for each in wanted if each.name not in refused), refused


def check(model: Model, cfg: Detect) -> None:
    """Raises UserError when settings are out of range, or the model takes no text."""
    if not layers(model):
        raise UserError(
            "net.text = 0: the model attends to no text, so it has no prompts; train one with net.text"
        )
    if model.damage is not None:
        raise UserError("data.degrade: the model was trained on damaged images; detectors need whole ones")
    for name, least in (("seeds", 1), ("steps", 2), ("batch", 1), ("probes", 0), ("bootstrap", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"detect.{name} = {getattr(cfg, name)}: must be {least} or more")
    if not 0 <= cfg.guidance < math.inf:
        raise UserError(
            f"detect.guidance = {cfg.guidance}: must be 0 or above, and finite; 1 is no guidance, 3 the default"
        )
    low, high = model.process.sigma_min, model.process.sigma_max
    if cfg.sigma != 0 and not low <= cfg.sigma <= high:
        raise UserError(
            f"detect.sigma = {cfg.sigma}: must be in [{low:g}, {high:g}], the process's noise levels, or 0 for the highest"
        )
    for name in ("false_alarms", "confidence"):
        if not 0 < getattr(cfg, name) < 1:
            raise UserError(f"detect.{name} = {getattr(cfg, name)}: must be between 0 and 1")


def program(
    model: Model, detector: Detector, cfg: Detect, on: DeviceMesh | None = None
) -> Callable[[Params, Array | np.ndarray], Array]:
    """A jitted `(params, tokens int32 [P,L]) -> float32 [P,S]`, S = cfg.seeds; a row depends on its prompt and seed alone.

    Args:
      model: a text-conditional one; a detector that takes derivatives gets it with plain convolutions.
      detector: which.
      cfg: settings.
      on: devices that prompts are split over, which P divides by; every process gets all numbers.
    """
    # The batch's size and the evaluation are the caller's: one program serves all of them.
    plain = replace(cfg, detectors=(), batch=1, false_alarms=0.5, bootstrap=0, confidence=0.5)
    return _program(_plain(model) if detector.jvp else model, detector, plain, on)


@functools.lru_cache(maxsize=32)
def _program(
    model: Model, detector: Detector, cfg: Detect, on: DeviceMesh | None
) -> Callable[[Params, Array | np.ndarray], Array]:
    split, whole = (None, None) if on is None else (meshes.batch_sharding(on), meshes.replicated(on))

    @functools.partial(jax.jit, out_shardings=whole)
    def detect(params: Params, tokens: Array) -> Array:
        if split is not None:
            tokens = jax.lax.with_sharding_constraint(tokens, split)
        asked = ask(model, params, tokens, cfg)  # outside: the one empty prompt is not to be split
        with nullcontext() if on is None else meshes.activations_on(on):
            return detector(asked).reshape(len(tokens), cfg.seeds)

    return detect


def ask(model: Model, params: Params, tokens: Array, cfg: Detect) -> Asked:
    """What a detector may ask `model` about prompts int32 [P,L]: P times cfg.seeds rows."""
    prompts, null = model.condition(params, {"tokens": tokens}), model.condition(params, {}, n=1)
    assert prompts is not None and null is not None

    def look(xt: Array, t: Array, cond: Array, maps: bool = False) -> tuple[Prediction, Maps]:
        return model.apply(params, xt, t, cond, taps=(MAPS,) if maps else ())

    return Asked(
        look=look,
        cond=each_seed(prompts, cfg.seeds),
        null=null,
        length=each_seed(jnp.argmax(tokens == END, axis=1) + 1, cfg.seeds),
        seed=jnp.tile(jnp.arange(cfg.seeds), len(tokens)),
        shape=model.shape,
        process=model.process,
        cfg=cfg,
        layers=layers(model),
        sigma_data=model.sigma_data,
    )


def run(
    model: Model,
    params: Params,
    detector: Detector,
    tokens: np.ndarray,
    cfg: Detect,
    *,
    on: DeviceMesh | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Scored:
    """One detector on all prompts, about `cfg.batch` rows a call.

    Args:
      model: a text-conditional one.
      params: its parameters, on the devices of `on`.
      detector: from `choose`.
      tokens: int32 [P,L].
      cfg: settings.
      on: devices that prompts are split over.
      advance: told how many prompts are done, call by call.

    Raises:
      UserError: no prompts, or numbers that are not finite.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or not len(tokens):
        raise UserError(f"prompts: tokens of shape {tokens.shape}; give one prompt or more, int32 [P,L]")
    ways = 1 if on is None else meshes.batch_devices(on)
    each = min(-(-max(1, cfg.batch // cfg.seeds) // ways), -(-len(tokens) // ways)) * ways

    def part(start: int) -> Array | np.ndarray:
        # Calls of one size; what the last one is filled up with is not read.
        rows = tokens[np.minimum(np.arange(start, start + each), len(tokens) - 1)]
        return rows if on is None else meshes.place(rows, meshes.replicated(on))

    detect, starts = program(model, detector, cfg, on), range(0, len(tokens), each)

    def timed(start: int) -> tuple[np.ndarray, float]:
        rows, before = part(start), time.perf_counter()
        return np.asarray(detect(params, rows)), time.perf_counter() - before

    found, seconds, first = [], 0.0, 0.0
    for start in starts:
        numbers, taken = timed(start)
        if start == 0:
            first = taken
            # A call that compiled says nothing of speed; where there is no other one it is made again.
            taken = 0.0 if len(starts) > 1 else timed(start)[1]
        found.append(numbers)
        seconds += taken
        advance(min(each, len(tokens) - start))
    every = np.concatenate(found)[: len(tokens)]
    broken = int(np.sum(~np.isfinite(every).all(1)))
    if broken:
        raise UserError(
            f"{detector.name}: numbers of {broken} of {len(tokens)} prompts are not finite; check the checkpoint"
        )
    return Scored(detector.name, detector.sign, every, seconds / (each * max(1, len(starts) - 1)), first)


def _plain(model: Model) -> Model:
    """The same model with convolutions that have a forward derivative; parameters are the same."""
    cfg = getattr(model.net, "cfg", None)
    if cfg is None or not cfg.scan_safe:
        return model
    return replace(model, net=model.net.clone(cfg=replace(cfg, scan_safe=False)))
