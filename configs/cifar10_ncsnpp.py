"""NCSN++ for 32x32 colour images (56.4 M parameters): the sizes of arXiv 2206.00364 for CIFAR-10.

Data: CIFAR-10, prepared as the TFDS set "cifar10" in array_record format; nothing is downloaded. Cost: made for
accelerators (docs/models.md: 128 GFLOPs per image and training step).
"""

from mdiff.config import Config, Data, Sample, Train
from mdiff.nets.sizes import SIZES

config = Config(
    name="cifar10-ncsnpp",
    data=Data(source="cifar10", size=32, n=45_000, heldout=5_000, flip=True),
    net=SIZES["ncsnpp-cifar10"],
    train=Train(
        steps=400_000,
        batch=512,
        lr=1e-3,
        warmup=20_000,
        ema_halflife=500_000,
        save_every=5_000,
        eval_every=20_000,
    ),
    sample=Sample(n=10_000, batch=512),
)
