"""The environment of child processes."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def child_env(shared: Path) -> dict[str, str]:
    """On CPU, with the tests importable; compiled programs and prepared data are shared through the folder `shared`."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MDIFF_DATA_DIR": str(shared / "data"),
        "COLUMNS": "160",
    }
