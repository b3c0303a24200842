"""ResNet-50 on ImageNet in 90 epochs: the recipe behind torchvision's first weights.

Source    torchvision's reference training, IMAGENET1K_V1; learning rate by Goyal et al. (arXiv 1706.02677)
Command   resnet-dist train jobs/imagenet_rn50.py --workers 8
Expected  76.13 % top-1 on the 50,000 validation images
Measured  not yet: it takes a GPU node for a day
Differs   bf16 (there: fp32); 143 images of an epoch, other ones in each, are left out (there: they are a smaller batch)
          shards as below have images whose short side is 400 pixels at most (there: the images as they are)

Shards first: `resnet-dist prepare IMAGENET output/data/imagenet --resize-short 400`, where IMAGENET holds train/ and
val/; or existing shards, by URL: `--set data.train=s3://bucket/train.json --set data.eval=…`.
"""

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train, scaled_lr

GLOBAL_BATCH_SIZE = 256


def recipe() -> Recipe:
    return Recipe(
        name="imagenet_rn50",
        description=__doc__,
        data=Data(
            train="{output}/data/imagenet/train",
            eval="{output}/data/imagenet/eval",
            image_size=224,
            eval_crop=224 / 256,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=32,
            lanes=64,
            crop="random-resized-crop",
            flip=True,
        ),
        model=Model(name="resnet50"),
        optim=Optim(
            lr=scaled_lr(0.1, global_batch_size=GLOBAL_BATCH_SIZE),
            momentum=0.9,
            nesterov=False,
            weight_decay=1e-4,
            decay_norms=True,
        ),
        schedule=Schedule(decay="step", milestones=("30 epochs", "60 epochs")),
        train=Train(length="90 epochs", precision="bf16", log_every="100 steps"),
    )
