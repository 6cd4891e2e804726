"""What the data tests share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdiff.data.source import Images
from mdiff.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def one_line(*parts: str):
    """Expects a UserError of one line that holds every part."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def noise_images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def image_set(n: int, *shape: int) -> Images:
    return Images("made", noise_images(n, *(shape or (4, 4, 1))), np.arange(n, dtype=np.int32))


def python(code: str, *args: str, env: dict[str, str] | None = None, wait: bool = True):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
