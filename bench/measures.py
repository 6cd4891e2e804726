"""Seconds and peak memory of the audit and of each probe, each in a process of its own.

Images are smooth random ones; a tenth of the generations are noisy copies. Seconds are one cold call, compilation
included, without imports; memory is the process's peak, and beside it what imports and images alone take.

Usage: python bench/measures.py [--generated 1000] [--train 5000] [--size 32] [--features pixel] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

NAMES = ("audit", "similarity", "yields", "quality")


def images(seed: int, n: int, size: int) -> np.ndarray:
    """uint8 [n,size,size,3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (n, -(-size // 4), -(-size // 4), 3)).astype(np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)[:, :size, :size]


def peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work(name: str, args: argparse.Namespace) -> None:
    """Runs one probe and prints its cost as JSON."""
    from mdiff.config import Audit
    from mdiff.probes import registry
    from mdiff.probes.audit import audit

    train, heldout = images(0, args.train, args.size), images(1, args.train, args.size)
    generated = images(2, args.generated, args.size)
    copied = args.generated // 10
    noise = np.random.default_rng(3).integers(0, 8, generated[:copied].shape).astype(np.uint8)
    generated[:copied] = np.minimum(train[:copied], 247) + noise
    config = Audit(features=args.features)
    before, begin = peak(), time.perf_counter()
    if name == "audit":
        audit(generated, train, heldout, config)
    else:
        registry.find(name)(generated, train, heldout, config)
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak": peak(), "before": before}))


def main() -> None:
    """Prints one row per probe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--generated", type=int, default=1000)
    parser.add_argument("--train", type=int, default=5000, help="training images, and as many held-out ones")
    parser.add_argument("--size", type=int, default=32, help="pixels along a side; three channels")
    parser.add_argument("--features", default="pixel")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"no such probe: {', '.join(sorted(unknown))}; give some of {', '.join(NAMES)}")
    if args.worker:
        return work(args.names[0], args)
    print(
        f"{args.generated} x {args.train} (+ {args.train} held-out) of {args.size}x{args.size}x3, {args.features}"
    )
    print(f"{'probe':12} {'seconds':>8} {'peak GB':>8} {'before':>8}")
    options = [f"--{key}={getattr(args, key)}" for key in ("generated", "train", "size", "features")]
    for name in args.names:
        command = [sys.executable, __file__, name, "--worker", *options]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        cost = json.loads(out.splitlines()[-1])
        print(f"{name:12} {cost['seconds']:8.1f} {cost['peak']:8.2f} {cost['before']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
