"""How it is trained: the optimizer, its schedule, the loss, and the lengths of a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.lengths import Length
from resnet_dist.config.part import Part, refuse_unread, refuse_without
from resnet_dist.errors import RecipeError

Beta = Annotated[float, Field(ge=0, lt=1)]

# Fields that only some of the choices read. A value that nothing reads is a mistake, not a preference.
_OPTIMIZERS_THAT_READ = {
    "momentum": ("sgd", "lars", "muon"),
    "nesterov": ("sgd", "lars", "muon"),
    "betas": ("adamw", "lamb"),
    "eps": ("adamw", "lamb", "lars"),
    "trust_coefficient": ("lars",),
    "sgd_lr": ("muon",),
    "sgd_momentum": ("muon",),
}
_DECAYS_THAT_READ = {
    "floor": ("cosine", "polynomial"),
    "milestones": ("step",),
    "gamma": ("step",),
    "power": ("polynomial",),
}
_LOSSES_THAT_READ = {"bce_target_threshold": ("bce",)}


class Optim(Part):
    optimizer: Literal["sgd", "adamw", "lamb", "lars", "muon"] = "sgd"
    """lamb (arXiv 1904.00962) and lars (arXiv 1708.03888) are timm's. muon: convolution weights by Muon
    (https://kellerjordan.github.io/posts/muon), all others by SGD."""
    lr: float = Field(default=0.1, gt=0)
    """For the whole global batch. Scaling with it is written out in the recipe, never done behind it: see
    `scaled_lr`."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float | None = Field(default=None, gt=0)
    """Added to the denominator. None: 1e-8 for adamw and lars, 1e-6 for lamb."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """lars: the longest step of a layer at a rate of 1, as a share of the length of its weights."""
    sgd_lr: float | None = Field(default=None, gt=0)
    """muon: the rate of what is not a convolution weight. None: `lr`."""
    sgd_momentum: float | None = Field(default=None, ge=0, lt=1)
    """muon: the momentum of what is not a convolution weight. None: `momentum`."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """On convolution and linear weights; on norms and biases with `decay_norms` only."""
    decay_norms: bool = False
    """Decay the scales of norms, and all biases, too: what He et al. 2015 and torchvision's V1 recipe do."""
    bias_lr_scale: float = Field(default=1.0, gt=0)
    """Rate of biases, norms' included and convolutions' not, over that of weights: 64 in CIFAR speed recipes. Where
    they decay, their decay is divided by it."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Longest gradient over all parameters together, in the 2-norm; a longer one is scaled down to it."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_unread(self, "optimizer", _OPTIMIZERS_THAT_READ)
        momentum = self.momentum if self.sgd_momentum is None else min(self.momentum, self.sgd_momentum)
        if self.nesterov and momentum == 0 and self.optimizer in _OPTIMIZERS_THAT_READ["nesterov"]:
            name = "momentum" if self.momentum == 0 else "sgd_momentum"
            raise ValueError(f"nesterov=True needs {name} greater than 0; set nesterov=false or {name}=0.9")
        return self


class Schedule(Part):
    """The rate of a step, from the step alone: a warm-up to optim.lr, then a decay.

    One-cycle schedules are long warm-ups: triangular is warmup="30 percent" with decay="polynomial", and the
    1cycle policy (arXiv 1708.07120) is warmup="30 percent", warmup_shape="cosine", warmup_start=0.04,
    decay="cosine".
    """

    decay: Literal["cosine", "constant", "step", "polynomial"] = "cosine"
    """cosine (arXiv 1608.03983) and polynomial run from the warm-up's end to the run's end; step multiplies the
    rate by `gamma` at each of `milestones`, which count from the run's start."""
    warmup: Length = "0 steps"
    warmup_shape: Literal["linear", "cosine", "constant"] = "linear"
    """linear (arXiv 1706.02677); constant stays at `warmup_start`, as He et al. 2015 begin with 110 layers."""
    warmup_start: float = Field(default=0.0, ge=0, le=1)
    """Where the warm-up begins, as a share of optim.lr."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Where cosine and polynomial end, as a share of optim.lr."""
    milestones: tuple[Length, ...] = ()
    gamma: float = Field(default=0.1, gt=0, lt=1)
    power: float = Field(default=1.0, gt=0)
    """polynomial: optim.lr · (1 - progress)^power."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_unread(self, "decay", _DECAYS_THAT_READ)
        if self.decay == "step" and not self.milestones:
            raise ValueError('decay=\'step\' needs milestones, such as ["50 percent", "75 percent"]')
        if self.warmup_shape == "constant" and self.warmup_start == 0:
            raise ValueError(
                "warmup_shape='constant' needs warmup_start greater than 0, such as 0.1: at 0 nothing is learned"
            )
        return self


class Train(Part):
    length: Length
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    """bce: each class is a yes or no, their mean binary cross-entropy (ResNet strikes back, arXiv 2110.00476)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    bce_target_threshold: float | None = Field(default=None, ge=0, lt=1)
    """bce: targets above it become 1, others 0, so that a mixed image is wholly of both its classes."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Set, an exponential moving average of the weights is kept, evaluated, and exported: average = decay · average
    + (1 - decay) · weights."""
    ema_every: Length = "1 steps"
    """How often the average moves."""
    ema_warmup: bool = True
    """Let the n-th move decay by (1 + n) / (10 + n) where that is less, or the average remembers the random weights
    of the start for 1 / (1 - decay) moves."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the arithmetic in forward passes; weights stay fp32. fp16 scales the loss, and needs CUDA."""
    tf32: bool = True
    """On CUDA, round the factors of fp32 products to 10 bits of mantissa, which is several times faster."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile's mode, for forward pass and loss together and for evaluation. reduce-overhead replays CUDA
    graphs, which suits small nets."""
    gradient_sums: Literal["fp32", "fp64"] = "fp32"
    """fp64 adds up the gradients of micro-batches and ranks so exactly that, with data.micro_batch_size set, every
    number of ranks draws the same curve. fp32: the order of a sum shows, after some twenty steps to the naked eye."""
    sync_batch_norm: bool = False
    """Normalize over the images of all ranks, not over each rank's own. Needs CUDA where there are several."""
    log_every: Length = "50 steps"
    eval_every: Length = "1 epochs"
    checkpoint_every: Length = "1 epochs"
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Also after so many minutes without one, by rank 0's clock."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest so many; the best one is kept beside them."""
    best_metric: Literal["eval/top1", "eval/top5", "eval/loss"] | None = None
    """What says which checkpoint is the best: the highest accuracy, or the lowest loss."""
    stall_timeout_seconds: float = Field(default=600.0, gt=0)
    """After so long without any progress the run ends and names the ranks that are behind. The first time
    through every phase (compiling, filling caches) may take three times as long."""
    log_gradient_norms: bool = False
    """Whether log steps also measure the gradient of every convolution: gradient_norms.json of the run."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length.endswith("percent"):
            raise ValueError(f"length={self.length!r}: percent of itself; use epochs, steps or samples")
        if float(self.length.split()[0]) == 0:
            raise ValueError(f"length={self.length!r}: nothing would be trained; use 1 steps or more")
        refuse_unread(self, "loss", _LOSSES_THAT_READ)
        refuse_without(self, "ema_decay", ("ema_every", "ema_warmup"))
        return self


def scaled_lr(lr: float, *, global_batch_size: int, per: int = 256) -> float:
    """`lr` for a batch of `per`, grown linearly to `global_batch_size` (arXiv 1706.02677, section 2.1)."""
    return lr * global_batch_size / per


def check_classes(train: Train, num_classes: int) -> None:
    """Raise RecipeError where the options do not suit so many classes."""
    if train.best_metric == "eval/top5" and num_classes <= 5:
        raise RecipeError(
            f"train.best_metric='eval/top5' is not measured with {num_classes} classes, as none misses the first five; "
            "use eval/top1 or eval/loss"
        )
    threshold, smoothing = train.bce_target_threshold, train.label_smoothing
    no, yes = smoothing / num_classes, 1 - smoothing + smoothing / num_classes  # targets of an unmixed image
    if threshold is not None and smoothing and not no < threshold < yes:
        raise RecipeError(
            f"train.bce_target_threshold={threshold} tells no class from another: with train.label_smoothing={smoothing} "
            f"and {num_classes} classes, targets are {no:.6g} and {yes:.6g}; use one between them"
        )
