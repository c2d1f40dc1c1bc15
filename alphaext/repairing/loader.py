"""A model and its data, as they are: the features of a loader's batches, and the model with its rare classes repaired."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..doctor.accuracy import at_chance, chance_level
from ..features.store import Features
from ..metrics.predictions import predict
from ..models.huggingface import class_names_of
from ..models.split import (
    called,
    check_used_once,
    compare_scores,
    find_classifier,
    is_output,
    linear_layers,
    logits_of,
    plain_scores,
    rows_of,
    unwrapped,
)
from ..training.result import AlphaNetWarning
from ..utils.callers import warn_caller
from ..utils.checks import check_class_names, check_integer, check_kind, if_given
from ..utils.linear import make_linear, wide
from ..utils.modules import evaluating
from ..utils.progress import task_bar
from ..utils.tensors import as_tensor, check_device, check_finite, check_labels, check_not_meta
from ..utils.text import percent
from .preset import Repair
from .repair import repair

__all__ = ["RepairedModel", "extract_features", "repair_model"]

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""What labels are called in batches that have names."""


def extract_features(
    model: nn.Module,
    data: Any,
    *,
    classifier: str | None = None,
    label_name: str | int | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Features:
    """Compute what goes into a model's last linear layer, for every sample of its data; the result stays in memory.

    Args:
        model: any module whose output, or the output's ``logits``, is that of an ``nn.Linear``. It runs in eval mode, without
            gradients, and is afterwards as it was.
        data: a ``DataLoader`` or another iterable of batches; a ``Dataset`` of samples; or arrays ``(inputs, labels)``, or a
            mapping of arrays by name. A batch is a tuple whose last entry is the labels, or has names (a mapping, a dataclass,
            a named tuple): then the labels are under one of ``labels``, ``label``, ``targets``, ``target`` and ``y``, and the
            model gets all other tensors by their names. Any other object with such an attribute goes into the model whole.
            Inputs are of any kind: images, token ids, rows of a table. The order plays no part. A loader that leaves samples
            out, draws them with replacement or augments them is warned of.
        classifier: dotted name of the last linear layer. Default: the one whose output is the model's.
        label_name: the name of the labels, where it is another one; or their place in tuples, as in 1 where a third entry
            follows that the model does not take.
        num_classes: N, which must be the layer's; default the layer's own.
        class_names: of all classes. Default: those of the data set (``classes``), or of the model's configuration
            (``id2label``), or none.
        batch_size: samples at a time, default 64; of a ``Dataset`` and of arrays only.
        device: where the model computes; it goes back afterwards. Default: where it is.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        The features, float32 ``[n, D]`` in the order of the data, with their labels: a :class:`alphaext.features.Features`,
        which :func:`alphaext.fit`, :func:`alphaext.repair` and the rest take in place of arrays.

    Raises:
        TypeError: no module, no data of a known kind, labels that are not integers.
        ValueError: a model that does not end in a plain linear layer, or whose layer is used twice; batches without labels;
            labels beyond the classes; no samples. The message names what was seen.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> features = extract_features(model, (torch.randn(10, 6), torch.arange(10) % 3))
        >>> features.features.shape, features.class_counts()
        ((10, 4), tensor([4, 3, 3]))
    """
    check_kind(model, nn.Module, "model")
    model, classifier = unwrapped(model, classifier)
    batches, total = _batches(data, check_integer(batch_size, "batch_size", minimum=1))
    _warn_of_loader(data)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model must have parameters, it has none")
    place = check_device(parameter.device if device is None else device)
    layers = linear_layers(model) if classifier is None else {classifier: _named_layer(model, classifier)}
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    bar = task_bar(progress, "batches through the model", total=total)
    with _on_device(model, place), evaluating(model), torch.autocast(place.type, enabled=False), bar as report:
        for batch in batches:
            inputs, targets = _inputs_and_labels(batch, label_name)
            passed, logits = _watched(model, layers, _prepared(inputs, place, parameter.dtype), label_name)
            if classifier is None:
                classifier = _ending(passed, logits, layers)
                layers = {classifier: layers[classifier]}
            check_used_once(classifier, len(passed[classifier]))
            features = rows_of(*passed[classifier][0], logits, classifier)
            check_finite(features, "the model's features", first_row=sum(map(len, rows)))
            if not rows:
                compare_scores(plain_scores(layers[classifier], features), logits, classifier, "the model's output")
            rows.append(features.float().cpu())
            try:
                labels.append(_labels(targets, len(features), layers[classifier].out_features))
            except (TypeError, ValueError) as error:
                if not isinstance(batch, (tuple, list)) or len(batch) == 2:
                    raise
                raise type(error)(f"{error}; of a batch of {len(batch)} entries {_taken(label_name)}") from error
            report()
    if classifier is None or not rows:
        raise ValueError("data must hold at least one batch, got none")
    available = layers[classifier].out_features
    if num_classes is not None and num_classes != available:
        raise ValueError(f"num_classes must be that of the model's classifier, {available}, got {num_classes}")
    found = _class_names(data, model, available) if class_names is None else class_names
    names = if_given(check_class_names, found, available, distinct=False)
    return Features(torch.cat(rows).numpy(), torch.cat(labels), available, names, {"classifier": classifier})


@dataclass(frozen=True)
class RepairedModel:
    """What :func:`repair_model` made.

    Attributes:
        model: a copy of the model with the repaired layer in it.
        classifier: that layer's name.
        repair: the layer alone, its head, the training's result, and which classes are few.
        train: the training features, which another repair can start from.
        val: the validation features, or None.
    """

    model: nn.Module
    classifier: str
    repair: Repair
    train: Features
    val: Features | None

    @property
    def before(self) -> dict[str, float] | None:
        """Top-1 accuracy of the model as it was, on the validation samples: ``few``, ``medium``, ``many``, ``all``."""
        return self.repair.result.before

    @property
    def after(self) -> dict[str, float] | None:
        """The same of the repaired model."""
        return self.repair.result.after

    def __str__(self) -> str:
        before, after = self.before, self.after
        few = f"{len(self.repair.split.few)} of {self.train.num_classes} classes are few"
        if before is None or after is None:
            return f"{few}; without validation samples nothing was measured"
        gains = (f"{part} {percent(before[part])} -> {percent(after[part])}" for part in before)
        return f"{few}; top-1 in % on the validation samples: {', '.join(gains)}"


def repair_model(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    classifier: str | None = None,
    label_name: str | int | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> RepairedModel:
    """Repair the rare classes of a trained model, by its own data.

    Args:
        model: the trained model, as for :func:`extract_features`. It is not changed.
        train: the training data, as for :func:`extract_features`: each image once, as it is used in tests, not augmented. Or
            the features of it.
        val: validation data likewise, which all choices go by. Without, none are made.
        classifier: dotted name of the last linear layer. Default: the one whose output is the model's.
        label_name: as for :func:`extract_features`, as are ``class_names``, ``batch_size`` and ``device``.
        class_names: of all classes.
        batch_size: samples at a time.
        device: where the model computes.
        progress: show progress bars; None shows them where standard error is a terminal.
        options: of :func:`alphaext.repair`: ``preset``, ``few_below``, ``many_above``, and so on.

    Returns:
        A :class:`RepairedModel`; printed, it says what was gained. A model that knows no more of its training data than chance
        would is warned of: it sees them otherwise than in its training, and a gain on that is none.

    Raises:
        TypeError, ValueError: as :func:`extract_features` and :func:`alphaext.repair`.
        FloatingPointError: the training diverged.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> labels = torch.tensor([0] * 120 + [1] * 50 + [2] * 5)
        >>> made = repair_model(model, (torch.randn(175, 6), labels), epochs=2)
        >>> made.classifier, torch.equal(made.model[2].weight[:2], model[2].weight[:2])
        ('2', True)
    """
    check_kind(model, nn.Module, "model")
    model, classifier = unwrapped(model, classifier)
    common: dict[str, Any] = {"label_name": label_name, "class_names": class_names, "batch_size": batch_size, "device": device}
    parts = []
    for data in (train, val):
        if data is not None and not isinstance(data, Features):
            data = extract_features(model, data, classifier=classifier, progress=progress, **common)
        if data is not None and classifier is None:
            classifier = data.metadata.get("classifier")
        parts.append(data)
    name = find_classifier(model) if classifier is None else classifier
    layer = _named_layer(model, name)
    _warn_of_chance(layer, parts[0])
    wide_layer = make_linear(wide(layer.weight), None if layer.bias is None else wide(layer.bias))
    made = repair(wide_layer, parts[0], val_features=parts[1], progress=progress, **options)
    biases: list[Tensor | None] = [layer.bias, made.linear.bias]
    if biases[0] is None and biases[1] is not None:
        warn_caller(
            f"the layer {name!r} has no bias and the repaired one has: what makes the model anew from a file, such as "
            "from_pretrained, makes it without and loses the bias; load it into a layer with one, or save the layer alone "
            "(made.repair.save)",
            AlphaNetWarning,
        )
    return RepairedModel(made.apply(copy.deepcopy(model), name), name, made, parts[0], parts[1])


# At most twice as many training samples tell whether a model is at chance: all would cost a product more in every repair.
_SAMPLES_TO_TELL_CHANCE = 4096


def _warn_of_chance(layer: nn.Linear, features: Features) -> None:
    apart = max(1, len(features) // _SAMPLES_TO_TELL_CHANCE)
    some, labels = features.features[::apart], features.labels[::apart]
    accuracy, chance, bad = at_chance(predict(layer, some, labels, progress=False).predicted, labels)
    if chance_level(bad, len(labels)) == "error":
        warn_caller(
            f"of {len(labels)} training samples the model knows {percent(accuracy)}%, where chance would know "
            f"{percent(chance)}%: the transform (size, mean and deviation) is another than in its training, or the labels "
            "count the classes in another order",
            AlphaNetWarning,
        )


# ---- Data and batches --------------------------------------------------------------------------------------------------


def _batches(data: Any, batch_size: int) -> tuple[Iterable[Any], int | None]:
    """The batches of data of any kind, and how many there are where that is known."""
    if isinstance(data, tuple) and len(data) == 2 and _are_arrays(data[0]) and _are_numbers(data[1]):
        data = data[0], as_tensor(data[1], "labels")
    if isinstance(data, tuple) and len(data) == 2 and _are_arrays(data[0]) and isinstance(data[1], (Tensor, np.ndarray)):
        return _slices(data, len(data[1]), batch_size)
    if isinstance(data, Mapping) and data and _are_arrays(data):
        return _slices(data, len(next(iter(data.values()))), batch_size)
    is_batches = isinstance(data, (DataLoader, list, tuple)) or not hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset) or not is_batches:
        loader: Iterable[Any] = DataLoader(data, batch_size=batch_size)
    else:
        loader = data
    if isinstance(data, (str, bytes, Tensor, np.ndarray, Mapping)) or not hasattr(loader, "__iter__"):
        raise TypeError(
            "data must be a DataLoader or another iterable of batches, a Dataset, arrays (inputs, labels) or a mapping of "
            f"arrays, got {type(data).__name__}"
        )
    countable = hasattr(loader, "__len__") and not isinstance(getattr(loader, "dataset", None), IterableDataset)
    return loader, len(loader) if countable else None  # type: ignore[arg-type]


def _within(data: Any) -> Iterator[Any]:
    """Data, the data set that they load, and what that is a part of."""
    while data is not None:
        yield data
        data = getattr(data, "dataset", None)


def _warn_of_loader(data: Any) -> None:
    """Warn of a loader that does not give each sample once, as it is tested."""
    dataset = getattr(data, "dataset", None)
    if isinstance(data, DataLoader) and data.drop_last and not isinstance(dataset, IterableDataset) and data.batch_size:
        left_out = len(data.sampler) % data.batch_size  # type: ignore[arg-type]
        if left_out:
            warn_caller(f"the loader has drop_last=True and leaves out {left_out} of {len(data.sampler)} samples")  # type: ignore[arg-type]
    if getattr(getattr(data, "sampler", None), "replacement", False):
        warn_caller(
            f"the loader's {type(data.sampler).__name__} draws samples with replacement: which classes are few goes by how "
            "often they are drawn; give the data set itself"
        )
    steps = [step for each in _within(data) for step in _steps_of(getattr(each, "transform", None))]
    random = [name for name in (type(step).__name__ for step in steps) if name.startswith("Rand") or name in _AUGMENTING]
    if random:
        names = ", ".join(dict.fromkeys(random))
        warn_caller(f"the data set augments its images ({names}): give each image once, as the model is tested on it")


# Of torchvision's random transforms, those whose name does not begin with Rand.
_AUGMENTING = ("AugMix", "AutoAugment", "ColorJitter", "ElasticTransform", "TrivialAugmentWide")


def _steps_of(transform: Any) -> Iterator[Any]:
    """A transform, or those that it is composed of."""
    steps = getattr(transform, "transforms", None)
    if isinstance(steps, (list, tuple)):
        for step in steps:
            yield from _steps_of(step)
    elif transform is not None:
        yield transform


def _are_arrays(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_are_arrays, value.values()))
    return isinstance(value, (Tensor, np.ndarray))


def _are_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, (int, np.integer)) for each in value)


def _slices(data: Any, samples: int, batch_size: int) -> tuple[Iterator[Any], int]:
    def cut(value: Any, rows: slice) -> Any:
        if isinstance(value, Mapping):
            return {name: cut(entry, rows) for name, entry in value.items()}
        if isinstance(value, tuple):
            return tuple(cut(entry, rows) for entry in value)
        if len(value) != samples:
            raise ValueError(f"data must have one entry a sample in each array, got {len(value)} and {samples}")
        return as_tensor(value, "data")[rows] if isinstance(value, Tensor) else value[rows]

    starts = range(0, samples, batch_size)
    return (cut(data, slice(start, start + batch_size)) for start in starts), len(starts)


def _inputs_and_labels(batch: Any, label_name: str | int | None) -> tuple[Any, Any]:
    """What goes into the model, and the labels."""
    names = (label_name,) if isinstance(label_name, str) else LABEL_NAMES
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        batch = batch._asdict()
    elif dataclasses.is_dataclass(batch):
        batch = {entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        found = next((name for name in names if name in batch), None)
        if found is None:
            raise ValueError(
                f"a batch must have {' or '.join(names)}, got {', '.join(map(str, batch))}; label_name says another"
            )
        return {name: value for name, value in batch.items() if name != found}, batch[found]
    if isinstance(batch, (tuple, list)):
        if len(batch) < 2:
            raise ValueError(f"a batch must be of inputs and labels, got a {type(batch).__name__} of {len(batch)}")
        place = label_name if isinstance(label_name, int) else len(batch) - 1
        place = check_integer(place, "label_name", minimum=1, maximum=len(batch) - 1)
        return batch[0] if place == 1 else tuple(batch[:place]), batch[place]
    found = next((name for name in names if hasattr(batch, name)), None)
    if found is None:
        raise ValueError(
            f"a batch must be a tuple (inputs, labels), have names, or have an attribute {' or '.join(names)}, got a "
            f"{type(batch).__name__}"
        )
    return batch, getattr(batch, found)


def _prepared(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Inputs where the model computes; of those by name, the tensors alone."""
    if isinstance(inputs, np.ndarray):
        inputs = as_tensor(inputs, "inputs")
    if isinstance(inputs, Tensor):
        check_not_meta(inputs, "inputs")
        return inputs.to(device, dtype if inputs.is_floating_point() else None)
    if isinstance(inputs, Mapping):
        kept = {name: value for name, value in inputs.items() if isinstance(value, (Tensor, np.ndarray))}
        return {name: _prepared(value, device, dtype) for name, value in kept.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_prepared(value, device, dtype) for value in inputs)
    return inputs.to(device) if hasattr(inputs, "to") else inputs


def _labels(targets: Any, samples: int, num_classes: int) -> Tensor:
    labels = as_tensor(targets, "labels")
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    labels = check_labels(labels, num_classes).cpu()
    if len(labels) != samples:
        raise ValueError(f"a batch must have one label a sample, got {len(labels)} labels and {samples} rows of features")
    return labels


def _class_names(data: Any, model: nn.Module, num_classes: int) -> Sequence[str] | None:
    """The names that the data set or the model's configuration has for all classes, if any."""
    for names in (*(getattr(each, "classes", None) for each in _within(data)), class_names_of(model)):
        if isinstance(names, (list, tuple)) and len(names) == num_classes and all(isinstance(name, str) for name in names):
            return names
    return None


# ---- The model ---------------------------------------------------------------------------------------------------------


def _named_layer(model: nn.Module, name: str) -> nn.Linear:
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear):
        seen = "not there" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"classifier must name an nn.Linear of the model, but {name!r} is {seen}. Its linear layers: "
            f"{', '.join(map(repr, linear_layers(model)))}"
        )
    return layer


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _watched(
    model: nn.Module, layers: Mapping[str, nn.Linear], inputs: Any, label_name: str | int | None
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Tensor]:
    """What each layer is given and returns in a pass, and the model's logits."""
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            passed[name].append((arguments[0] if arguments else named["input"], output))

        return keep

    hooks = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        output = called(model, lambda: _call(model, inputs), _shapes(inputs, label_name))
    finally:
        for hook in hooks:
            hook.remove()
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        seen = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"model must return logits [n, N], or an object with such logits, got {seen}")
    return passed, logits


def _taken(label_name: str | int | None) -> str:
    """Which entry of a batch the labels are, for an error."""
    which = f"number {label_name}" if isinstance(label_name, int) else "the last"
    return f"{which} is taken for the labels; label_name=1 takes the second"


def _shapes(inputs: Any, label_name: str | int | None = None) -> str:
    """What goes into a model, for an error."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {_shapes(value)}" for name, value in inputs.items()) or "nothing by name"
    if isinstance(inputs, tuple):
        return f"{', '.join(map(_shapes, inputs))} (of a batch's entries {_taken(label_name)})"
    return f"inputs {list(inputs.shape)}" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return model(*inputs)
    if not isinstance(inputs, Mapping):
        return model(inputs)
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {name: value for name, value in inputs.items() if takes_all or name in parameters}
    if not known and len(inputs) == 1:
        return model(*inputs.values())
    return model(**known)


def _ending(passed: Mapping[str, list[tuple[Tensor, Tensor]]], logits: Tensor, layers: Mapping[str, nn.Linear]) -> str:
    """The layer whose output is the model's."""

    same = [name for name, calls in passed.items() if any(is_output(output, logits) for _, output in calls)]
    if not same:
        shown = ", ".join(f"{name!r} [{layer.out_features}, {layer.in_features}]" for name, layer in list(layers.items())[-8:])
        raise ValueError(
            f"model must end in an nn.Linear whose output it returns, but its logits {list(logits.shape)} are not those of any "
            f"(a softmax or a scale may follow). Its last linear layers: {shown}"
        )
    return same[-1]
