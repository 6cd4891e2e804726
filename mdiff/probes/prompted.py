"""Detectors of memorized prompts: one number per prompt and starting noise, from the text-to-image model alone.

A detector is a frozen dataclass: its settings, its direction (`sign`), what it needs, and a pure function of what a model may be
asked (`prompted_asked.Asked`, which also says in what units). `prompted_run` makes programs of them, `rates` says how well they do.
Those that look at attention are in `prompted_attention`; all have names here (`ALL`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.nemo import Detect, Similarity
from mdiff.probes import alike, detectors
from mdiff.probes.prompted_asked import Asked, Detector, each_seed, norm
from mdiff.probes.prompted_attention import AttentionEntropy, AttentionEntropyEnd, BrightEnding
from mdiff.sample import sampler
from mdiff.types import Array


@dataclass(frozen=True)
class NoiseGap(Detector):
    """Mean over steps of ||eps_c - eps||_2 = ||D_c - D||_2 / s along a guided trajectory (arXiv 2407.21720).

    Attributes:
      steps: the first so many; 0 is all.
    """

    steps: int = 1
    source: ClassVar[str] = "arXiv 2407.21720"

    @property
    def guides(self) -> bool:
        return self.steps != 1  # a first step is taken before guidance acts

    def calls(self, cfg: Detect) -> int:
        return 2 * (self.steps or cfg.steps)

    def refuses(self, cfg: Detect, shape: tuple[int, int, int], layers: tuple[str, ...]) -> str:
        short = self.steps > cfg.steps
        return f"detect.steps = {cfg.steps}: must be {self.steps} or more for {self.name}" if short else ""

    def __call__(self, asked: Asked) -> Array:
        if self.steps == 1:
            given, free = asked.both(asked.level * asked.noise, asked.level)
            return norm(given - free) / asked.level
        gaps, _ = asked.walk(self.steps or asked.cfg.steps, lambda given, free, s, _: norm(given - free) / s)
        return gaps.mean(0)


@dataclass(frozen=True)
class SeedAgreement(Detector):
    """Similarity of a prompt's one-step differences eps_c - n = -D_c / s between seeds (NeMo, arXiv 2406.02366, eq. 4).

    Attributes:
      over: the largest of a prompt's pairs (the paper's calibration), or their mean.
      similarity: how alike two differences are.
    """

    over: Literal["max", "mean"] = "max"
    similarity: Similarity = Similarity()
    source: ClassVar[str] = "arXiv 2406.02366"

    def calls(self, cfg: Detect) -> int:
        return 1

    def refuses(self, cfg: Detect, shape: tuple[int, int, int], layers: tuple[str, ...]) -> str:
        if cfg.seeds < 2:
            return f"detect.seeds = {cfg.seeds}: must be 2 or more for {self.name}, which compares seeds"
        try:
            alike.check(self.similarity, *shape[:2])
        except UserError as error:
            return str(error)
        return ""

    def __call__(self, asked: Asked) -> Array:
        seeds = asked.cfg.seeds
        delta = -asked.given(asked.level * asked.noise, asked.level) / asked.level
        delta = delta.reshape(-1, seeds, *asked.shape)
        one, other = jnp.triu_indices(seeds, 1)
        each = alike.similarity(delta[:, one], delta[:, other], self.similarity)
        return each_seed(each.max(1) if self.over == "max" else each.mean(1), seeds)


@dataclass(frozen=True)
class DenoisingConfidence(Detector):
    """Mean over pixels of (x_T - D_g)^2 / s^2 = eps_g^2, less the noise's own n^2 (arXiv 2305.08694, white box).

    n^2 is the same for all prompts, and leaving it out keeps digits: the mean of (D_g / s)^2 - 2 n D_g / s.
    """

    guided: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2305.08694"

    def calls(self, cfg: Detect) -> int:
        return 1 if cfg.guidance == 1 else 2

    def __call__(self, asked: Asked) -> Array:
        noise = asked.noise
        removed = asked.guided(asked.level * noise, asked.level) / asked.level
        return jnp.mean(removed * (removed - 2 * noise), axis=(1, 2, 3))


@dataclass(frozen=True)
class EdgeConsistency(Detector):
    """Share of pixels that are an edge in more than `share` of the seeds' one-step images D_g (arXiv 2305.08694, black box).

    An edge: the magnitude of Sobel's gradient (weights 1 2 1 and -1 0 1), on images clipped to [0, 1], summed over the channels
    (for other numbers of channels three times their mean), is above `threshold`.

    Attributes:
      threshold: the published one is for images of 256 pixels; small ones have steeper edges.
      share: of the seeds.
    """

    threshold: float = 1.5
    share: float = 0.5
    guided: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2305.08694"

    def calls(self, cfg: Detect) -> int:
        return 1 if cfg.guidance == 1 else 2

    def __call__(self, asked: Asked) -> Array:
        image = asked.guided(asked.level * asked.noise, asked.level)
        edges = edge_strength(jnp.clip((image + 1) / 2, 0, 1)) > self.threshold
        often = edges.reshape(-1, asked.cfg.seeds, *edges.shape[1:]).mean(1) > self.share
        return each_seed(often.mean((1, 2)), asked.cfg.seeds)


@dataclass(frozen=True)
class ScoreNorm(Detector):
    """||eps_g||_2, the guided score's norm times s (arXiv 2411.00113)."""

    guided: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2411.00113"

    def calls(self, cfg: Detect) -> int:
        return 1 if cfg.guidance == 1 else 2

    def __call__(self, asked: Asked) -> Array:
        noise = asked.noise
        return norm(noise - asked.guided(asked.level * noise, asked.level) / asked.level)


@dataclass(frozen=True)
class Flipd(Detector):
    """Local intrinsic dimension of the guided model (FLIPD, arXiv 2406.03537; of prompts, arXiv 2411.00113); low is memorized.

    d - s tr(d eps_g / du) + ||eps_g||^2 = tr(d D_g / du) + ||D_g - u||^2 / s^2 (`detectors.local_dimension`), differentiated in both
    branches of guidance. The trace is Hutchinson's with `Detect.probes` sign vectors, 0 takes every direction.

    Attributes:
      after: share of the trajectory's steps taken first; 0 looks at x_T with s = `Detect.sigma`.
    """

    after: float = 0.0
    sign: ClassVar[int] = -1
    jvp: ClassVar[bool] = True
    guided: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2411.00113"

    def _steps(self, cfg: Detect) -> int:
        return min(round(self.after * cfg.steps), cfg.steps - 1)

    def calls(self, cfg: Detect) -> int:
        each = 1 if cfg.guidance == 1 else 2
        return 2 * self._steps(cfg) + each * (1 + cfg.probes)

    def __call__(self, asked: Asked) -> Array:
        cfg, steps = asked.cfg, self._steps(asked.cfg)
        u, level = asked.level * asked.noise, jnp.float32(asked.level)
        if steps:
            _, u = asked.walk(steps, lambda given, free, s, _: None)
            grid = sampler.grid_of(asked.process, config.Sample(steps=cfg.steps))
            level = asked.process.noise_level(jnp.float32(grid[steps]))
        each = keys(cfg.seed, "detect trace", asked.seed)
        return detectors.local_dimension(lambda x: asked.guided(x, level), u, level, cfg.probes, each)


@dataclass(frozen=True)
class Sharpness(Detector):
    """||H s||_2 times s^3, s_Delta = s_c - s_0 the score of p(c | x) and H its Jacobian (arXiv 2412.04140, whose score
    is its square).

    With D_Delta = D_c - D this is ||(d D_Delta / du) D_Delta||_2 / s, a pure number and one derivative of both branches.
    """

    jvp: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2412.04140"

    def calls(self, cfg: Detect) -> int:
        return 4

    def __call__(self, asked: Asked) -> Array:
        def apart(u: Array) -> Array:
            given, free = asked.both(u, asked.level)
            return given - free

        found, along = jax.linearize(apart, asked.level * asked.noise)
        return norm(along(found)) / asked.level


@dataclass(frozen=True)
class Anisotropy(Detector):
    """norm ||eps_c - eps||_2 at x_T + cosine cos(eps, eps_c - eps), the latter of noise shown as an image (arXiv 2601.20642).

    The cosine is over channels, its mean over pixels, at low noise level `level` with u = sqrt(sigma_data^2 + level^2) n: x_T
    itself for a variance-preserving law and data of unit variance. Away from that law the two terms weigh differently than
    published: at s = 80 the norm is 80 times smaller for the same difference of images.

    Attributes:
      norm: weight of the norm.
      cosine: weight of the cosine.
      level: the published timesteps[-3] of 50 is 41 of 1000, a noise level of 0.2.
    """

    norm: float = 1.0
    cosine: float = 2.0
    level: float = 0.2
    source: ClassVar[str] = "arXiv 2601.20642"

    def calls(self, cfg: Detect) -> int:
        return 4

    def __call__(self, asked: Asked) -> Array:
        noise = asked.noise
        given, free = asked.both(asked.level * noise, asked.level)
        length = norm(given - free) / asked.level
        u = (asked.sigma_data**2 + self.level**2) ** 0.5 * noise
        given, free = asked.both(u, self.level)
        eps, delta = (u - free) / self.level, -(given - free) / self.level
        scale = jnp.sqrt(jnp.sum(eps**2, -1) * jnp.sum(delta**2, -1))
        cosine = jnp.sum(eps * delta, -1) / jnp.where(scale > 0, scale, 1.0)
        return self.norm * length + self.cosine * cosine.mean((1, 2))


ALL: tuple[Detector, ...] = (
    NoiseGap("noise_gap_1", 1),
    NoiseGap("noise_gap_5", 5),
    NoiseGap("noise_gap_all", 0),
    SeedAgreement("seed_agreement"),
    SeedAgreement("seed_agreement_mean", "mean"),
    AttentionEntropy("attention_entropy"),
    AttentionEntropy("attention_entropy_3", 3),
    AttentionEntropyEnd("attention_entropy_end"),
    DenoisingConfidence("denoising_confidence"),
    EdgeConsistency("edge_consistency"),
    ScoreNorm("score_norm"),
    Flipd("flipd"),
    Flipd("flipd_late", 0.8),
    Sharpness("sharpness"),
    BrightEnding("bright_ending"),
    Anisotropy("anisotropy"),
)
"""Detectors that have names in `Detect.detectors`."""


def edge_strength(image: Array) -> Array:
    """The magnitude of Sobel's gradient of [B,H,W,C], summed over three channels, [B,H,W]; edges of the image repeat."""
    x = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    smooth, slope = (1.0, 2.0, 1.0), (-1.0, 0.0, 1.0)
    height, width = image.shape[1:3]

    def gradient(rows: tuple[float, ...], columns: tuple[float, ...]) -> Array:
        taps = [(i, j, rows[i] * columns[j]) for i in range(3) for j in range(3)]
        parts = [weight * x[:, i : i + height, j : j + width] for i, j, weight in taps if weight]
        return jnp.sum(jnp.stack(parts), axis=0)

    return 3 * jnp.hypot(gradient(slope, smooth), gradient(smooth, slope)).mean(-1)


def needs(cfg: Detect = Detect()) -> list[dict[str, Any]]:
    """What each detector is and needs: name, what, source, larger_is_memorized, attention, jvp, guidance, calls for each prompt and seed."""
    return [
        {
            "name": each.name,
            "what": " ".join((type(each).__doc__ or "").split("\n\n")[0].split()).rstrip(":"),
            "source": each.source,
            "larger_is_memorized": each.sign > 0,
            "attention": each.taps,
            "jvp": each.jvp,
            "guidance": each.guides,
            "calls": each.calls(cfg),
        }
        for each in ALL
    ]
