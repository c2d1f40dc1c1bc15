"""What a training did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class FitResult:
    """What :func:`fit` did.

    Attributes:
        history: one dictionary an epoch, from epoch 0 (before training): ``epoch``, ``loss`` (mean cross-entropy; nan for
            epoch 0), ``lr`` (what the epoch trained with), ``clamped`` (classes whose own coefficient sits on its clamp), and
            with validation data the sixteen metrics.
        selected_epoch: the epoch whose parameters the head now has.
        selection: the policy that chose it, with its bounds.
        metrics_before: sixteen metrics of the original classifier on the validation data, or None without: ``few``,
            ``medium``, ``many``, ``all``, top-1 accuracy over samples, a fraction of 1; and each with ``_top5``,
            ``_class_mean`` (the mean of the classes' accuracies) and ``_class_mean_top5``.
        metrics_after: the same of the head as it is now.
        clamped: classes whose own coefficient sits on its clamp now.
        engine: what ran the training, ``"native"`` or ``"autograd"``.
        engine_reason: why it was not the native engine; empty if it was, or if ``"autograd"`` was asked for.
        seconds: wall-clock time.
        few_bias: the constant on the few scores that validation samples chose, in ``metrics_after`` but not in ``history``; 0
            where none was asked for.
    """

    history: list[dict[str, float]] = field(repr=False)
    selected_epoch: int
    selection: str
    metrics_before: dict[str, float] | None = field(repr=False)
    metrics_after: dict[str, float] | None = field(repr=False)
    clamped: int
    engine: str
    engine_reason: str
    seconds: float
    few_bias: float = 0.0

    @property
    def before(self) -> dict[str, float] | None:
        """Top-1 accuracy of the original classifier on the validation data: ``few``, ``medium``, ``many``, ``all``."""
        return _top1(self.metrics_before)

    @property
    def after(self) -> dict[str, float] | None:
        """The same of the head as it is now."""
        return _top1(self.metrics_after)

    def plot(self) -> Any:
        """Loss and accuracies by epoch, as a matplotlib ``Figure`` (``pip install 'alphaext[report]'``)."""
        from .history import plot_history

        return plot_history(self)

    def _repr_html_(self) -> str:
        from .history import history_html

        return history_html(self)


def _top1(metrics: dict[str, float] | None) -> dict[str, float] | None:
    return None if metrics is None else {name: metrics[name] for name in ("few", "medium", "many", "all")}
