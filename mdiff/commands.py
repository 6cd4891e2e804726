"""What each command takes: one dataclass per command, whose docstrings are its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mdiff import config
from mdiff.config import Config, Processes
from mdiff.nemo import Detect, Nemo
from mdiff.side import Side


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Train a model, or go on training it."""

    config: Path
    """Experiment file, such as configs/faces.py."""
    workdir: Path
    """Folder of the run; an interrupted run in it is resumed."""
    init_from: Path | None = None
    """Fine-tune: start from the averaged weights of this run, or of one of its checkpoints/STEP."""
    processes: Processes = Processes()
    fields: Annotated[Config, tyro.conf.arg(name="")] = Config()


@dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """Train a cell for every combination of values of some fields, then measure each; resumable."""

    config: Path
    """Experiment file that all cells share, such as configs/faces.py."""
    workdir: Path
    """Folder of the sweep; each cell is an ordinary run in cells/NAME. An interrupted sweep in it is resumed."""
    over: tuple[str, ...]
    """Fields and their values: loss.cutoff=0,0.5,1 seed=0,1,2. A value of several numbers is written 1:2:2."""
    side_by_side: Literal["auto", "yes", "no"] = "auto"
    """One cell per device, one after another on all devices, or (auto) side by side where cells are small enough."""
    eval: bool = True
    """Sample and audit each trained cell."""
    again_failed: bool = False
    """Try cells again that failed in an earlier call."""
    processes: Processes = Processes()
    fields: Annotated[Config, tyro.conf.arg(name="")] = Config()


@dataclass(frozen=True, kw_only=True)
class SweepValue:
    """One value of a varied field, read as any command line."""

    fields: Annotated[Config, tyro.conf.arg(name="")] = Config()


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Sample a trained model and measure the samples against its training images."""

    workdir: Path
    """Folder of the run."""
    probes: tuple[str, ...] = ("audit",)
    """What to measure: audit, similarity, yields, quality. The page is made when the audit is among them."""
    sample: config.Sample = config.Sample()
    audit: config.Audit = config.Audit()
    mesh: config.Mesh = config.Mesh()
    processes: Processes = Processes()


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Draw generations from a trained model into samples.npz."""

    workdir: Path
    """Folder of the run."""
    png: bool = False
    """Also write every generation as a PNG file into generations/."""
    sample: config.Sample = config.Sample()
    mesh: config.Mesh = config.Mesh()
    processes: Processes = Processes()


@dataclass(frozen=True, kw_only=True)
class AuditArgs:
    """Audit images from any system: what they copy from the training images. Needs no model."""

    generated: Path
    """Generated images: a folder or an .npz file."""
    train: Path
    """Images the system was trained on: a folder or an .npz file."""
    heldout: Path | None = None
    """Images from the same source that it was not trained on: the control."""
    out: Path = Path("runs/audit")
    """Folder for audit.json, report.html and report.json."""
    probes: tuple[str, ...] = ("audit",)
    """What to measure: audit, and beside it similarity, yields, quality."""
    audit: config.Audit = config.Audit()


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write one page from the result files of one or more runs, side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders that hold an audit.json; the others are compared with the first."""
    workdir: tuple[Path, ...] = ()
    """More such folders: the same by name."""
    out: Path | None = None
    """Folder for report.html and report.json; the run's own folder when there is one run."""
    title: str = "mdiff report"
    """Title of the page."""


@dataclass(frozen=True, kw_only=True)
class FrontArgs:
    """The front of quality and memorization over the cells of sweeps, with intervals, plots, samples and one page."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of mdiff sweep, or of single runs."""
    out: Path
    """Folder for front.json, front.html, front.svg, front.png and front_samples.png."""
    quality: str = "energy_heldout"
    """Measure of quality: a number of the audit, or PROBE.MEASURE, such as quality.recall_heldout."""
    memorized: str = "memorized"
    """Measure of memorization: memorized, excess, calibrated, calibrated_excess, unique, or PROBE.MEASURE."""
    select: tuple[str, ...] = ()
    """Only cells with these values: loss.cutoff=0,0.5 seed=0,1."""
    reference: tuple[float, float] | None = None
    """Quality and memorization up to which areas are counted; None: the worst cell's quality, and 1 for a share."""
    title: str = "Quality and memorization"
    """Title of the page."""


@dataclass(frozen=True, kw_only=True)
class LeakageArgs:
    """How many nats the noisy copies of ambient training can tell about each image, at most (arXiv 2502.21278).

    For a data set, or with --workdir for the cutoffs, images and epochs of a run. mdiff makes one copy of each image for
    good, before any augmentation; the last table says what drawing the noise more often would cost.
    """

    source: str | None = None
    """Data set, as data.source: a built-in name, a folder, an .npz file, or a prepared TFDS set."""
    size: int | None = None
    """Images are resized to size x size pixels; None leaves them as they are."""
    n: int | None = None
    """Images, drawn as training images are; None is all of them."""
    seed: int | None = None
    """Seed of that draw, as data.seed; None is 0."""
    workdir: Path | None = None
    """Folder of a run: its images and what its own cutoffs add up to."""
    cutoff: tuple[float, ...] = ()
    """Noise levels of the copies; empty is 0.4 1 2 4, or those of the run."""
    draws: tuple[int, ...] = (10, 100)
    """Independent draws of the noise of each image to compare with one and two."""
    covariance: Literal["shrunk", "sample", "isotropic"] = "shrunk"
    """How the covariance is guessed: Ledoit-Wolf, of the images as they are, or from the mean variance alone."""
    candidates: int | None = None
    """Pictures that an attacker chooses from; None is as many as the source has."""
    confidence: float = 0.95
    """Level of the intervals, which are over images."""
    out: Path | None = None
    """Also write all of it to this .json file."""


@dataclass(frozen=True, kw_only=True)
class DenoiseArgs:
    """What runs answer to the same noisy images by noise level: errors on known and new images, sharpness, pictures.

    The runs are of one source and size. Their new images are those that none of them was trained on.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of mdiff train, or a sweep's cells/NAME; errors are also compared with the first one's."""
    out: Path
    """Folder for denoising.json, denoising.png, denoising.svg and denoising_images.png."""
    names: tuple[str, ...] = ()
    """Names of the runs, one each; their folders' names when none are given."""
    levels: tuple[float, ...] = ()
    """Noise levels; 12 from 0.02 to 80, within the range of all runs, when none are given."""
    draws: int = 4
    """Draws of noise per image and level."""
    n: int = 256
    """Images of each side, trained on and new, at most."""
    images: int = 8
    """Images in the picture: half of them trained on, where all runs share some."""
    seed: int = 0
    """Seed of the choice of images and of their noise."""
    confidence: float = 0.95
    """Level of the intervals, which are over images."""


@dataclass(frozen=True, kw_only=True)
class SideArgs:
    """Extract training images through a surrogate condition (SIDE, arXiv 2410.02467), and measure what came out.

    The attack sees the model alone: it draws images, clusters them, distils a noise-aware classifier of the clusters, and draws
    images guided towards each cluster. Only then are the generations compared with training and held-out images. An
    interrupted attack goes on where it was.
    """

    workdir: Path
    """Folder of the run that is attacked."""
    out: Path | None = None
    """Folder of the attack; WORKDIR/side when not given."""
    processes: Processes = Processes()
    fields: Annotated[Side, tyro.conf.arg(name="")] = Side()


@dataclass(frozen=True, kw_only=True)
class DetectArgs:
    """Which prompts does a text-to-image model know by heart? Every detector, compared with the truth where it is known.

    Prompts are captions of the model's planted duplicates beside captions of images seen once or never; or the lines of a file.
    An interrupted run goes on with the detectors that are left.
    """

    workdir: Path | None = None
    """Folder of the run; the model that comes with mdiff when not given (with --demo)."""
    demo: bool = False
    """Take the small model that comes with mdiff, which recites emoji."""
    prompts: Path | None = None
    """Text file, one prompt a line; when not given, captions of the run's planted duplicates beside unknown ones."""
    unknown: int = 100
    """Captions of images seen once, and as many of held-out images, that those are compared with."""
    images: int = 4
    """Images drawn of each prompt, to see whether it recites its own."""
    image_guidance: float = 1.0
    """Classifier-free guidance of those images; 1 is none."""
    truncate: bool = False
    """Cut prompts that are longer than the model takes."""
    list: bool = False
    """Only say which detectors there are, and what each needs."""
    out: Path | None = None
    """Folder of the results; WORKDIR/detect when not given."""
    processes: Processes = Processes()
    fields: Annotated[Detect, tyro.conf.arg(name="")] = Detect()


@dataclass(frozen=True, kw_only=True)
class NemoArgs:
    """Find the neurons that make prompts recite their images (NeMo, arXiv 2406.02366), and see what switching them off does.

    Prompts that look memorized are searched, ordinary ones calibrate the threshold. An interrupted search goes on with the
    prompts that are left.
    """

    workdir: Path | None = None
    """Folder of the run; the model that comes with mdiff when not given (with --demo)."""
    demo: bool = False
    """Take the small model that comes with mdiff, which recites emoji."""
    prompts: Path | None = None
    """Text file, one prompt a line; the captions of the run's planted duplicates when not given."""
    ordinary: Path | None = None
    """Text file of prompts that the model does not know, which calibrate; captions of held-out images when not given."""
    truncate: bool = False
    """Cut prompts that are longer than the model takes."""
    images: int = 4
    """Images of each prompt from each network, with neurons on and off."""
    guidance: float = 3.0
    """Classifier-free guidance of those images; the search itself is unguided."""
    sample_seed: int = 2
    """Seed of those images, another than the search's."""
    export: Path | None = None
    """Also write a run whose weights have the union of the found neurons pruned."""
    out: Path | None = None
    """Folder of the results; WORKDIR/nemo when not given."""
    processes: Processes = Processes()
    fields: Annotated[Nemo, tyro.conf.arg(name="")] = Nemo()


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """Paired differences between two audited runs (second minus first), with intervals."""

    runs: tyro.conf.Positional[tuple[Path, Path]]
    """Two folders with an audit.json, sampled with the same seed and number of generations."""
    out: Path | None = None
    """Also write the differences to this .json file."""


@dataclass(frozen=True, kw_only=True)
class WatchArgs:
    """Follow runs on the terminal from their files alone, until all are trained (or Ctrl-C)."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs; one that does not exist yet is waited for."""
    every: float = 2.0
    """Seconds between looks at the files."""
    once: bool = False
    """Print one frame and exit; so it does when the output is not a terminal."""


@dataclass(frozen=True, kw_only=True)
class JudgeExportArgs:
    """Write a page on which a person judges the most copy-like pairs, blinded and with control pairs.

    A control pair is a generation beside its nearest held-out image, which it cannot have copied. The page
    shows neither scores nor which pairs are controls. An audit of folders (`mdiff audit`) stores only the 64
    most copy-like pairs and no held-out pictures, so its page has those and no controls.
    """

    workdir: tyro.conf.Positional[Path]
    """Folder with an audit.json."""
    top: int | None = None
    """Pairs with the lowest ratio; 100 when not given, or fewer when there are fewer generations."""
    controls: int | None = None
    """Control pairs; half as many as the others when not given."""
    seed: int = 0
    """Seed of the order the pairs are shown in."""
    out: Path | None = None
    """Folder for judge.html; the run's own when not given."""


@dataclass(frozen=True, kw_only=True)
class JudgeImportArgs:
    """Read the answers of one or more judges: precision of the rule, false alarms, agreement."""

    workdir: tyro.conf.Positional[Path]
    """Folder with the audit.json that was judged."""
    answers: tyro.conf.Positional[tuple[Path, ...]]
    """Files that the page's button saved, one per judge."""


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Train, sample and audit a standard and an ambient twin on the same few faces."""

    out: Path = Path("runs/demo")
    """Folder for both runs and the page; an interrupted demo in it is resumed."""
    steps: int | None = None
    """Training steps of both twins; the demo's own number when not given."""
    again: bool = False
    """Start over: delete an earlier demo in the folder first."""
