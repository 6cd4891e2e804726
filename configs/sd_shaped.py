"""A network shaped like Stable Diffusion's (arXiv 2112.10752): ADM U-Net, width 320, on 64x64x4 latents, in bfloat16.

It takes one vector of width 768 per image; cross-attention to the tokens of a text comes later. Heads are 64 wide, as
in Stable Diffusion 2. Data: an .npz file of latents with vectors, given with --data.source. Cost: made for
accelerators; `mdiff plan --channels 4` says which.
"""

from mdiff.config import Config, Data, Net, Sample, Train

config = Config(
    name="sd-shaped",
    data=Data(source="latents.npz", size=64, n=10_000, heldout=10_000),
    net=Net(
        arch="adm",
        channels=320,
        mults=(1, 2, 4, 4),
        blocks=2,
        attention=(64, 32, 16),
        head_channels=64,
        vector=768,
        condition_dropout=0.1,
        dtype="bfloat16",
        remat="blocks",
    ),
    train=Train(
        steps=100_000,
        batch=256,
        optimizer="adamw",
        lr=1e-4,
        warmup=1_000,
        ema_halflife=1_000_000,
        save_every=5_000,
        eval_every=20_000,
    ),
    sample=Sample(n=10_000, batch=256, steps=50, method="ddim", guidance=7.5),
)
