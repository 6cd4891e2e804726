"""The peer of NeMo's sweep: a plain sequential PyTorch loop over a diffusers U-Net of the same shape, one neuron at a time.

Usage: python bench/nemo_peer.py [--tests 100] [--seeds 6]

The network is `UNet2DConditionModel` with the maps, widths, blocks, text and value neurons of the model that comes with mdiff
(configs/emoji_text.py); `SHAPE` says what differs. Its weights are fresh: time does not depend on them.
A test is what the released code of NeMo (arXiv 2406.02366) needs and no more: text embedded once, whole difference computed
once, one forward pass with all seeds in the batch, neurons off by a hook on every `attn2.to_v`, SSIM, the maximum over seeds.
Fresh weights decide nothing, so the refinement's decisions are a script; the score is computed and read all the same.
Without options it prints seconds per test of 1 and 2 threads, both memory layouts; bench/nemo_sweep.py takes the fastest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch.utils.flop_counter import FlopCounterMode

SHAPE = {
    "sample_size": 16,  # space-to-depth of 32 x 32 x 3, which ours does inside
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 64,
    "attention_head_dim": (1, 2, 2),  # heads, by their name in diffusers: 32 channels each
    "norm_num_groups": 8,
}
"""Of `UNet2DConditionModel`. Its transformers have a map in, a map out and a feed-forward part twice as wide as ours; ours has
residual blocks where it resamples with one convolution. Parameters and work of a forward pass come out alike."""

LOOKING = ("down_blocks.2", "mid_block", "up_blocks.0.attentions.1")
"""Where ours has self-attention; diffusers puts it into every transformer, and it is taken out of the others."""

LENGTH = 24
SIGMA = 5.0
VARIANTS = tuple(itertools.product((1, 2), (False, True)))
"""Threads and whether the memory layout is channels_last."""


def window(size: int = 11, deviation: float = 1.5) -> torch.Tensor:
    """Gaussian weights [size], sum 1."""
    place = torch.arange(size) - size // 2
    heights = torch.exp(-(place**2) / (2 * deviation**2))
    return heights / heights.sum()


def scaled(delta: torch.Tensor) -> torch.Tensor:
    """Differences [S,C,H,W] stretched to [0, 1], each image and channel by itself."""
    low, high = delta.amin((2, 3), keepdim=True), delta.amax((2, 3), keepdim=True)
    return (delta - low) / (high - low).clamp_min(1e-12)


def ssim(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """SSIM of maps [S,C,H,W] in [0, 1], windows inside the map, each channel by itself; [S]."""
    maps = torch.cat([a, b, a * a, b * b, a * b])
    n, c, h, w = maps.shape
    rows = F.conv2d(maps.reshape(n * c, 1, h, w), weights.view(1, 1, -1, 1))
    blurred = F.conv2d(rows, weights.view(1, 1, 1, -1))
    ma, mb, aa, bb, ab = blurred.reshape(5, len(a), c, *blurred.shape[2:])
    va, vb, covariance = (aa - ma * ma).clamp_min(0), (bb - mb * mb).clamp_min(0), ab - ma * mb
    contrast = (2 * covariance + 0.03**2) / (va + vb + 0.03**2)
    return (contrast * (2 * ma * mb + 0.01**2) / (ma * ma + mb * mb + 0.01**2)).mean((1, 2, 3))


class Nothing(torch.nn.Module):
    """In the place of self-attention that ours does not have."""

    def forward(self, x: torch.Tensor, **unused: Any) -> torch.Tensor:
        return x.new_zeros(())


def network() -> Any:
    """The U-Net, in evaluation mode."""
    unet: Any = UNet2DConditionModel(**SHAPE)
    for name, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock) and not name.startswith(LOOKING):
            block.norm1, block.attn1 = torch.nn.Identity(), Nothing()
    return unet.eval()


class Peer:
    """The U-Net with switches on its value neurons, and the tests of one prompt.

    Args:
      seeds: starting noises, the batch of every test.
      channels_last: memory layout of weights and maps.
    """

    def __init__(self, seeds: int, channels_last: bool = False) -> None:
        torch.manual_seed(0)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.unet = network().to(memory_format=self.layout)
        self.values = [layer for name, layer in self.unet.named_modules() if name.endswith("attn2.to_v")]
        self.sizes = [layer.out_features for layer in self.values]
        self.factors = torch.ones(sum(self.sizes))
        for layer, factor in zip(self.values, self.factors.split(self.sizes), strict=True):
            layer.register_forward_hook(lambda _, given, out, factor=factor: out * factor)
        self.noise = torch.randn(seeds, 12, 16, 16).contiguous(memory_format=self.layout)
        self.level = torch.full((seeds,), 500.0)
        self.text = torch.randn(1, LENGTH, 64).expand(seeds, -1, -1).contiguous()
        self.window = window()
        self.whole = scaled(self.difference())

    @property
    def parameters(self) -> int:
        """Of the U-Net."""
        return sum(each.numel() for each in self.unet.parameters())

    def flops(self) -> int:
        """Matrix products and convolutions of one forward pass, two for a multiply-add."""
        # The fused attention of CPUs is unknown to the counter; the plain one is not.
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, plain:
            self.difference()
        return int(counter.get_total_flops())

    @torch.inference_mode()
    def difference(self) -> torch.Tensor:
        """Noise difference [S,3,32,32] of the network as it is switched now."""
        noise = self.unet(self.noise, self.level, self.text, return_dict=False)[0]
        return F.pixel_shuffle(noise - self.noise / SIGMA, 2)

    @torch.inference_mode()
    def test(self) -> float:
        """Similarity of whole and ablated difference, the maximum over seeds."""
        return float(ssim(self.whole, scaled(self.difference()), self.window).max())

    def refine(self, neurons: Sequence[int], needed: Sequence[bool], tau: float = 0.5) -> int:
        """Leaves one neuron on again after the other; one that is needed goes off again. Returns the tests made.

        Args:
          neurons: those that are off at first.
          needed: the script's decisions.
          tau: what scores are compared with.
        """
        self.factors.fill_(1.0)
        self.factors[list(neurons)] = 0.0
        below = 0
        for neuron, stays in zip(neurons, needed, strict=True):
            self.factors[neuron] = 1.0
            below += self.test() < tau
            if stays:
                self.factors[neuron] = 0.0
        assert 0 <= below <= len(neurons)
        return len(neurons)


def script(peer: Peer, tests: int) -> tuple[list[int], list[bool]]:
    """Neurons that are off at first, and which are needed: every fifth, about as often as in our searches."""
    order = np.random.default_rng(0).permutation(sum(peer.sizes))
    neurons = np.resize(order, tests).tolist()
    return neurons, [i % 5 == 0 for i in range(tests)]


def seconds_per_test(peer: Peer, tests: int, threads: int) -> float:
    """Of a refinement with so many tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    neurons, needed = script(peer, tests)
    begin = time.perf_counter()
    made = peer.refine(neurons, needed)
    seconds = (time.perf_counter() - begin) / made
    torch.set_num_threads(before)
    return seconds


def trials(seeds: int, tests: int, rounds: int = 3) -> dict[tuple[int, bool], float]:
    """Seconds per test of every variant, the least of some rounds in turning order.

    Four tests warm each up; a variant whose best is more than three times the fastest's is not tried further.
    """
    peers = {layout: Peer(seeds, layout) for layout in (False, True)}
    found = {}
    for threads, layout in VARIANTS:
        found[threads, layout] = min(seconds_per_test(peers[layout], 1, threads) for _ in range(4))
    hopeful = [variant for variant in VARIANTS if found[variant] < 3 * min(found.values())]
    for number in range(rounds):
        for turn in range(len(hopeful)):
            threads, layout = variant = hopeful[(turn + number) % len(hopeful)]
            found[variant] = min(found[variant], seconds_per_test(peers[layout], tests, threads))
    return found


def named(variant: tuple[int, bool]) -> str:
    """For tables."""
    threads, layout = variant
    return f"{threads} thread{'s' * (threads > 1)}, {'channels_last' if layout else 'contiguous'}"


def main() -> None:
    """Prints the shape and seconds per test of all variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    peer = Peer(options.seeds)
    print(
        f"{peer.parameters} parameters, {peer.flops()} FLOPs for {options.seeds} seeds, {sum(peer.sizes)} neurons"
    )
    for variant, seconds in trials(options.seeds, options.tests).items():
        print(f"{named(variant):26} {1e3 * seconds:8.2f} ms per test")


if __name__ == "__main__":
    main()
