"""What a training did, as numbers, as a figure, and as a table for notebooks."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from ..metrics.accuracy import SPLITS_AND_ALL
from ..utils.figures import COLOR_VARIABLES, INK, MUTED, own_style, render, require_matplotlib, series_color, series_marker
from ..utils.records import data_frame
from ..utils.text import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["AlphaNetWarning", "FitResult", "history_html", "plot_history"]

_MOST_ROWS = 12


class AlphaNetWarning(UserWarning):
    """Alpha Net did less than it was asked to, or something to know of: the message says what and why."""


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
        kept_original: nothing was better than the original classifier on validation samples, and the head is that now; what was
            learned is still in its parameters.
        verified: validation samples have shown what was gained; False without them, and where they show too little.
        notes: what to know of the result, in sentences: that it is not verified, that the original is kept, what is lost.
        calibration: what measures ``calibration_errors``; None without validation samples, and in :func:`fit_many`.

    Example:
        >>> linear, features, labels = nn.Linear(8, 4), torch.randn(40, 8), torch.arange(40) % 4
        >>> head = AlphaNet.from_linear(linear, members=[[3, 0, 1]], gamma=0.5, seed=0)
        >>> result = fit(head, features, labels, epochs=2, progress=False)
        >>> len(result.history), result.selected_epoch, result.engine, result.verified
        (3, 2, 'native', False)
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
    kept_original: bool = False
    verified: bool = False
    notes: list[str] = field(default_factory=list)
    calibration: Callable[[], tuple[float, float]] | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def calibration_errors(self) -> tuple[float, float] | None:
        """Of the original classifier and of the head as training left it, measured when first asked for.

        On validation samples, some thousand at most (:func:`alphaext.metrics.expected_calibration_error` over all).
        """
        return None if self.calibration is None else self.calibration()

    @property
    def before(self) -> dict[str, float] | None:
        """Top-1 accuracy of the original classifier on the validation data: ``few``, ``medium``, ``many``, ``all``."""
        return _top1(self.metrics_before)

    @property
    def after(self) -> dict[str, float] | None:
        """The same of the head as it is now."""
        return _top1(self.metrics_after)

    def table(self) -> Any:
        """The metrics before and after, and the calibration errors, fractions of 1; without validation samples no rows.

        A pandas ``DataFrame`` where pandas is installed, else a list of dictionaries.
        """
        errors, rows = self.calibration_errors or (math.nan, math.nan), []
        for when, metrics, error in zip(("before", "after"), (self.metrics_before, self.metrics_after), errors, strict=True):
            if metrics is not None:
                rows.append({"when": when, **metrics, "calibration_error": error})
        return data_frame(rows, "when")

    def plot(self) -> Any:
        """Loss and accuracies by epoch, as a matplotlib ``Figure``; it needs matplotlib."""
        return plot_history(self)

    def __str__(self) -> str:
        table, lines = _summary(self)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)
        return "\n".join([*rows, *lines])

    def _repr_html_(self) -> str:
        return history_html(self)


def _top1(metrics: dict[str, float] | None) -> dict[str, float] | None:
    return None if metrics is None else {name: metrics[name] for name in SPLITS_AND_ALL}


def plot_history(result: FitResult) -> Figure:
    """Return a figure of a training: its loss, and with validation data few accuracy and accuracy over all, by epoch.

    Args:
        result: what :func:`alphaext.fit` returned.

    Returns:
        The figure, which belongs to no window and to no global state: ``figure.savefig("training.png")``, or the last line of a
        notebook's cell. A vertical line marks the selected epoch, horizontal ones the original classifier.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.

    Example:
        >>> linear, features, labels = nn.Linear(8, 4), torch.randn(40, 8), torch.arange(40) % 4
        >>> split = ClassSplit(few=[3], medium=[2], many=[0, 1])
        >>> head = AlphaNet.from_linear(linear, members=[[3, 0, 1]], gamma=0.5, seed=0)
        >>> result = fit(head, features, labels, val_features=features, val_labels=labels, epochs=2, progress=False)
        >>> [axes.get_ylabel() for axes in plot_history(result).axes]
        ['loss', 'validation accuracy, %']
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels = _panels(result)
    with own_style("training"):
        figure = Figure(figsize=(8.0 if len(panels) > 1 else 4.4, 3.2), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, result, names)
            axes.legend(loc="best")
    return figure


def _panels(result: FitResult) -> list[list[str]]:
    """What each panel shows: the loss, and what was measured of few and all, in any epoch."""
    measured = [part for part in ("few", "all") if _known(result, part)]
    return [["loss"], measured] if measured else [["loss"]]


def _known(result: FitResult, name: str) -> list[tuple[float, float]]:
    """The epochs in which a number is known, with that number."""
    return [(entry["epoch"], entry[name]) for entry in result.history if not math.isnan(entry.get(name, math.nan))]


def _draw(axes: Any, result: FitResult, names: list[str]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "loss": {"color": series_color(4)},
        "few": {"color": series_color(0), "marker": series_marker(0), "markersize": 3, "linewidth": 1.3},
        "all": {"color": INK, "marker": series_marker(3), "markersize": 3, "linewidth": 1.3},
    }
    unit = 1 if names == ["loss"] else 100
    for name in names:
        epochs, values = zip(*_known(result, name), strict=True) if _known(result, name) else ((), ())
        axes.plot(epochs, [unit * value for value in values], label=name, **styles[name])
        before = (result.metrics_before or {}).get(name, math.nan)
        if not math.isnan(before):
            axes.axhline(unit * before, color=styles[name]["color"], linestyle=":", linewidth=1.1)
    label = f"selected: epoch {result.selected_epoch}"
    axes.axvline(result.selected_epoch, color=MUTED, linestyle="--", linewidth=1.1, label=label)
    axes.set_ylabel("loss" if unit == 1 else "validation accuracy, %")
    axes.set_xlabel("epoch")


def history_html(result: FitResult) -> str:
    """Return a training as HTML for notebooks: accuracies before and after, epochs, and a figure if matplotlib is there.

    Args:
        result: what :func:`alphaext.fit` returned.

    Returns:
        An element without scripts, links or anything that is fetched; whatever texts hold is shown as text.

    Example:
        >>> linear, features, labels = nn.Linear(8, 4), torch.randn(40, 8), torch.arange(40) % 4
        >>> head = AlphaNet.from_linear(linear, members=[[3, 0, 1]], gamma=0.5, seed=0)
        >>> print(history_html(fit(head, features, labels, epochs=2, progress=False))[:59])
        <div class="alphaext-training"><p>Epoch 2 of 2, selected by
    """
    last = len(result.history) - 1
    clamped = f"{result.clamped} classes on their clamp"
    text = f"Epoch {result.selected_epoch} of {last}, selected by: {result.selection}; {clamped}; {result.seconds:.2f} s"
    engine = f"engine {result.engine}" + (f" ({result.engine_reason})" if result.engine_reason else "")
    pieces = [
        f'<div class="alphaext-training"><p>{escape(text)}; {escape(engine)}.</p>',
        _summary_html(result),
        _figure(result),
    ]
    return "".join([*pieces, _epochs(result), "</div>"])


def _summary_html(result: FitResult) -> str:
    table, lines = _summary(result)
    shown = _table(table[0], table[1:]) if table else ""
    return shown + "".join(f"<p>{escape(line)}</p>" for line in lines)


def _summary(result: FitResult) -> tuple[list[list[str]], list[str]]:
    """A small table of before and after, its header first, and what to say below it."""
    lines = [f"Constant on the few scores: {result.few_bias:+.3g}"] if result.few_bias else []
    before, after = result.metrics_before, result.metrics_after
    if before is None or after is None:
        return [], [*lines, "Not verified: there are no validation samples, and nothing was chosen."]
    errors = result.calibration_errors or (math.nan, math.nan)
    table = [["validation samples, %", *(f"{part} top-1" for part in SPLITS_AND_ALL), "all top-5", "calibration error"]]
    for when, values, error in (("before", before, errors[0]), ("after", after, errors[1])):
        shown = [*(values[part] for part in SPLITS_AND_ALL), values["all_top5"], error]
        table.append([when, *map(percent, shown)])
    return table, [*lines, *result.notes]


def _figure(result: FitResult) -> str:
    """A small picture a panel; nothing where there is no matplotlib."""
    try:
        require_matplotlib()
    except ImportError:
        return ""
    # A page may hold several trainings: ids go by what is drawn.
    shown = repr((result.history, result.metrics_before, result.selected_epoch))
    prefix = f"alphaext-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"
    inline = ""
    for names in _panels(result):
        known = {name: [value for _, value in _known(result, name)] for name in names}
        alt = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in known.items() if values)
        inline += render(f"{prefix}-{names[0]}", functools.partial(_draw, result=result, names=names), alt=alt).inline
    # A notebook's page knows none of the report's colours: the figures lie on white.
    for color, variable in COLOR_VARIABLES.items():
        inline = inline.replace(variable, color)
    return f'<div style="display:flex;flex-wrap:wrap">{inline}</div>'


def _epochs(result: FitResult) -> str:
    """Some epochs, the first, the last and the selected one among them."""
    last = len(result.history) - 1
    parts = [part for part in SPLITS_AND_ALL if _known(result, part)]
    rows = [
        [
            f"{epoch} (selected)" if epoch == result.selected_epoch else str(epoch),
            f"{entry['loss']:.4g}",
            f"{entry['lr']:.3g}",
            f"{entry['clamped']:g}",
            *(percent(entry.get(part)) for part in parts),
        ]
        for epoch, entry in enumerate(result.history)
        if epoch % -(-(last + 1) // _MOST_ROWS) == 0 or epoch in (last, result.selected_epoch)
    ]
    table = _table(["epoch", "loss", "lr", "on their clamp", *(f"{part}, %" for part in parts)], rows)
    return f"<details><summary>Epochs</summary>{table}</details>"


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
