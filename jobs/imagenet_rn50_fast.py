"""ResNet-50 on ImageNet in 16 to 88 epochs, with images that grow while it trains.

Source    FFCV's ResNet-50 configurations (https://github.com/libffcv/ffcv-imagenet): growing images, BlurPool, no decay
          on norms but those of shortcuts, evaluation at 256 pixels with mirror images
Command   resnet-dist train jobs/imagenet_rn50_fast.py --workers 8
          EPOCHS=88 resnet-dist train jobs/imagenet_rn50_fast.py --workers 8
Expected  73.8 % top-1 after 16 epochs (14.9 min on eight A100), 78.4 % after 88 (77 min)
Measured  not yet: it takes a GPU node
Differs   images are resized bilinearly with antialiasing (there: OpenCV's average over areas)
          step s of the warm-up has the rate that step s + 1 has there; bf16 (there: fp16)
          data from shards with images of at most 400 pixels, all JPEG (there: 500 pixels, half of them JPEG of quality 90)

Data as for imagenet_rn50.py. train.compile cannot be used with growing images: every size would be compiled again.
"""

import math
import os

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train

EPOCHS = int(os.environ.get("EPOCHS", "16"))  # 16, 24, 32, 40, 56 or 88 in the source
# The source interpolates from 160 pixels at the first epoch to 192 at the second, and rounds to a multiple of 32.
RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}
RAMP = RAMPS.get(EPOCHS, (round(0.73 * EPOCHS), round(0.86 * EPOCHS)))
# It changes the size between epochs, so the first epoch in or after the middle of the ramp has 192 pixels.
LARGE_FROM = math.ceil(sum(RAMP) / 2)


def recipe() -> Recipe:
    return Recipe(
        name=f"imagenet_rn50_fast_{EPOCHS}",
        experiment="imagenet_rn50_fast",
        description=__doc__,
        data=Data(
            train="{output}/data/imagenet/train",
            eval="{output}/data/imagenet/eval",
            image_size=192,
            train_sizes=(("0 epochs", 160), (f"{LARGE_FROM} epochs", 192)),
            eval_size=256,
            eval_crop=224 / 256,
            eval_flip=True,
            global_batch_size=4096,
            micro_batch_size=512,
            lanes=64,
            crop="random-resized-crop",
            flip=True,
        ),
        model=Model(name="resnet50", blurpool=True),
        optim=Optim(
            lr=1.7,
            momentum=0.9,
            nesterov=False,
            weight_decay=1e-4,
            decay_biases=True,
            decay_shortcut_norms=True,
        ),
        # The rate rises over two epochs, then falls linearly to zero.
        schedule=Schedule(decay="polynomial", power=1.0, warmup="2 epochs", warmup_start=1e-4),
        train=Train(length=f"{EPOCHS} epochs", label_smoothing=0.1, precision="bf16", log_every="100 steps"),
    )
