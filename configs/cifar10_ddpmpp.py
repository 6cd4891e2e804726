"""EDM's DDPM++ for 32x32 colour images (55.7 M parameters): the sizes of arXiv 2206.00364 for CIFAR-10.

Data: a folder of 32x32 images, given with --data.source. Cost: made for accelerators; one CPU core takes
minutes per step.
"""

from mdiff.config import Config, Data, Net, Sample, Train

config = Config(
    name="cifar10-ddpmpp",
    data=Data(source="cifar10-folder", size=32, n=5000, heldout=5000, flip=True),
    net=Net(channels=128, mults=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13),
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
