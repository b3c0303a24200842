"""ResNet-50 on ImageNet in 16 to 88 epochs, with images that grow while it trains.

Source    FFCV's ResNet-50 configurations (https://github.com/libffcv/ffcv-imagenet): growing images, BlurPool, no decay
          on norms, evaluation at 256 pixels with mirror images
Command   resnet-dist train jobs/imagenet_rn50_fast.py --workers 8
          EPOCHS=88 resnet-dist train jobs/imagenet_rn50_fast.py --workers 8
Expected  73.8 % top-1 after 16 epochs (14.9 min on eight A100), 78.4 % after 88 (77 min)
Measured  not yet: it takes a GPU node

Data as for imagenet_rn50.py. train.compile cannot be used with growing images: every size would be compiled again.
"""

import os

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train

EPOCHS = int(os.environ.get("EPOCHS", "16"))  # 16, 24, 32, 40, 56 or 88 in the source
RAMP = {16: (11, 13), 88: (65, 76)}.get(EPOCHS, (round(0.73 * EPOCHS), round(0.86 * EPOCHS)))


def recipe() -> Recipe:
    return Recipe(
        name=f"imagenet_rn50_fast_{EPOCHS}",
        experiment="imagenet_rn50_fast",
        description=__doc__,
        data=Data(
            train="{output}/data/imagenet/train",
            eval="{output}/data/imagenet/eval",
            image_size=192,
            train_sizes=((f"{RAMP[0]} epochs", 160), (f"{RAMP[1]} epochs", 192)),
            train_size_curve="linear",
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
        optim=Optim(lr=1.7, momentum=0.9, nesterov=False, weight_decay=1e-4),
        # The rate rises over two epochs, then falls linearly to zero.
        schedule=Schedule(decay="polynomial", power=1.0, warmup="2 epochs"),
        train=Train(length=f"{EPOCHS} epochs", label_smoothing=0.1, precision="bf16", log_every="100 steps"),
    )
