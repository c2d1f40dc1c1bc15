"""Where a model ends in a linear classifier: all before that layer is its backbone, and what goes into it its features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..utils.checks import check_kind
from ..utils.modules import evaluating
from ..utils.seeds import noise
from ..utils.tensors import check_floating, tensor_bytes

# How far logits may be from those of a plain linear layer on the features, relative to the largest logit: the rounding of the
# model's own dtype, with room for sums in another order.
PARITY = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def find_classifier(model: nn.Module, example: Tensor | None = None) -> str:
    """Find the last linear layer of a model.

    Args:
        model: any module.
        example: a batch of images ``[n, ...]``. With it the model is run once, in eval mode, and the layer is the ``nn.Linear``
            whose output is the model's output. Without it the last ``nn.Linear`` in the order of the modules is taken on trust;
            :func:`split_model` with an example shows whether rightly.

    Returns:
        The layer's dotted name, as in ``model.named_modules()``.

    Raises:
        TypeError: not a module, not a batch of floating-point images.
        ValueError: a model without an ``nn.Linear``, or one whose output is something else than a linear layer's (a softmax
            behind it, a tuple), or whose last layer is used twice in a pass. The message lists the linear layers with their
            shapes.

    Example:
        >>> from alphaext.models import SmallConvNet
        >>> find_classifier(SmallConvNet(10), torch.zeros(1, 3, 28, 28))
        'fc'
    """
    linears = linear_layers(model)
    if example is None:
        return list(linears)[-1]
    images = _to_model(model, example, "example")
    calls, logits = _watched(model, linears, images)
    _check_logits(logits, linears)
    # A change in place raises an output's version: it is no longer the layer's.
    same = [
        name
        for name, seen in calls.items()
        if any(output._version == version and is_output(output, logits) for _, output, version in seen)
    ]
    if not same:
        raise ValueError(
            f"model must end in an nn.Linear whose output it returns, but its output {list(logits.shape)} is not that of any "
            "(a softmax, a scale or a mean of several heads may follow); wrap it in a module that returns the layer's output. "
            f"Its linear layers: {_listed(linears)}"
        )
    check_used_once(same[-1], len(calls[same[-1]]))
    return same[-1]


def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor
) -> tuple[dict[str, list[tuple[Any, Tensor, int]]], Any]:
    """What each layer is given and returns, with the version of that, in a pass in eval mode; and what the model returns."""
    calls: dict[str, list[tuple[Any, Tensor, int]]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            calls[name].append((arguments[0] if arguments else named["input"], output, output._version))

        return keep

    hooks = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            return calls, run_model(model, images)
    finally:
        for hook in hooks:
            hook.remove()


class SplitModel:
    """A model seen as a backbone that makes features and a linear classifier that makes logits of them.

    :func:`split_model` makes one. The model is the very one that was handed in: nothing is copied.

    Attributes:
        model: the whole model.
        classifier_name: dotted name of its linear classifier.

    Example:
        >>> from alphaext.models import SmallConvNet
        >>> split = split_model(SmallConvNet(10))
        >>> split.classifier_name, split.num_classes, split.in_features
        ('fc', 10, 192)
        >>> split.features(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 192])
    """

    def __init__(self, model: nn.Module, classifier_name: str) -> None:
        self.model = model
        self.classifier_name = classifier_name

    @property
    def classifier(self) -> nn.Linear:
        """The linear classifier, as it is in the model now."""
        layer = self.model.get_submodule(self.classifier_name)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def num_classes(self) -> int:
        """N, the classifier's outputs."""
        return self.classifier.out_features

    @property
    def in_features(self) -> int:
        """D, the features' width."""
        return self.classifier.in_features

    @property
    def device(self) -> torch.device:
        """Where the model is, and its images are taken to."""
        return self.classifier.weight.device

    def features(self, images: Tensor) -> Tensor:
        """What goes into the classifier for a batch of images, with the model in eval mode and without gradients.

        The model's training mode is as before afterwards.

        Args:
            images: floating point ``[n, ...]``, transformed as the model expects; taken to the model's device and dtype.

        Returns:
            float32 ``[n, D]`` on the model's device.

        Raises:
            TypeError: images that are not a floating-point tensor.
            ValueError: images of a shape that the model cannot take; a classifier that is not used exactly once in a pass, or
                on something else than ``[n, D]``.
        """
        return self._run(images)[0]

    def fingerprint(self) -> str:
        """SHA-256 by which models with other features are told apart, the same on every device.

        It is over the names, shapes, dtypes and bytes of all tensors of the state dict but the classifier's own, on which the
        features do not depend.
        """
        own = f"{self.classifier_name}." if self.classifier_name else ""
        digest = hashlib.sha256()
        if getattr(self.model, "transform_input", False):  # of torchvision's GoogLeNet and Inception, in no state dict
            digest.update(b"transform_input\n")
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith(own) or not isinstance(tensor, Tensor):
                continue
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"SplitModel({type(self.model).__name__}, classifier_name={self.classifier_name!r}, "
            f"num_classes={self.num_classes}, in_features={self.in_features})"
        )

    def _run(self, images: Tensor) -> tuple[Tensor, Any]:
        """Features and the model's own output."""
        inputs = _to_model(self.model, images, "images")
        calls, output = _watched(self.model, {self.classifier_name: self.classifier}, inputs)
        check_used_once(self.classifier_name, len(calls[self.classifier_name]))
        features: Tensor = calls[self.classifier_name][0][0]
        if features.dim() == 3 and isinstance(output, Tensor) and output.dim() == 2:
            features = rows_of(*calls[self.classifier_name][0][:2], output, self.classifier_name)
        if features.dim() != 2 or len(features) != len(inputs):
            raise ValueError(
                f"features must have shape [{len(inputs)}, {self.in_features}], one row an image, but the classifier "
                f"{self.classifier_name!r} gets {list(features.shape)} from the images {list(inputs.shape)}"
            )
        return features.detach().to(torch.float32), output


def split_model(model: nn.Module, classifier: str | None = None, example: Tensor | None = None) -> SplitModel:
    """Split a model into its backbone and its last linear layer.

    Args:
        model: any module that ends in an ``nn.Linear``; of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``
            what they wrap.
        classifier: dotted name of that layer, as in ``"fc"`` or ``"heads.head"``. Default: :func:`find_classifier`.
        example: a batch of images ``[n, ...]``. With it the logits that a plain linear layer makes of the features are compared
            with the model's own, so that a wrong layer, or one that does more than a matrix product and a bias, is found.

    Returns:
        The :class:`SplitModel`.

    Raises:
        TypeError: not a module, not a batch of floating-point images.
        ValueError: as :func:`find_classifier`; a ``classifier`` that the model does not have or that is no ``nn.Linear``;
            logits that differ (the message has the largest difference).

    Example:
        >>> from alphaext.models import make_model
        >>> split_model(make_model("mobilenet_v3_small", 7), example=torch.zeros(2, 3, 64, 64))
        SplitModel(MobileNetV3, classifier_name='classifier.3', num_classes=7, in_features=1024)
    """
    model, classifier = unwrapped(model, classifier)
    if classifier is None:
        classifier = find_classifier(model, example)
    linears = linear_layers(model)
    if classifier not in linears:
        modules = dict(model.named_modules())
        seen = f"a {type(modules[classifier]).__name__}" if classifier in modules else "not there"
        raise ValueError(
            f"classifier must name an nn.Linear of the model, but {classifier!r} is {seen}. "
            f"Its linear layers: {_listed(linears)}"
        )
    split = SplitModel(model, classifier)
    _check_plain(split)
    if example is not None:
        _check_parity(split, example)
    return split


def unwrapped(model: nn.Module, classifier: str | None) -> tuple[nn.Module, str | None]:
    """What a wrapper holds: its names have no prefix, and hooks work in it."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    name = "module" if parallel else "_orig_mod"  # of torch.compile
    inner = getattr(model, name, None)
    if not isinstance(inner, nn.Module):
        return model, classifier
    return unwrapped(inner, classifier and classifier.removeprefix(f"{name}."))


def _check_parity(split: SplitModel, example: Tensor) -> None:
    features, logits = split._run(example)
    linears = linear_layers(split.model)
    _check_logits(logits, linears)
    if logits.shape != (len(features), split.num_classes):
        raise ValueError(
            f"classifier {split.classifier_name!r} makes logits {[len(features), split.num_classes]}, but the model returns "
            f"{list(logits.shape)}. Its linear layers: {_listed(linears)}"
        )
    compare_scores(plain_scores(split.classifier, features), logits, split.classifier_name, "the model's output")


def _check_plain(split: SplitModel) -> None:
    """Whether the layer is a matrix product and a bias, and nothing more: a subclass may scale or normalise."""
    layer = split.classifier
    if type(layer) is nn.Linear or layer.weight.device.type == "meta":
        return
    features = noise(2, layer.in_features)
    with evaluating(layer):
        output = layer(features.to(layer.weight.device, layer.weight.dtype))
    name = split.classifier_name
    compare_scores(
        plain_scores(layer, features.to(layer.weight.device)), output, name, f"that of {type(layer).__name__}.forward"
    )


@torch.no_grad()
def plain_scores(layer: nn.Linear, features: Tensor) -> Tensor:
    return functional.linear(features.to(layer.weight.dtype), layer.weight, layer.bias)


def compare_scores(plain: Tensor, logits: Tensor, name: str, what: str) -> None:
    expected, seen = plain.detach().double(), logits.detach().double()
    largest = float(seen.abs().max()) if seen.numel() else 0.0
    difference = float((expected - seen).abs().max()) if seen.numel() else 0.0
    tolerance = PARITY.get(logits.dtype, 1e-4) * largest
    # Written so that NaN fails too.
    if not difference <= tolerance:
        raise ValueError(
            f"classifier {name!r} is not the plain linear layer that ends this model: a matrix product and a bias differ from "
            f"{what} by up to {difference:g}, where the largest logit is {largest:g} and {tolerance:g} is allowed"
        )


def check_used_once(name: str, times: int) -> None:
    if times != 1:
        raise ValueError(
            f"classifier {name!r} must be used once in a forward pass of the model in eval mode, it is used {times} times"
        )


def _check_logits(logits: object, linears: dict[str, nn.Linear]) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model must return a tensor of logits, or an object with such logits, got a {type(logits).__name__}; wrap it in a "
            f"module that returns the logits. Its linear layers: {_listed(linears)}"
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by their names, in the order of its modules; a ValueError if it has none."""
    check_kind(model, nn.Module, "model", what="an nn.Module")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(f"model must end in an nn.Linear, but this {type(model).__name__} has none")
    return linears


def _listed(linears: dict[str, nn.Linear], limit: int = 8) -> str:
    """The last linear layers, which come into question first."""
    names = list(linears)[-limit:]
    text = ", ".join(f"{name!r} [{linears[name].out_features}, {linears[name].in_features}]" for name in names)
    return text if len(linears) <= limit else f"{text} (the last {limit} of {len(linears)})"


def is_output(output: Tensor, logits: Tensor) -> bool:
    """Whether a layer's output is the model's: itself, or one position of each sample's sequence."""
    if output.dim() == 3 and logits.dim() == 2:
        return _position(output, logits) is not None
    if output.shape != logits.shape or output.dtype != logits.dtype or output.device != logits.device:
        return False
    # NaN is equal to itself here: what a broken model returns is still its layer's output.
    return output is logits or torch.allclose(output, logits, rtol=0, atol=0, equal_nan=True)


def _position(output: Tensor, logits: Tensor) -> Tensor | None:
    """Which of the positions ``[n, T, N]`` of a layer's output are the logits, ``[n]``; None where they are not all there."""
    if output.shape[0] != logits.shape[0] or output.shape[2] != logits.shape[1]:
        return None
    same = (output == logits[:, None]).all(dim=2)
    return same.int().argmax(dim=1) if bool(same.any(dim=1).all()) else None


def rows_of(features: Tensor, output: Tensor, logits: Tensor, name: str) -> Tensor:
    """What a classifier was given for each sample; of a sequence, at the position whose scores are the model's."""
    if features.dim() == 3:
        position = _position(output, logits)
        if position is not None:
            features = features[torch.arange(len(features), device=features.device), position]
    if features.dim() != 2 or len(features) != len(logits):
        raise ValueError(
            f"features must have one row a sample, but the classifier {name!r} gets {list(features.shape)} where the logits "
            f"are {list(logits.shape)}"
        )
    return features


def logits_of(output: Any) -> Any:
    """The logits in what a model returns: itself, what it calls ``logits``, or the first of several."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return found[0] if isinstance(found, (tuple, list)) and found else found


def _to_model(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """A batch of images where the model is, in the dtype it computes in."""
    check_kind(images, Tensor, name, what="a tensor of images [n, ...]")
    check_floating(images, name)
    if images.dim() < 2:
        raise ValueError(f"{name} must be a batch of images [n, ...], got shape {list(images.shape)}")
    parameter = next(model.parameters())
    return images.to(parameter.device, parameter.dtype)


def run_model(model: nn.Module, images: Tensor) -> Any:
    """A model's logits of the images. What it raises where their shape is wrong becomes a ValueError that names it."""
    return logits_of(called(model, lambda: model(images), f"images {list(images.shape)}"))


def called(model: nn.Module, call: Callable[[], Any], inputs: str) -> Any:
    """The same of a call with any ``inputs``, in words."""
    try:
        return call()
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        raise ValueError(
            f"the model, a {type(model).__name__}, cannot take {inputs}: {type(error).__name__}: {error}"
        ) from error
