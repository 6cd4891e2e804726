"""One experiment is one frozen dataclass.

A file under `configs/` builds a `Config` named `config`; the command line overrides single fields. The
library below takes these small dataclasses or plain arguments and never looks anything up globally.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mdiff.errors import UserError
from mdiff.fields import check_values as check_values
from mdiff.fields import from_json as from_json
from mdiff.fields import to_json as to_json


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and which of them are trained on."""

    source: str = "faces"
    """Built-in name (faces, digits, mnist5k, emoji), a folder of images, an .npz file, or a prepared TFDS set."""
    split: str = "train"
    """Split of a TFDS set."""
    reading: Literal["memory", "disk"] = "memory"
    """Hold the training images on the devices, or read each batch from disk (TFDS sets only)."""
    size: int = 16
    """Images are resized to size x size pixels."""
    n: int = 50
    """Training images, drawn from the source by seed."""
    heldout: int = 50
    """Held-out images, disjoint from the training ones: the audit's control."""
    seed: int = 0
    """Seed of the draw into training and held-out images."""
    skip: int = 0
    """Images of that draw passed over before the training ones: 100 and n 100 is disjoint from 0 and n 100."""
    labels: Literal["own", "clusters", "random", "redrawn", "unique"] = "own"
    """Labels trained with (net.classes of them): the source's own, clusters of pixels, random but fixed, random and drawn anew at
    every visit, or one for each image (arXiv 2310.02664, section 4)."""
    label_noise: float = 0.0
    """Share of the training images whose label is replaced, for good, by a random one: a mitigation, and a control."""
    flip: bool = False
    """Mirror each training image left-right half of the time."""
    shift: int = 0
    """Shift each training image by up to so many pixels, with mirrored edges."""
    augment: float = 0.0
    """Probability of the transforms of EDM's non-leaky augmentation (flips along x: half); the network is told."""
    ladder: dict[int, int] = field(default_factory=dict)
    """Planted duplicates by rung: copies -> how many images have so many (sources with families)."""
    templates: int = 0
    """With ladder: families trained on whole, each of one layout with a varying part, under one caption."""
    template_copies: int = 20
    """With ladder: copies of each image of such a family."""
    duplicates: dict[int, int] = field(default_factory=dict)
    """Planted duplicates: training image id -> how many copies of it are trained on."""
    planted_flips: dict[int, int] = field(default_factory=dict)
    """Planted mirror images: training image id -> how many mirrored copies are added."""
    planted_crops: dict[int, int] = field(default_factory=dict)
    """Planted small crops: training image id -> how many differently cropped copies are added."""
    degrade: Literal["none", "mask", "blocks", "blur"] = "none"
    """Damage to every training image, fixed for good: pixels or 4x4 blocks hidden, or blur (arXiv 2305.19256)."""
    degrade_by: float = 0.0
    """Share of the pixels or blocks hidden; of blur the standard deviation in pixels."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """The noise law, and the range of noise levels worked in (EDM's sigma, whatever the law)."""

    kind: Literal["ve", "vp_linear", "vp_cosine", "flow"] = "ve"
    """Variance exploding (EDM), variance preserving with a linear or cosine schedule, or rectified flow."""
    sigma_min: float = 0.002
    """Lowest noise level of sampling."""
    sigma_max: float = 80.0
    """Highest noise level: where sampling starts."""
    rho: float = 7.0
    """ve: exponent of the time map sigma = sigma_max * t**rho. All: exponent of the Karras grid."""
    beta_min: float = 0.1
    """vp_linear: rate of noise at t = 0."""
    beta_max: float = 20.0
    """vp_linear: rate of noise at t = 1."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """The network: a DDPM++ U-Net as sized by EDM unless `arch` says otherwise."""

    arch: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ddpmpp"
    """DDPM++ or NCSN++ U-Net (arXiv 2011.13456), ADM U-Net (arXiv 2105.05233), DiT (arXiv 2212.09748)."""
    channels: int = 128
    """Base width; of a DiT, the width of its tokens."""
    mults: tuple[int, ...] = (2, 2, 2)
    """U-Nets: width of each resolution level, as a multiple of `channels`."""
    blocks: int = 4
    """U-Nets: residual blocks per level (the decoder has one more). DiT: number of blocks."""
    attention: tuple[int, ...] = (16,)
    """U-Nets: resolutions (of the feature map) that have self-attention."""
    head_channels: int = 0
    """Width of one attention head; 0 is a single head."""
    patch: int = 1
    """U-Nets: space-to-depth stem, so that they work on size/patch. DiT: patch size."""
    dropout: float = 0.0
    """Dropout inside blocks while training."""
    classes: int = 0
    """Number of class labels; 0 trains without labels."""
    vector: int = 0
    """Width of the vector condition that comes with each image; 0 trains without one."""
    text: int = 0
    """U-Nets: width of the text encoder, whose tokens are attended to; 0 trains without captions."""
    text_blocks: int = 2
    """Transformer blocks of the text encoder."""
    text_length: int = 24
    """Tokens of a caption: its start, its words, its end, padding."""
    vocabulary: int = 1024
    """Tokens that byte-pair encoding learns from the captions."""
    cross: tuple[int, ...] = (16, 8, 4)
    """Resolutions (of the feature map) whose blocks attend to the text."""
    cross_channels: int = 0
    """Width of the queries, keys and values of text; 0 is the feature map's."""
    condition_dropout: float = 0.0
    """Share of training examples whose condition is dropped: what classifier-free guidance needs."""
    prediction: Literal["edm", "x0", "eps", "v", "velocity"] = "edm"
    """What the network's output stands for: EDM's preconditioned mixture, or the quantity itself."""
    sigma_data: float = 0.5
    """Standard deviation of the data that the preconditioning assumes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the network's computations; parameters and coefficients are always float32."""
    remat: Literal["none", "blocks", "dots"] = "none"
    """Recompute in the backward pass: nothing, whole blocks, or all but matrix products."""
    scan_safe: bool = False
    """Convolution gradients that stay fast inside lax.scan on CPU, at the price of forward mode."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Denoising loss; a cutoff above 0 makes it the ambient one (arXiv 2502.21278)."""

    times: Literal["lognormal", "uniform", "logsnr", "logit_normal"] = "lognormal"
    """Law of the noise levels trained at: ln sigma normal, t uniform, log SNR uniform, or logit t normal."""
    p_mean: float = -1.2
    """Mean of ln sigma (of logit t) over training draws."""
    p_std: float = 1.2
    """Standard deviation of ln sigma (of logit t) over training draws."""
    stratified: bool = False
    """Spread the noise levels of a batch evenly over their law (low discrepancy)."""
    share: float = 0.0
    """Share of draws at or above the cutoff; 0 leaves it to the law."""
    level_weight: Literal["edm", "x0", "eps", "v", "velocity", "min_snr", "learned"] = "edm"
    """Weight of a noise level: EDM's, the plain error of x0, eps, v or velocity, min-SNR, or learned (EDM2)."""
    min_snr: float = 5.0
    """With level_weight min_snr: the largest weight (gamma)."""
    cutoff: float = 0.0
    """Noise level at and above which only the fixed noisy copies are trained on; 0 is plain training."""
    cutoff_of: dict[int, float] = field(default_factory=dict)
    """Images with a cutoff of their own: training image id -> noise level; 0 for a clean one."""
    cutoff_stages: dict[int, float] = field(default_factory=dict)
    """A schedule in place of one cutoff: first step -> cutoff from there on; what leaks is that of the lowest."""
    clean: Literal["below", "never", "always"] = "below"
    """Where an image is seen clean: below its cutoff, never (noisy data only), or at all levels (a control for share)."""
    clean_share: float = 0.0
    """Share of the training images, drawn by data.seed, that have no cutoff: a mixture of clean and noisy images."""
    weight: Literal["edm", "x0", "inverse_variance"] = "edm"
    """Weight above the cutoff: `level_weight` in noisy space, in clean space, or with inverse variance."""
    max_gain: float = 4.0
    """With weight x0 or buffer redraw: levels above the cutoff whose 1/a exceeds this are not trained on (the buffer)."""
    buffer: Literal["drop", "redraw"] = "drop"
    """Draws in the buffer get weight 0, or are drawn again elsewhere (with any weight)."""
    consistency: float = 0.0
    """Weight of the consistency loss, which teaches noise levels below the cutoff without clean images; 0 is off."""
    consistency_steps: int = 4
    """Steps of the sampler that the consistency loss runs from level to level."""
    further: float = 0.1
    """With data.degrade: how much is hidden on top, so that the network cannot tell what to guess."""

    @property
    def levels(self) -> tuple[float, ...]:
        """All cutoffs above 0, rising."""
        each = self.cutoff_stages.values() or (self.cutoff, *self.cutoff_of.values())
        return tuple(sorted({level for level in each if level > 0}))

    @property
    def ambient(self) -> bool:
        """Does any image have a cutoff at any time?"""
        return bool(self.levels)

    @property
    def copies(self) -> bool:
        """Are noisy copies trained on?"""
        return self.ambient and self.clean != "always"

    @property
    def ladder(self) -> tuple[float, ...]:
        """The levels between which the copies of one image move during training; none if they do not."""
        return self.levels if self.cutoff_stages else ()


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimization, checkpoints and logging."""

    steps: int = 2000
    """Optimizer steps."""
    batch: int = 32
    """Images per step, over all devices."""
    accumulate: int = 1
    """Parts a batch is worked through in, one after another: gradients are those of the whole, memory that of a part."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """Adam, AdamW, or Muon for matrices with Adam for the rest."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """How the learning rate falls after the warm-up."""
    decay_steps: int = 0
    """Where linear and cosine reach 0, or from where inverse_sqrt falls; 0 is the last step (of warm-up)."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.999
    """Decay of the mean of squared gradients."""
    weight_decay: float = 0.0
    """adamw, muon: decoupled decay of matrices and kernels."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_halflife: float = 2000.0
    """Half-life of the averaged weights, in images."""
    ema_lengths: tuple[float, ...] = ()
    """Also average with EDM2's power functions of these relative widths, such as 0.05 0.1."""
    ema_every: int = 0
    """Steps between snapshots of those averages, for post-hoc reconstruction; 0 keeps only the newest."""
    log_every: int = 50
    """Steps between log rows; the loss is checked for NaN there."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint at a multiple of this step; 0 keeps none."""
    eval_every: int = 0
    """Steps between measurements of memorization; 0 measures only at the end."""
    eval_samples: int = 64
    """Generations per measurement while training."""
    eval_levels: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    """Noise levels at which held-out and training error are compared while training; none measures none."""
    stop_when: dict[str, float] = field(default_factory=dict)
    """Early stopping: measure -> limit, such as memorized 0.1; ends with the last state measured within all limits."""


AROUND = (
    "log_every",
    "save_every",
    "keep",
    "keep_every",
    "eval_every",
    "eval_samples",
    "eval_levels",
    "stop_when",
)
"""Fields of `Train` that change no training step."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices by axis; -1 takes what is left."""

    data: int = -1
    """Batch-parallel devices."""
    fsdp: int = 1
    """Devices the state is sharded over; they carry batch too."""
    trial: int = 1
    """Devices that hold independent trials of a sweep."""
    shard_above: int = 4 << 20
    """fsdp: leaves of fewer bytes are held whole; they cost more to gather than to hold."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which of the processes of a job this one is. Not part of an experiment: it differs from process to process."""

    launch: Literal["auto", "cluster", "single"] = "auto"
    """auto: join the job of Slurm, Open MPI, Kubernetes or a TPU pod if one started us; cluster: insist; single: do not."""
    coordinator: str = ""
    """host:port on which process 0 listens, for jobs that nothing detects; needs count and index."""
    count: int = 0
    """With coordinator: how many processes there are. 1 is a job of its own, which hears preemption notices."""
    index: int = -1
    """With coordinator: which one this is, from 0."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How generations are drawn."""

    n: int = 256
    """Generations."""
    batch: int = 64
    """Generations per device call."""
    method: Literal["heun", "euler", "ddim", "dpmpp2m", "ddpm", "sde"] = "heun"
    """Heun with churn (EDM), Euler, DDIM, DPM-Solver++(2M), ancestral DDPM, or Euler-Maruyama of the SDE."""
    grid: Literal["karras", "uniform", "logsnr"] = "karras"
    """Spacing of the noise levels: Karras (rho), uniform in t, or uniform in log SNR."""
    steps: int = 18
    """Steps of the grid."""
    until: float | None = None
    """Noise level at which sampling ends with the denoiser's estimate; None: where training knew nothing lower, or 0."""
    churn: float = 0.0
    """Heun: S_churn; 0 is deterministic."""
    churn_min: float = 0.0
    """Heun: lowest sigma that is churned."""
    churn_max: float = 1e9
    """Heun: highest sigma that is churned."""
    churn_noise: float = 1.0
    """Heun: S_noise, scale of the added noise."""
    eta: float = 0.0
    """DDIM: 0 is deterministic, 1 is ancestral."""
    guidance: float = 1.0
    """Weight of classifier-free guidance: 1 is none, 0 drops the condition, above 1 sharpens."""
    guidance_min: float = 0.0
    """Noise level down to which guidance acts."""
    guidance_max: float = 1e9
    """Noise level up to which guidance acts."""
    ema: float = 0.0
    """Sample the power-function average of this relative width (needs train.ema_lengths); 0: the usual one."""
    seed: int = 0
    """Sample i starts from noise that depends on (seed, i) alone."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What counts as a copy, and how sure we are."""

    ratio: float = 1 / 3
    """A generation is memorized when d(nearest) / d(second nearest) is below this (arXiv 2310.02664)."""
    alpha: float = 0.5
    """Calibrated L2: distance over alpha times the mean distance to the neighbours (arXiv 2301.13188)."""
    neighbours: int = 50
    """Calibrated L2: how many nearest training images calibrate (fewer when there are fewer)."""
    calibrated: float = 1.0
    """Calibrated L2 below this counts as a copy."""
    near_duplicate: float = 0.2
    """Training images closer than this times the median pair distance are one image."""
    flips: bool = False
    """Compare with mirrored training images too (on when trained with flips)."""
    confidence: float = 0.95
    """Level of every interval."""
    bootstrap: int = 1000
    """Bootstrap resamples."""
    chunk: int = 1024
    """Rows per distance block; bounds memory."""
    features: str = "pixel"
    """Feature space of cosine and quality: pixel (principal components) or random (untrained convolutions)."""
    components: int = 32
    """Principal components of the PCA-pixel space."""
    seed: int = 0
    """Seed of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    name: str = "experiment"
    """Name shown in reports."""
    seed: int = 0
    """Seed of initialization, batches, noise and degradation."""
    data: Data = Data()
    process: Process = Process()
    net: Net = Net()
    loss: Loss = Loss()
    train: Train = Train()
    mesh: Mesh = Mesh()
    sample: Sample = Sample()
    audit: Audit = Audit()


DIGESTED = ("seed", "data", "process", "net", "loss")
NOISE = "of pixels"
"""Whose the fixed noise is. Up to mdiff 0.3 it belonged to ids; going on with other noise would be a second draw."""


def digest(config: Config) -> str:
    """What makes two runs the same experiment: seed, data, process, network and loss.

    Steps, mesh, logging, sampling and audit are left out, so a run may be extended or moved; so is how the
    images are read, which does not change a batch.
    """
    tree = to_json(config)
    del tree["data"]["reading"]
    text = json.dumps({name: tree[name] for name in DIGESTED}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: str | Path) -> Config:
    """The `config` of a Python file.

    Raises:
      UserError: no such file, or it defines no `config`.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.as_posix() for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else "; see configs/"
        raise UserError(f"--config {path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(f"mdiff_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (TypeError, ValueError, NameError, AttributeError, ImportError, SyntaxError) as error:
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"--config {path}: defines no `config = Config(...)`")
    return from_json(Config, dataclasses.asdict(config), f"--config {path}")  # checks the types
