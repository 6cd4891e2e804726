"""The cells of a front at 32x32 in colour, as arXiv 2310.02664 trains them: 40,000 epochs of a 2-block DDPM++.

Data: a folder of CIFAR-10's images, given with --data.source; 10,000 held out.
Cost: 99 cells of 24,000 to 240,000 steps of 512 images, made for accelerators. Not run (`python bench/fronts.py cifar10`).
"""

from mdiff.config import Config, Data, Net, Sample, Train

config = Config(
    name="cifar10",
    data=Data(source="cifar10-folder", size=32, n=1_000, heldout=10_000),
    net=Net(channels=128, mults=(2, 2, 2), blocks=2, attention=(16,)),
    train=Train(
        steps=80_000,
        batch=512,
        lr=2e-4,
        warmup=400,
        ema_halflife=10_000,
        save_every=10_000,
        eval_every=10_000,
        eval_samples=512,
    ),
    sample=Sample(n=10_000, batch=512),
)
