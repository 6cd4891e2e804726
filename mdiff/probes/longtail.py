"""Why rare images are memorized at low noise only: long tails, in closed form and by simulation.

Feldman (2020, arXiv 1906.05271) draws the frequency of each item of a population from a long-tailed prior. Of an item seen l
times among n samples the expected frequency is

    tau_l = E[alpha^(l+1) (1 - alpha)^(n-l)] / E[alpha^l (1 - alpha)^(n-l)]        (section 2),

so a learner that does not fit the items seen once loses tau_1 for each: under Zipf's law with n items and n samples about
0.47 / n each, for 17 % of the samples. arXiv 2502.21278 (theorem 4.3) says the same of denoising: an item is a component of a
mixture, and noise merges components (lemma 4.5), so what is lost at low noise levels is not at high ones.

The simulation has components N(mu_k, s^2 I) with Zipf's weights. Two denoisers know the components of the samples they were
given: one keeps all of them, the other drops those seen once. Their losses over the population differ

- by next to nothing where the noise is wide beside the distance of the components: they have become one, and all that the
  dropped ones still do is to move its mean a little,
- by tau_1 times the squared distance to the nearest component kept, for each one dropped, below that,
- by nothing where the noise is narrow beside the components' own width s: there the noisy image says what it is.

An image of a small training set is a component of no width: the last case is never reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from mdiff.errors import UserError
from mdiff.probes.intervals import jackknife
from mdiff.types import Estimate

# ------------------------------------------------------------------------------------ frequencies


def zipf(items: int, exponent: float = 1.0) -> np.ndarray:
    """Frequencies [items] proportional to 1 / rank^exponent, falling, of sum 1."""
    weights = np.arange(1, items + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def tau(frequencies: np.ndarray, n: int, seen: int = 1) -> float:
    """Expected frequency of an item that was seen `seen` times in n samples (arXiv 1906.05271, section 2).

    Args:
      frequencies: [N] between 0 and 1, all equally likely to be an item's.
      n: samples.
      seen: l, 0 to n.
    """
    alpha = np.asarray(frequencies, np.float64)
    # In logarithms: alpha^l underflows. An item of frequency 1 is seen n times or never.
    likely = special.xlogy(seen, alpha) + special.xlog1py(n - seen, -alpha)
    return float(special.softmax(likely) @ alpha)


def seen_share(frequencies: np.ndarray, n: int, seen: int = 1) -> float:
    """Expected share of n samples whose item occurs `seen` times among them (17.04 % once, Zipf of 50,000, n 50,000)."""
    alpha = np.asarray(frequencies, np.float64)
    log_many = special.gammaln(n + 1) - special.gammaln(seen + 1) - special.gammaln(n - seen + 1)
    likely = np.exp(log_many + special.xlogy(seen, alpha) + special.xlog1py(n - seen, -alpha))
    return float(seen * likely.sum() / n)


def total_variation(distance: np.ndarray | float, sigma: np.ndarray | float) -> np.ndarray:
    """Between N(mu, sigma^2 I) and N(nu, sigma^2 I), ||mu - nu|| = distance: 2 Phi(distance / (2 sigma)) - 1.

    The best guess which of the two made a point is right with probability (1 + this) / 2. arXiv 2502.21278, lemma 4.5.
    """
    return special.erf(np.asarray(distance) / (np.sqrt(8.0) * np.asarray(sigma)))


# --------------------------------------------------------------------------------------- mixtures


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k w_k N(mu_k, s_k^2 I), in float64.

    Attributes:
      means: [K,D].
      weights: [K], of sum 1.
      widths: [K] standard deviations; 0 is a point.
    """

    means: np.ndarray
    weights: np.ndarray
    widths: np.ndarray

    def log_posterior(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """[B,K] log probability of each component given x [B,D], a sample with noise of level sigma > 0."""
        variance = self.widths**2 + sigma**2
        squared = (x**2).sum(1)[:, None] - 2 * x @ self.means.T + (self.means**2).sum(1)
        with np.errstate(divide="ignore"):
            logits = np.log(self.weights) - 0.5 * (squared / variance + x.shape[1] * np.log(variance))
        return logits - special.logsumexp(logits, axis=1, keepdims=True)

    def denoise(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """E[x0 | x] [B,D]: of each component x moved towards its mean, weighed by its probability."""
        towards = np.exp(self.log_posterior(x, sigma)) * (sigma**2 / (self.widths**2 + sigma**2))
        return x * (1 - towards.sum(1, keepdims=True)) + towards @ self.means

    def sample(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(x0 [count,D], component [count])."""
        which = generator.choice(len(self.weights), count, p=self.weights)
        noise = generator.standard_normal((count, self.means.shape[1]))
        return self.means[which] + self.widths[which, None] * noise, which

    def keep(self, kept: np.ndarray) -> Mixture:
        """Only the components where `kept` [K] holds."""
        weights = self.weights[kept] / self.weights[kept].sum()
        return Mixture(self.means[kept], weights, self.widths[kept])


def effective_components(mixture: Mixture, x: np.ndarray, which: np.ndarray, sigma: float) -> float:
    """exp(I(component; noisy sample)): how many components can still be told apart at this noise level.

    1 where all have merged; the perplexity of the weights where none have.

    Args:
      mixture: the law.
      x: [B,D] samples of it with noise of level sigma.
      which: [B] their components.
      sigma: noise level above 0.
    """
    gained = mixture.log_posterior(x, sigma)[np.arange(len(x)), which] - np.log(mixture.weights[which])
    return float(np.exp(gained.mean()))


def fit(samples: np.ndarray, which: np.ndarray, width: float) -> tuple[Mixture, np.ndarray]:
    """What is known of a mixture from samples whose components are told: predictive laws, weighed by counts.

    Of a component seen c times with mean m the next sample is N(m, s^2 (1 + 1/c) I) under a flat prior on its mean.

    Args:
      samples: [n,D].
      which: [n] their components.
      width: s, common to all components.

    Returns:
      The mixture of the K components seen, and how often each was [K].
    """
    _, place, counts = np.unique(which, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), samples.shape[1]))
    np.add.at(sums, place, samples)
    widths = width * np.sqrt(1 + 1 / counts)
    return Mixture(sums / counts[:, None], counts / len(which), widths), counts


# ------------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class World:
    """A population and how it is looked at.

    Attributes:
      components: K, with Zipf's weights.
      n: samples that the denoisers are given.
      size: D, values of a sample.
      spread: standard deviation of a value over components; two of them are about spread sqrt(2 D) apart.
      width: s, standard deviation of a value within a component.
      draws: population samples that a loss is averaged over.
      repeats: independent populations.
      seed: of all of it.
    """

    components: int = 500
    n: int = 500
    size: int = 64
    spread: float = 0.5
    width: float = 0.05
    draws: int = 2000
    repeats: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Level:
    """What dropping the singletons costs at one noise level; losses are squared errors per value.

    Attributes:
      sigma: noise level.
      optimum: loss of the denoiser that knows the population.
      kept: loss of the one that keeps all components seen.
      gap: how much more the one loses that drops those seen once.
      relative: gap / optimum.
      components: how many components of the population can be told apart.
      apart: total variation between a component and its nearest one, both with noise; mean over components.
    """

    sigma: float
    optimum: Estimate
    kept: Estimate
    gap: Estimate
    relative: Estimate
    components: Estimate
    apart: Estimate


@dataclass(frozen=True)
class LongTail:
    """The simulation's result; intervals are Student's, over populations.

    Attributes:
      world: what was simulated.
      levels: one per noise level.
      singletons: share of the samples whose component was seen once.
      tau: expected weight of a component that was seen once.
      predicted: tau times the squared distance, per value, to the nearest component kept, summed over those dropped: the
        gap at noise levels between the components' width and their distance.
    """

    world: World
    levels: tuple[Level, ...]
    singletons: Estimate
    tau: float
    predicted: Estimate


def simulate(world: World, sigmas: Sequence[float], confidence: float = 0.95) -> LongTail:
    """What dropping the components seen once costs, by noise level.

    In each repeat all noise levels and all denoisers share samples and noise, so gaps are of pairs.

    Args:
      world: the population.
      sigmas: noise levels above 0.
      confidence: level of the intervals.

    Raises:
      UserError: a field of the world is out of range, or a level is not above 0.
    """
    _check(world, sigmas)
    law = zipf(world.components)
    once = tau(law, world.n)
    found = np.empty((world.repeats, len(sigmas), 6))
    singletons, predicted = np.empty(world.repeats), np.empty(world.repeats)
    for repeat, seeds in enumerate(np.random.SeedSequence(world.seed).spawn(world.repeats)):
        generator = np.random.Generator(np.random.Philox(seeds))
        means = world.spread * generator.standard_normal((world.components, world.size))
        truth = Mixture(means, law, np.full(world.components, world.width))
        known, counts = fit(*truth.sample(generator, world.n), world.width)
        dropped = known.keep(counts > 1)
        singletons[repeat] = np.sum(counts == 1) / world.n
        predicted[repeat] = once * _nearest(known.means[counts == 1], dropped.means).sum() / world.size
        nearest = np.sqrt(_nearest(means, means, itself=False))
        x0, which = truth.sample(generator, world.draws)
        noise = generator.standard_normal(x0.shape)
        for place, sigma in enumerate(sigmas):
            x = x0 + sigma * noise
            best, kept, less = (np.mean((m.denoise(x, sigma) - x0) ** 2) for m in (truth, known, dropped))
            many = effective_components(truth, x, which, sigma)
            apart = total_variation(nearest, np.hypot(sigma, world.width)).mean()
            found[repeat, place] = best, kept, less - kept, (less - kept) / best, many, apart

    def over_repeats(values: np.ndarray) -> Estimate:
        # Leaving out one at a time is Student's interval of a mean.
        return jackknife(
            lambda kept: float(np.mean(kept)), values, confidence=confidence, groups=len(values)
        ).plain

    return LongTail(
        world=world,
        levels=tuple(
            Level(float(sigma), *(over_repeats(column) for column in found[:, place].T))
            for place, sigma in enumerate(sigmas)
        ),
        singletons=over_repeats(singletons),
        tau=once,
        predicted=over_repeats(predicted),
    )


def _nearest(points: np.ndarray, others: np.ndarray, itself: bool = True) -> np.ndarray:
    """[B] squared distance of each point to the nearest of `others`; the point itself can be left out."""
    squared = ((points[:, None] - others[None]) ** 2).sum(-1)
    if not itself:
        np.fill_diagonal(squared, np.inf)
    return squared.min(1)


def _check(world: World, sigmas: Sequence[float]) -> None:
    for name, least in (("components", 2), ("n", 2), ("size", 1), ("draws", 1), ("repeats", 2)):
        if getattr(world, name) < least:
            raise UserError(f"{name} = {getattr(world, name)}: must be {least} or more")
    if not world.spread > 0 or not world.width > 0:
        raise UserError(f"spread = {world.spread}, width = {world.width}: must both be above 0")
    for sigma in sigmas:
        if not 0 < sigma < np.inf:
            raise UserError(f"sigma = {sigma}: must be above 0")
