"""The cells of the front of arXiv 2502.21278, figure 1: faces at 64x64, NCSN++ (62.8 M parameters), 30 M images for n = 300.

Data: a folder of 64x64 images of FFHQ, given with --data.source; 10,000 held out. No augmentation: its copies would be
further observations of the images.
Cost: 135 cells, made for a pod. Not run (`python bench/fronts.py ffhq64`).
"""

from mdiff.config import Config, Data, Sample, Train
from mdiff.nets.sizes import SIZES

config = Config(
    name="ffhq64",
    data=Data(source="ffhq64-folder", size=64, n=300, heldout=10_000),
    net=SIZES["ncsnpp-ffhq64"],
    train=Train(
        steps=117_000,
        batch=256,
        lr=1e-4,
        warmup=39_000,
        ema_halflife=500_000,
        save_every=5_000,
        eval_every=10_000,
        eval_samples=512,
    ),
    sample=Sample(n=10_000, batch=256, steps=40),
)
