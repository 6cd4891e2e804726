"""A text-to-image model that recites what it saw often: 595 emoji under their captions, 32x32, with planted duplicates.

Data: OpenMoji (inside the wheel, CC BY-SA 4.0): 47 images with captions of their own at 3 to 300 copies, 8 skin-tone families
under one caption each, 500 images once, none near another.
Cost: 6,000 steps of 32 images, 50 to 60 minutes on two CPU cores (about 60 images/s).
"""

from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="emoji-text",
    data=Data(
        source="emoji",
        size=32,
        n=595,
        heldout=200,
        ladder={300: 3, 100: 8, 30: 12, 10: 12, 3: 12},
        templates=8,
        template_copies=15,
    ),
    net=Net(
        channels=32,
        mults=(1, 2, 2),
        blocks=1,
        patch=2,
        attention=(4,),
        head_channels=32,
        text=64,
        cross=(16, 8, 4),
        condition_dropout=0.1,
    ),
    loss=Loss(p_mean=-0.6),
    train=Train(
        steps=6000,
        batch=32,
        lr=1e-3,
        schedule="linear",
        ema_halflife=10000.0,
        save_every=1000,
        eval_every=1000,
        eval_samples=96,
        eval_levels=(0.5, 2.0, 8.0),
    ),
    sample=Sample(n=595, batch=64),
)
