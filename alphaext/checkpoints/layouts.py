"""Where in the file of a trained model the classifier is, and where the rest of the model.

Known are state dicts under any of the usual wrappers, bare linear layers, the two networks of Kang et al.'s code (ICLR 2020),
and the experts of RIDE (Wang et al., ICLR 2021).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..utils.checks import format_ids
from .files import Payload

KeyPath: TypeAlias = tuple[str, ...]
"""Where a tensor is in a file: the keys that lead to it, outermost first."""

# Of several state dicts in a file, the first of these is the model.
_WRAPPERS = ("state_dict_best", "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
# Averages over training are taken only where there is nothing else, and what belongs to training never.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model")
# Such a network beside the one that is trained, in a module of both.
_AVERAGE = re.compile(r"(?:.*_)?(?:ema|swa|averaged?)(?:_.*)?")
_NOT_MODELS = (
    "optimizer",
    "optimizer_state",
    "optimizer_state_dict",
    "optimizer_states",
    "scheduler",
    "lr_scheduler",
    "scaler",
    "amp",
    "criterion",
    "callbacks",
)

# Names of last layers in torchvision, timm and the long-tail literature; a number is that of a layer in a sequence.
_KNOWN_CLASSIFIERS = (
    *("fc", "classifier", "head", "head.fc", "heads.head", "head.linear"),
    *("linear", "last_linear", "output", "logits"),
)
# Counters that averages, profilers and torch itself leave among the weights.
COUNTERS = ("n_averaged", "num_updates", "decay", "total_ops", "total_params", "num_batches_tracked", "_extra_state")
_DEEPEST_CLASSIFIER = 2  # modules above it; such names further down are those of layers inside blocks
_DEEPEST_STATE = 8  # a file's dictionaries can be within each other without end
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NUMBERED_CLASSIFIER = re.compile(r"((?:.*\.)?(?:classifier|head|heads|fc))\.(\d+)")
_ADAPTED = re.compile(r"(.+?)\.(?:base_layer|original_module|modules_to_save\.[^.]+)\.")  # by PEFT
_RIDE_EXPERT = re.compile(r"(?:backbone\.)?linears\.(\d+)\.weight")
_RIDE_SINGLE = "backbone.linear.weight"

_CLASS_NAMES = ("class_names", "classes", "categories", "CLASSES")
_NOTES = ("meta", "metadata", "hyper_parameters", "config", "args")

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layout:
    """Where a payload holds the classifier and the rest of the model.

    Attributes:
        format: ``"classifier-balancing"``, ``"state_dict"``, ``"linear"`` or ``"ride"``.
        classifier: dotted name of the classifier in the model, wrappers' prefixes removed; empty for a bare ``{weight, bias}``.
        weights: where the weight of each expert is; one for all but RIDE's.
        biases: where the bias of each expert is; none for classifiers without.
        scales: where the learned scales of LWS are, or None.
        gains: where the lengths of the rows are that weight normalisation keeps beside their directions, or None.
        normalized: a linear layer of normalised columns, stored transposed, on normalised features (RIDE's, LDAM's).
        states: the dictionaries that hold a model: first the one that was taken, then all others; empty for a bare model.
        notes: what the user has to know of how the classifier was found.
        backbone: name in the model (prefixes removed) of every other tensor of the model, and where it is.
    """

    format: str
    classifier: str
    weights: tuple[KeyPath, ...]
    biases: tuple[KeyPath, ...]
    scales: KeyPath | None
    normalized: bool
    backbone: dict[str, KeyPath]
    gains: KeyPath | None = None
    states: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def classifier_tensors(self) -> tuple[KeyPath, ...]:
        """Where all tensors of the classifier are."""
        return self.weights + self.biases + tuple(place for place in (self.scales, self.gains) if place is not None)


def find_layout(
    payload: Payload, path: Path, *, classifier: str | None, num_classes: int | None = None, state: str | None = None
) -> Layout:
    """Find the classifier and the rest of the model.

    Args:
        payload: what the file holds.
        path: its path, for errors.
        classifier: dotted name of the classifier; None finds it.
        num_classes: prefers, among several candidates, those with so many rows.
        state: which of the file's dictionaries is the model; None takes the usual ones.

    Raises:
        ValueError: there is no classifier, or more than one candidate; the message lists them with their shapes.
    """
    content: Mapping[str, Any] = payload.content
    trail: KeyPath = ()
    average = ""
    if state is not None:
        rest = state
        while rest:
            # The names of callbacks can hold slashes themselves.
            key = max(
                (key for key in map(str, content) if f"{rest}/".startswith(f"{key}/")), key=len, default=rest.partition("/")[0]
            )
            rest = rest[len(key) + 1 :]
            inner = content.get(key)
            if isinstance(inner, Mapping) and _holds_tensors(inner):
                content, trail = inner, (*trail, key)
            elif any(name.startswith(f"{key}.") for name in _tensors(content)):
                average = key
            else:
                named = [key for key, value in content.items() if isinstance(value, Mapping) and _holds_tensors(value)]
                raise ValueError(f"state must name a dictionary of tensors in {path}, got {state!r}; it has: {listed(named)}")
    content, trail = _find_state(content, trail, path)
    if _is_two_networks(content):
        return _two_networks(content, trail, path, classifier)
    tensors, averages = _without_averages(_tensors(content), average)
    lightning = "pytorch-lightning_version" in payload.content
    keys = {key.removeprefix(f"{average}.") if average else key: key for key in tensors}
    short: dict[str, KeyPath] = {name: (*trail, keys[key]) for key, name in short_names(keys, lightning=lightning).items()}
    shapes = {name: tensors[key_path[-1]] for name, key_path in short.items()}
    if classifier is None:
        ride = _ride(short, path)
        if ride is not None:
            return ride
    directions = {layer: direction for layer, (direction, _) in _weight_normalized(shapes).items()}
    for layer, direction in directions.items():
        shapes[join(layer, "weight")], short[join(layer, "weight")] = shapes[direction], short[direction]
    notes: list[str] = []
    if classifier is not None and not set(shapes) <= {"weight", "bias"}:
        by_key = {key_path[-1]: name for name, key_path in short.items()}
        name = _named_classifier(classifier, shapes, by_key, path)
    else:
        name = _find_classifier(shapes, path, num_classes, notes)
    scales = join(name.rpartition(".")[0], "scales")  # of LWS, whose two networks somebody has put together
    parts = _weight_normalized(shapes).get(name, ())
    own = {join(name, "weight"), join(name, "bias"), scales, *parts, *(join(layer, "weight") for layer in directions)}
    normalized = _is_transposed(name, shapes, path, num_classes, set(parts))
    if normalized:
        notes.append(
            f"{path}: {join(name, 'weight')} {list(shapes[join(name, 'weight')].shape)} is read as a normalised layer that is "
            "stored transposed, [features, classes], as LDAM's code has it"
        )
    backbone = {other: key_path for other, key_path in short.items() if other not in own}
    layout = _layout("state_dict" if backbone else "linear", name, [name], short, backbone, scales)
    taken = "/".join((*trail, average) if average else trail)
    others = [*("/".join((*trail, prefix)) for prefix in averages), *_other_states(payload.content, trail, name, path)]
    if others and state is None:
        notes.append(
            f"{path}: {taken or 'what has no prefix'} is read; {listed(others)} in the same file is neither read nor repaired, "
            "though other loaders may prefer it (timm loads an average where there is one); state= or --state chooses"
        )
    notes += _unnamed_averages(payload.content, path) if state is None else ()
    return replace(
        layout,
        normalized=normalized,
        gains=short[parts[1]] if parts else None,
        states=(taken, *others) if taken or others else (),
        notes=tuple(notes),
    )


def _unnamed_averages(content: Mapping[str, Any], path: Path) -> list[str]:
    """What callbacks keep as lists of weights, whose places in the model nobody tells."""
    callbacks = content.get("callbacks")
    kept = [
        f"callbacks/{callback}/{key} ({len(value)} tensors)"
        for callback, values in (callbacks.items() if isinstance(callbacks, Mapping) else ())
        for key, value in (values.items() if isinstance(values, Mapping) else ())
        if isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(each, Tensor) for each in value)
    ]
    return [f"{path}: {listed(kept)} has no names of layers, and is neither read nor repaired"] if kept else []


def _without_averages(tensors: dict[str, Tensor], wanted: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the model, or those of the average ``wanted``, from a dictionary that has both; the averages' prefixes."""
    prefixes = {name: name.rpartition(".")[0].partition(".")[0] for name in tensors}
    averages = [
        prefix
        for prefix in sorted(set(filter(_AVERAGE.fullmatch, prefixes.values())))
        if prefix in _AVERAGES or _candidates({name: each for name, each in tensors.items() if prefixes[name] == prefix})
    ]
    if wanted:
        return {name: tensor for name, tensor in tensors.items() if prefixes[name] == wanted}, []
    rest = {name: tensor for name, tensor in tensors.items() if prefixes[name] not in averages}
    return (rest, averages) if _candidates(rest) or not _candidates(tensors) else (tensors, [])


def _other_states(content: Mapping[str, Any], trail: KeyPath, classifier: str, path: Path) -> list[str]:
    """The dictionaries beside the one that was taken that have a classifier of the same name."""
    others = []
    for depth, taken in enumerate(trail):
        within: dict[str, Any] = {str(key): value for key, value in content.items()}
        # Lightning's callbacks keep averages, each under a name of its own.
        for callback, kept in (within.get("callbacks") or {}).items() if isinstance(within.get("callbacks"), Mapping) else ():
            if isinstance(kept, Mapping):
                within |= {f"callbacks/{callback}/{key}": value for key, value in kept.items()}
        for key, value in within.items():
            if (
                key in (taken, "/".join(trail[depth:]))
                or key in _NOT_MODELS
                or not isinstance(value, Mapping)
                or not _holds_tensors(value)
            ):
                continue
            try:
                inner, _ = _find_state(value, (key,), path)
            except ValueError:
                continue
            if join(classifier, "weight") in short_names(_tensors(inner)).values():
                others.append("/".join((*trail[:depth], key)))
        content = content[taken]
    return others


def _weight_normalized(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Linear layers under weight normalisation: where the directions of their rows are, and the lengths, in either form."""
    found = {}
    for lengths, directions in (
        (".weight_g", ".weight_v"),
        (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    ):
        for name, tensor in tensors.items():
            layer = name.removesuffix(directions)
            if layer != name and layer + lengths in tensors and tensor.dim() == 2:
                found[layer] = name, layer + lengths
    return found


def _is_transposed(name: str, tensors: Mapping[str, Tensor], path: Path, num_classes: int | None, parts: set[str]) -> bool:
    """Whether a layer is stored ``[features, classes]``, as normalised layers are; an error where that cannot be told.

    Raises:
        ValueError: a layer with more tensors than a plain one has, or one that fits both ways.
    """
    weight = tensors[join(name, "weight")]
    beside = [
        other
        for other in tensors
        if other.rpartition(".")[0] == name and other.rpartition(".")[2] not in ("weight", "bias", "scales", *COUNTERS)
    ]
    if _ADAPTED.fullmatch(f"{name}."):  # what the adapter around it adds or puts in its place is beside it
        wrapper = name.rpartition(".")[0]
        beside += [other for other in tensors if other.startswith(f"{wrapper}.") and not other.startswith(f"{name}.")]
    if name and set(beside) - parts:
        raise ValueError(
            f"the classifier {name} of {path} is no plain linear layer: it has {listed(beside)} beside its weight (a "
            "normalised, cosine or adapted layer); save the plain layer that it stands for"
        )
    if join(name, "bias") in tensors or parts or weight.shape[0] == weight.shape[1]:
        return False
    if num_classes in tuple(weight.shape):
        return weight.shape[1] == num_classes
    names = list(tensors)
    before = [tensors[other] for other in names[: names.index(join(name, "weight"))] if tensors[other].dim() > 0]
    width = before[-1].shape[0] if before else weight.shape[1]
    if width != weight.shape[0] or width == weight.shape[1]:
        return False
    if weight.shape[1] % width == 0:
        raise ValueError(
            f"{join(name, 'weight')} {list(weight.shape)} of {path} has no bias, and fits what comes before it as [classes, "
            "features] and, transposed, as a normalised layer; num_classes= says which it is"
        )
    return True


def _layout(
    format: str, classifier: str, layers: list[str], short: dict[str, KeyPath], backbone: dict[str, KeyPath], scales: str = ""
) -> Layout:
    weights, biases = ([short[name] for layer in layers if (name := join(layer, each)) in short] for each in ("weight", "bias"))
    return Layout(
        format=format,
        classifier=classifier,
        weights=tuple(weights),
        biases=tuple(biases),
        scales=short.get(scales),
        normalized=format == "ride" and not biases,
        backbone=backbone,
    )


def short_names(names: Iterable[str], *, lightning: bool = False) -> dict[str, str]:
    """Each name and what is left of it without the prefixes of wrappers.

    A leading ``module.`` (DataParallel) goes, ``_orig_mod.`` (torch.compile) and what FSDP adds anywhere, ``model.`` where
    every name but counters has it.
    With ``lightning``, a checkpoint of PyTorch Lightning, names without ``model.`` are no part of the model and are left out.

    Example:
        >>> short_names(["module.fc.weight", "module.fc.bias"])
        {'module.fc.weight': 'fc.weight', 'module.fc.bias': 'fc.bias'}
    """
    short = {name: name for name in names}
    if lightning and any(name.startswith("model.") for name in short):
        short = {name: name for name in short if name.startswith("model.")}
    while True:
        stripped = {name: _WRAPPED.sub("", rest).removeprefix("module.") for name, rest in short.items()}
        named = [rest for rest in stripped.values() if rest.rpartition(".")[2] not in COUNTERS]
        if named and all(rest.startswith("model.") for rest in named):
            stripped = {name: rest.removeprefix("model.") for name, rest in stripped.items()}
        if stripped == short:
            return short
        if len(set(stripped.values())) < len(stripped):
            return short  # two models of the same names, which prefixes tell apart
        short = stripped


def class_names(payload: Payload, num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes, where the file holds as many as there are classes."""
    try:
        named = json.loads(payload.metadata.get("class_names", "null"))
    except json.JSONDecodeError:
        named = None
    inner = (payload.content.get(key) for key in (*_NOTES, *_WRAPPERS))
    for place in ({"class_names": named}, payload.content, *(value for value in inner if isinstance(value, Mapping))):
        for names in map(place.get, _CLASS_NAMES):
            if isinstance(names, (list, tuple)) and len(names) == num_classes and all(isinstance(n, str) for n in names):
                return tuple(names)
        indices = place.get("class_to_idx")
        if isinstance(indices, Mapping) and sorted(indices.values(), key=str) == sorted(range(num_classes), key=str):
            return tuple(str(name) for name in sorted(indices, key=lambda name: int(indices[name])))
    return None


def check_classifier_tensors(layout: Layout, payload: Payload, path: Path) -> None:
    """Check dtypes and shapes of the classifier's tensors.

    Raises:
        ValueError: naming the tensor, what it is and what it should be.
    """
    for key_path in layout.classifier_tensors:
        tensor = tensor_at(payload.content, key_path)
        name = " / ".join(key_path)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in _FLOATING:
            kind = "quantised" if tensor.is_quantized else f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"the classifier of {path} must be dense and floating point, got {kind} for {name}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the classifier of {path} must be finite, got NaN or infinity in {name}")
    first = tensor_at(payload.content, layout.weights[0])
    for key_path in layout.weights:
        tensor = tensor_at(payload.content, key_path)
        if tensor.dim() != 2 or tensor.shape != first.shape or 0 in tensor.shape:
            wanted = "[N, D]" if len(layout.weights) == 1 else f"{list(first.shape)}, as that of the first expert"
            raise ValueError(f"{' / '.join(key_path)} of {path} must have shape {wanted}, got {list(tensor.shape)}")
    width = first.shape[1] if layout.normalized else first.shape[0]
    scales = [place for place in (layout.scales, layout.gains) if place is not None]
    for key_paths, what, shapes in ((layout.biases, "number", [(width,)]), (scales, "scale", [(width,), (width, 1)])):
        for key_path in key_paths:
            tensor = tensor_at(payload.content, key_path)
            if tensor.shape not in shapes:
                raise ValueError(
                    f"{' / '.join(key_path)} of {path} must have one {what} for each of the {width} classes, "
                    f"got {tensor.numel()} in shape {list(tensor.shape)}"
                )


def is_no_weight(name: str) -> bool:
    """Whether a tensor of this name is no part of what a model computes: a counter, a loss's or an auxiliary head's."""
    first, _, _ = name.partition(".")
    return name.rpartition(".")[2] in COUNTERS or first in _NOT_MODELS or first.lower().startswith(("aux", "loss", "criterion"))


def tensor_at(content: Mapping[str, Any], key_path: KeyPath) -> Tensor:
    """The tensor that ``key_path`` leads to."""
    value: Any = content
    for key in key_path:
        value = value[key]
    assert isinstance(value, Tensor)
    return value.detach()


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _holds_tensors(content: Mapping[str, Any]) -> bool:
    # Each dictionary is looked into once, though a file can have it in a thousand places.
    seen: set[int] = set()
    waiting: list[Mapping[str, Any]] = [content]
    while waiting:
        current = waiting.pop()
        if _tensors(current):
            return True
        if id(current) not in seen:
            seen.add(id(current))
            waiting.extend(value for value in current.values() if isinstance(value, Mapping))
    return False


def _is_two_networks(content: Mapping[str, Any]) -> bool:
    inner = content.get("classifier")
    return isinstance(inner, Mapping) and bool(_tensors(inner))


def _find_state(content: Mapping[str, Any], trail: KeyPath, path: Path) -> tuple[Mapping[str, Any], KeyPath]:
    """The dictionary that holds the model's tensors, and where it is."""
    if _is_two_networks(content):
        return content, trail
    if len(trail) > _DEEPEST_STATE:
        raise ValueError(f"{path} has its dictionaries too deep within each other: {' / '.join(trail)}")
    inner = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Mapping) and _holds_tensors(value)
    }
    for key in _WRAPPERS:
        if key in inner:
            return _find_state(inner[key], (*trail, key), path)
    if _tensors(content):
        return content, trail
    others = [key for key in inner if key not in _AVERAGES + _NOT_MODELS]
    if len(others) > 1:
        raise ValueError(f"{path} holds several dictionaries of tensors; say with state= which is the model: {listed(others)}")
    for key in (*others, *_AVERAGES):
        if key in inner:
            return _find_state(inner[key], (*trail, key), path)
    raise ValueError(f"{path} is not a checkpoint of a model: no tensors in it; it has: {listed(map(str, content))}")


def _two_networks(content: Mapping[str, Any], trail: KeyPath, path: Path, classifier: str | None) -> Layout:
    """Kang et al.'s file: one network makes the features, the other is a linear layer ``fc``, with ``scales`` for LWS."""
    inside = (*trail, "classifier")
    tensors = _tensors(content["classifier"])
    short = {name: (*inside, key) for key, name in short_names(tensors).items()}
    # A name given is that in the model, so it need not be the one in here, where there is but one layer.
    names = ["fc" if classifier is None else classifier, "fc", *([""] if "bias" in short else [])]
    name = next((name for name in names if join(name, "weight") in short), None)
    if name is None:
        found = listed(_shapes({name: tensors[key_path[-1]] for name, key_path in short.items()}))
        raise ValueError(
            f"the classifier of {path} must be a linear layer fc, got {found} (a cosine or a memory classifier is none)"
        )
    features = content.get("feat_model")
    backbone: dict[str, KeyPath] = {}
    if isinstance(features, Mapping):
        backbone = {short: (*trail, "feat_model", key) for key, short in short_names(_tensors(features)).items()}
    return _layout("classifier-balancing", name, [name], short, backbone, "scales")


def _ride(short: dict[str, KeyPath], path: Path) -> Layout | None:
    """The experts of RIDE, or None where there are none."""
    numbered = {int(found.group(1)): name for name in short if (found := _RIDE_EXPERT.fullmatch(name))}
    if not numbered and _RIDE_SINGLE in short:
        numbered = {0: _RIDE_SINGLE}
    if not numbered:
        return None
    if sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"{path} lacks experts: it has linears {listed(map(str, sorted(numbered)))}")
    layers = [_module(numbered[expert]) for expert in range(len(numbered))]
    biases = [name for layer in layers if (name := join(layer, "bias")) in short]
    if biases and len(biases) != len(layers):
        raise ValueError(f"{path} must have a bias for each of its {len(layers)} experts or for none, got {listed(biases)}")
    backbone = {name: key_path for name, key_path in short.items() if name.rpartition(".")[0] not in layers}
    return _layout("ride", layers[0] if len(layers) == 1 else layers[0].rpartition(".")[0], layers, short, backbone)


def _named_classifier(classifier: str, tensors: dict[str, Tensor], by_key: dict[str, str], path: Path) -> str:
    for name in (join(classifier, "weight"), by_key.get(join(classifier, "weight"), "")):
        if name in tensors and tensors[name].dim() == 2:
            return name.removesuffix("weight").removesuffix(".")
    raise ValueError(
        f"classifier must name a linear layer of {path}, got {classifier!r}; its two-dimensional weights: "
        f"{listed(_shapes(_candidates(tensors)))}"
    )


def _find_classifier(tensors: dict[str, Tensor], path: Path, num_classes: int | None, notes: list[str]) -> str:
    candidates = _candidates(tensors)
    if set(tensors) <= {"weight", "bias"} and "weight" in candidates:
        return ""
    adapted = _known({join(at.group(1), "weight"): tensors[name] for name in tensors if (at := _ADAPTED.match(name))})
    if adapted:
        inside = [name for name in tensors if name.startswith(f"{adapted[0]}.")]
        raise ValueError(
            f"the classifier {adapted[0]} of {path} is no plain linear layer: an adapter is around it ({listed(inside)}); "
            "save the model after PEFT's merge_and_unload()"
        )
    heads = _known({join(name.rpartition(".")[0], "weight"): tensor for name, tensor in tensors.items() if tensor.dim() > 1})
    plain = [name for name in heads if join(name, "weight") in candidates]
    seen = "; ".join(_described(name, tensors) for name in heads)
    if not candidates:
        seen = f"; {seen}" if seen else ""
        raise ValueError(f"{path} has no linear layer: none of its {len(tensors)} tensors is a two-dimensional weight{seen}")
    if heads and not plain:
        raise ValueError(f"the classifier of {path} is no plain linear layer: {seen}; classifier= names another layer")

    def narrowed(names: list[str]) -> list[str]:
        fitting = [name for name in names if candidates[join(name, "weight")].shape[0] == num_classes]
        return fitting if num_classes is not None and fitting else names

    known = narrowed(_known(candidates))
    if len(known) == 1:
        return known[0]
    if not known:
        biased = [name for name in map(_module, candidates) if _has_bias(name, tensors)]
        unbiased = list(map(_module, candidates))
        if biased:
            found = narrowed(biased)[-1]
            if len(narrowed(biased)) > 1:
                notes.append(
                    f"{path}: {found} is taken for the classifier, as the last of {len(biased)} linear layers; no layer has a "
                    "usual name, and classifier= says which it is"
                )
            return found
        known = narrowed(unbiased)
        if len(known) == 1:
            return known[0]
    shown = listed(_shapes({join(name, "weight"): candidates[join(name, "weight")] for name in known}))
    raise ValueError(f"{path} has several layers that may be the classifier; say with classifier= which: {shown}")


def _known(candidates: Mapping[str, Tensor]) -> list[str]:
    """The layers with the name of a classifier, those alone that are nearest to the top of the model."""
    found: dict[str, int] = {}
    last: dict[str, tuple[int, str]] = {}
    for name in map(_module, candidates):
        for known in _KNOWN_CLASSIFIERS:
            if name == known or name.endswith(f".{known}"):
                found[name] = min(found.get(name, 99), name.count(".") - known.count("."))
        numbered = _NUMBERED_CLASSIFIER.fullmatch(name)
        if numbered and int(numbered.group(2)) >= last.get(numbered.group(1), (-1, ""))[0]:
            last[numbered.group(1)] = (int(numbered.group(2)), name)
    for sequence, (_, name) in last.items():
        found[name] = sequence.count(".")
    top = min(found.values(), default=0)
    return [name for name, depth in found.items() if depth == top <= _DEEPEST_CLASSIFIER]


def _described(layer: str, tensors: Mapping[str, Tensor]) -> str:
    own = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == layer}
    weight = own.get(join(layer, "weight"))
    is_convolution = weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1)
    what = " is a 1x1 convolution" if is_convolution else ""
    return f"{layer}{what} with {listed(f'{name} {list(tensor.shape)} {tensor.dtype}' for name, tensor in own.items())}"


def _candidates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (name == "weight" or name.endswith(".weight")) and tensor.dim() == 2 and tensor.dtype.is_floating_point
    }


def _has_bias(name: str, tensors: dict[str, Tensor]) -> bool:
    bias = tensors.get(join(name, "bias"))
    return bias is not None and bias.shape == tensors[join(name, "weight")].shape[:1]


def _module(weight: str) -> str:
    return weight.removesuffix("weight").removesuffix(".")


def join(module: str, tensor: str) -> str:
    """The dotted name of a module's tensor; without a module, the tensor's own."""
    return f"{module}.{tensor}" if module else tensor


def _shapes(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()]


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names in one line, of many the first and how many there are."""
    return format_ids(names, limit) or "none"
