"""The cells of the front at 32x32: 50 faces, a small network; cutoffs and seeds come from the sweep.

Data: scikit-image's lfw_subset (inside the wheel; 25x25 pixels, resized), 50 training and 50 held-out faces.
Cost and result: results/ambient/faces32 (`python bench/fronts.py faces32`).
"""

from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="faces32",
    data=Data(source="faces", size=32, n=50, heldout=50),
    net=Net(channels=32, mults=(1, 2), blocks=1, attention=(), patch=4),
    loss=Loss(p_mean=-0.8),
    train=Train(steps=1000, batch=32, lr=3e-3, save_every=1000, eval_every=250, eval_samples=128),
    sample=Sample(n=256, batch=128),
)
