"""The table of options: of a head and its neighbours, and of its training. All else that has an option takes it from here.

Signatures, flags, configuration keys, presets and ``docs/reference/options.md`` follow the fields below. What an option means
and which values it takes is said here alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from typing import Any

from ..head.choices import COEFFICIENTS, INITS, METRICS, POOLS, RULES
from ..utils.checks import check_integer
from ..utils.option_table import OptionTable, check_known, documented, table_option

__all__ = ["HeadOptions", "TrainingOptions", "read_options", "selection_score"]

_SAME: Any = object()


def _option(
    default: Any,
    help: str,
    more_help: str = "",
    *,
    few: Any = _SAME,
    paper: Any = _SAME,
    several: bool = False,
    **more: Any,
) -> Any:
    """An option: its value in the plain form and in the presets, what it is, and which values are allowed.

    ``more_help``: what the docstring says besides ``help``. ``several``: ``alphaext fit`` tries several values. ``more``: as of
    :func:`table_option`.
    """
    presets = {"few": default if few is _SAME else few, "paper": default if paper is _SAME else paper}
    return table_option(default, help, more_help=more_help, presets=presets, several=several, **more)


@dataclass(frozen=True)
class HeadOptions(OptionTable):
    """What a head is and which neighbours its classes have; :meth:`alphaext.AlphaNet.from_linear` says what each option means.

    The defaults are the plain form's: the paper's, but from the original classifier on, and with a gradient that lets a clamped
    coefficient return.

    Raises:
        TypeError, ValueError: a value out of range; the message names the option.

    Example:
        >>> HeadOptions(top_k=3).pool
        'base'
    """

    gamma: float = _option(
        1.0, "the own coefficient's bound, up to 1; of several, validation chooses", paper=0.7, several=True, above=0, maximum=1
    )
    coefficients: str = _option(
        "mlp",
        "a sub-module's outputs, or learned directly, or by the number of samples alone, without training",
        few="direct",
        choices=COEFFICIENTS,
    )
    tau: float = _option(1.0, "under closed-form coefficients: so many samples count as much as all neighbours", minimum=0)
    top_k: int = _option(5, "neighbours of each few class; of several, validation chooses", few=60, several=True, minimum=1)
    pool: str = _option("base", "classes that neighbours are chosen from", choices=POOLS)
    metric: str = _option("euclidean", "what makes a neighbour near", choices=METRICS)
    neighbor_seed: int = _option(0, "of random neighbours", minimum=0)
    pca_dim: int | None = _option(
        500, "width to which classifiers are reduced for the sub-modules; the paper: 500, Places-LT 300", minimum=1
    )
    hidden_dim: int | None = _option(None, "hidden units of a sub-module; without, as wide as a reduced classifier", minimum=1)
    rule: str = _option("clamp", "how outputs become coefficients; of several, validation chooses", choices=RULES, several=True)
    init: str = _option("identity", "start at the original classifier, or PyTorch's start", paper="default", choices=INITS)
    shared: bool = _option(False, "one sub-module for all few classes")
    projected_gradient: bool = _option(True, "let a clamped coefficient return; the paper does not", paper=False)
    residual: int = _option(
        0, "directions along which a few row may move besides, under direct coefficients", few=256, minimum=0
    )


CHOOSING = ("best_all", "best_few")
SELECTIONS = (*CHOOSING, "last")


@documented
@dataclass(frozen=True)
class TrainingOptions(OptionTable):
    """How to train. The defaults are the paper's, but that the original classifier is kept where nothing is better.

    Raises:
        TypeError, ValueError: a value out of range, or values that disagree; the message names the options.

    Example:
        >>> TrainingOptions(lr=0.2).lr_multiplier(epoch=21)
        0.1
    """

    epochs: int = _option(80, "of training", few=50, minimum=0, maximum=2**31)
    batch_size: int = _option(64, "samples a step", "A last, smaller batch is kept.", few=256, minimum=1, maximum=2**40)
    lr: float = _option(0.1, "learning rate", few=0.05, above=0)
    momentum: float = _option(0.9, "of SGD", minimum=0)
    dampening: float = _option(0.0, "of the momentum", minimum=0)
    weight_decay: float = _option(0.0, "L2 penalty toward 0", minimum=0)
    regularize: float = _option(
        0.0,
        "L2 penalty toward the original classifier",
        "Half of this times the squared distance of the outputs (coefficients before ``rule``, and amounts of the residual) "
        "from those of the original classifier is added to the loss of a step; not to the ``loss`` in the history.",
        few=0.03,
        minimum=0,
        maximum=1e6,
    )
    nesterov: bool = _option(False, "Nesterov momentum")
    lr_schedule: str = _option(
        "step",
        "how the learning rate falls",
        '``"step"``, times ``lr_factor`` every ``lr_step`` epochs; ``"multistep"``, at each of ``lr_milestones``; '
        '``"cosine"``, down to 0 after ``epochs``; ``"constant"``. Of any optimiser.',
        few="cosine",
        choices=("constant", "step", "multistep", "cosine"),
    )
    lr_step: int = _option(20, "epochs between falls, under step", minimum=1, maximum=2**31)
    lr_factor: float = _option(0.1, "what a fall multiplies by", above=0)
    lr_milestones: Sequence[int] = _option((), "epochs of the falls, under multistep")
    negative_ratio: float = _option(
        1.0, "base samples for each few sample", "0 in the paper's appendix E.", minimum=0, maximum=1e6
    )
    negative_sampling: str = _option(
        "uniform",
        "how base samples are drawn",
        '``"class_balanced"``: as many from each base class.',
        choices=("uniform", "class_balanced"),
    )
    samples_per_class: int | None = _option(
        None,
        "of every class in an epoch, instead of the two above",
        "Few classes and base; with replacement where a class has fewer.",
        few=8,
        minimum=1,
        maximum=10**6,
    )
    augment: str | None = _option(
        None,
        "train few classes on samples drawn from near base classes",
        "Instead of on their own; each is the class's mean moved the way a sample of a near base class lies around its own "
        "mean (:mod:`alphaext.training.augmentation`). With ``samples_per_class``.",
        few="neighbors",
        choices=("neighbors",),
    )
    augment_samples: int = _option(200, "drawn samples of each few class", minimum=1, maximum=10**6)
    augment_neighbors: int = _option(5, "base classes whose samples are borrowed", few=10, minimum=1, maximum=10**6)
    prior_correction: bool = _option(
        False,
        "train with the log of how often classes are drawn added",
        "So the scores themselves do not take up how often that is (which ``samples_per_class`` makes equal anyway).",
    )
    few_bias: bool = _option(
        False,
        "add the constant to the few scores that validation features choose",
        'After training, by ``select`` (under ``"last"``, by ``"best_all"``). It is in the head and its ``fold()``, and in '
        "``metrics_after``.",
        few=True,
    )
    select: str | None = _option(
        None,
        "which epoch, and which gamma; without, best_all where there are validation features, else last",
        '``"best_all"``, the best accuracy over all validation samples; ``"best_few"``, the best few accuracy among those '
        'whose accuracy over all is not below ``min_all``; ``"last"`` (also with ``few_bias``, without which epochs are '
        "measured). Epoch 0, before training, takes part; of equal epochs the first wins.",
        choices=SELECTIONS,
    )
    min_all: float | None = _option(
        None, "under best_few: the least accuracy over all; without, the classifier's own", "A fraction of 1.", minimum=0
    )
    keep_original: bool = _option(
        True,
        "keep the original classifier where nothing is better on validation features",
        'By ``select`` (under ``"last"``, by ``"best_all"``); the result says so. Validation samples that show less than half '
        "of the few or of the base classes, or less than ten samples of either, decide nothing.",
    )
    max_base_drop: float | None = _option(
        None,
        "points of accuracy that base classes may lose on validation features",
        "What loses more is not chosen. None for no bound.",
        minimum=0,
        maximum=100,
    )
    seed: int = _option(
        0,
        "of everything random",
        "The samples drawn and their order; in :func:`alphaext.fit_many` also the weights.",
        minimum=0,
        maximum=2**63 - 1,
    )

    def __post_init__(self) -> None:
        min_all = check_min_all(self.min_all, self.select)
        super().__post_init__()
        object.__setattr__(self, "min_all", min_all)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs a momentum above 0 and no dampening, got momentum={self.momentum:g} and "
                f"dampening={self.dampening:g}"
            )
        if self.samples_per_class is None and self.augment is not None:
            raise ValueError(
                f"augment={self.augment!r} needs samples_per_class: an epoch cannot have all samples that could be drawn"
            )
        if self.samples_per_class is not None and (self.negative_ratio != 1 or self.negative_sampling != "uniform"):
            raise ValueError(
                "samples_per_class already says how many samples an epoch has of every class; got negative_ratio="
                f"{self.negative_ratio:g} and negative_sampling={self.negative_sampling!r} as well"
            )
        self._check_milestones()
        self._check_last_lr()

    def _check_last_lr(self) -> None:
        try:
            last = self.lr * self.lr_multiplier(self.epochs)
        except OverflowError:
            last = math.inf
        if not math.isfinite(last):
            raise ValueError(f"lr_factor={self.lr_factor:g} makes the learning rate infinite within {self.epochs} epochs")

    def _check_milestones(self) -> None:
        milestones: object = self.lr_milestones
        if not isinstance(milestones, (list, tuple)):
            raise TypeError(f"lr_milestones must be a list of epochs, got {milestones!r}")
        for milestone in milestones:
            check_integer(milestone, "lr_milestones", minimum=1)
        if any(second <= first for first, second in itertools.pairwise(milestones)):
            raise ValueError(f"lr_milestones must increase, got {list(milestones)}")
        if bool(milestones) != (self.lr_schedule == "multistep"):
            raise ValueError(f"lr_milestones go with lr_schedule='multistep', got {list(milestones)} with {self.lr_schedule!r}")
        object.__setattr__(self, "lr_milestones", tuple(int(milestone) for milestone in milestones))

    def lr_multiplier(self, epoch: int) -> float:
        """What the learning rate of ``epoch`` (1 is the first) is multiplied by."""
        done = max(epoch, 1) - 1
        if self.lr_schedule == "step":
            return float(self.lr_factor ** (done // self.lr_step))
        if self.lr_schedule == "multistep":
            return float(self.lr_factor ** sum(milestone <= done for milestone in self.lr_milestones))
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done / max(self.epochs, 1)))
        return 1.0

    def identity(self) -> dict[str, Any]:
        """What must be equal for one training to go on from another's checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "epochs" or self.lr_schedule == "cosine"}


OPTIONS: dict[str, Field[Any]] = {entry.name: entry for table in (HeadOptions, TrainingOptions) for entry in fields(table)}
"""The whole table, by name."""


def read_options(config: Mapping[str, Any]) -> tuple[HeadOptions, TrainingOptions]:
    """The options of a head and of its training, from one mapping of both.

    Raises:
        TypeError, ValueError: an option that there is not, or a value out of range; the message names it.

    Example:
        >>> head, training = read_options({"top_k": 3, "epochs": 10})
        >>> head.top_k, training.epochs
        (3, 10)
    """
    check_known(config, OPTIONS)
    head = {entry.name for entry in fields(HeadOptions)}
    of_head = HeadOptions(**{name: value for name, value in config.items() if name in head})
    training = TrainingOptions(**{name: value for name, value in config.items() if name not in head})
    # Coefficients in closed form leave nothing to train.
    return of_head, replace(training, epochs=0) if of_head.coefficients == "closed-form" else training


def check_min_all(min_all: object, select: str | None) -> float | None:
    """``min_all`` as a number, checked together with the policy that it goes with."""
    if min_all is None:
        return None
    message = f"min_all must be a fraction in [0, 1], with select='best_few'; got {min_all!r} with {select!r}"
    if isinstance(min_all, bool) or not isinstance(min_all, (int, float)):
        raise TypeError(message)
    if select != "best_few" or not 0 <= min_all <= 1:
        raise ValueError(message)
    return float(min_all)


def selection_score(select: str, metrics: dict[str, float], min_all: float | None) -> float:
    """How good ``metrics`` on validation data are by the policy ``"best_all"`` or ``"best_few"``: the largest is chosen."""
    if select == "best_all":
        return metrics["all"]
    # What is below the bound comes after all others, the least bad first.
    return metrics["few"] if min_all is None or metrics["all"] >= min_all else metrics["all"] - 2
