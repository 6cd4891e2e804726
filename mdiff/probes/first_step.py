"""What a text-to-image model says at the first sampling step, with neurons on and off (NeMo, arXiv 2406.02366, section 3).

The noise difference of prompt y and seed j is delta = eps(x_T, T, y) - x_T. For x_T = sigma n that is not of unit variance we
compute it as -x0 / sigma, the same thing without cancellation: it points at the image the network already sees.

A prompt whose differences agree between seeds has its image fixed whatever the noise: its seeds are *kept*. What an ablation
scores is the similarity between whole and ablated difference of the same seed, the maximum over kept seeds.

One program tests many (prompt, ablation) pairs at once, a `vmap` over gates and text, spread over the mesh axis `trial`
without messages. On one device, what an ablation cannot change is not computed again: text embeddings, and the network up to
the first block whose neurons differ from those of the test before (`Model.carry`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mdiff.data.captions import END
from mdiff.keys import keys
from mdiff.nemo import Nemo
from mdiff.nets.denoiser import Model
from mdiff.probes import alike
from mdiff.probes.units import Units, ablate
from mdiff.process.gaussian import bcast
from mdiff.train import mesh as meshes
from mdiff.types import Array, Params

KEPT = 512
"""Prefixes of the network held for later tests."""
CUTS = 4
"""Places where the network may be cut: each is a program to compile."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What the whole network says about prompts.

    Attributes:
      tokens: int32 [P,L].
      delta: float32 [P,S,H,W,C], noise differences.
      pairs: float32 [P,S,S], similarity of the differences of two seeds.
      activation: float32 [P,N], mean |activation| of the neurons.
    """

    tokens: np.ndarray
    delta: np.ndarray
    pairs: np.ndarray
    activation: np.ndarray

    def kept(self, tau: float) -> np.ndarray:
        """bool [P,S]: seeds whose difference is more similar to another seed's than tau."""
        return self.best > tau

    @property
    def best(self) -> np.ndarray:
        """float32 [P,S]: the largest similarity of each seed to another."""
        others = ~np.eye(self.pairs.shape[-1], dtype=bool)
        return np.where(others, self.pairs, -np.inf).max(-1)

    @property
    def score(self) -> np.ndarray:
        """float32 [P]: the largest similarity of two seeds: how memorized a prompt looks."""
        return self.best.max(-1)

    def scores(self, which: str) -> np.ndarray:
        """What a threshold is calibrated on: "max", one score for each prompt, or "pairs", all of them."""
        if which == "max":
            return self.score
        rows, columns = np.triu_indices(self.pairs.shape[-1], 1)
        return self.pairs[:, rows, columns].ravel()


def token_weights(tokens: Array, which: str) -> Array:
    """float32 [B,L], sums to 1: the positions over which activations are averaged, see `Nemo.tokens`."""
    place, end = jnp.arange(tokens.shape[-1]), jnp.argmax(tokens == END, axis=-1)[:, None]
    chosen = {
        "all": place >= 0 * end,
        "words": (place > 0) & (place < end),
        "end": place == end,
        "padding": place > end,
    }[which].astype(jnp.float32)
    return chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1)


class FirstStep:
    """The first step of one model, prompt by prompt and ablation by ablation.

    Args:
      model: a text-conditional one.
      params: its parameters.
      units: the neurons that are asked about.
      cfg: uses seeds, seed, sigma, similarity, tokens and batch.
      mesh: spreads ablations over its axis `trial`.
    """

    def __init__(self, model: Model, params: Params, units: Units, cfg: Nemo, mesh: Mesh) -> None:
        alike.check(cfg.similarity, *model.shape[:2])
        self.model, self.params, self.units, self.cfg, self.mesh = model, params, units, cfg, mesh
        process = model.process
        level = jnp.full((cfg.seeds,), cfg.sigma or process.sigma_max)
        self.t = process.time(level)
        noise = jax.vmap(lambda key: jax.random.normal(key, model.shape))(
            keys(cfg.seed, "first step", jnp.arange(cfg.seeds))
        )
        self.xt = noise * bcast(process.sigma(self.t), noise)
        self.looked: Looked | None = None
        self.kept = np.zeros((0, cfg.seeds), bool)
        self.calls = 0
        self._last: dict[int, np.ndarray] = {}
        self._carries: OrderedDict[tuple[int, int, bytes], Any] = OrderedDict()
        self._single = mesh.size == 1 and jax.process_count() == 1
        self._cuts = _cuts(units) if self._single else [0]
        # Of the object, not of the class: programs go when it goes.
        self._prefix = functools.cache(self._make_prefix)
        self._program = functools.cache(self._make_program)

    # ------------------------------------------------------------------ the whole network

    def look(self, tokens: np.ndarray, advance: Callable[[int], None] = lambda n: None) -> Looked:
        """Runs the whole network on prompts [P,L], `cfg.batch` at a time.

        Args:
          tokens: int32 [P,L].
          advance: told how many prompts are done.
        """
        found: list[tuple[np.ndarray, ...]] = []
        for start in range(0, len(tokens), self.cfg.batch):
            part = tokens[start : start + self.cfg.batch]
            filled = np.concatenate([part, np.repeat(part[-1:], self.cfg.batch - len(part), axis=0)])
            rows = jax.device_get(self._look(self.params, filled))
            found.append(tuple(each[: len(part)] for each in rows))
            advance(len(part))
        return Looked(tokens, *(np.concatenate(column) for column in zip(*found, strict=True)))

    @functools.cached_property
    def _look(self) -> Callable[[Params, np.ndarray], tuple[Array, Array, Array]]:
        units, model = self.units, self.model
        taps = tuple(name.removeprefix("net/") + "/in" for name in units.names if name.startswith("net/"))

        def of_prompt(params: Params, tokens: Array) -> tuple[Array, Array, Array]:
            cond = self._text(params, tokens, None)
            prediction, tapped = model.apply(params, self.xt, self.t, cond, taps=taps)
            delta = self._delta(prediction.x0)
            weights = token_weights(tokens[None], self.cfg.tokens)
            activation = [
                _mean_activation(tapped[name.removeprefix("net/") + "/in"], weights)
                if name.startswith("net/")
                else jnp.zeros(size)
                for name, size in zip(units.names, units.sizes, strict=True)
            ]
            return delta, alike.pairs(delta, self.cfg.similarity), jnp.concatenate(activation)

        return jax.jit(lambda params, tokens: jax.lax.map(functools.partial(of_prompt, params), tokens))

    def _text(self, params: Params, tokens: Array, gates: Params | None) -> Array:
        """The prompt's embedding for every seed, [S,L,E]."""
        cond = self.model.condition(params, {"tokens": tokens[None]}, gates=gates)
        assert cond is not None
        return jnp.broadcast_to(cond, (self.cfg.seeds, *cond.shape[1:]))

    def _delta(self, x0: Array) -> Array:
        return -x0 / bcast(self.model.process.noise_level(self.t), x0)

    # ------------------------------------------------------------------ ablations

    def prompts(self, looked: Looked, kept: np.ndarray) -> None:
        """The prompts that `evaluate` and `gradient` number, and which of their seeds count [P,S]."""
        self.looked, self.kept = looked, kept
        self._last.clear()
        self._carries.clear()

    def evaluate(self, prompt: np.ndarray, off: np.ndarray) -> np.ndarray:
        """Similarity of whole and ablated differences, the maximum over kept seeds: `lockstep.Evaluate`.

        Args:
          prompt: int [K], numbers of the prompts given to `prompts`.
          off: bool [K,N], neurons that are switched off.

        Returns:
          float32 [K].
        """
        assert self.looked is not None
        out = np.zeros(len(prompt), np.float32)
        groups: dict[int, list[int]] = {}
        for row, number in enumerate(prompt):
            groups.setdefault(self._cut(int(number), off[row]), []).append(row)
        for cut, rows in groups.items():
            for start in range(0, len(rows), self._most):
                part = np.array(rows[start : start + self._most])
                out[part] = self._run(cut, prompt[part], off[part])
        return out

    @property
    def _most(self) -> int:
        """Tests in a call of the program: a CPU gains nothing from more than one, whose seeds are a batch."""
        if self._single and jax.default_backend() == "cpu":
            return 1
        return self.cfg.batch * self.mesh.shape["trial"]

    def _cut(self, prompt: int, off: np.ndarray) -> int:
        """The layer before whose block the network need not be computed again; 0 is the whole network."""
        before = self._last.get(prompt)
        self._last[prompt] = off
        if before is None:
            return 0
        changed = np.flatnonzero(before != off)
        first = int(self.units.layer[changed[0]]) if len(changed) else len(self.units.sizes)
        return max(cut for cut in self._cuts if cut <= first)

    def _run(self, cut: int, prompt: np.ndarray, off: np.ndarray) -> np.ndarray:
        assert self.looked is not None
        n = len(prompt)
        rows = np.minimum(np.arange(self._most), n - 1)  # filled up with the last one
        prompt, off = prompt[rows], off[rows]
        lanes = [self.looked.tokens[prompt], self.looked.delta[prompt], self.kept[prompt], off]
        if cut:
            lanes.append(self._prefixes(cut, prompt, off, n))
        self.calls += 1
        scores = self._program(cut)(self.params, *self._spread(lanes))
        return np.asarray(multihost_utils.process_allgather(scores, tiled=True))[:n]

    def _spread(self, lanes: list[Any]) -> list[Any]:
        if self._single:
            return lanes
        return [meshes.place(np.asarray(lane), NamedSharding(self.mesh, P("trial"))) for lane in lanes]

    def _prefixes(self, cut: int, prompt: np.ndarray, off: np.ndarray, n: int) -> Any:
        """The network's state before the block of layer `cut` for each lane, from memory where it is there."""
        start = self.units.starts[cut]
        names = [
            (int(number), cut, np.packbits(row[:start]).tobytes())
            for number, row in zip(prompt, off, strict=True)
        ]
        missing = [i for i in range(n) if names[i] not in self._carries]
        firsts = list({names[i]: i for i in missing}.values())
        for i in firsts:
            tokens = self.looked.tokens[prompt[i]]  # type: ignore[union-attr]
            self._carries[names[i]] = self._prefix(cut)(self.params, tokens, off[i])
        found = []
        for name in names:
            self._carries.move_to_end(name)
            found.append(self._carries[name])
        while len(self._carries) > KEPT:
            self._carries.popitem(last=False)
        return jax.tree.map(lambda *each: jnp.stack(each), *found)

    def _make_prefix(self, cut: int) -> Callable[[Params, np.ndarray, np.ndarray], Any]:
        def carry(params: Params, tokens: Array, off: Array) -> Any:
            gates = self.units.gates(ablate(off))
            cond = self._text(params, tokens, gates["text"])
            return self.model.carry(params, self.xt, self.t, cond, self.units.blocks[cut], gates["net"])

        return jax.jit(carry)

    def _make_program(self, cut: int) -> Callable[..., Array]:
        """`(params, tokens [K,L], whole [K,S,…], kept [K,S], off [K,N], prefixes [K,…]?) -> [K]`."""

        def test(params: Params, tokens: Array, whole: Array, kept: Array, off: Array, *prefix: Any) -> Array:
            return self._score(params, tokens, whole, kept, ablate(off), cut, *prefix)

        def share(params: Params, *lanes: Any) -> Array:
            return jax.vmap(functools.partial(test, params))(*lanes)

        if self._single:
            return jax.jit(share)
        trial = P("trial")
        spread = jax.shard_map(
            share, mesh=self.mesh, in_specs=(P(), *[trial] * 4), out_specs=trial, check_vma=False
        )
        return jax.jit(spread)

    def _score(
        self,
        params: Params,
        tokens: Array,
        whole: Array,
        kept: Array,
        factor: Array,
        cut: int = 0,
        prefix: Any = None,
    ) -> Array:
        gates = self.units.gates(factor)
        cond = self._text(params, tokens, gates["text"])
        resume = None if prefix is None else (self.units.blocks[cut], prefix)
        x0 = self.model.apply(params, self.xt, self.t, cond, gates["net"], resume=resume)[0].x0
        similar = alike.similarity(whole, self._delta(x0), self.cfg.similarity)
        return jnp.max(jnp.where(kept, similar, -jnp.inf))

    # ------------------------------------------------------------------ gradients

    def gradient(self, prompt: np.ndarray) -> np.ndarray:
        """How much each neuron does for the memorized image, by one backward pass; float32 [K,N].

        The derivative with respect to the gates of what the text adds, the inner product of delta(gates) with delta - delta_null
        over kept seeds, where all gates are halfway between on and off: the midpoint rule for integrated gradients (arXiv
        1703.01365, eq. 1) from the whole network to one without these neurons. Where all are on, the slope says what one neuron
        does while all others can still do it, which ranks worse: in the shipped model 151 instead of 58 leading neurons reach tau
        (docs/results.md). The similarity itself has no slope there at all: it is at its maximum of 1.
        """
        assert self.looked is not None
        rows = []
        for number in prompt:
            lane = self.looked.tokens[number], self.looked.delta[number], self.kept[number]
            rows.append(np.asarray(self._gradient(self.params, *lane)))
        return np.stack(rows)

    @functools.cached_property
    def _gradient(self) -> Callable[..., Array]:
        def attribution(params: Params, tokens: Array, whole: Array, kept: Array) -> Array:
            null = self.model.condition(params, {}, n=self.cfg.seeds)
            added = whole - self._delta(self.model.apply(params, self.xt, self.t, null)[0].x0)

            def along(factor: Array) -> Array:
                gates = self.units.gates(factor)
                cond = self._text(params, tokens, gates["text"])
                x0 = self.model.apply(params, self.xt, self.t, cond, gates["net"])[0].x0
                each = jnp.sum(self._delta(x0) * added, axis=(1, 2, 3))
                return jnp.sum(jnp.where(kept, each, 0.0))

            return jax.grad(along)(jnp.full(len(self.units), 0.5))

        return jax.jit(attribution)


def _mean_activation(x: Array, weights: Array) -> Array:
    """Mean |x| of a gated activation [S,...,C] over all but channels; of tokens [S,L,C] by their weights [1,L]."""
    if x.ndim == 3 and x.shape[1] == weights.shape[1]:
        return jnp.einsum("slc,kl->c", jnp.abs(x), weights) / len(x)
    return jnp.mean(jnp.abs(x), axis=tuple(range(x.ndim - 1)))


def _cuts(units: Units) -> list[int]:
    """Layers before which the network may be cut, the first of a block each; 0 stands for the whole network."""
    blocks = units.blocks
    fits = [i for i in range(1, len(blocks)) if blocks[i] and blocks[i] != blocks[i - 1]]
    return [0, *fits[:: -max(1, -(-len(fits) // CUTS))][::-1]]
