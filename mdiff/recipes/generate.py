"""Generations of a model, in batches that do not change them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from PIL import Image

from mdiff import config, processes
from mdiff.data.source import Images
from mdiff.files import remove, write_atomically
from mdiff.keys import keys
from mdiff.nets.denoiser import Model
from mdiff.recipes.runs import Experiment, load_params
from mdiff.sample import guidance, sampler
from mdiff.train import loop, mesh
from mdiff.train.ledger import Ledger
from mdiff.types import Array, Denoiser, Params, to_uint8

Own = Mapping[str, np.ndarray]
"""Conditions that the training images come with: `vector` [N,V], `tokens` [N,L]."""


def own(images: Images) -> Own:
    """The conditions of a set of images that samples are drawn under, but for classes, which are drawn in turn."""
    found = {"vector": images.vector, "tokens": images.tokens}
    return {name: column for name, column in found.items() if column is not None}


def conditions(model: Model, params: Params, index: Array, given: Own | None = None) -> Array | None:
    """Conditions of samples `index` [B]: classes, and those of the training images, in turn; None without conditions."""
    if model.embedding is None:
        return None
    takes, entries = model.embedding.takes, {}
    if "label" in takes:
        entries["label"] = index % model.embedding.classes
    for name, column in (given or {}).items():
        if name in takes:
            entries[name] = jnp.asarray(column)[index % len(column)]
    return model.condition(params, entries, n=len(index))


def seen_of(model: Model, seed: int, index: Array) -> Array | None:
    """A~ of samples `index` [B] of a model of damaged images, [B,H,W,1]; None for any other model."""
    if model.damage is None:
        return None
    return model.damage.fresh(keys(seed, "sample damage", index), *model.shape[:2])


def own_denoiser(model: Model, params: Params, cfg: config.Sample, seen: Array | None) -> Denoiser:
    """The model as it is sampled, with the classifier-free guidance that is asked for."""
    denoiser = model.denoiser(params, seen=seen)
    if cfg.guidance == 1:
        return denoiser
    null, span = model.condition(params, {}, n=1), (cfg.guidance_min, cfg.guidance_max)
    return guidance.classifier_free(denoiser, null, cfg.guidance, model.process, *span)


def sample_program(
    model: Model,
    cfg: config.Sample,
    given: Own | None = None,
    on: DeviceMesh | None = None,
) -> Any:
    """A jitted `(params, sample index int32 [B]) -> images [B,H,W,C]`; sample i is the same in any batch.

    A model of damaged images is asked through the kind of A~ that it was trained with: each sample draws one and keeps
    it at all steps (the fixed mask sampler of arXiv 2305.19256), and is the last estimate of the whole
    image. With nothing hidden the model is not defined: training compares no such answer with anything.

    Args:
      model: the network.
      cfg: the sampler.
      given: the training images' own conditions, for a model that has such.
      on: devices the batch is split over, which B divides by; every process gets all images. They need not exist.
    """
    split, whole = (None, None) if on is None else (mesh.batch_sharding(on), mesh.replicated(on))

    @functools.partial(jax.jit, out_shardings=whole)
    def generate(params: Params, index: Array) -> Array:
        if split is not None:
            index = jax.lax.with_sharding_constraint(index, split)
        denoiser = own_denoiser(model, params, cfg, seen_of(model, cfg.seed, index))
        cond = conditions(model, params, index, given)
        every = keys(cfg.seed, "sample", index)
        with nullcontext() if on is None else mesh.activations_on(on):
            return sampler.sample(model.process, cfg, denoiser, every, model.shape, cond)

    return generate


@functools.lru_cache(maxsize=8)
def _shared_program(model: Model, cfg: config.Sample, on: DeviceMesh | None) -> Any:
    """`sample_program`, compiled once for all runs of one network: the cells of a sweep."""
    return sample_program(model, cfg, None, on)


def make_generator(
    model: Model,
    cfg: config.Sample,
    given: Own | None = None,
    on: DeviceMesh | None = None,
) -> Callable[[Params, Any], Array]:
    """`sample_program` for any batch: it is filled up where it does not divide over the devices."""
    generate: Callable[[Params, Any], Array] = (
        sample_program(model, cfg, given, on) if given else _shared_program(model, cfg, on)
    )
    if on is None:
        return generate
    ways, whole = mesh.batch_devices(on), mesh.replicated(on)

    def fill_up(params: Params, index: Any) -> Array:
        short = -len(index) % ways
        padded = np.pad(np.asarray(index), (0, short), mode="edge")
        images = generate(params, mesh.place(padded, whole))
        return images[: len(index)] if short else images

    return fill_up


def batches(n: int, batch: int) -> list[np.ndarray]:
    """Sample indices 0..n-1 in device batches of one size; the last one runs over."""
    return [np.arange(start, start + batch, dtype=np.int32) for start in range(0, n, batch)]


def draw(generate: Callable[[Any], Array], n: int, batch: int) -> np.ndarray:
    """Samples 0..n-1 of `generate(index [B]) -> images [B,H,W,C]` as uint8 [n,H,W,C]."""
    return np.concatenate([to_uint8(generate(index)) for index in batches(n, batch)])[:n]


def draw_kept(
    generate: Callable[[Any], Array],
    n: int,
    batch: int,
    unfinished: Path,
    path: Path,
    monitor: loop.Monitor,
    task: str = "sample",
    **also: Any,
) -> None:
    """As `draw`, into the file `path`: `x` uint8 [n,H,W,C], `id` [n], and what is given `also`.

    Finished batches are kept in `unfinished`, so an interrupted call goes on where it was; the caller removes it.
    """
    todo = batches(n, batch)
    paths = [unfinished / f"{place:06d}.npy" for place in range(len(todo))]
    present = processes.from_first(lambda: [part.is_file() for part in paths])
    for place, (part, index) in enumerate(zip(paths, todo, strict=True)):
        if not present[place]:
            write_atomically(part, functools.partial(np.save, arr=to_uint8(generate(index))))
        monitor.progress(task, min((place + 1) * batch, n), n, {})

    def join() -> None:
        images = np.concatenate([np.load(io.BytesIO(part.read_bytes())) for part in paths])[:n]
        write_atomically(
            path, lambda temporary: np.savez_compressed(temporary, x=images, id=np.arange(n), **also)
        )

    processes.from_first(join)


def sample(experiment: Experiment, folder: Path, monitor: loop.Monitor) -> np.ndarray:
    """Draw the configured generations from the newest checkpoint into `folder/samples.npz`.

    Finished batches are kept in `folder/samples/`, so an interrupted call goes on where it was.

    Returns:
      uint8 [n,H,W,C].
    """
    cfg, model = experiment.config, experiment.model
    params, step = load_params(folder, monitor, ema=cfg.sample.ema, on=cfg.mesh)
    drawn = json.dumps([step, config.digest(cfg), {**config.to_json(cfg.sample), "n": 0}], sort_keys=True)
    unfinished = folder / "samples" / hashlib.sha256(drawn.encode()).hexdigest()[:12]
    ledger = Ledger.load(folder / "ledger.json")
    with ledger.time("sample"):
        generate = make_generator(
            model, sampler.settings(cfg), own(experiment.subset.train), mesh.make_mesh(cfg.mesh)
        )
        draw_kept(
            lambda index: generate(params, index),
            cfg.sample.n,
            cfg.sample.batch,
            unfinished,
            folder / "samples.npz",
            monitor,
            step=step,
        )
        processes.from_first(lambda: remove(folder / "samples"))
    ledger.save(folder / "ledger.json")
    return load(folder)[0]


def load(folder: Path) -> tuple[np.ndarray, int]:
    """A run's generations, uint8 [n,H,W,C], and the training step they are of."""
    with (folder / "samples.npz").open("rb") as opened, np.load(opened) as stored:
        return stored["x"], int(stored["step"])


def write_pngs(images: np.ndarray, folder: Path) -> None:
    """uint8 [n,H,W,C] as `folder/000000.png`, …."""
    if not processes.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{place:06d}.png"
        )
