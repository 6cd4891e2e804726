"""Prompts of a text-to-image model: its own captions with the truth about them, or lines of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.data.captions import Tokenizer
from mdiff.data.split import Subset
from mdiff.errors import UserError

KINDS = ("verbatim", "template", "unique", "heldout", "given")
"""Planted duplicates, families under one caption, images seen once, captions of held-out images, and lines of a file."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a model is asked, and what is known about it.

    Attributes:
      text: [P] captions.
      tokens: int32 [P,L].
      kind: [P] of `KINDS`.
      copies: int [P], training images seen under the caption in an epoch; 0 for other captions.
      own: [P] indices of the training images under the caption; none for other captions.
    """

    text: tuple[str, ...]
    tokens: np.ndarray
    kind: np.ndarray
    copies: np.ndarray
    own: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.text)

    def take(self, places: np.ndarray) -> Prompts:
        """Those at `places` (indices or a mask), in that order."""
        index = np.arange(len(self))[places]
        return Prompts(
            tuple(self.text[i] for i in index),
            self.tokens[index],
            self.kind[index],
            self.copies[index],
            tuple(self.own[i] for i in index),
        )

    def row(self, place: int) -> dict[str, Any]:
        """What is known of one, for result files."""
        return {
            "prompt": self.text[place],
            "kind": str(self.kind[place]),
            "copies": int(self.copies[place]),
            "own": list(self.own[place]),
        }


def join(*several: Prompts) -> Prompts:
    """One after the other."""
    return Prompts(
        text=tuple(text for each in several for text in each.text),
        tokens=np.concatenate([each.tokens for each in several]),
        kind=np.concatenate([each.kind for each in several]),
        copies=np.concatenate([each.copies for each in several]),
        own=tuple(own for each in several for own in each.own),
    )


def of_training(subset: Subset) -> Prompts:
    """The different captions of the training images, in order of first appearance.

    Raises:
      UserError: the model was trained without captions.
    """
    text, tokens = _captions(subset.train.caption, subset.train.tokens)
    places: dict[str, list[int]] = {}
    for place, caption in enumerate(text):
        places.setdefault(caption, []).append(place)
    copies, planted = subset.copies, {i for each in subset.templates for i in each.ids}

    def kind(own: list[int]) -> str:
        if len(own) > 1 or int(subset.train.id[own[0]]) in planted:
            return "template"
        return "verbatim" if copies[own[0]] > 1 else "unique"

    return Prompts(
        tuple(places),
        tokens[[own[0] for own in places.values()]],
        np.array([kind(own) for own in places.values()]),
        np.array([copies[own].sum() for own in places.values()]),
        tuple(map(tuple, places.values())),
    )


def of_heldout(subset: Subset) -> Prompts:
    """The captions of the held-out images that no training image has."""
    if not len(subset.heldout):
        raise UserError(
            "data.heldout = 0: calibration takes captions that were not trained on; hold some out"
        )
    text, tokens = _captions(subset.heldout.caption, subset.heldout.tokens)
    trained = set(subset.train.caption or ())
    places = [i for i, caption in enumerate(text) if caption not in trained]
    n = len(places)
    return Prompts(
        tuple(text[i] for i in places),
        tokens[places],
        np.full(n, "heldout"),
        np.zeros(n, int),
        ((),) * n,
    )


def of_file(path: Path, tokenizer: Tokenizer, *, truncate: bool = False) -> Prompts:
    """The lines of a text file, without empty ones.

    Args:
      path: the file, UTF-8.
      tokenizer: of the model.
      truncate: cut prompts that are too long, instead of refusing them.

    Raises:
      UserError: no such file, no text, no prompt in it, or one is too long.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}; give a text file, one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: is not UTF-8 text; give a text file, one prompt a line") from None
    text = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not text:
        raise UserError(f"--prompts {path}: has no prompt; write one a line")
    tokens = tokenizer(text, truncate=truncate, where=f"--prompts {path}:")
    n = len(text)
    return Prompts(text, tokens, np.full(n, "given"), np.zeros(n, int), ((),) * n)


def known(given: Prompts, trained: Prompts) -> Prompts:
    """`given`, with the truth about those that are captions of training images."""
    at = {text: place for place, text in enumerate(trained.text)}
    rows = [at.get(text) for text in given.text]
    return Prompts(
        given.text,
        given.tokens,
        np.array([given.kind[i] if row is None else trained.kind[row] for i, row in enumerate(rows)]),
        np.array([0 if row is None else trained.copies[row] for row in rows]),
        tuple(() if row is None else trained.own[row] for row in rows),
    )


def _captions(text: tuple[str, ...] | None, tokens: np.ndarray | None) -> tuple[tuple[str, ...], np.ndarray]:
    if text is None or tokens is None:
        raise UserError("the model was trained without captions (net.text = 0); train a text-to-image model")
    return text, tokens
