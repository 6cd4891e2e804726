"""Settings of SIDE, extraction through a surrogate condition (arXiv 2410.02467): one frozen dataclass per stage.

The paper leaves open how many images are drawn, how the classifier is trained and how strongly it guides; each of these
is a field here, with a default of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mdiff.config import Audit, Mesh, Sample


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The surrogate condition: clusters of the model's own unguided images (arXiv 2410.02467, algorithm 1)."""

    n: int = 4096
    """Unguided images drawn from the model (the paper names no number; about 40 for each cluster)."""
    seed: int = 1_000_003
    """Their sample.seed, another than that of the attack, and the seed of the clustering."""
    features: Literal["pixel", "random", "network"] = "pixel"
    """Space that is clustered: principal components of pixels, untrained convolutions, or the model's middle features."""
    components: int = 32
    """Principal components kept of that space."""
    level: float = 0.3
    """features network: the noise level at which the model looks at the images."""
    clusters: int = 100
    """K, clusters sought."""
    cohesion: float = 0.5
    """A cluster is kept when the mean cosine of its members with its centre is at least this."""
    min_size: int = 10
    """... and it has so many members: small ones are cohesive by chance."""
    dropped: Literal["reassign", "drop"] = "reassign"
    """Images of clusters not kept go to the nearest kept one (the paper's rule), or out."""
    restarts: int = 5
    """Starts of k-means; the best is taken."""
    teacher: Literal["clusters", "shuffled", "model", "oracle"] = "clusters"
    """What labels the images: their clusters; clusters dealt at random (a control); the model itself as a classifier, if it has
    classes; or a classifier trained on the real training images and their labels (for reference: no attacker has it)."""
    soft: float = 0.0
    """Temperature of soft labels, softmax(cosine with the centres / this); 0 labels hard."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The time-dependent classifier that is distilled from those labels (TDKD)."""

    arch: Literal["resnet", "half_unet"] = "resnet"
    """ResNet-34 with the time in every block, or the encoder half of a U-Net (arXiv 2105.05233)."""
    width: int = 32
    """Channels of the first stage, doubled at every next one; 64 in ResNet-34."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks per stage; ResNet-34's. Each stage but the first halves the resolution."""
    norm: Literal["group", "batch"] = "group"
    """Normalization; batch is the paper's, with statistics over all noise levels."""
    timed: bool = True
    """Tell the network the noise level; off is the time-independent guide, trained on clean images only."""
    loss: Literal["kl", "ce"] = "kl"
    """Divergence from the teacher, or cross-entropy (the same gradient, with another value for soft labels)."""
    steps: int = 2000
    """Optimizer steps."""
    batch: int = 128
    """Images per step."""
    lr: float = 1e-4
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = 0.05
    """Decoupled decay of kernels."""
    heldout: float = 0.1
    """Share of the labelled images that measures accuracy and calibration, and is not trained on."""
    levels: Literal["uniform", "logsnr", "lognormal"] = "uniform"
    """Law of the noise levels trained at, as loss.times; uniform in t is the paper's."""
    calibrate: bool = True
    """Divide the logits by a temperature per noise level, fitted on the held-out share, before guiding."""
    seed: int = 0
    """Seed of initialization, batches and noise."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The second way: low-rank adapters and a learned condition, fine-tuned on the labelled images (LoRA)."""

    rank: int = 0
    """Rank of the adapters; 0 takes the classifier instead. The paper: 512, best below 64."""
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Learning rate (the paper's 1e-5 is that of a large model fine-tuned for long)."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One attack, stage by stage."""

    surrogate: Surrogate = Surrogate()
    classifier: Classifier = Classifier()
    adapter: Adapter = Adapter()
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 12.0, 16.0, 24.0, 32.0, 50.0)
    """Strengths lambda of the guidance; 0 is the model alone, drawn from the same noise."""
    sample: Sample = field(default_factory=lambda: Sample(n=1024, batch=256, method="ddim", steps=50))
    """How guided images are drawn; n of them at each strength."""
    quality_floor: float = 0.8
    """The strength is chosen among those whose share of images near unguided ones (precision) is at least this part of that of
    unguided images themselves."""
    audit: Audit = Audit()
    mesh: Mesh = Mesh()
