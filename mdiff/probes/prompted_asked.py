"""What a detector of memorized prompts may ask a text-to-image model, and what a detector is.

Units. With u = xt / alpha at noise level s = sigma / alpha, the denoiser D(u) and eps = (u - D(u)) / s, the estimate of unit noise,
published formulas for variance-preserving models carry over to any process. There x_T has unit variance; here it is s n with unit
noise n, so that every "eps - x_T" is eps - n = -D / s, and every difference of two eps that of two D over -s, which is how both are
computed: nothing cancels at s = 80. Scores are -eps / s. A prompt's prediction has the index c, the empty prompt's none, Delta
is their difference, and eps_g = eps + g (eps_c - eps) the guided one with g = `Detect.guidance`.

One-step detectors look at x_T = s n with s = `Detect.sigma`; detectors over steps follow DDIM (arXiv 2010.02502, eta = 0) with eps_g
down the Karras grid from the same noise. Noises are the same for all prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.keys import keys
from mdiff.nemo import Detect
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.sample import guidance, sampler
from mdiff.sample.steps import METHODS, Interval, State
from mdiff.types import Array, Denoiser, Key, Prediction

Maps = dict[str, Array]
"""Layer -> attention of pixels to tokens [B,heads,Q,L]."""


class Look(Protocol):
    """What answers: a network, or a closed form."""

    def __call__(self, xt: Array, t: Array, cond: Array, maps: bool = False) -> tuple[Prediction, Maps]:
        """The prediction at xt [B,H,W,C], t [B] under cond [B,L,E], and its attention if `maps`; row by row."""


@dataclass(frozen=True)
class Asked:
    """What a detector may ask: B rows, prompts times seeds, the seeds of a prompt in a row.

    Attributes:
      look: the model.
      cond: [B,L,E], embedded prompts.
      null: [1,L,E], the embedded empty prompt.
      length: int [B], tokens of each prompt up to and with its end.
      seed: int [B], which of its prompt's noises a row has.
      shape: (H, W, C) of one image.
      process: the noise law.
      cfg: settings.
      layers: names of the attention maps in the network's order.
      sigma_data: standard deviation of the data.
    """

    look: Look
    cond: Array
    null: Array
    length: Array
    seed: Array
    shape: tuple[int, int, int]
    process: GaussianProcess
    cfg: Detect
    layers: tuple[str, ...] = ()
    sigma_data: float = 0.5

    @property
    def level(self) -> float:
        """The noise level s of one-step detectors."""
        return self.cfg.sigma or self.process.sigma_max

    @property
    def keys(self) -> Key:
        """[B] keys, of (cfg.seed, seed) alone."""
        return keys(self.cfg.seed, "detect", self.seed)

    @property
    def noise(self) -> Array:
        """Unit noise n [B,H,W,C], of (cfg.seed, seed) alone."""
        return sampler.start(1.0, self.keys, self.shape)

    def at(self, u: Array, level: float | Array) -> tuple[Array, Array]:
        """xt and t [B] of u [B,H,W,C] at noise level s."""
        t = jnp.full(len(u), self.process.time(jnp.float32(level)))
        return bcast(self.process.alpha(t), u) * u, t

    def given(self, u: Array, level: float | Array) -> Array:
        """D_c(u), the clean image [B,H,W,C] under the prompt."""
        return self.look(*self.at(u, level), self.cond)[0].x0

    def both(self, u: Array, level: float | Array) -> tuple[Array, Array]:
        """D_c(u) and D(u), each [B,H,W,C], from one call on 2B rows."""
        given, free, _ = self._both(*self.at(u, level), maps=False)
        return given.x0, free.x0

    def guided(self, u: Array, level: float | Array) -> Array:
        """D_g(u), guided with `cfg.guidance`, [B,H,W,C]; both of its branches depend on u."""
        denoiser: Denoiser = lambda xt, t, cond: self.look(xt, t, cond)[0]  # type: ignore[arg-type]  # noqa: E731
        through = guidance.classifier_free(denoiser, self.null, self.cfg.guidance, self.process)
        return through(*self.at(u, level), self.cond).x0

    def walk(self, steps: int, record: Callable[[Array, Array, Array, Maps], Any], maps: bool = False) -> Any:
        """Follows the guided sampler for its first `steps` of `cfg.steps` steps.

        Args:
          steps: how many.
          record: told (D_c, D, s, attention of the prompt's branch) at each step.
          maps: look at attention.

        Returns:
          What `record` gave, stacked [steps,...], and where the sampler is then: u [B,H,W,C].
        """
        settings = config.Sample(method="ddim", steps=self.cfg.steps)
        step, grid = METHODS["ddim"](self.process, settings), sampler.grid_of(self.process, settings)

        def body(u: Array, between: tuple[Array, Array]) -> tuple[Array, Any]:
            records = []

            def denoiser(xt: Array, t: Array, cond: Array | None) -> Prediction:
                given, free, seen = self._both(xt, t, maps)
                records.append(record(given.x0, free.x0, self.process.noise_level(t[0]), seen))
                return guidance.extrapolate(free, given, self.cfg.guidance)

            t, s = between
            at = Interval(jnp.int32(0), t, t, s, last=False)
            return step(denoiser, State(u, u), at, self.keys, self.cond).u, records[0]

        times = jnp.asarray(grid, jnp.float32)
        u = self.process.noise_level(times[0]) * self.noise
        u, records = jax.lax.scan(body, u, (times[:steps], times[1 : steps + 1]))
        return records, u

    def _both(self, xt: Array, t: Array, maps: bool) -> tuple[Prediction, Prediction, Maps]:
        def pairs(a: Array, b: Array) -> Array:
            # Alternating: both rows of a pair stay on the device that holds it.
            return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(2 * len(a), *a.shape[1:])

        both, seen = self.look(pairs(xt, xt), pairs(t, t), pairs(self.cond, self.null), maps)
        given, free = (Prediction(*(_half(part, side) for part in both)) for side in (0, 1))
        return given, free, {name: _half(each, 0) for name, each in seen.items()}


@dataclass(frozen=True)
class Detector(ABC):
    """A number for each row that is larger (sign 1) or smaller (sign -1) when the prompt is memorized.

    Attributes:
      name: shown in tables.
    """

    name: str
    sign: ClassVar[int] = 1
    taps: ClassVar[bool] = False
    """Looks at attention maps."""
    jvp: ClassVar[bool] = False
    """Takes forward derivatives: of a network with plain convolutions (`net.scan_safe` off)."""
    guided: ClassVar[bool] = False
    source: ClassVar[str] = ""

    @property
    def guides(self) -> bool:
        """Depends on the weight of guidance."""
        return self.guided

    @abstractmethod
    def calls(self, cfg: Detect) -> int:
        """Network calls for each prompt and seed: rows, two for a pair of predictions; a derivative counts as a call."""

    @abstractmethod
    def __call__(self, asked: Asked) -> Array:
        """[B] numbers."""

    def refuses(self, cfg: Detect, shape: tuple[int, int, int], layers: tuple[str, ...]) -> str:
        """Why it cannot be run: the field, its value and the fix; "" if it can."""
        return ""


def norm(x: Array) -> Array:
    """||x||_2 of each image, [B]."""
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))


def each_seed(x: Array, seeds: int) -> Array:
    """[P,...] as [P * seeds,...], each entry repeated in place; no messages between devices, unlike `jnp.repeat`."""
    return jnp.broadcast_to(x[:, None], (len(x), seeds, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _half(x: Array, side: int) -> Array:
    """Every other row of [2B,...], the first at `side`."""
    return x.reshape(-1, 2, *x.shape[1:])[:, side]
