"""94 % on CIFAR-10 in seconds of one GPU, with a residual net.

Source    the training of airbench94 (Jordan, arXiv 2404.00498), its rates turned into those of a mean loss, with
          residual blocks in its net (model/fast.py)
Command   resnet-dist train jobs/cifar10_fast.py --workers 1 --gpu
          resnet-dist train jobs/cifar10_fast.py --local --cpu --set train.length="1 epochs"
Expected  94 % top-1; the plain net of the source takes 3.8 s on an A100
Measured  not yet: it takes a GPU. tests/benchmarks/gpu measures time and accuracy over 50 seeds, beside the source's net
          and cifar10_fast_muon
Differs   the net has residual blocks: one in the first and one in the last group (there: a second convolution in each)
          bf16 with weights in fp32, and fp32 in the whitening layer (there: fp16, weights too, but for the norms)
          a batch has 128 images of each of 8 parts of the set (there: 1,024 of the whole set)
"""

from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train


def recipe() -> Recipe:
    return Recipe(
        name="cifar10_fast",
        description=__doc__,
        data=Data(
            source="cifar10",
            train="{output}/data/cifar10/train",
            eval="{output}/data/cifar10/eval",
            image_size=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            global_batch_size=1024,
            lanes=8,
            crop="pad-crop",
            pad=2,
            pad_fill="reflect",
            flip="alternate",
            eval_flip=True,
            eval_shift=1,
            cache="device",
        ),
        model=Model(name="resnet9_fast", norm_eps=1e-12, whitening="second-moment"),
        optim=Optim(
            lr=1.5,
            momentum=0.85,
            nesterov=True,
            weight_decay=0.0153 / 11.5,  # The source gives both decoupled from momentum and batch size.
            decay_norms=True,
            bias_lr_scale=64,
        ),
        schedule=Schedule(
            decay="polynomial",
            floor=0.07,
            warmup="23 percent",
            warmup_start=0.2,
            warmup_at_start=True,
            whitening_bias="144 steps",  # 3 epochs of 48 whole batches
        ),
        train=Train(
            length="476 steps",  # 9.9 epochs of 48 whole batches, rounded up
            label_smoothing=0.2,
            ema_decay=0.95**5,
            ema_every="5 steps",
            ema_warmup=False,
            ema_rise=3,
            ema_replaces=True,
            precision="bf16",
            log_every="5 epochs",
            eval_every="0 steps",  # Evaluate at the end only.
            checkpoint_every="0 steps",
        ),
    )
