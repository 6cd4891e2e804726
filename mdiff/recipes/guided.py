"""Generations guided by a classifier: at many strengths from the same noise, streamed to disk."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from mdiff import config, processes
from mdiff.data.stream import uniforms
from mdiff.errors import UserError
from mdiff.files import remove, write_atomically
from mdiff.keys import keys
from mdiff.nets.denoiser import Model
from mdiff.recipes import generate
from mdiff.sample import guidance, stepwise
from mdiff.sample.guidance import Guide
from mdiff.train import loop, mesh
from mdiff.types import Array, Key, Params, to_uint8

Form = Literal["steps", "scan"]
"""A Python loop over a compiled step, or one compiled scan."""


class Guided(NamedTuple):
    """A batch of generations.

    Attributes:
      x: [B,H,W,C] images, not clipped.
      gap: [B] mean over the sampler's calls of ||sigma grad log p(label | xt)||, the push at strength 1 (the surrogate
        gap); NaN at strength 0, where no classifier is asked.
    """

    x: Array
    gap: Array


Generator = Callable[[Any, Any, float], Guided]
"""`(sample index [B], label [B], scale) -> Guided`: a generator with its parameters bound."""


# --------------------------------------------------------------------------------------- programs


class _Rows(NamedTuple):
    """What stays with each sample of a batch: its key, its conditions, and what is seen of it."""

    keys: Key
    cond: Array | None
    seen: Array | None


@dataclass(frozen=True)
class _Programs:
    """Compiled parts of a guided sampler; `steps` are those of `stepwise.whens`.

    Attributes:
      begin: `(params, index, given, seed) -> (Walk, _Rows)`, seed static.
      step: `(params, guide_params, Walk, When, _Rows, label, scale, last) -> Walk`, last static.
      whole: `(params, guide_params, Walk, _Rows, label, scale) -> Walk`, all steps as a scan.
      end: `Walk -> Guided` on every process.
    """

    steps: list[tuple[stepwise.When, bool]]
    begin: Any
    step: Any
    whole: Any
    end: Any


@functools.lru_cache(maxsize=8)
def _programs(model: Model, cfg: config.Sample, guide: Guide, on: DeviceMesh | None) -> _Programs:
    """Compiled once for all seeds, strengths and classes, and for all parameters of one shape."""
    process = model.process
    split, whole = (None, None) if on is None else (mesh.batch_sharding(on), mesh.replicated(on))

    def shared(tree: Any) -> Any:
        """The batch's arrays split over the devices."""
        if split is None:
            return tree
        keep = functools.partial(jax.lax.with_sharding_constraint, shardings=split)
        return jax.tree.map(lambda x: keep(x) if jnp.ndim(x) else x, tree)

    @functools.partial(jax.jit, static_argnames="seed")
    def begin(params: Params, index: Array, given: Any, seed: int) -> tuple[stepwise.Walk, _Rows]:
        index = shared(index)
        every, cond = keys(seed, "sample", index), generate.conditions(model, params, index, given)
        rows = _Rows(every, cond, generate.seen_of(model, seed, index))
        return shared(stepwise.begin(process, cfg, every, model.shape)), shared(rows)

    def advance(
        params: Params,
        guide_params: Params,
        walk: stepwise.Walk,
        when: stepwise.When,
        rows: _Rows,
        label: Array,
        scale: Array,
        last: bool = False,
    ) -> stepwise.Walk:
        label, scale = shared((label, scale))
        denoiser = generate.own_denoiser(model, params, cfg, rows.seen)
        log_prob = functools.partial(guide.log_prob, guide_params)
        walk = stepwise.advance(
            process, cfg, denoiser, log_prob, walk, when, rows.keys, label, scale, rows.cond, last
        )
        return shared(walk)

    steps = stepwise.whens(process, cfg)

    def scanned(
        params: Params, guide_params: Params, walk: stepwise.Walk, rows: _Rows, label: Array, scale: Array
    ) -> stepwise.Walk:
        def step(carry: stepwise.Walk, when: stepwise.When, last: bool) -> stepwise.Walk:
            return advance(params, guide_params, carry, when, rows, label, scale, last)

        return stepwise.scan(step, walk, steps)

    return _Programs(
        steps=steps,
        begin=begin,
        step=jax.jit(_on(on, advance), static_argnames="last", donate_argnames="walk"),
        whole=jax.jit(_on(on, scanned), donate_argnames="walk"),
        end=jax.jit(lambda walk: Guided(walk.state.u, walk.gap), out_shardings=whole),
    )


def _on(device_mesh: DeviceMesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` whose networks keep feature maps split over the devices."""
    if device_mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with mesh.activations_on(device_mesh):
            return function(*args, **kwargs)

    return traced


def make_generator(
    model: Model,
    cfg: config.Sample,
    guide: Guide,
    on: DeviceMesh | None = None,
    given: generate.Own | None = None,
    form: Form | None = None,
) -> Callable[[Params, Params, Any, Any, Any], Guided]:
    """`(params, guide_params, sample index [B], label [B], scale) -> Guided`; sample i is the same in any batch.

    Sample i starts from the noise of sample i of `generate.make_generator`, and has its conditions and its damage. At
    scale 0, the number, it is that generator's sample, bit for bit. Any other number, or [B] of them, runs one
    compiled program (two, where the method's last step is another one).

    Args:
      model: the network.
      cfg: the sampler.
      guide: what log p(label | xt) comes from.
      on: devices the batch is split over; it is filled up where it does not divide.
      given: the training images' own conditions, for a model that has such.
      form: None is "steps" on CPU (see `mdiff.sample.stepwise`), else "scan".

    Raises:
      UserError: the guide is of other images or of another process than the model's. On call: a strength is negative or not
        finite, or a label is none of the guide's classes.
    """
    check_guide(model, guide)
    plain = generate.make_generator(model, cfg, given, on)
    # Neither changes a program: all seeds share it.
    programs = _programs(model, replace(cfg, seed=0, n=1, batch=1), guide, on)
    if form is None:
        platform = jax.default_backend() if on is None else on.devices.flat[0].platform
        form = "steps" if platform == "cpu" else "scan"
    ways = 1 if on is None else mesh.batch_devices(on)

    def run(params: Params, guide_params: Params, index: Any, label: Any, scale: Any) -> Guided:
        n, label = len(index), check_labels(label, guide.classes)
        if len(label) != n:
            raise UserError(f"label: {len(label)} of them for {n} samples; give one for each")
        if np.ndim(scale) == 0 and scale == 0:
            return Guided(plain(params, index), jnp.full(n, jnp.nan))
        strengths = np.broadcast_to(np.asarray(scale, np.float32), n)
        for each in (strengths.min(), strengths.max()):  # a NaN is both
            guidance.check_scale(float(each))
        rows: tuple[Any, ...] = (np.asarray(index, np.int32), label.astype(np.int32), strengths)
        rows = tuple(np.pad(row, (0, -n % ways), mode="edge") for row in rows)
        if on is not None:
            rows = mesh.place(rows, mesh.replicated(on))
        index, label, strengths = rows
        walk, kept = programs.begin(params, index, given, seed=cfg.seed)
        if form == "scan":
            walk = programs.whole(params, guide_params, walk, kept, label, strengths)
        else:
            for when, last in programs.steps:
                walk = programs.step(params, guide_params, walk, when, kept, label, strengths, last=last)
        made = programs.end(walk)
        return Guided(made.x[:n], made.gap[:n])

    return run


def check_guide(model: Model, guide: Guide) -> None:
    """Raises UserError when `guide` cannot guide `model`."""
    if tuple(guide.shape) != tuple(model.shape):
        raise UserError(
            f"classifier: is of images {tuple(guide.shape)}, the model of {tuple(model.shape)}; distil it from images "
            "of this model"
        )
    if guide.process != model.process:
        raise UserError(
            f"classifier: its process is {guide.process}, the model's {model.process}; distil it for this model"
        )


def check_labels(label: Any, classes: int) -> np.ndarray:
    """Labels [B] on the host.

    Raises:
      UserError: one is not in 0..classes-1.
    """
    label = np.asarray(label)
    bad = label[(label < 0) | (label >= classes)]
    if bad.size:
        raise UserError(f"label {bad[0]}: the guide has classes 0 to {classes - 1}; ask for one of those")
    return label


def labels(seed: int, n: int, classes: int) -> np.ndarray:
    """The class asked for in sample i, uniform, int32 [n]: a function of (seed, i) alone (arXiv 2410.02467, algorithm 1)."""
    return (uniforms(seed, "guided label", (0, 0), n) * classes).astype(np.int32)


# ---------------------------------------------------------------------------------- all strengths


def path_of(folder: Path, scale: float) -> Path:
    """The file of one strength's generations in `folder`."""
    return folder / f"scale_{scale:g}.npz"


def draw(
    generator: Generator,
    cfg: config.Sample,
    scales: Sequence[float],
    classes: int,
    folder: Path,
    identity: str,
    monitor: loop.Monitor,
    guard: Callable[[], None] | None = None,
) -> dict[float, Path]:
    """cfg.n generations at each strength, paired: sample i has one noise and one label at all of them.

    Each strength becomes `folder/scale_<strength>.npz` with x uint8 [n,H,W,C], label, id int32 [n], gap float32 [n] (see
    `Guided`) and finite bool [n]: an image that is not finite, as strong guidance makes them, is stored grey.
    Finished batches are kept until their file is written, so an interrupted call goes on where it was. What is
    there of another `identity` or sampler is drawn anew.

    Args:
      generator: from `make_generator`, its parameters bound.
      cfg: n, batch, and all that says which images these are; seed is also that of the labels.
      scales: strengths, 0 or above.
      classes: labels are 0..classes-1.
      folder: where the files go.
      identity: which parameters the generator has, such as digest and step of the model's and the classifier's runs.
      monitor: told about progress.
      guard: called before every write, on the first process; raises `UserError` when the folder is no longer ours.

    Returns:
      The file of each strength.

    Raises:
      UserError: a strength is negative, not finite or not told from another by its file's name.
    """
    check_scales(scales)
    wanted, todo = labels(cfg.seed, cfg.n, classes), generate.batches(cfg.n, cfg.batch)
    over = labels(cfg.seed, len(todo) * cfg.batch, classes)  # the last batch runs over
    files = {scale: path_of(folder, scale) for scale in scales}
    for place, (scale, file) in enumerate(files.items()):
        told = [identity, classes, f"{scale:g}", {**config.to_json(cfg), "n": 0}]
        stamp = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        done = place * cfg.n
        if not processes.from_first(functools.partial(_is_finished, file, stamp, cfg.n)):
            unfinished = folder / "batches" / f"{file.stem}-{stamp}"
            paths = [unfinished / f"{number:06d}.npz" for number in range(len(todo))]
            present = processes.from_first(functools.partial(_present, paths))
            for number, (path, index) in enumerate(zip(paths, todo, strict=True)):
                if not present[number]:
                    columns = _columns(generator(index, over[index], scale))
                    _write(path, columns, guard)
                monitor.progress(
                    "guided",
                    done + min((number + 1) * cfg.batch, cfg.n),
                    len(files) * cfg.n,
                    {"scale": scale},
                )
            broken = processes.from_first(functools.partial(_join, file, paths, wanted, stamp, scale, guard))
            if broken:
                monitor.say(
                    f"scale {scale:g}: {broken} of {cfg.n} images are not finite; stored grey, `finite` says which"
                )
        monitor.progress("guided", done + cfg.n, len(files) * cfg.n, {"scale": scale})
    processes.from_first(functools.partial(_clear, folder / "batches"))
    return files


def check_scales(scales: Sequence[float]) -> None:
    """Raises UserError when these strengths cannot be drawn side by side."""
    if not scales:
        raise UserError("scales = (): give one strength or more, such as 0 1 4")
    names: dict[str, float] = {}
    for scale in scales:
        guidance.check_scale(scale)
        name = f"{scale:g}"
        if name in names:
            raise UserError(
                f"scales: {names[name]!r} and {scale!r} are both {name} in file names; leave one out"
            )
        names[name] = scale


def load(path: Path) -> dict[str, np.ndarray]:
    """One strength's generations: the columns of `draw`."""
    with np.load(io.BytesIO(path.read_bytes())) as stored:
        return {name: stored[name] for name in ("x", "label", "id", "gap", "finite")}


def _columns(made: Guided) -> dict[str, np.ndarray]:
    x = np.asarray(made.x)
    finite = np.isfinite(x).all(axis=(1, 2, 3))
    x = np.where(finite[:, None, None, None], x, 0.0)
    return {"x": to_uint8(x), "gap": np.asarray(made.gap, np.float32), "finite": finite}


def _write(path: Path, columns: dict[str, Any], guard: Callable[[], None] | None) -> None:
    if guard is not None:
        processes.from_first(guard)
    write_atomically(path, lambda temporary: np.savez_compressed(temporary, **columns))


def _present(paths: list[Path]) -> list[bool]:
    return [path.is_file() for path in paths]


def _clear(folder: Path) -> None:
    if folder.is_dir():
        remove(folder)


def _is_finished(file: Path, stamp: str, n: int) -> bool:
    if not file.is_file():
        return False
    with np.load(io.BytesIO(file.read_bytes())) as stored:
        return "stamp" in stored and str(stored["stamp"]) == stamp and len(stored["id"]) == n


def _join(
    file: Path,
    paths: list[Path],
    wanted: np.ndarray,
    stamp: str,
    scale: float,
    guard: Callable[[], None] | None,
) -> int:
    """Make one file of the batches; how many images are not finite."""
    parts = []
    for path in paths:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            parts.append({name: stored[name] for name in ("x", "gap", "finite")})
    n = len(wanted)
    columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts])[:n] for name in parts[0]}
    columns |= {"label": wanted, "id": np.arange(n, dtype=np.int32), "stamp": stamp, "scale": scale}
    if guard is not None:
        guard()
    write_atomically(file, lambda temporary: np.savez_compressed(temporary, **columns))
    return int(n - columns["finite"].sum())
