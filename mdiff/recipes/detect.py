"""Detectors on the prompts of a text-to-image model, and what the model draws for them: part by part, each kept when it is done."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mdiff import config, processes
from mdiff.data.split import Subset
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.files import strict, write_atomically
from mdiff.nemo import Detect
from mdiff.probes import prompted_run, recited, stamped, units
from mdiff.probes.prompted import Detector
from mdiff.probes.prompted_run import Scored
from mdiff.recipes import prompts, recite
from mdiff.recipes.prompts import Prompts
from mdiff.recipes.text_target import TextTarget
from mdiff.train import loop

KNOWN, UNKNOWN = 0.5, 0.1
"""A prompt is memorized when more than KNOWN of its images are copies, and not when fewer than UNKNOWN are; others are left out."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Finished parts of a job, in files named after all that decides them: other settings are other files.

    Attributes:
      folder: of the files.
      identity: what decides every part: the model and the prompts, as plain JSON.
      guard: called before a file is written; raises when the folder is no longer ours.
    """

    folder: Path
    identity: Mapping[str, Any]
    guard: Callable[[], None] = lambda: None

    def get(
        self, what: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The part that `what` names, from its file, or made and stored; one process of a job writes.

        Raises:
          UserError: the file is damaged.
        """
        name = json.dumps(strict({**self.identity, **what}), sort_keys=True)
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.npz"
        if processes.from_first(path.exists):
            try:
                with np.load(path, allow_pickle=False) as file:
                    return {key: file[key] for key in file.files}
            except (ValueError, zipfile.BadZipFile):
                raise UserError(f"{path}: is damaged; delete it, and it is made again") from None
        made = make()
        self.guard()

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda part: part.write_bytes(stamped.pack(made)[0]))

        processes.from_first(write)
        return made


def of_model(subset: Subset, unknown: int, seed: int) -> Prompts:
    """Captions of all planted duplicates, of `unknown` images seen once, and of as many held-out images, drawn by `seed`."""
    trained = prompts.of_training(subset)
    once = trained.kind == "unique"
    chosen = [trained.take(~once), some(trained.take(once), unknown, seed)]
    if len(subset.heldout):
        chosen.append(some(prompts.of_heldout(subset), unknown, seed))
    return prompts.join(*chosen)


def some(of: Prompts, n: int, seed: int) -> Prompts:
    """At most n of the prompts, in their order."""
    return of.take(np.sort(permutation(seed, "prompts", 0, len(of))[:n]))


@dataclass(frozen=True, eq=False)
class Recited:
    """What a model draws for prompts that have training images.

    Attributes:
      place: int [K], which of the prompts those are.
      images: uint8 [K,G,H,W,C].
      verdicts: which of them are copies; None for K = 0.
    """

    place: np.ndarray
    images: np.ndarray
    verdicts: recited.Verdicts | None

    @property
    def share(self) -> np.ndarray:
        """float [K], share of copies."""
        return np.zeros(0) if self.verdicts is None else self.verdicts.share

    def truth(self, asked: Prompts) -> np.ndarray:
        """[P]: "verbatim", "template", "none", or "" for what is neither."""
        truth = np.where(asked.kind == "heldout", "none", "").astype("<U8")
        for place, share in zip(self.place, self.share, strict=True):
            kind = "template" if asked.kind[place] == "template" else "verbatim"
            truth[place] = kind if share > KNOWN else "none" if share < UNKNOWN else ""
        return truth

    def curve(self, asked: Prompts, audit: config.Audit) -> dict[str, Any] | None:
        """How the share of copies grows with the copies planted; None where those do not differ."""
        planted = np.isin(asked.kind[self.place], ("verbatim", "unique"))
        copies = asked.copies[self.place][planted]
        if self.verdicts is None or len(set(copies)) < 2:
            return None
        return recited.curve(copies, self.verdicts.copy[planted], audit).to_json()


def draw(
    target: TextTarget, asked: Prompts, images: int, guidance: float, kept: Parts, monitor: loop.Monitor
) -> Recited:
    """Draws images of every prompt that has training images of its own, and compares them with those."""
    place = np.flatnonzero([bool(own) for own in asked.own])
    if not len(place):
        return Recited(place, np.zeros((0, images, *target.model.shape), np.uint8), None)
    here, done = asked.take(place), 0
    sample = replace(target.config.sample, seed=target.config.sample.seed + 1, guidance=guidance)

    def advance(more: int) -> None:
        nonlocal done
        done += more
        monitor.progress("images", done, len(here), {})

    def make() -> dict[str, np.ndarray]:
        everything = units.discover(target.model, "cross/value_gate")
        on = np.ones((len(here), len(everything)), np.float32)
        drawn = recite.make(target.model, everything, sample, advance)
        return {"images": drawn(target.params, here.tokens, on, np.arange(images))}

    got = kept.get({"sample": to_json(sample), "images": images}, make)["images"]
    train = np.asarray(target.subset.train.x)
    return Recited(place, got, recited.verdicts(got, here.own, train, target.config.audit))


def score(
    target: TextTarget,
    asked: Prompts,
    chosen: Sequence[Detector],
    cfg: Detect,
    kept: Parts,
    monitor: loop.Monitor,
    on: Mesh,
) -> dict[str, Scored]:
    """Every detector on every prompt, by name."""
    settings = {
        name: getattr(cfg, name) for name in ("seeds", "seed", "steps", "guidance", "sigma", "probes")
    }
    found = {}
    for number, detector in enumerate(chosen):
        task, done = f"detector {number + 1} of {len(chosen)}, {detector.name}", 0

        def advance(more: int, task: str = task) -> None:
            nonlocal done
            done += more
            monitor.progress(task, done, len(asked), {})

        def make(
            detector: Detector = detector, advance: Callable[[int], None] = advance
        ) -> dict[str, np.ndarray]:
            made = prompted_run.run(
                target.model, target.params, detector, asked.tokens, cfg, on=on, advance=advance
            )
            return {"rows": made.rows, "seconds": np.array([made.seconds, made.first])}

        part = kept.get({"detector": detector.name, "settings": settings}, make)
        each, first = map(float, part["seconds"])
        found[detector.name] = Scored(detector.name, detector.sign, part["rows"], each, first)
    return found
