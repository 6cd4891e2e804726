"""NCSN++ for 64x64 faces (62.8 M parameters): the sizes of arXiv 2206.00364 for FFHQ-64, 30 M images long.

Data: a folder of 64x64 images, given with --data.source. Set --loss.cutoff for the ambient twin. Cost: made for
accelerators (docs/models.md: 254 GFLOPs per image and training step).
"""

from mdiff.config import Config, Data, Sample, Train
from mdiff.nets.sizes import SIZES

config = Config(
    name="ffhq64-ncsnpp",
    data=Data(source="ffhq64-folder", size=64, n=3_000, heldout=3_000, augment=0.15),
    net=SIZES["ncsnpp-ffhq64"],
    train=Train(
        steps=117_000,
        batch=256,
        lr=1e-4,
        warmup=39_000,
        ema_halflife=500_000,
        save_every=5_000,
        eval_every=10_000,
    ),
    sample=Sample(n=10_000, batch=256, steps=40),
)
