"""A model that copies some of its images: the target of the extraction experiments in results/side.

Data: 100 of scikit-learn's handwritten digits, 8x8 (inside the wheel), and 600 held out; `data.skip 100` gives the other half of
the crossed design. Stopped at 1,500 steps, where 10 to 15 % of unguided generations are copies.
Cost: about 80 s on one core; `python bench/side.py` runs all of it.
"""

from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="side-digits8",
    data=Data(source="digits", size=8, n=100, heldout=600),
    net=Net(channels=64, mults=(1,), blocks=2, attention=(), patch=2),
    loss=Loss(p_mean=-0.8),
    train=Train(steps=1500, batch=32, lr=4e-3, save_every=1500, eval_samples=256),
    sample=Sample(n=1024, batch=256),
)
