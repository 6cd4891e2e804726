"""ADM for class-conditional 64x64 ImageNet (295.9 M parameters), in bfloat16, with guidance.

Data: the TFDS set "imagenet_resized/64x64", prepared in array_record format and read from disk. Cost: made for pods
(docs/models.md: 658 GFLOPs per image and training step); shard the state with --mesh.fsdp.
"""

from dataclasses import replace

from mdiff.config import Config, Data, Sample, Train
from mdiff.nets.sizes import SIZES

config = Config(
    name="imagenet64-adm",
    data=Data(
        source="imagenet_resized/64x64", reading="disk", size=64, n=1_231_167, heldout=50_000, flip=True
    ),
    net=replace(SIZES["adm-imagenet64"], dtype="bfloat16", condition_dropout=0.1),
    train=Train(
        steps=610_000,
        batch=4096,
        lr=1e-4,
        warmup=2_500,
        ema_halflife=50_000_000,
        save_every=5_000,
        eval_every=20_000,
    ),
    sample=Sample(n=50_000, batch=1024, guidance=1.5),
)
