"""Probes by name.

A probe is a function of images and settings:

    run(generated, train, heldout, config, *, train_ids, heldout_ids, labels, progress) -> ProbeResult

`mdiff eval --probes NAME` and `mdiff audit --probes NAME` call it, and `probes.records.save` writes what it found.
To add one, write such a function and name it here. The audit itself (`probes.audit`) has files of its own.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.probes import quality_probe, similarity_probe, yields_probe
from mdiff.probes.records import ProbeResult
from mdiff.probes.sets import Progress


class Probe(Protocol):
    """What a probe is called with; the arguments are those of `similarity_probe.run`."""

    def __call__(
        self,
        generated: np.ndarray,
        train: np.ndarray,
        heldout: np.ndarray | None,
        config: Audit,
        *,
        train_ids: np.ndarray | None = None,
        heldout_ids: np.ndarray | None = None,
        labels: dict[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> ProbeResult:
        """Measures."""
        ...


PROBES: dict[str, tuple[Probe, str]] = {
    "similarity": (
        similarity_probe.run,
        "worst-tile L2, SSIM, MS-SSIM and perceptual hash, with thresholds set on held-out images",
    ),
    "yields": (
        yields_probe.run,
        "how many different images are copied: rarefaction, Chao1, bands, authenticity",
    ),
    "quality": (
        quality_probe.run,
        "Fréchet distance, KID, precision, recall, density, coverage, Vendi, also per class",
    ),
}
"""Name -> (function, one line)."""


def find(name: str) -> Probe:
    """The probe of this name.

    Raises:
      UserError: there is none.
    """
    if name not in PROBES:
        raise UserError(f"probe {name!r}: no such probe; give one of {', '.join(PROBES)}")
    return PROBES[name][0]
