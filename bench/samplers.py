"""Error of every sampler on every process and grid, for a 1-D mixture whose denoiser is known exactly.

Deterministic samplers: mean distance of the end point from that of the exact probability flow, which in one
dimension keeps quantiles. Stochastic ones: Wasserstein-1 distance of the draws from the target. In one dimension
the first number is a Wasserstein-1 distance too.

Usage: python bench/samplers.py [--write]      (--write puts the tables into docs/samplers.md)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from mdiff import config
from mdiff.files import write_text
from mdiff.keys import keys
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.process.laws import make_process
from mdiff.process.times import make_grid
from mdiff.sample import sampler
from mdiff.sample.steps import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "samplers.md"
BEGIN, END = "<!-- bench/samplers.py: begin -->", "<!-- bench/samplers.py: end -->"
WEIGHTS, MEANS, STDS = np.array([0.5, 0.3, 0.2]), np.array([-0.6, 0.3, 1.05]), np.array([0.15, 0.25, 0.1])
STEPS = (8, 16, 32, 64)
GRIDS = ("karras", "uniform", "logsnr")
KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
DETERMINISTIC = {
    "euler = ddim": {"method": "euler"},
    "heun": {"method": "heun"},
    "dpmpp2m": {"method": "dpmpp2m"},
}
STOCHASTIC = {
    "heun, churn = steps / 4": {"method": "heun", "churn": lambda steps: steps / 4},
    "ddim, eta = 0.5": {"method": "ddim", "eta": 0.5},
    "ddpm = ddim, eta = 1": {"method": "ddpm"},
    "sde": {"method": "sde"},
}


def denoise(x, sigma):
    """E[x0 | x] of the mixture; x [B,1,1,1], sigma [B]."""
    variance = jnp.float32(STDS) ** 2 + sigma[:, None] ** 2
    rows = x.reshape(-1, 1)
    logits = jnp.log(jnp.float32(WEIGHTS)) - 0.5 * jnp.log(variance)
    logits -= 0.5 * (rows - jnp.float32(MEANS)) ** 2 / variance
    each = MEANS + jnp.float32(STDS) ** 2 / variance * (rows - jnp.float32(MEANS))
    return jnp.sum(jax.nn.softmax(logits) * each, axis=-1).reshape(x.shape)


def cdf(x, sigma):
    """float64 distribution function of the mixture plus noise of standard deviation sigma."""
    return norm.cdf(x[..., None], MEANS, np.sqrt(STDS**2 + sigma**2)) @ WEIGHTS


def quantile(p):
    """float64 inverse of `cdf(., 0)` by bisection."""
    low, high = np.full(p.shape, -3.0), np.full(p.shape, 3.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        under = cdf(middle, 0.0) < p
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return 0.5 * (low + high)


def generate(kind, fields, steps, n):
    """float64 [grids, n] generations on every grid, [n] starting noise and its noise level."""
    law = make_process(config.Process(kind=kind))
    cfg = config.Sample(
        steps=steps, **{name: value(steps) if callable(value) else value for name, value in fields.items()}
    )
    denoiser, sample_keys = from_sigma_fn(denoise, law), keys(0, "sample", jnp.arange(n))
    step = METHODS[cfg.method](law, cfg)
    grids = np.stack([make_grid(law, grid, steps, law.sigma_min, law.sigma_max, law.rho) for grid in GRIDS])

    def run(grid):
        return sampler.integrate(law, denoiser, step, grid, sample_keys, (1, 1, 1))

    ends = jax.jit(jax.vmap(run))(grids)  # one compilation for all grids
    begin = sampler.start(law.sigma_max, sample_keys, (1, 1, 1))
    return (
        np.asarray(ends, np.float64).reshape(-1, n),
        np.asarray(begin, np.float64).reshape(n),
        law.sigma_max,
    )


def measure():
    """{(grid, process, sampler): errors at STEPS}, and the error that exact draws would have."""
    n = 2**14
    target = quantile((np.arange(n) + 0.5) / n)
    found = {}
    for kind in KINDS:
        for name, fields in (DETERMINISTIC | STOCHASTIC).items():
            for steps in STEPS:
                if name in DETERMINISTIC:
                    ends, begin, level = generate(kind, fields, steps, 2**11)
                    exact = quantile(cdf(begin, level))
                else:
                    ends, exact = np.sort(generate(kind, fields, steps, n)[0]), target
                for grid, error in zip(GRIDS, np.mean(np.abs(ends - exact), axis=1), strict=True):
                    found.setdefault((grid, kind, name), []).append(float(error))
            print(kind, name, *(f"{grid} {found[grid, kind, name][-1]:.1e}" for grid in GRIDS), flush=True)
    drawn = quantile(np.random.default_rng(0).uniform(size=(20, n)))
    return found, float(np.mean(np.abs(np.sort(drawn) - target)))


def order(errors, lowest):
    """Fitted order of convergence over the last three errors above `lowest`; None if there are fewer."""
    fit = [(steps, error) for steps, error in zip(STEPS, errors, strict=True) if error > lowest][-3:]
    return -np.polyfit(*np.log(np.array(fit)).T, 1)[0] if len(fit) == 3 else None


def tables(found, floor):
    """The page's tables, as Markdown."""
    parts = []
    for grid in GRIDS:
        head = f"| process | sampler | {' | '.join(f'N = {k}' for k in STEPS)} | order |"
        lines = [f"### Grid `{grid}`", "", head, "|---|---" + "|--:" * (len(STEPS) + 1) + "|"]
        for kind in KINDS:
            for name in DETERMINISTIC | STOCHASTIC:
                errors = found[grid, kind, name]
                fitted = order(errors, 2 * floor if name in STOCHASTIC else 1e-5)
                numbers = " | ".join(f"{error:.4f}" for error in errors)
                lines.append(f"| {kind} | {name} | {numbers} | {'' if fitted is None else f'{fitted:.1f}'} |")
        parts.append("\n".join(lines))
    parts.append(f"Exact draws would show {floor:.4f} in the rows of stochastic samplers.")
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/samplers.md")
    write = parser.parse_args().write
    made = tables(*measure())
    print(made)
    if write:
        head, rest = PAGE.read_text().split(BEGIN)
        write_text(PAGE, f"{head}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
