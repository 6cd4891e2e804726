"""The cells of the front at 8x8: 100 handwritten digits, a small network; cutoffs, shares and seeds come from the sweep.

Data: scikit-learn's digits (inside the wheel), 100 training and 1,000 held-out images, without their classes.
Cost and result: results/ambient (`python bench/fronts.py digits8`).
"""

from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="digits8",
    data=Data(source="digits", size=8, n=100, heldout=1000),
    net=Net(channels=64, mults=(1,), blocks=2, attention=(), patch=2),
    loss=Loss(p_mean=-0.8),
    train=Train(steps=2500, batch=32, lr=4e-3, save_every=2500, eval_every=500, eval_samples=256),
    sample=Sample(n=1024, batch=256),
)
