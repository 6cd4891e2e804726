"""XLA settings for CPU, made before jax starts.

On XLA:CPU the kernel gradient of a 3x3 convolution runs at a third of the forward's speed with the default
library settings; one flag restores it (a training step takes about half the time, see `bench/`). The flag's
name belongs to a jaxlib version and an unknown flag aborts the process, so it is set for known versions only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

_FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
_KNOWN_JAXLIB = ("0.10.2", "0.12.0.1")
_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def tune() -> bool:
    """Set the flag if this process will run on CPU; call before importing jax.

    Leaves XLA_FLAGS alone when the user has set it.

    Returns:
      Whether the flag was set.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    accelerated = any(importlib.util.find_spec(name) is not None for name in _ACCELERATOR_PLUGINS)
    on_cpu = platforms == "cpu" or (not platforms and not accelerated)
    if not on_cpu or "XLA_FLAGS" in os.environ or importlib.metadata.version("jaxlib") not in _KNOWN_JAXLIB:
        return False
    os.environ["XLA_FLAGS"] = _FLAG
    return True
