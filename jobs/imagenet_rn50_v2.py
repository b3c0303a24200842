"""ResNet-50 on ImageNet in 600 epochs: the recipe behind torchvision's second weights.

Source    torchvision's new training recipe, IMAGENET1K_V2
          (https://pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives)
Command   resnet-dist train jobs/imagenet_rn50_v2.py --workers 8
Expected  80.86 % top-1 at 224 of 232 pixels
Measured  not yet: it takes a GPU node for about a week
Differs   an epoch has every image four times (there: four times a random quarter of the images, in a quarter of the steps)
          the rate changes with every step (there: once an epoch)
          the average of the weights begins with the first step (there: it follows the weights until the warm-up ends), and
          moves every 32 steps of the run (there: of each epoch)
          a rectangle to erase that does not fit is cut off (there: drawn again up to ten times), and the edges of CutMix's
          box are rounded (there: truncated)
          bf16 (there: fp32)

Data as for imagenet_rn50.py.
"""

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train, scaled_lr

GLOBAL_BATCH_SIZE = 1024
# An epoch of torchvision draws as many images as the set has, so its 600 epochs are 150 with four copies.
REPEATS = 4
EPOCHS = 600 / REPEATS
# torchvision moves its average every 32 steps by (1 - 0.99998) · global_batch_size · 32 / epochs.
EMA_STEPS = 32
EMA_DECAY = 1 - (1 - 0.99998) * GLOBAL_BATCH_SIZE * EMA_STEPS / 600


def recipe() -> Recipe:
    return Recipe(
        name="imagenet_rn50_v2",
        description=__doc__,
        data=Data(
            train="{output}/data/imagenet/train",
            eval="{output}/data/imagenet/eval",
            image_size=176,
            eval_size=224,
            eval_crop=224 / 232,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=128,
            lanes=64,
            repeats=REPEATS,
            spread_repeats=True,
            crop="random-resized-crop",
            flip=True,
            policy="trivial-augment",
            policy_translation="pixels",
            policy_backend="pillow",
            policy_interpolation="bilinear",
            erase=0.1,
            mixup=0.2,
            cutmix=1.0,
        ),
        model=Model(name="resnet50"),
        optim=Optim(
            lr=scaled_lr(0.125, global_batch_size=GLOBAL_BATCH_SIZE),  # 0.5
            momentum=0.9,
            nesterov=False,
            weight_decay=2e-5,
            decay_biases=True,
        ),
        schedule=Schedule(decay="cosine", warmup=f"{5 / REPEATS} epochs", warmup_start=0.01),
        train=Train(
            length=f"{EPOCHS} epochs",
            label_smoothing=0.1,
            ema_decay=EMA_DECAY,
            ema_every=f"{EMA_STEPS} steps",
            ema_warmup=False,
            precision="bf16",
            log_every="100 steps",
        ),
    )
