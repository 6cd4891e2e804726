"""Settings of detecting memorized prompts, and of NeMo, which finds the neurons behind them (arXiv 2406.02366).

Paper and released code of NeMo differ in many places. What we do in each is a field or is written here:

- Similarity (T1): SSIM or MS-SSIM, `Similarity.measure`. The released three scales with an 11-pixel window need maps of 41
  pixels; below that use `ssim`, or fewer scales and a smaller window (T14). The data range is 1, the range of a difference scaled
  to [0, 1], so a score does not depend on what else is in its batch (T13).
- First step (T2, T15): one network call at noise level `sigma`. The noise difference eps - xT is computed as -x0 / sigma, which
  does not assume xT of unit variance and does not cancel.
- Scaling (T3): `scaling`, per image and channel as released, or per image.
- Seeds (T4): the first-step noise of seed j is a function of (seed, j) alone, the same for every prompt.
- Outliers (T5): `two_sided`, the released |z| > theta; the paper's algorithm says z > theta.
- End of the search (T6): the last theta is evaluated, as the paper says; the released loop stops before it.
- Order (T7): `order`, deep to shallow as released, or the paper's shallow to deep.
- Calibration (T8): of `calibrate_on`, the maximum over pairs of each prompt (the paper), or all pairs, without guidance (T9: guidance
  in the released calibration is inverted); tau = mean + `tau_sigmas` std, or a quantile.
- Pruning (T10): results are reported for each prompt's own neurons and for the union.
- Random control (T11): random neurons of the same layers, disjoint from the found ones.
- Prompts (T12): which ones is in every result file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mdiff.config import Mesh


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How alike two noise differences are."""

    measure: Literal["ssim", "ms_ssim"] = "ssim"
    """SSIM (the paper, eq. 4), or MS-SSIM (the released code)."""
    window: int = 11
    """Side of the Gaussian window in pixels, odd; the map must hold it at every scale."""
    deviation: float = 1.5
    """Standard deviation of the window in pixels."""
    betas: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
    """ms_ssim: exponent of each scale, finest first."""
    scaling: Literal["channel", "image"] = "channel"
    """Scale differences to [0, 1] per image and channel (the released code), or per image."""


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Which detectors are run on prompts, and how."""

    detectors: tuple[str, ...] = ()
    """Names (see `mdiff detect --list`); empty runs all that the model allows."""
    seeds: int = 4
    """Starting noises for each prompt."""
    seed: int = 1
    """Noise j of every prompt is a function of (seed, j)."""
    steps: int = 18
    """Steps of the sampler that detectors over several steps follow."""
    guidance: float = 3.0
    """Classifier-free guidance of those trajectories."""
    sigma: float = 0.0
    """Noise level of one-step detectors; 0 is the sampler's first, process.sigma_max."""
    probes: int = 1
    """Random directions of Hutchinson's trace estimate (FLIPD)."""
    batch: int = 64
    """Prompts x seeds for each call of the program."""
    false_alarms: float = 0.01
    """False-positive rate at which the share of found prompts is reported."""
    bootstrap: int = 1000
    """Bootstrap resamples of the intervals."""
    confidence: float = 0.95
    """Level of the intervals."""


@dataclass(frozen=True, kw_only=True)
class Nemo:
    """The search for the neurons that trigger a memorized image."""

    layers: str = "cross/value_gate"
    """Regular expression over gate names: which neurons are searched. The released code takes the value projections of the down and
    middle blocks."""
    mode: Literal["exact", "fast", "gradient"] = "exact"
    """exact: the sequential algorithm, neuron for neuron. fast: galloping and bisection, which assume that the score falls with every
    neuron switched on. gradient: rank by one backward pass, then ablate the top ones."""
    refine: bool = False
    """gradient: then test each leading neuron as exact mode does, about as many calls as neurons. Off, the leading ones are the answer,
    after about log2 N."""
    similarity: Similarity = Similarity()
    seeds: int = 10
    """First-step noises for each prompt."""
    seed: int = 1
    """Noise j is a function of (seed, j); images are generated with another seed."""
    sigma: float = 0.0
    """Noise level of the first step; 0 is process.sigma_max."""
    tau: float = 0.0
    """Similarity above which two differences are the same image; 0 calibrates on non-memorized prompts."""
    tau_sigmas: float = 1.0
    """tau = mean + this many standard deviations of the calibration scores."""
    tau_quantile: float = 0.0
    """Above 0: tau is this quantile of the calibration scores instead."""
    calibrate_on: Literal["max", "pairs"] = "max"
    """The calibration scores: the largest pair similarity of each prompt (the paper), or all pairs (the released code)."""
    theta: float = 5.0
    """Standard deviations from its mean at which a neuron's activation is an outlier, at the start."""
    theta_step: float = 0.25
    """How much theta is lowered in each round."""
    theta_min: float = 1.0
    """The last theta, evaluated too."""
    top: int = 1
    """Neurons of the largest activation added per layer and round."""
    two_sided: bool = True
    """Outliers on both sides of the mean."""
    tokens: Literal["all", "words", "end", "padding"] = "all"
    """Over which positions |activation| is averaged: all as in NeMo, or the prompt's words, its end token, or the padding."""
    order: Literal["deep", "shallow"] = "deep"
    """Which layers are refined first: from the middle of the network to its start, or the other way."""
    factor: float = 0.0
    """What the found neurons' activations are multiplied with; the search itself uses 0."""
    width: int = 0
    """Candidates of one prompt tested in one call (speculative prefixes); 0 chooses by device: 1 on CPU, 8 elsewhere."""
    batch: int = 16
    """Ablations (prompts x candidates) for each call of the program and device."""
    control_seed: int = 0
    """Seed of the random control neurons."""
    mesh: Mesh = field(default_factory=Mesh)
