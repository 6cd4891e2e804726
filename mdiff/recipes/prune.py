"""Found neurons pruned for good: an ordinary run whose weights answer as the network does with the neurons off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.data.split import save_subset
from mdiff.errors import UserError
from mdiff.files import check_writable, write_json
from mdiff.nets.fold import fold
from mdiff.probes.units import Units, ablate
from mdiff.recipes.text_target import TextTarget
from mdiff.train import checkpoint, mesh, optim, state, workdir
from mdiff.trees import size

RECORD = "pruned.json"


def export(target: TextTarget, units: Units, neurons: np.ndarray, folder: Path, factor: float = 0.0) -> None:
    """Writes a run of one checkpoint, at the step of the model it was made from.

    Args:
      target: the model.
      units: the layers of the neurons.
      neurons: int [K], their numbers.
      folder: of the new run; empty or not there.
      factor: what their activations are multiplied with.

    Raises:
      UserError: the folder holds something, or a gate cannot be folded into weights.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--export {folder}: is not empty; give a new folder")
    check_writable(folder, "--export")
    gates = units.gates(ablate(jnp.asarray(units.off(neurons.tolist())), factor))
    params = fold(target.params, gates)
    settings = target.config.train
    optimizer = optim.make_optimizer(settings)
    plan = state.plan_state(
        target.model, optimizer, target.config.seed, mesh.make_mesh(target.config.mesh), settings.ema_lengths
    )
    shapes = plan[1]
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    pruned = replace(
        fresh,
        step=jnp.asarray(target.identity["step"], fresh.step.dtype),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        profiles={name: jax.tree.map(jnp.copy, params) for name in fresh.profiles},
    )
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write(folder, target.config, target.model.shape, size(params))
    save_subset(folder / "subset.json", target.subset, target.config.data)
    with checkpoint.open_run(folder, settings) as checkpoints:
        checkpoints.save(pruned, {"pruned": len(neurons)})
        checkpoints.wait()
    write_json(
        folder / RECORD,
        {"of": target.identity, "factor": factor, "neurons": units.by_layer(neurons.tolist())},
    )
