"""Rectified flow with a DiT on 500 emoji, 32x32 RGB: the smallest experiment away from EDM's defaults.

Data: OpenMoji (inside the wheel, CC BY-SA 4.0), 500 training and 500 held-out drawings of different families.
Cost: about 55 images/s on one CPU core, so 39 minutes. Not yet run to its end: what it memorizes is not known.
"""

from mdiff.config import Config, Data, Loss, Net, Process, Sample, Train

config = Config(
    name="emoji-flow",
    data=Data(source="emoji", size=32, n=500, heldout=500),
    process=Process(kind="flow"),
    net=Net(arch="dit", channels=128, blocks=6, head_channels=32, patch=4, prediction="velocity"),
    loss=Loss(times="logit_normal", p_mean=0.0, p_std=1.0, level_weight="velocity"),
    train=Train(steps=4000, batch=32, optimizer="adamw", lr=1e-3, schedule="cosine", eval_every=1000),
    sample=Sample(n=256, method="euler", grid="uniform", steps=40),
)
