"""Fine-tune a trained network on your own images: other classes, another last layer, a few epochs.

Source    Kornblith et al. 2018 (arXiv 1805.08974): all layers are trained, at a low rate
Command   resnet-dist train jobs/finetune.py --set data.source=FOLDER
          resnet-dist train jobs/finetune.py --set data.source=FOLDER --set model.init_from=output/runs/NAME --set model.name=…
Expected  depends on the images; each epoch's accuracy is in MLflow
Measured  not yet: the machines of these measurements cannot reach the server that has the weights
Differs   batch 64, ten epochs, label smoothing and a warm-up (there: batch 256, 20,000 steps, neither), and one rate and
          one decay (there: the best of a grid for each data set)

FOLDER holds a folder for each class, and train/ beside val/ or test/ above them if you have a split of your own; otherwise
a fifth is held out. When the run starts, it reports which weights fit and which layers start from random values.
"""

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train, scaled_lr

GLOBAL_BATCH_SIZE = 64


def recipe() -> Recipe:
    return Recipe(
        name="finetune",
        description=__doc__,
        data=Data(
            train="{output}/data/finetune/train",
            eval="{output}/data/finetune/eval",
            image_size=224,
            eval_crop=224 / 256,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=32,
            lanes=8,
            crop="random-resized-crop",
            flip=True,
        ),
        model=Model(name="resnet18", init_from="torchvision:resnet18.IMAGENET1K_V1"),
        optim=Optim(
            lr=scaled_lr(0.01, global_batch_size=GLOBAL_BATCH_SIZE),
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
        ),
        schedule=Schedule(decay="cosine", warmup="5 percent"),
        train=Train(
            length="10 epochs", label_smoothing=0.1, log_every="10 steps", checkpoint_every="2 epochs"
        ),
    )
