"""Residual networks on CIFAR-10 as in the paper: 20 to 110 layers of 16, 32 and 64 channels.

Source    He et al. 2015 (arXiv 1512.03385), section 4.2 and table 6
Command   resnet-dist train jobs/cifar10_resnet.py
          resnet-dist train jobs/cifar10_resnet.py --set model.name=resnet56
          resnet-dist train jobs/cifar10_resnet.py --set model.name=resnet110 --set schedule.warmup="400 steps"
Expected  top-1 91.25 / 92.49 / 92.83 / 93.03 % for 20 / 32 / 44 / 56 layers; 93.39 % for 110, the mean of five runs, of
          which the best has 93.57 % (test error 6.61 ± 0.16, best 6.43); all at the last step
Measured  not yet at full length, which takes a GPU: tests/benchmarks/gpu does it. A shortened ResNet-20 on a CPU
          equals a loop written without this package: tests/benchmarks/cifar_reference.py
Differs   the mean and the deviation of each color are taken out of the pixels (there: the mean of each pixel)
          110 layers begin at a rate of 0.01 for 400 steps (there: until the training error is below 80 %, about 400 steps)

The first run downloads CIFAR-10. If you have its images in folders (class = folder), prepare them instead:
`resnet-dist prepare FOLDER output/data/cifar10`.
"""

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train


def recipe() -> Recipe:
    return Recipe(
        name="cifar10_resnet",
        description=__doc__,
        data=Data(
            source="cifar10",
            train="{output}/data/cifar10/train",
            eval="{output}/data/cifar10/eval",
            image_size=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            global_batch_size=128,
            micro_batch_size=64,  # On the paper's two GPUs, batch norm sees 64 images.
            lanes=8,
            crop="pad-crop",
            pad=4,
            flip=True,
            cache="ram",
        ),
        model=Model(name="resnet20", shortcut="zero-pad"),
        optim=Optim(lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, decay_norms=True),
        # The paper trains the first 400 steps of 110 layers at 0.01: set schedule.warmup="400 steps" for them.
        schedule=Schedule(
            decay="step",
            milestones=("32000 steps", "48000 steps"),
            warmup_shape="constant",
            warmup_start=0.1,
        ),
        train=Train(
            length="64000 steps", log_every="200 steps", eval_every="5 epochs", checkpoint_every="5 epochs"
        ),
    )
