"""What a classifier says of each sample, kept as a few numbers a sample: all that metrics and comparisons need."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.checks import PRECISIONS, check_choice, check_integer, check_kind
from ..utils.modules import computing_in, evaluating
from ..utils.progress import task_bar
from ..utils.tensors import (
    LabelledFeatures,
    TensorLike,
    as_tensor,
    check_device,
    check_finite,
    check_floating,
    check_labels,
    check_rows,
    check_shape,
    check_targets,
    features_and_labels,
    first_true,
    floating_tensor,
)
from .accuracy import label_ranks

# Rows of features that are read and moved to the device at a time, if the caller does not say.
_BLOCK_ROWS = 4096
# Rows of one matrix product, padded if need be. Always the same number, and a sample always in the same place of its product:
# so its scores have the same bits whatever the block size, on any matrix library. Fewer rows are slower, more hardly faster.
_PRODUCT_ROWS = 256
# Logits of one product, beyond which it gets fewer rows, down to the 64 that matrix libraries round alike from.
_PRODUCT_ELEMENTS = 1 << 26
_FEWEST_PRODUCT_ROWS = 64
# Logits of one block where they are there already.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """What a classifier says of ``n`` samples, as made by :func:`predict` and :func:`predict_logits`.

    Made by hand, it takes tensors, arrays or lists; all is kept on the CPU.

    Attributes:
        ranks: int64 [n], how many classes stand before the right one (:func:`alphaext.metrics.label_ranks`): 0 where the
            sample is recognised, below k where the right class is among the best k.
        predicted: int64 [n], the class with the largest score; of equal scores the class of lowest id.
        labels: int64 [n], the right class.
        num_classes: N, the classes that compete.
        confidence: float32 [n], the softmax probability of the predicted class; None if not known. Only
            :func:`alphaext.metrics.expected_calibration_error` needs it.

    Raises:
        TypeError: ranks or classes that are not integers, a confidence that is not floating point.
        ValueError: values out of range, different numbers of samples, or a sample whose rank is 0 though another class than
            the right one is predicted, or the other way round.

    Example:
        >>> predictions = Predictions(ranks=[0, 2], predicted=[1, 0], labels=[1, 2], num_classes=3)
        >>> predictions
        Predictions(samples=2, num_classes=3)
        >>> predictions.hits(top_k=1), predictions.counts()
        (tensor([0, 1, 0]), tensor([0, 1, 1]))
    """

    ranks: Tensor
    predicted: Tensor
    labels: Tensor
    num_classes: int
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        num_classes = check_integer(self.num_classes, "num_classes", minimum=1)
        object.__setattr__(self, "num_classes", num_classes)
        for name in ("labels", "ranks", "predicted"):
            values = check_labels(getattr(self, name), num_classes, name).cpu()
            object.__setattr__(self, name, values)
            if len(values) != len(self.labels):
                raise ValueError(f"{name} and labels must have one entry a sample, got {len(values)} and {len(self.labels)}")
        if (index := first_true((self.ranks == 0) != (self.predicted == self.labels))) is not None:
            raise ValueError(
                f"ranks must be 0 exactly where predicted is the label, got rank {int(self.ranks[index])}, predicted "
                f"{int(self.predicted[index])}, label {int(self.labels[index])} at index {index}"
            )
        if self.confidence is not None:
            object.__setattr__(self, "confidence", _check_confidence(self.confidence, len(self.labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Predictions(samples={len(self)}, num_classes={self.num_classes})"

    def counts(self) -> Tensor:
        """Samples of each class, int64 [N]."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def hits(self, top_k: int = 1) -> Tensor:
        """Of each class, its samples that have it among their best ``top_k`` classes: int64 [N]."""
        top_k = check_integer(top_k, "top_k", minimum=1)
        return torch.bincount(self.labels.masked_select(self.ranks < top_k), minlength=self.num_classes)

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and lists, for JSON; :meth:`from_dict` makes the same predictions of it again."""
        return {
            "num_classes": self.num_classes,
            "labels": self.labels.tolist(),
            "predicted": self.predicted.tolist(),
            "ranks": self.ranks.tolist(),
            "confidence": None if self.confidence is None else self.confidence.tolist(),
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Predictions:
        """What :meth:`to_dict` returned, as predictions.

        Raises:
            TypeError, ValueError: a missing entry, or values as :class:`Predictions` refuses them.

        Example:
            >>> predictions = Predictions(ranks=[0], predicted=[1], labels=[1], num_classes=2)
            >>> Predictions.from_dict(predictions.to_dict())
            Predictions(samples=1, num_classes=2)
        """
        check_kind(entries, Mapping, "entries")
        names = ("ranks", "predicted", "labels", "num_classes")
        missing = [name for name in names if name not in entries]
        if missing:
            raise ValueError(f"entries must hold {', '.join(names)}, got no {', '.join(missing)}")
        return cls(**{name: entries[name] for name in names}, confidence=entries.get("confidence"))


def predict(
    classifier: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    *,
    block_rows: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool | None = None,
) -> Predictions:
    """Return what ``classifier`` says of each sample, from its features.

    Features are read block by block and scored 256 samples at a time, so neither all features nor all scores are ever in
    memory. The products always have the same sizes, so that the results have the same bits whatever ``block_rows``.

    Args:
        classifier: maps [m, D] to scores [m, N], each row for itself: ``nn.Linear``, :class:`alphaext.AlphaNet` or any other
            module. It is evaluated in evaluation mode, without gradient, and left as it was.
        features: floating point [n, D], at least one row; a tensor, an array or a memory map (float16 too). They are
            converted to the classifier's dtype.
            Or a :class:`alphaext.features.Features`, which has its labels.
        labels: right class of each sample, integers [n], where ``features`` has none.
        block_rows: rows of features that are read at a time, rounded up to a multiple of 256; default 4096.
        device: where to compute; default where the classifier is. Elsewhere, a copy of the classifier is used.
        precision: ``"float32"``: the classifier computes in its own dtype (default); ``"bfloat16"``: its products in bfloat16,
            whose three digits make more scores equal.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        :class:`Predictions`, on the CPU. Ties have one answer, as in :func:`alphaext.metrics.label_ranks`.

    Raises:
        TypeError: a classifier that is no module, features that are not floating point, labels that are not integers.
        ValueError: no samples, a width that the classifier does not take, labels out of range or too many or too few,
            features that are not finite, a score that is NaN (the message names the sample), a device that is not there.

    Example:
        >>> linear = nn.Linear(2, 3, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        >>> predictions = predict(linear, torch.tensor([[2.0, 1.0], [0.0, 3.0]]), [1, 1])
        >>> predictions.predicted, predictions.ranks
        (tensor([0, 1]), tensor([1, 0]))
    """
    check_kind(classifier, nn.Module, "classifier")
    check_choice(precision, "precision", PRECISIONS)
    features, labels = features_and_labels(features, labels)
    source, floating = check_rows(features, "features", "D")
    samples, width = int(source.shape[0]), int(source.shape[1])
    if samples == 0:
        raise ValueError("features must not be empty")
    takes, num_classes = _size(classifier, "in_features"), _size(classifier, "out_features")
    targets = check_targets(labels, num_classes, samples, "features").cpu()
    if takes is not None and takes != width:
        raise ValueError(f"features must have shape [n, {takes}] for this classifier, got [{samples}, {width}]")
    block_rows = check_integer(_BLOCK_ROWS if block_rows is None else block_rows, "block_rows", minimum=1)
    block_rows += -block_rows % _PRODUCT_ROWS
    own = _first_floating(classifier)
    place = check_device((floating if own is None else own).device if device is None else device)
    dtype = floating.dtype if own is None else own.dtype
    if own is not None and own.device != place:
        classifier = copy.deepcopy(classifier).to(place)

    many_classes = num_classes is not None and _PRODUCT_ROWS * num_classes > _PRODUCT_ELEMENTS
    product_rows = _FEWEST_PRODUCT_ROWS if many_classes else _PRODUCT_ROWS
    collected = _Collected(samples, num_classes)
    bar = task_bar(progress, "samples scored", total=samples)
    with evaluating(classifier), computing_in(precision, place), bar as report:
        for start in range(0, samples, block_rows):
            block = as_tensor(source[start : start + block_rows], "features").detach().to(place)
            check_finite(block, "features", first_row=start)
            # A fresh block each time: whatever memory features lie in, the products see them alike.
            padded = torch.empty(len(block) + -len(block) % _PRODUCT_ROWS, width, dtype=dtype, device=place)
            padded[: len(block)] = block
            padded[len(block) :] = block[-1]
            for first in range(0, len(block), product_rows):
                logits = _scores(classifier, padded[first : first + product_rows], collected.num_classes)
                if collected.num_classes is None:
                    collected.num_classes = logits.shape[1]
                    check_labels(targets, logits.shape[1])
                collected.add(logits[: len(block) - first], targets, "classifier")
            report(len(block))
    return collected.predictions(targets)


def predict_logits(logits: TensorLike, labels: TensorLike) -> Predictions:
    """Return what a classifier says of each sample, from scores that are there already.

    Args:
        logits: floating point [n, N], N at least 1; tensor, array or memory map, read block by block. Infinities are ranked
            as such (a class may be masked by -inf).
        labels: right class of each sample, integers [n].

    Returns:
        :class:`Predictions`, on the CPU.

    Raises:
        TypeError: logits that are not floating point, labels that are not integers.
        ValueError: NaN among the logits (the message names the sample), labels out of range or too many or too few.

    Example:
        >>> predict_logits(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0]]), [2, 1]).ranks
        tensor([1, 1])
    """
    source, _ = check_rows(logits, "logits", "N")
    samples, num_classes = int(source.shape[0]), int(source.shape[1])
    if num_classes == 0:
        raise ValueError(f"logits must have at least one column, got [{samples}, 0]")
    targets = check_targets(labels, num_classes, samples, "logits").cpu()
    collected = _Collected(samples, num_classes)
    rows = max(1, _BLOCK_ELEMENTS // num_classes)
    for start in range(0, samples, rows):
        collected.add(as_tensor(source[start : start + rows], "logits").detach(), targets, "logits")
    return collected.predictions(targets)


class _Collected:
    """Predictions in the making, block of scores by block of scores."""

    @torch.inference_mode(False)  # a tensor made there cannot be written outside
    def __init__(self, samples: int, num_classes: int | None = None) -> None:
        self.num_classes = num_classes
        self._done = 0
        self._ranks = torch.empty(samples, dtype=torch.int64, device="cpu")
        self._predicted = torch.empty(samples, dtype=torch.int64, device="cpu")
        self._confidence = torch.empty(samples, dtype=torch.float32, device="cpu")

    def add(self, logits: Tensor, targets: Tensor, name: str) -> None:
        """Take up the scores of the next samples; ``targets`` are the labels of all."""
        part = slice(self._done, self._done + len(logits))
        best, predicted = logits.max(dim=1)  # NaN where there is one
        if (row := first_true(best.isnan())) is not None:
            column = first_true(logits[row].isnan())
            raise ValueError(f"{name} must give no NaN, got nan for sample {part.start + row}, class {column}")
        self._ranks[part] = label_ranks(logits, targets[part].to(logits.device)).cpu()
        self._predicted[part] = predicted.cpu()
        self._confidence[part] = _confidence(logits, best, predicted).cpu()
        self._done = part.stop

    def predictions(self, targets: Tensor) -> Predictions:
        assert self._done == len(targets) and self.num_classes is not None
        return Predictions(self._ranks, self._predicted, targets, self.num_classes, self._confidence)


def _confidence(logits: Tensor, best: Tensor, predicted: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    confidence = wide.softmax(dim=1).gather(1, predicted.unsqueeze(1)).squeeze(1).float()
    # The limit of infinite scores: the classes that have the largest one share it all.
    infinite = ~best.isfinite()
    if bool(infinite.any()):
        confidence[infinite] = 1 / (logits[infinite] == best[infinite].unsqueeze(1)).sum(dim=1).float()
    return confidence


def _scores(classifier: nn.Module, block: Tensor, num_classes: int | None) -> Tensor:
    """The classifier's scores of ``block``, checked for all but their values."""
    try:
        logits = classifier(block)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"classifier cannot score features of shape {list(block.shape)}, {block.dtype}, on {block.device}: {error}"
        ) from error
    if not isinstance(logits, Tensor):
        raise TypeError(f"classifier must return a tensor of scores, got {type(logits).__name__}")
    check_shape(logits, "the classifier's scores", (len(block), "N" if num_classes is None else num_classes))
    check_floating(logits, "the classifier's scores")
    if logits.shape[1] == 0:
        raise ValueError("the classifier's scores must have at least one column, got none")
    return logits


def _check_confidence(confidence: TensorLike, samples: int) -> Tensor:
    values = floating_tensor(confidence, "confidence", (samples,)).cpu()
    if (index := first_true(~((values >= 0) & (values <= 1)))) is not None:  # NaN too
        raise ValueError(f"confidence must be in [0, 1], got {float(values[index])} at index {index}")
    return values.float()


def _size(classifier: nn.Module, name: str) -> int | None:
    size = getattr(classifier, name, None)
    return size if isinstance(size, int) else None


def _first_floating(classifier: nn.Module) -> Tensor | None:
    """What tells the classifier's dtype and device; None if it has no numbers of its own."""
    tensors = (*classifier.parameters(), *classifier.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)
