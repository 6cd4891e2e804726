"""DiT-XL/4 for class-conditional 64x64 ImageNet (674.9 M parameters), in pixels: 256 tokens, as XL/2 on latents.

Data: the TFDS set "imagenet_resized/64x64", prepared in array_record format and read from disk. Cost: made for pods
(docs/models.md: 949 GFLOPs per image and training step, recomputation of blocks included); shard the state with
--mesh.fsdp.
"""

from dataclasses import replace

from mdiff.config import Config, Data, Sample, Train
from mdiff.nets.sizes import SIZES

config = Config(
    name="imagenet64-dit-xl",
    data=Data(
        source="imagenet_resized/64x64", reading="disk", size=64, n=1_231_167, heldout=50_000, flip=True
    ),
    net=replace(SIZES["dit-xl/4"], dtype="bfloat16", remat="blocks"),
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
    sample=Sample(n=50_000, batch=512, guidance=1.5),
)
