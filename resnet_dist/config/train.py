"""The training of a recipe: optimizer, learning rate schedule, loss, length and intervals."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.lengths import Length
from resnet_dist.config.part import Part, refuse_unread, refuse_without
from resnet_dist.errors import RecipeError

Beta = Annotated[float, Field(ge=0, lt=1)]

# Fields that only some choices read. A value that nothing reads is a mistake, not a preference.
_OPTIMIZERS_THAT_READ = {
    "momentum": ("sgd", "lars", "muon"),
    "nesterov": ("sgd", "lars", "muon"),
    "betas": ("adamw", "lamb"),
    "eps": ("adamw", "lamb", "lars"),
    "trust_coefficient": ("lars",),
    "sgd_lr": ("muon",),
    "sgd_momentum": ("muon",),
    "ns_steps": ("muon",),
    "normalize_weights": ("muon",),
}
_DECAYS_THAT_READ = {
    "floor": ("cosine", "polynomial"),
    "milestones": ("step",),
    "gamma": ("step",),
    "power": ("polynomial",),
}
_WARMUPS_THAT_READ = {"warmup_at_start": ("linear", "cosine")}
_LOSSES_THAT_READ = {"bce_target_threshold": ("bce",)}


class Optim(Part):
    """The optimizer, its learning rate and its weight decay."""

    optimizer: Literal["sgd", "adamw", "lamb", "lars", "muon"] = "sgd"
    """Rule of an update. lamb (arXiv 1904.00962) and lars (arXiv 1708.03888) are timm's. muon: Muon
    (https://kellerjordan.github.io/posts/muon) for convolution weights, SGD for all others."""
    lr: float = Field(default=0.1, gt=0)
    """Highest learning rate, for the whole global batch. It is never scaled implicitly: see `scaled_lr`."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd, lars and muon."""
    nesterov: bool = True
    """Nesterov momentum of sgd, lars and muon; needs a momentum above 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of adamw's and lamb's averages of the gradient and of its square."""
    eps: float | None = Field(default=None, gt=0)
    """Term added to the denominator of adamw, lamb and lars. None: 1e-8 for adamw and lars, 1e-6 for lamb."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Longest step of a layer in lars at a rate of 1, as a share of the norm of its weights."""
    sgd_lr: float | None = Field(default=None, gt=0)
    """Learning rate of muon for all but convolution weights. None: `lr`."""
    sgd_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of muon for all but convolution weights. None: `momentum`."""
    ns_steps: int = Field(default=5, ge=1)
    """Newton-Schulz iterations of muon: with fewer, singular values differ more from one. Speed records use 3."""
    normalize_weights: bool = False
    """Before each update of muon, bring the convolution weights of a layer to the norm √(output channels), in place of
    their decay, as in airbench94's version with Muon."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decay of convolution and linear weights; also of norms and biases with `decay_norms`."""
    decay_norms: bool = False
    """Decay the scales of norms, and all biases, too, as He et al. 2015 and torchvision's V1 recipe do."""
    decay_biases: bool = False
    """Decay the biases of linear layers and convolutions, but not those of norms, as torchvision's V2 recipe
    does."""
    decay_shortcut_norms: bool = False
    """Decay the scales and biases of the norms on shortcuts, but not those of other norms: FFCV's script leaves
    out norms by their names, which those on shortcuts do not have."""
    bias_lr_scale: float = Field(default=1.0, gt=0)
    """Learning rate of biases, relative to that of weights: 64 in CIFAR speed recipes. It holds for biases of
    norms, not for those of convolutions. Where biases decay, their decay is divided by it."""
    whitening_bias_lr_scale: float = Field(default=1.0, gt=0)
    """The same for the bias of resnet9_fast's first layer."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest 2-norm of the gradient of all parameters; longer ones are scaled down to it. None: no limit."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_unread(self, "optimizer", _OPTIMIZERS_THAT_READ)
        for name in ("decay_biases", "decay_shortcut_norms"):
            if getattr(self, name) and self.decay_norms:
                raise ValueError(
                    f"{name}=True with decay_norms=True, which includes it; leave one of them out"
                )
        momentum = self.momentum if self.sgd_momentum is None else min(self.momentum, self.sgd_momentum)
        if self.nesterov and momentum == 0 and self.optimizer in _OPTIMIZERS_THAT_READ["nesterov"]:
            name = "momentum" if self.momentum == 0 else "sgd_momentum"
            raise ValueError(f"nesterov=True needs {name} greater than 0; set nesterov=false or {name}=0.9")
        return self


class Schedule(Part):
    """The learning rate as a function of the step alone: a warm-up to `optim.lr`, then a decay.

    One-cycle schedules are long warm-ups: triangular is `warmup="30 percent"` with `decay="polynomial"`, and
    the 1cycle policy (arXiv 1708.07120) is `warmup="30 percent"`, `warmup_shape="cosine"`, `warmup_start=0.04`,
    `decay="cosine"`.
    """

    decay: Literal["cosine", "constant", "step", "polynomial"] = "cosine"
    """Shape after the warm-up. constant: `optim.lr` to the end. cosine (arXiv 1608.03983) and polynomial run
    from the end of the warm-up to the end of the run. step multiplies the rate by `gamma` at each of
    `milestones`."""
    warmup: Length = "0 steps"
    """Length of the warm-up."""
    warmup_shape: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the warm-up, linear as in arXiv 1706.02677. constant stays at `warmup_start`, as He et al.
    2015 train the first steps of 110 layers."""
    warmup_start: float = Field(default=0.0, ge=0, le=1)
    """Rate at the start of the warm-up, as a share of `optim.lr`; above 0 where the warm-up is constant."""
    warmup_at_start: bool = False
    """Begin a linear or cosine warm-up at `warmup_start` itself, as torch's schedulers do, and reach `optim.lr` with the
    first step after it. False: begin one step higher, and reach it with the last step of the warm-up."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end of cosine and polynomial, as a share of `optim.lr`."""
    milestones: tuple[Length, ...] = ()
    """Positions, in ascending order from the start of the run, at which step lowers the rate; step needs one
    or more."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """Factor by which step multiplies the rate at each milestone."""
    power: float = Field(default=1.0, gt=0)
    """Exponent of polynomial: the rate falls from `optim.lr` to `floor` in proportion to (1 -
    progress)^power."""
    whitening_bias: Length | None = None
    """Time for which the bias of resnet9_fast's first layer trains. None: to the end."""
    whitening_bias_decay: Literal["none", "linear"] = "none"
    """Rate of that bias meanwhile. none: that of the schedule. linear: it falls from the highest one to zero."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse_unread(self, "decay", _DECAYS_THAT_READ)
        refuse_unread(self, "warmup_shape", _WARMUPS_THAT_READ)
        # Not shape and start: a recipe may have them for warm-ups that its `warmup` switches on and off.
        refuse_without(self, "warmup", ("warmup_at_start",))
        refuse_without(self, "whitening_bias", ("whitening_bias_decay",))
        if self.decay == "step" and not self.milestones:
            raise ValueError('decay=\'step\' needs milestones, such as ["50 percent", "75 percent"]')
        if self.warmup_shape == "constant" and self.warmup_start == 0:
            raise ValueError(
                "warmup_shape='constant' needs warmup_start greater than 0, such as 0.1: at 0 nothing is learned"
            )
        return self


class Train(Part):
    """The length of the run, the loss, the precision, and the intervals of logs and checkpoints."""

    length: Length
    """Length of the run, above zero and not in percent."""
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    """bce: mean binary cross-entropy over the classes, each of which is a yes or no (ResNet strikes back,
    arXiv 2110.00476)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all classes."""
    bce_target_threshold: float | None = Field(default=None, ge=0, lt=1)
    """With bce, targets above it become 1 and others 0, so that a mixed image belongs wholly to both its
    classes. None: targets stay as they are."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights (average = decay · average + (1 - decay) · weights),
    which is evaluated and exported in place of the weights. None: no average."""
    ema_every: Length = "1 steps"
    """Interval between updates of the average, at most the run's length."""
    ema_warmup: bool = True
    """Limit the decay of the n-th update to (1 + n) / (10 + n), as the average otherwise holds the random
    initial weights for about 1 / (1 - decay) updates."""
    ema_rise: float = Field(default=0.0, ge=0)
    """Exponent r of a decay that rises over the run: ema_decay · (step / length)^r. 0: it does not; 3 in airbench94."""
    ema_replaces: bool = False
    """Put the average in place of the weights at each of its updates, from where they train on: lookahead
    (arXiv 1907.08610), as in airbench94."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the arithmetic in forward passes, also of evaluations; weights stay fp32. fp16 scales the loss, and
    needs CUDA."""
    tf32: bool = True
    """On CUDA, round the factors of fp32 products to 10 bits of mantissa, which is several times faster."""
    deterministic: bool = False
    """On CUDA, compute the same bits in every run on the same kind of GPU, with the same ranks and versions: kernels
    that add in a fixed order, chosen without timing them. It is slower. A CPU does so anyway."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """Mode of torch.compile, for forward pass and loss together and for evaluation. reduce-overhead replays
    CUDA graphs, which suits small nets. Not with several sizes in `data.train_sizes`."""
    gradient_sums: Literal["fp32", "fp64"] = "fp32"
    """Precision of the sum of gradients over micro-batches and ranks. With fp64 and `data.micro_batch_size`,
    every number of ranks draws the same curve, bit for bit; with fp32, curves differ visibly after some
    twenty steps."""
    sync_batch_norm: bool = False
    """Normalize over the images of all ranks instead of each rank's own. With several ranks it needs CUDA;
    not with `data.micro_batch_size`."""
    log_every: Length = "50 steps"
    """Interval between log lines and metrics of training; zero: at the end only."""
    eval_every: Length = "1 epochs"
    """Interval between evaluations; zero: at the end only."""
    evaluate: Literal["inline", "beside"] = "inline"
    """Who evaluates. inline: the ranks, while training waits. beside: under Ray, another process on a spare GPU or
    CPU, from the checkpoint that each evaluation then is; training goes on. Without room for it: inline."""
    checkpoint_every: Length = "1 epochs"
    """Interval between checkpoints, beside those by `checkpoint_minutes` and the best; zero: at the end only."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints, by the clock of rank 0, beside `checkpoint_every`. None: by steps alone."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept, beside the best one."""
    best_metric: Literal["eval/top1", "eval/top5", "eval/loss"] | None = None
    """Metric that selects the best checkpoint, whose model MLflow gets: highest accuracy, or lowest loss.
    eval/top5 needs six classes or more. None: MLflow gets the last model."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads that each rank computes with. The curve depends on them in its last bits, so a run that is resumed
    keeps them. None: as many as the work of a step keeps busy, at most the CPUs of the rank, and one for small nets; on
    a GPU, all CPUs of the rank."""
    stall_timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds without progress after which the run ends and names the ranks that are behind. The first pass
    through each phase (compiling, filling caches) may take three times as long."""
    log_gradient_norms: bool = False
    """Write the gradient norm of every convolution at log steps to the run's gradient_norms.json."""
    figures: Literal["none", "end", "evaluations"] = "end"
    """Figures on the page of the run: curves, and confusions, classes, calibration and the worst images of the
    last evaluation. evaluations: those of every evaluation, with some 30 bytes a sample kept of each."""
    log_checkpoints: bool = True
    """Show every checkpoint in MLflow as a model with its step, its metrics and the place of its weights, which are
    not copied. False: only the models of the end."""
    log_node_metrics: bool = False
    """Log CPU, memory, disk, network and GPU use of each machine too, beside minimum, mean and maximum over
    all: keys for every machine."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length.endswith("percent"):
            raise ValueError(f"length={self.length!r}: percent of itself; use epochs, steps or samples")
        if float(self.length.split()[0]) == 0:
            raise ValueError(f"length={self.length!r}: nothing would be trained; use 1 steps or more")
        refuse_unread(self, "loss", _LOSSES_THAT_READ)
        refuse_without(self, "ema_decay", ("ema_every", "ema_warmup", "ema_rise", "ema_replaces"))
        return self


def scaled_lr(lr: float, *, global_batch_size: int, per: int = 256) -> float:
    """Scale `lr`, which suits a batch of `per`, linearly to `global_batch_size` (arXiv 1706.02677, section 2.1)."""
    return lr * global_batch_size / per


def check_classes(train: Train, num_classes: int) -> None:
    """Raise RecipeError where options do not suit the number of classes."""
    if train.best_metric == "eval/top5" and num_classes <= 5:
        raise RecipeError(
            f"train.best_metric='eval/top5' is not measured with {num_classes} classes, as none misses the first five; "
            "use eval/top1 or eval/loss"
        )
    threshold, smoothing = train.bce_target_threshold, train.label_smoothing
    # Targets of an unmixed image: of the other classes, and of its own.
    no, yes = smoothing / num_classes, 1 - smoothing + smoothing / num_classes
    if threshold is not None and smoothing and not no < threshold < yes:
        raise RecipeError(
            f"train.bce_target_threshold={threshold} does not separate the classes: with train.label_smoothing={smoothing} "
            f"and {num_classes} classes, targets are {no:.6g} and {yes:.6g}; use one between them"
        )
