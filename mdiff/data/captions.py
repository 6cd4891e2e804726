"""Captions as tokens: byte-pair encoding learnt from the captions of the source (Hugging Face's tokenizers).

A row of tokens is start, words, end, padding, of one length. The tokenizer belongs to the run and is kept in its `subset.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mdiff import config
from mdiff.errors import UserError

if TYPE_CHECKING:  # which keeps a tokenizer
    from mdiff.data.split import Subset

PAD, START, END = 0, 1, 2
SPECIAL = ("<pad>", "<start>", "<end>")
FEWEST = len(SPECIAL) + 256
"""Tokens without any word: the special ones and the bytes."""


def empty(length: int) -> np.ndarray:
    """The empty caption, int32 [length]: start, end, padding."""
    row = np.full(length, PAD, np.int32)
    row[:2] = START, END
    return row


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Captions to tokens and back.

    Attributes:
      inner: a `tokenizers.Tokenizer`.
      length: tokens of a row.
    """

    inner: Any
    length: int

    def __call__(
        self, captions: Sequence[str], *, truncate: bool = False, where: str = "prompt"
    ) -> np.ndarray:
        """Tokens of captions, int32 [N, length]; upper case and surrounding space do not count.

        Args:
          captions: N strings.
          truncate: cut captions that are too long, instead of refusing them.
          where: what error messages call a caption.

        Raises:
          UserError: a caption is longer than `length` has room for.
        """
        rows = np.full((len(captions), self.length), PAD, np.int32)
        for row, caption, found in zip(rows, captions, self.inner.encode_batch(list(captions)), strict=True):
            words = found.ids
            if len(words) > self.length - 2:
                if not truncate:
                    raise UserError(
                        f"{where} {caption!r}: has {len(words)} tokens, and the model takes {self.length - 2}; "
                        "shorten it, or ask to truncate"
                    )
                words = words[: self.length - 2]
            row[: len(words) + 2] = START, *words, END
        return rows

    def decode(self, row: np.ndarray) -> list[str]:
        """The text of each token of one row [length], special ones in angle brackets."""
        return [
            SPECIAL[token] if token < len(SPECIAL) else self.inner.decode([int(token)]).strip()
            for token in row
        ]

    def to_json(self) -> dict[str, Any]:
        """For `subset.json`; the inverse of `from_json`."""
        return {"length": self.length, "inner": self.inner.to_str()}


def lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens of each row [N, length] up to and with its end, int32 [N]."""
    return (np.argmax(np.asarray(tokens) == END, axis=1) + 1).astype(np.int32)


def learn(captions: Sequence[str], vocabulary: int, length: int) -> Tokenizer:
    """The tokenizer of a set of captions; the same captions in any order give the same one.

    Args:
      captions: what it learns from.
      vocabulary: tokens at most; fewer when the captions have no more to join.
      length: tokens of a row.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(sorted(captions), trainer)
    return Tokenizer(inner, length)


def tokenize(cfg: config.Net, subset: Subset) -> Subset:
    """A text model's images with `tokens`, and the tokenizer, learnt from the training captions unless it is there.

    Raises:
      UserError: the images have no captions, or one is longer than net.text_length.
    """
    if not cfg.text:
        return subset
    if subset.train.caption is None:
        raise UserError(
            f"net.text = {cfg.text}: {subset.train.name!r} has no captions; set it to 0, or data.source to emoji"
        )
    tokenizer = subset.tokenizer or learn(subset.train.caption, cfg.vocabulary, cfg.text_length)
    train, heldout = (
        replace(each, tokens=tokenizer(each.caption or (), where="caption"))
        for each in (subset.train, subset.heldout)
    )
    return replace(subset, train=train, heldout=heldout, tokenizer=tokenizer)


def from_json(tree: dict[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_json`.

    Raises:
      KeyError, TypeError, ValueError: it is not such a tree.
    """
    from tokenizers import Tokenizer as Inner

    return Tokenizer(Inner.from_str(json.dumps(json.loads(tree["inner"]))), int(tree["length"]))
