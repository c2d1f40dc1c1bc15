"""A repair by one of the presets: few and base classes, neighbours, training, and a plain linear layer back."""

from __future__ import annotations

import copy
import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.writer import save_linear
from ..classes import ClassSplit
from ..head.alphanet import AlphaNet
from ..head.neighbors import pool_size
from ..models.split import find_classifier, linear_layers
from ..training.builder import Builder
from ..training.engine import hits_of
from ..training.presets import preset_options
from ..training.result import FitResult
from ..training.selection import BaselineResult
from ..training.single import Run, train, warn_of
from ..utils.checks import check_kind
from ..utils.files import without_nan
from .all_rows import average_all_rows, check_all_rows
from .recommendation import Recommendation

__all__ = ["Repair", "repair_by_preset"]


@dataclass(frozen=True)
class Repair:
    """What :func:`repair` made.

    Attributes:
        linear: the repaired layer: its base rows are the original ones, to the bit, but for preset ``"all"``, and where
            ``method="auto"`` took another method that changes them.
        head: the Alpha Net that it is folded from, with coefficients and neighbours; None where ``method="auto"`` took another
            method than a preset.
        result: the training's history, and with validation samples the accuracies before and after.
        split: which classes are few, medium and many; ``split.empty``, classes without training samples, keep their rows.
        average: under preset ``"all"``, how the head's layer was averaged with others: which candidate was chosen, its weights.
        recommendation: under ``method="auto"``, all methods compared, and why one was taken.

    Example:
        >>> labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> linear, features = nn.Linear(8, 4), torch.randn(95, 8)
        >>> made = repair(linear, features, labels, epochs=1)
        >>> made.split.few, torch.equal(made.linear.weight[:3], linear.weight[:3])
        (tensor([3]), True)
    """

    linear: nn.Linear
    head: AlphaNet | None
    result: FitResult
    split: ClassSplit
    average: BaselineResult | None = None
    recommendation: Recommendation | None = None

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the repaired layer, ``weight`` and ``bias``, with what is known of it.

        Args:
            path: ending in ``.safetensors`` for that format, in anything else for ``torch.save``'s, which
                ``torch.load(path, weights_only=True)`` reads. Without an ending, ``.safetensors`` where that package is
                installed, else ``.pth``.
            overwrite: replace a file that is there.

        Returns:
            Where it was written.

        Raises:
            ValueError: a file that is there already, a directory that is not.
            ImportError: ``.safetensors``, and the package is not installed.

        Example:
            >>> labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
            >>> made = repair(nn.Linear(8, 4), torch.randn(95, 8), labels, epochs=1)
            >>> made.save("/tmp/repaired_layer.pth", overwrite=True).name
            'repaired_layer.pth'
        """
        target = Path(path)
        if not target.suffix:
            target = target.with_suffix(".safetensors" if importlib.util.find_spec("safetensors") else ".pth")
        result = self.result
        known = {"before": result.before, "after": result.after, "few_bias": result.few_bias, "notes": result.notes}
        known |= {"few_classes": self.split.few.tolist(), "verified": result.verified}
        save_linear(self.linear, target, metadata=without_nan(known), overwrite=overwrite)
        return target

    def apply(self, model: nn.Module, classifier: str | None = None) -> nn.Module:
        """Put the repaired layer into a model, in place of its last linear layer.

        Args:
            model: any module with an ``nn.Linear`` of the repaired layer's shape. It is changed.
            classifier: the layer's dotted name, as in ``model.named_modules()``. Default: the last one.

        Returns:
            The model.

        Raises:
            TypeError: no module.
            ValueError: no such layer, or one of another shape; the message names the linear layers.

        Example:
            >>> labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
            >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
            >>> made = repair(model[2], torch.randn(95, 8), labels, epochs=1)
            >>> torch.equal(made.apply(model)[2].weight, made.linear.weight)
            True
        """
        check_kind(model, nn.Module, "model")
        name = find_classifier(model) if classifier is None else classifier
        layer = linear_layers(model).get(name)
        if layer is None or layer.weight.shape != self.linear.weight.shape:
            shapes = ", ".join(f"{known!r} {list(each.weight.shape)}" for known, each in linear_layers(model).items())
            raise ValueError(
                f"classifier must name a linear layer of shape {list(self.linear.weight.shape)}, got {name!r}; the model has "
                f"{shapes}"
            )
        # In the dtype and on the device of the model, frozen if the layer was, in its mode.
        made = copy.deepcopy(self.linear).to(layer.weight).train(layer.training).requires_grad_(layer.weight.requires_grad)
        if not name:
            return made
        model.set_submodule(name, made)
        return model

    def table(self) -> Any:
        """Metrics before and after, or under ``method="auto"`` all methods, as :meth:`FitResult.table` and
        :meth:`Recommendation.table` have them."""
        return (self.recommendation or self.result).table()

    def __str__(self) -> str:
        return f"{self._said()}\n{self.recommendation or self.result}"

    def _repr_html_(self) -> str:
        return f"<p>{self._said()}</p>{(self.recommendation or self.result)._repr_html_()}"

    def _said(self) -> str:
        return f"{len(self.split.few)} of {self.split.num_classes} classes are few"


def repair_by_preset(
    linear: nn.Module, builder: Builder, preset: str, options: dict[str, Any], progress: bool | None
) -> Repair:
    """What :func:`alphaext.repair` makes of a classifier by a preset, and options in place of the preset's."""
    available = pool_size(builder.split, options.get("pool", "base"))
    if available == 0:
        largest = int(builder.counts().max())
        if len(builder.split.base) > 0:
            raise ValueError(f"pool must have a class, 'many' has none: the largest class has {largest} samples")
        raise ValueError(
            f"every class is few, the largest having {largest} samples, and rows are composed of classes that are not few: "
            "a smaller few_below, or few_classes, leaves some as base"
        )
    if preset == "all":
        check_all_rows(builder)
    of_few_rows = "few" if preset == "all" else preset
    config = preset_options(of_few_rows, pool_size=available, validation=builder.validation is not None) | options
    head, of_training, data = builder.prepare(config)
    run = Run(head, of_training, data, builder.split)
    result = train(run, progress=progress)
    made, average = head.fold(), None
    if preset == "all" and not run.doubt:
        average = average_all_rows(made, linear, builder, of_training.seed, progress)
        assert builder.validation is not None and run.metrics is not None and run.before is not None
        after = run.metrics.of(hits_of(average.linear, builder.validation))
        # The average is to beat the original, not the repaired layer: that one looks better than it is on the samples that its
        # constant was chosen by, and would be kept where the average is better on other samples (as on BANKING77).
        if run.final_policy.score(after) > run.final_policy.score(run.before):
            made = average.linear
            notes = run.notes(after, made)
            result = replace(
                result,
                metrics_after=after,
                kept_original=False,
                notes=notes,
                calibration=run.calibration(made),
                few_bias=average.settings["few_bias"],
            )
    warn_of(result.notes)
    return Repair(made, head, result, builder.split, average)
