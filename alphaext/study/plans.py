"""What a study trains: the paper's experiments, each as a list of configurations, and the choice among them on validation.

Figures, tables and appendices named here are those of the paper. Every experiment varies one thing of an Alpha Net and leaves
the rest as :class:`StudyOptions` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..training.options import OPTIONS, HeadOptions, TrainingOptions, read_options
from ..training.presets import PRESETS
from ..utils.checks import check_choice, check_number
from ..utils.option_table import OptionTable, table_option

EXPERIMENTS = {
    "gamma": "the own coefficient's bound (figures 5 and 9 to 12)",
    "top-k": "how many neighbours (appendix C, figure 7)",
    "pool": "which classes neighbours come from, over all gammas (appendix D, figure 8)",
    "sharing": "one sub-module for all few classes or one each, over all gammas (appendix A, figure 6)",
    "negatives": "base samples for each few sample, at gamma 0.5 (appendix E, table 4)",
    "rule": "how a sub-module's outputs become coefficients",
    "start": "the start of the training, and whether a clamped coefficient can return",
    "controls": "random and cosine neighbours; coefficients that are equal and not trained",
    "data-size": "few classes with fewer training samples",
    "beyond": "what lifts it above one constant on the few logits: each means alone, together, and left out of all",
    "compare": "the rivals and the Alpha Net, each with what validation chooses for it (tables 1 and 2)",
}
"""The experiments of a study."""

ROWS = "rows"
"""A rival that is trained like preset few: one neighbour, and a residual that can make any row of it."""

FORM_NAMES = {"plain": "Alpha Net", "paper": "Alpha Net, paper's form", "few": "Alpha Net, preset few", ROWS: "free rows"}
"""What each form, and that rival, is called in results."""

FROZEN = "frozen uniform alphas"
"""The control without training: gamma for a class's own classifier and ``(1 - gamma) / K`` for each neighbour."""

POLICIES = ("best_all", "best_few", "knee")
"""What a choice on validation samples goes by; see :func:`choose`."""

RETRAINED = ("crt", "lws")
"""The rivals that train on class-balanced samples, a row of "compare" for each seed."""

_NOT_OF_FEW = {"shared", "negative_ratio"}  # it has no sub-modules, and equally many samples of every class

CANDIDATES = "candidates"
"""Under this name stand the results of which "compare" shows the chosen ones."""

_NEGATIVES_GAMMA = 0.5
_GAMMAS: dict[str, Any] = {"above": 0, "maximum": 1}
_OF_IDENTITY = ("first_seed", "gammas", "top_k", "epochs", "batch_size", "lr", "pca_dim", "policy", "max_drop")


CONFIGURATION = (
    *("gamma", "top_k", "pool", "metric", "shared", "rule", "init", "projected_gradient", "negative_ratio", "coefficients"),
    *("residual", "regularize", "samples_per_class", "augment", "augment_neighbors", "prior_correction", "few_bias"),
    *("few_samples", "epochs", "batch_size", "lr", "lr_schedule"),
)
"""The columns of results that say what was trained: options of :func:`alphaext.fit_many`, and ``few_samples``."""


@dataclass(frozen=True)
class Configuration:
    """What is trained. Trainings of a study differ in nothing but the options of :data:`CONFIGURATION`.

    Attributes:
        head: the head's options.
        training: its training's.
        few_samples: how many training samples each few class keeps at most; None for all.
    """

    head: HeadOptions
    training: TrainingOptions
    few_samples: int | None = None

    @classmethod
    def of(cls, *, few_samples: int | None = None, **options: Any) -> Configuration:
        """A configuration of options by name; of those that are not given, the plain form's."""
        return cls(*read_options(options), few_samples)

    def cells(self) -> dict[str, Any]:
        """The columns of results that say which configuration it was."""
        values = {**vars(self.head), **vars(self.training), "few_samples": self.few_samples}
        return {name: values[name] for name in CONFIGURATION}


_PLAIN = {name: entry.default for name, entry in OPTIONS.items()}

FORMS: dict[str, dict[str, Any]] = {"plain": {}} | {
    form: {name: preset[name] for name in CONFIGURATION if name != "gamma" and preset.get(name) != _PLAIN.get(name)}
    for form, preset in PRESETS.items()
}
"""What the plain form and each preset differ in from the plain form, without gamma, which experiments set.

The plain form is the paper's, but starts at the original classifier (docs/reference/defaults.md).
"""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(OptionTable):
    """What to study; checked when made.

    Attributes:
        experiments: names out of :data:`EXPERIMENTS`; all by default.
        seeds: trainings of each configuration: of weights, samples, random neighbours, and cuts of the data.
        first_seed: the seeds are this one and those that follow.
        gammas: tried by gamma, pool, sharing, and compare, which chooses among them (preset few has 1). The paper's 0.1 to
            0.9, and 1.
        fixed_gammas: those with which the experiments train that do not vary gamma: 0.7, which the paper chose, and 1, the
            plain form's. (negatives has 0.5, the paper's.)
        top_ks: of top-k; 2, 5 and 10 in the paper.
        few_samples: of data-size: training samples that each few class keeps at most.
        negative_ratios: of negatives; 0 and 1 in the paper.
        forms: out of :data:`FORMS`: the forms of Alpha Net in gamma, top-k, pool, sharing, negatives and data-size; default
            preset few. The other experiments have their own. Preset few has its own top_k, epochs, batch_size and lr. It has
            neither sub-modules nor negative samples: sharing and negatives train the plain form in its place. The classes and
            confusions that compare shows are those of the first form.
        sharing_lr: learning rate of the one sub-module that all classes share, which each class's gradient moves: many more
            than one of its own has, so that it diverges at theirs.
        retraining_epochs: of cRT and LWS, rivals in compare; 0 leaves them out.
        retraining_lrs: learning rates of cRT and LWS, among which compare chooses.
        top_k: neighbours; 5 in the paper.
        epochs: 80 in the paper.
        batch_size: 64 in the paper.
        lr: learning rate; 0.1 in the paper.
        pca_dim: of the sub-modules' inputs; 500 in the paper for ImageNet-LT, 300 for Places-LT; None for full rows.
        policy: what every choice on validation samples goes by, also that of the epoch (under "knee", which compares, by
            "best_all"); see :func:`choose`.
        max_drop: under "best_few": points of accuracy over all that may be lost; None for 0.

    Raises:
        TypeError, ValueError: a value out of range; the message names it.

    Example:
        >>> StudyOptions(experiments=["gamma"], gammas=[0.5, 1]).gammas
        (0.5, 1.0)
    """

    experiments: Sequence[str] = table_option(
        tuple(EXPERIMENTS),
        "which; " + "; ".join(": ".join(each) for each in EXPERIMENTS.items()),
        choices=tuple(EXPERIMENTS),
        distinct=True,
    )
    seeds: int = table_option(3, "trainings of each configuration, from --seed on", minimum=1)
    first_seed: int = table_option(0, minimum=0)
    gammas: Sequence[float] = table_option(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "of gamma, pool, sharing and compare", distinct=True, **_GAMMAS
    )
    fixed_gammas: Sequence[float] = table_option(
        (0.7, 1.0), "of experiments that vary something else", distinct=True, **_GAMMAS
    )
    top_ks: Sequence[int] = table_option((2, 5, 10), "neighbours, of top-k", distinct=True, minimum=1)
    few_samples: Sequence[int] = table_option(
        (1, 2, 5, 10), "images that few classes keep at most, of data-size", distinct=True, minimum=1
    )
    negative_ratios: Sequence[float] = table_option(
        (0.0, 0.5, 1.0, 2.0, 4.0), "base samples for each few sample, of negatives", distinct=True, minimum=0
    )
    forms: Sequence[str] = table_option(
        ("few",),
        "of Alpha Net in gamma, top-k, pool, sharing, negatives and data-size; of the first compare shows the classes",
        choices=tuple(FORMS),
        distinct=True,
    )
    sharing_lr: float = table_option(0.01, "learning rate of a shared sub-module, of sharing", above=0)
    retraining_epochs: int = table_option(10, "of cRT and LWS in compare; 0 leaves them out", minimum=0)
    retraining_lrs: Sequence[float] = table_option(
        (0.1, 0.4), "learning rates of cRT and LWS to choose from", distinct=True, above=0
    )
    top_k: int = table_option(5, "neighbours of each few class, of all but top-k")
    epochs: int = table_option(80, "of training")
    batch_size: int = table_option(64, "samples a step")
    lr: float = table_option(0.1, "learning rate")
    pca_dim: int | None = table_option(500, OPTIONS["pca_dim"].metadata["help"])
    policy: str = table_option(
        "best_all",
        "what choices on validation features go by: accuracy over all, accuracy of few, or the knee between both",
        choices=POLICIES,
    )
    max_drop: float | None = table_option(
        None, "under best_few: what accuracy over all may lose; without, 0", metavar="POINTS", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # In one order, whatever order they are asked for in.
        object.__setattr__(self, "experiments", tuple(name for name in EXPERIMENTS if name in self.experiments))
        read_options({name: getattr(self, name) for name in ("top_k", "pca_dim", "epochs", "batch_size", "lr")})
        check_policy(self.policy, self.max_drop)

    def identity(self) -> dict[str, Any]:
        """The options that must be equal for results to stand in one table; the others only say which results there are."""
        return {name: getattr(self, name) for name in _OF_IDENTITY}

    def seed_values(self) -> list[int]:
        """The seeds."""
        return list(range(self.first_seed, self.first_seed + self.seeds))


@dataclass(frozen=True)
class Trial:
    """A line of the results to come: a configuration that is trained with a seed, for an experiment.

    Several experiments may ask for one training. ``seed`` is None where nothing is random.
    """

    experiment: str
    method: str
    configuration: Configuration
    seed: int | None

    @property
    def training(self) -> tuple[Configuration, int | None]:
        """What trials have in common that need the same training."""
        return self.configuration, self.seed


def plan(options: StudyOptions, most_neighbors: Mapping[str, int] | None = None) -> list[Trial]:
    """Return what the experiments asked for consist of, in the order of the results.

    Args:
        options: the study's.
        most_neighbors: how many neighbours preset few takes at most from each pool; without, as many as it asks for.

    Returns:
        All trials. Those of "compare" stand under "candidates"; the rivals, which are not trained, are not among them.

    Example:
        >>> trials = plan(StudyOptions(experiments=["top-k"], seeds=1, fixed_gammas=[1.0]))
        >>> [trial.configuration.head.top_k for trial in trials]
        [2, 5, 10]
    """
    variants = _variants(options)
    trials = [
        Trial(
            CANDIDATES if experiment == "compare" else experiment,
            method,
            _base(options, gamma, form, **changes),
            None if method == FROZEN else seed,
        )
        for experiment in options.experiments
        for method, form, gammas, changes in variants[experiment]
        for gamma in gammas
        for seed in options.seed_values()
    ]
    if most_neighbors is not None:
        trials = [_within(trial, most_neighbors) for trial in trials]
    return list(dict.fromkeys(trials))


def _within(trial: Trial, most_neighbors: Mapping[str, int]) -> Trial:
    own = trial.configuration
    of_few = trial.method.startswith((FORM_NAMES["few"], "Alpha Net, more neighbours"))
    if not of_few or own.head.top_k != FORMS["few"]["top_k"]:
        return trial
    fewer = {"top_k": min(own.head.top_k, most_neighbors[own.head.pool])}
    return replace(trial, configuration=Configuration.of(**own.cells() | fewer))


def _base(options: StudyOptions, gamma: float, form: str = "plain", **changes: Any) -> Configuration:
    common = {name: getattr(options, name) for name in ("top_k", "epochs", "batch_size", "lr")}
    return Configuration.of(**common | FORMS[form] | {"gamma": gamma} | changes)


_Variant = tuple[str, str, Sequence[float], Mapping[str, Any]]
"""A method, the form that it trains, with which gammas, and what differs from that form."""


def _variants(options: StudyOptions) -> dict[str, list[_Variant]]:
    """What each experiment trains, in the order of the results."""
    plain, few, one = FORM_NAMES["plain"], FORM_NAMES["few"], (1.0,)
    of_few = FORMS["few"]
    alone: dict[str, dict[str, Any]] = {
        "one constant": {"few_bias": True},
        "direct coefficients": {"coefficients": "direct"},
        "direct coefficients, L2": {"coefficients": "direct", "regularize": of_few["regularize"]},
        "L2": {"regularize": of_few["regularize"]},
        "more neighbours": {"top_k": of_few["top_k"]},
        "residual, L2": {name: of_few[name] for name in ("coefficients", "residual", "regularize")},
        "balanced classes": {"samples_per_class": of_few["samples_per_class"]},
        "prior correction": {"prior_correction": True},
        "drawn samples": {name: of_few[name] for name in ("samples_per_class", "augment", "augment_neighbors")},
    }
    left_out: dict[str, dict[str, Any]] = {
        "without the constant": {"few_bias": False},
        "without residual": {"residual": 0},
        "without L2": {"regularize": 0.0},
        "without drawn samples": {"augment": None},
        "without drawn samples, proportional classes, prior correction": {
            "augment": None,
            "samples_per_class": None,
            "prior_correction": True,
        },
        "with sub-modules, without residual": {"coefficients": "mlp", "residual": 0, "top_k": options.top_k},
        "fewer neighbours": {"top_k": options.top_k},
        "random neighbours": {"metric": "random"},
    }
    sharing: list[dict[str, Any]] = [{"shared": False}, {"shared": True, "lr": options.sharing_lr}]
    negatives = [{"negative_ratio": ratio} for ratio in options.negative_ratios]
    fewer_samples = [{"few_samples": most} for most in (*options.few_samples, None)]
    return {
        "gamma": _in_each_form(options, options.gammas, [{}]),
        "top-k": _in_each_form(options, options.fixed_gammas, [{"top_k": top_k} for top_k in options.top_ks]),
        "pool": _in_each_form(options, options.gammas, [{"pool": pool} for pool in ("many", "base", "all")]),
        "sharing": _in_each_form(options, options.gammas, sharing),
        "negatives": _in_each_form(options, [_NEGATIVES_GAMMA], negatives),
        "rule": [
            (plain, "plain", options.fixed_gammas, {}),
            # l1 has no gamma, and to softmax it is a bound and no share: both with the one that bounds nothing.
            ("Alpha Net, softmax", "plain", one, {"rule": "softmax"}),
            ("Alpha Net, l1", "plain", one, {"rule": "l1"}),
        ],
        "start": [
            (plain, "plain", options.fixed_gammas, {"init": "identity", "projected_gradient": True}),
            ("Alpha Net, identity start", "plain", options.fixed_gammas, {"init": "identity", "projected_gradient": False}),
            ("Alpha Net, default start", "plain", options.fixed_gammas, {"init": "default", "projected_gradient": True}),
            (FORM_NAMES["paper"], "plain", options.fixed_gammas, {"init": "default", "projected_gradient": False}),
        ],
        "controls": [
            (plain, "plain", options.fixed_gammas, {"metric": "euclidean"}),
            ("Alpha Net, random neighbours", "plain", options.fixed_gammas, {"metric": "random"}),
            ("Alpha Net, cosine neighbours", "plain", options.fixed_gammas, {"metric": "cosine"}),
            (FROZEN, "plain", options.gammas, {"epochs": 0}),
        ],
        "data-size": _in_each_form(options, options.fixed_gammas, fewer_samples),
        # Each means alone, on the plain form with gamma 1; all together; and all but one, or with another in its place.
        "beyond": [
            (plain, "plain", one, {}),
            *((f"Alpha Net, {name}", "plain", one, changes) for name, changes in alone.items()),
            (few, "few", one, {}),
            *((f"{few}, {name}", "few", one, changes) for name, changes in left_out.items()),
            (FORM_NAMES[ROWS], "few", one, {"top_k": 1}),
        ],
        "compare": [
            (plain, "plain", options.gammas, {}),
            (FORM_NAMES["paper"], "paper", options.gammas, {}),
            (few, "few", one, {}),
            (FORM_NAMES[ROWS], "few", one, {"top_k": 1}),
        ],
    }


def _in_each_form(options: StudyOptions, gammas: Sequence[float], changes: Sequence[Mapping[str, Any]]) -> list[_Variant]:
    """Changes of each form that the study is of; the plain form in the place of preset few where that has no such option."""
    lacking = any(_NOT_OF_FEW.intersection(change) for change in changes)
    forms = dict.fromkeys("plain" if form == "few" and lacking else form for form in options.forms)
    return [(FORM_NAMES[form], form, gammas, change) for form in forms for change in changes]


def choose(
    rows: Sequence[Mapping[str, Any]],
    policy: str,
    max_drop: float | None = None,
    *,
    original: Mapping[str, Any] | None = None,
    part: str = "val",
) -> Mapping[str, Any]:
    """Choose one of several results by its accuracy on validation samples; nothing else of a row is looked at.

    Args:
        rows: results with ``val_few`` and ``val_all``, fractions of 1; those that have none (a training that diverged) take no
            part. Put the one nearest to no change first: of equal ones the first is chosen.
        policy: ``"best_all"``, the best accuracy over all; ``"best_few"``, the best few accuracy among those that lose at most
            ``max_drop`` points over all against ``original`` (if all lose more, the best over all); ``"knee"``, of those that
            no other beats in few and in all, the one that lies farthest from the line between the two extremes, each axis
            measured by how far they are apart.
        max_drop: points (0.5 is half a percent of the samples), at least 0; only with ``"best_few"``; None for 0.
        original: the result of the original classifier; only ``"best_few"`` needs it.
        part: ``"val"``. It is here to be refused: whoever chooses by test samples has none left to measure on.

    Returns:
        One of ``rows``.

    Raises:
        TypeError: a ``max_drop`` that is no number.
        ValueError: a ``part`` other than ``"val"``, an unknown policy, ``max_drop`` with another policy, ``"best_few"`` without
            ``original``, no row with validation accuracies.

    Example:
        >>> rows = [{"gamma": 1.0, "val_few": 0.1, "val_all": 0.5}, {"gamma": 0.7, "val_few": 0.3, "val_all": 0.49}]
        >>> choose(rows, "best_all")["gamma"], choose(rows, "best_few", max_drop=2.0, original=rows[0])["gamma"]
        (1.0, 0.7)
    """
    if part != "val":
        raise ValueError(
            f"part must be 'val', got {part!r}: what is chosen by its accuracy on other samples, test ones above all, has seen "
            "them, and its accuracy on them is no longer that of new samples"
        )
    drop = check_policy(policy, max_drop)
    known = [row for row in rows if _is_number(row.get("val_all"))]
    if not known:
        raise ValueError(f"rows must have at least one with val_all to choose by, got none among {len(rows)}")
    best = max(known, key=lambda row: row["val_all"])
    if policy == "best_all":
        return best
    with_few = [row for row in known if _is_number(row.get("val_few"))]
    if not with_few:
        raise ValueError(f"rows must have val_few for policy {policy!r}: there are no validation samples of few classes")
    if policy == "knee":
        return _knee(with_few)
    if original is None or not _is_number(original.get("val_all")):
        raise ValueError("original must be given, with its val_all, for policy 'best_few': it says what may be lost")
    # A few rounding errors below, for the difference of two fractions is not exact.
    least = original["val_all"] - (drop or 0.0) / 100 - 1e-9
    allowed = [row for row in with_few if row["val_all"] >= least]
    return max(allowed, key=lambda row: (row["val_few"], row["val_all"]), default=best)


def _knee(rows: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    points = {(row["val_few"], row["val_all"]) for row in rows}
    beaten = {(few, total) for few, total in points if any(f >= few and t >= total for f, t in points - {(few, total)})}
    front = [row for row in rows if (row["val_few"], row["val_all"]) not in beaten]

    def share(row: Mapping[str, Any], name: str) -> float:
        values = [other[name] for other in front]
        width = max(values) - min(values)
        return (row[name] - min(values)) / width if width else 0.0

    # The extremes are (0, 1) and (1, 0): the distance from their line grows with the sum. Of two points the better in all.
    return max(front, key=lambda row: (share(row, "val_few") + share(row, "val_all"), row["val_all"]))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_policy(policy: str | None, max_drop: float | None) -> float | None:
    """``max_drop``, checked together with the policy; None stands for no policy."""
    if policy is not None:
        check_choice(policy, "policy", POLICIES)
    if max_drop is None:
        return None
    if policy != "best_few":
        raise ValueError(f"max_drop goes with policy 'best_few', got {max_drop!r} with {policy!r}")
    return check_number(max_drop, "max_drop", minimum=0)
