"""The options of a joint training, checked, and the learning rates that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..utils.checks import PRECISIONS, check_flag, check_thresholds
from ..utils.option_table import OptionTable, table_option

SAMPLINGS = ("instance", "class_balanced", "square_root")


@dataclass(frozen=True)
class JointOptions(OptionTable):
    """How to train; :func:`alphaext.pretraining.train_model` says what each option means."""

    epochs: int = table_option(90, "of training", minimum=1, maximum=2**31)
    batch_size: int = table_option(512, "images a step, over all processes", minimum=1, maximum=2**31)
    lr: float = table_option(0.2, "learning rate; some 1e-3 for adamw", above=0)
    momentum: float = table_option(0.9, "of SGD", minimum=0)
    nesterov: bool = table_option(False, "Nesterov momentum")
    weight_decay: float = table_option(5e-4, "of all parameters", minimum=0)
    schedule: str = table_option("cosine", "how the learning rate falls", choices=("cosine", "step", "constant"))
    warmup_epochs: int = table_option(0, "epochs in which the learning rate rises, before", minimum=0, maximum=2**31)
    lr_step: int = table_option(30, "epochs between falls, under step", minimum=1, maximum=2**31)
    lr_factor: float = table_option(0.1, "what a fall multiplies by", above=0)
    optimizer: str = table_option("sgd", "what takes the steps", choices=("sgd", "adamw"))
    sampling: str = table_option("instance", "how an epoch's images are drawn", choices=SAMPLINGS)
    label_smoothing: float = table_option(0.0, "share of the target spread over all classes", minimum=0, below=1)
    precision: str = table_option(
        "float32", "what the network computes in; bfloat16 is faster where the processor has it", choices=PRECISIONS
    )
    drop_last: bool = table_option(True)
    sync_batch_norm: bool = table_option(False, "batch normalisation over all processes; GPUs only")
    channels_last: bool = table_option(True)
    deterministic: bool = table_option(True)
    select: str | None = table_option(
        None, "which epoch; without, best_all where there are validation images", choices=("best_all", "last")
    )
    few_below: int = table_option(20, minimum=0, maximum=2**40)
    many_above: int = table_option(100, minimum=0, maximum=2**40)
    seed: int = table_option(0, minimum=0, maximum=2**63 - 1)

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.type == "bool":
                check_flag(getattr(self, entry.name), entry.name)
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs={self.epochs}, got {self.warmup_epochs}")
        if self.nesterov and (self.momentum == 0 or self.optimizer != "sgd"):
            raise ValueError(
                f"nesterov needs optimizer='sgd' and a momentum above 0, got {self.optimizer!r} and momentum={self.momentum:g}"
            )
        check_thresholds(self.few_below, self.many_above)

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of a step (0 is the first of ``steps``) of an epoch (1 is the first)."""
        if epoch <= self.warmup_epochs:
            return self.lr * ((epoch - 1) * steps + step + 1) / (self.warmup_epochs * steps)
        done = epoch - 1 - self.warmup_epochs
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done / (self.epochs - self.warmup_epochs)))
        if self.schedule == "step":
            return self.lr * float(self.lr_factor ** (done // self.lr_step))
        return self.lr
