"""The page of an attack."""

from __future__ import annotations

from pathlib import Path


def write(out: Path) -> Path:
    """Placeholder until the page is written."""
    return out / "side.html"
