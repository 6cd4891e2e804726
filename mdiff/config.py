"""One experiment is one frozen dataclass.

A file under `configs/` builds a `Config` named `config`; the command line overrides single fields. The
library below takes these small dataclasses or plain arguments and never looks anything up globally.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pydantic

from mdiff.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and which of them are trained on."""

    source: str = "faces"
    """Built-in name (faces, digits), a folder of images, or an .npz file."""
    size: int = 16
    """Images are resized to size x size pixels."""
    n: int = 50
    """Training images, drawn from the source by seed."""
    heldout: int = 50
    """Held-out images, disjoint from the training ones: the audit's control."""
    seed: int = 0
    """Seed of the draw into training and held-out images."""
    flip: bool = False
    """Mirror each training image left-right half of the time."""
    duplicates: dict[int, int] = field(default_factory=dict)
    """Planted duplicates: training image id -> how many copies of it are trained on."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """Variance-exploding process with EDM's noise range (arXiv 2206.00364)."""

    sigma_min: float = 0.002
    """Lowest noise level of sampling."""
    sigma_max: float = 80.0
    """Highest noise level; t = 1."""
    rho: float = 7.0
    """Exponent of the time map sigma = sigma_max * t**rho, and so of the Karras grid."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """DDPM++ U-Net (arXiv 2011.13456) as sized by EDM."""

    channels: int = 128
    """Base width."""
    mults: tuple[int, ...] = (2, 2, 2)
    """Width of each resolution level, as a multiple of `channels`."""
    blocks: int = 4
    """Residual blocks per level (the decoder has one more)."""
    attention: tuple[int, ...] = (16,)
    """Resolutions (of the feature map) that have self-attention."""
    patch: int = 1
    """Space-to-depth stem: the U-Net works on size/patch."""
    dropout: float = 0.0
    """Dropout inside residual blocks while training."""
    classes: int = 0
    """Number of class labels; 0 trains without conditions."""
    sigma_data: float = 0.5
    """Standard deviation of the data that the preconditioning assumes."""
    scan_safe: bool = False
    """Convolution gradients that stay fast inside lax.scan on CPU, at the price of forward mode."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Denoising loss; a cutoff above 0 makes it the ambient one (arXiv 2502.21278)."""

    p_mean: float = -1.2
    """Mean of ln sigma over training draws."""
    p_std: float = 1.2
    """Standard deviation of ln sigma over training draws."""
    cutoff: float = 0.0
    """Noise level at and above which only the fixed noisy copies are trained on; 0 is plain training."""
    weight: Literal["edm", "x0", "inverse_variance"] = "edm"
    """Weight above the cutoff: EDM's in noisy space, EDM's in clean space, or inverse variance."""
    max_gain: float = 4.0
    """With weight x0: draws whose 1/a exceeds this are set to weight 0 (the buffer above the cutoff)."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimization, checkpoints and logging."""

    steps: int = 2000
    """Optimizer steps."""
    batch: int = 32
    """Images per step, over all devices."""
    lr: float = 1e-3
    """Learning rate of Adam after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_halflife: float = 2000.0
    """Half-life of the averaged weights, in images."""
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


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices by axis; -1 takes what is left."""

    data: int = -1
    """Batch-parallel devices."""
    fsdp: int = 1
    """Devices the state is sharded over; they carry batch too."""
    trial: int = 1
    """Devices that hold independent trials of a sweep."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How generations are drawn."""

    n: int = 256
    """Generations."""
    batch: int = 64
    """Generations per device call."""
    method: Literal["heun", "ddim"] = "heun"
    """Heun's second-order solver with churn (EDM), or DDIM."""
    steps: int = 18
    """Steps of the Karras grid."""
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
    components: int = 32
    """Principal components of the named PCA-pixel space quality is measured in."""
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


def to_json(config: Any) -> dict[str, Any]:
    """A config (or any dataclass of plain values) as JSON-ready dicts and lists."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def from_json(cls: type, tree: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_json`.

    Raises:
      UserError: a field is unknown or of the wrong type; the message names the first one.
    """
    _forbid_unknown(cls, tree, where)
    try:
        return pydantic.TypeAdapter(cls).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {name} = {first['input']!r}: {first['msg']}") from None


def _forbid_unknown(cls: type, tree: dict[str, Any], where: str) -> None:
    known = {f.name: f for f in fields(cls)}
    for name, value in tree.items():
        if name not in known:
            raise UserError(
                f"{where}: unknown field {name!r}; this version of mdiff knows {', '.join(known)}"
            )
        default = known[name].default
        if hasattr(default, "__dataclass_fields__") and isinstance(value, dict):
            _forbid_unknown(type(default), value, f"{where}.{name}")


def digest(config: Config) -> str:
    """What makes two runs the same experiment: seed, data, process, network and loss.

    Steps, mesh, logging, sampling and audit are left out, so a run may be extended or moved.
    """
    tree = to_json(config)
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
