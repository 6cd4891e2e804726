"""The text-to-image model that prompts are tried on: a run of this machine, or the one that comes with mdiff."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mdiff import config
from mdiff.data import captions, source
from mdiff.data.split import Subset, load_subset, save_subset
from mdiff.errors import UserError
from mdiff.fields import from_json, to_json
from mdiff.files import strict, write_atomically, write_json
from mdiff.nets.denoiser import Model, make_model
from mdiff.recipes.runs import load_params, reopen
from mdiff.train import loop
from mdiff.trees import named_leaves
from mdiff.types import Params

SHIPPED = "emoji_text"


@dataclass(frozen=True, eq=False)
class TextTarget:
    """A text-conditional model and what it was trained on.

    Attributes:
      model: the network.
      params: its averaged parameters.
      subset: training and held-out images with captions and tokens, and the tokenizer.
      config: of the run.
      identity: plain JSON that tells it from other models.
    """

    model: Model
    params: Params
    subset: Subset
    config: config.Config
    identity: dict[str, Any]

    @property
    def tokenizer(self) -> captions.Tokenizer:
        """Of the model's captions."""
        assert self.subset.tokenizer is not None  # of a model with text
        return self.subset.tokenizer


def of_run(folder: Path, on: config.Mesh, monitor: loop.Monitor) -> TextTarget:
    """The newest checkpoint of a run.

    Raises:
      UserError: there is none, or it is no text-to-image model.
    """
    made = reopen(folder, mesh_as=on)
    if not made.config.net.text:
        raise UserError(
            f"--workdir {folder}: the model takes no text and has no cross-attention (net.text = 0); train one with "
            "configs/emoji_text.py, or take --demo"
        )
    params, step = load_params(folder, monitor, on=on)
    identity = {"step": step, "digest": config.digest(made.config), "name": made.config.name}
    return TextTarget(made.model, params, made.subset, made.config, identity)


def shipped(on: config.Mesh) -> TextTarget:
    """The model that comes with mdiff: configs/emoji_text.py, trained as its `about.json` says.

    Raises:
      UserError: the installation is damaged.
    """
    folder = Path(str(importlib.resources.files("mdiff") / "checkpoints" / SHIPPED))
    return load(folder, on)


def save(folder: Path, target: TextTarget, about: dict[str, Any]) -> None:
    """Writes a model as a folder of plain files: config.json, subset.json, weights.safetensors, about.json."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({name: np.asarray(leaf) for name, leaf in named_leaves(target.params)})
    write_atomically(folder / "weights.safetensors", lambda part: part.write_bytes(data))
    save_subset(folder / "subset.json", target.subset, target.config.data)
    write_json(folder / "config.json", strict(to_json(target.config)))
    about = {**target.identity, "sha256": hashlib.sha256(data).hexdigest(), **about}
    write_json(folder / "about.json", strict(about))


def load(folder: Path, on: config.Mesh = config.Mesh()) -> TextTarget:
    """The model that `save` wrote.

    Raises:
      UserError: a file is missing or damaged.
    """
    again = "; reinstall mdiff, or write the folder anew"
    try:
        data = (folder / "weights.safetensors").read_bytes()
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is no stored model ({error}){again}") from None
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise UserError(f"{folder / 'weights.safetensors'}: is damaged{again}")
    cfg = replace(from_json(config.Config, tree, str(folder / "config.json")), mesh=on)
    images = source.load(cfg.data.source, cfg.data.size, split=cfg.data.split)
    model = make_model(cfg, images.x.shape[-1])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    tensors = load_tensors(data)
    names = [name for name, _ in named_leaves(shapes)]
    if sorted(names) != sorted(tensors):
        raise UserError(f"{folder}: its weights are of another network{again}")
    params = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(tensors[name]) for name in names])
    subset = captions.tokenize(cfg.net, load_subset(folder / "subset.json", images))
    identity = {name: about[name] for name in ("step", "digest", "name")}
    return TextTarget(model, params, subset, cfg, identity)
