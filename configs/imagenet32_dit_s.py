"""DiT-S/2 for class-conditional 32x32 ImageNet (32.9 M parameters, 256 tokens), with guidance.

Data: the TFDS set "imagenet_resized/32x32", prepared in array_record format and read from disk. Cost: made for
accelerators (docs/models.md: 36 GFLOPs per image and training step).
"""

from dataclasses import replace

from mdiff.config import Config, Data, Sample, Train
from mdiff.nets.sizes import SIZES

config = Config(
    name="imagenet32-dit-s",
    data=Data(
        source="imagenet_resized/32x32", reading="disk", size=32, n=1_231_167, heldout=50_000, flip=True
    ),
    net=replace(SIZES["dit-s/2"], dtype="bfloat16"),
    train=Train(
        steps=400_000,
        batch=256,
        optimizer="adamw",
        lr=1e-4,
        warmup=1_000,
        ema_halflife=1_800_000,
        save_every=5_000,
        eval_every=20_000,
    ),
    sample=Sample(n=50_000, batch=1024, guidance=1.5),
)
