"""ResNet-20 on handwritten digits: the first run, and the dry run of every other.

Source    He et al. 2015 (arXiv 1512.03385), section 4.2, at 8x8 pixels and one channel; cosine instead of steps
Command   resnet-dist train jobs/digits.py
Expected  98.5 to 99.8 % top-1 on the 360 held-out digits: rounding differs between CPUs and thread counts
Differs   the data; Nesterov momentum, projections as shortcuts, no decay of norms and no flips; cosine after two epochs of
          warm-up (there: CIFAR-10; plain momentum, option A, decay of all parameters, flips; two steps)
Measured  AMD EPYC: 98.61 % on one rank and on two, of one thread each; 98.89 % on one of two threads
"""

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train


def recipe() -> Recipe:
    return Recipe(
        name="digits",
        description=__doc__,
        data=Data(
            source="digits",  # scikit-learn carries these 1,797 images: nothing is downloaded.
            train="{output}/data/digits/train",
            eval="{output}/data/digits/eval",
            image_size=8,
            channels=1,
            mean=(0.31,),
            std=(0.37,),
            global_batch_size=128,
            micro_batch_size=64,  # It gives the same curve on one rank and on two.
            lanes=8,
        ),
        model=Model(name="resnet20"),
        optim=Optim(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        schedule=Schedule(decay="cosine", warmup="2 epochs"),
        train=Train(
            length="12 epochs",
            log_every="10 steps",
            eval_every="3 epochs",
            checkpoint_every="3 epochs",
        ),
    )
