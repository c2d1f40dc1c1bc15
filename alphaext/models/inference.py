"""A model as it computes fastest on a CPU: the same features but for rounding, several times as many images a second."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..utils.modules import evaluating
from .split import PARITY, SplitModel


def for_cpu(split_model: SplitModel, example: Tensor) -> tuple[SplitModel, int]:
    """A copy of a model for inference on a CPU: channels last, batch normalisations folded into the convolutions before them,
    the activations behind those in place, and zeros around an image left to the convolution that takes them.

    The model itself stays as it is. Where folding changes features by more than rounding (another layer takes what comes out of
    such a convolution, say), nothing is folded.

    Args:
        split_model: on the CPU.
        example: a batch of images.

    Returns:
        The copy, and how many batch normalisations are folded.

    Example:
        >>> from alphaext.models import make_model, split_model
        >>> for_cpu(split_model(make_model("resnet18", 5)), torch.zeros(2, 3, 64, 64))[1]
        20
    """
    fast = _copied(split_model)
    expected = fast.features(example)
    paddings = _paddings(fast, example)
    for padding_name, convolution_name in paddings:
        padding, padded = fast.model.get_submodule(padding_name), fast.model.get_submodule(convolution_name)
        assert isinstance(padding, nn.ConstantPad2d | nn.ZeroPad2d) and isinstance(padded, nn.Conv2d)
        left, _, top, _ = padding.padding
        padded.padding = top + int(padded.padding[0]), left + int(padded.padding[1])
        fast.model.set_submodule(padding_name, nn.Identity())
    if paddings and not _same(fast, example, expected):
        fast = _copied(split_model)
    pairs, activations = _what_follows_what(fast, example)
    for name in activations:
        fast.model.get_submodule(name).inplace = True  # type: ignore[assignment]
    for convolution_name, norm_name in pairs:
        convolution, norm = fast.model.get_submodule(convolution_name), fast.model.get_submodule(norm_name)
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        fast.model.set_submodule(convolution_name, fuse_conv_bn_eval(convolution.eval(), norm.eval()))
        fast.model.set_submodule(norm_name, _rest_of(norm))
    if not _same(fast, example, expected):
        return _copied(split_model), 0
    return fast, len(pairs)


def _same(fast: SplitModel, example: Tensor, expected: Tensor) -> bool:
    """Whether the features are the same but for rounding; False where the model fails as it was changed."""
    try:
        found = fast.features(example)
    except Exception:  # of the model's own code
        return False
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= PARITY.get(fast.classifier.weight.dtype, 1e-4) * expected.abs().max())


def _copied(split_model: SplitModel) -> SplitModel:
    model = copy.deepcopy(split_model.model).to(memory_format=torch.channels_last)
    return SplitModel(model, split_model.classifier_name)


def _rest_of(norm: nn.BatchNorm2d) -> nn.Module:
    """What a batch normalisation does after normalising: timm's has an activation."""
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return nn.Sequential(*parts)


def _what_follows_what(split_model: SplitModel, example: Tensor) -> tuple[list[tuple[str, str]], list[str]]:
    """The names of convolutions and of the batch normalisations that take their output, each used once in a pass; and of the
    activations that take nothing but what comes out of such batch normalisations."""
    modules = dict(split_model.model.named_modules())
    convolutions = [name for name, module in modules.items() if _can_be_folded_into(module)]
    norms = [name for name, module in modules.items() if _can_be_folded(module)]
    activations = [name for name, module in modules.items() if getattr(module, "inplace", None) is False]
    # With its version, which a change in place raises; and kept, so that no other tensor gets its id.
    outputs: dict[int, tuple[Tensor, int, str]] = {}
    times: Counter[str] = Counter()
    sources: dict[str, list[str]] = defaultdict(list)  # of each use, what it takes the output of; "" for anything else

    def made(name: str, output: Tensor) -> None:
        times[name] += 1
        outputs[id(output)] = output, output._version, name

    def taken(name: str, inputs: Tensor) -> None:
        output, version, source = outputs.get(id(inputs), (None, 0, ""))
        sources[name].append(source if output is not None and output._version == version else "")

    hooks = [
        modules[name].register_forward_hook(lambda module, inputs, output, name=name: made(name, output))
        for name in [*convolutions, *norms]
    ]
    hooks += [
        modules[name].register_forward_pre_hook(lambda module, inputs, name=name: taken(name, inputs[0]))
        for name in [*norms, *activations]
    ]
    try:
        with evaluating(split_model.model):
            split_model.features(example)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(sources[norm][0], norm) for norm in norms if len(sources[norm]) == 1]
    folded = [(source, norm) for source, norm in pairs if source in convolutions and times[source] == 1]
    norms_folded = {norm for _, norm in folded}
    return folded, [name for name in activations if sources[name] and norms_folded.issuperset(sources[name])]


class _Uses(TorchFunctionMode):
    """Tells of each use of a tensor: of a convolution's input its weight, of anything else None."""

    def __init__(self, used: Callable[[Tensor, Tensor | None], None]) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_convolution = function is torch.conv2d and len(args) > 1
        for number, argument in enumerate(tree_leaves((args, kwargs))):
            if isinstance(argument, Tensor):
                self._used(argument, args[1] if is_convolution and number == 0 else None)
        return function(*args, **(kwargs or {}))


def _paddings(split_model: SplitModel, example: Tensor) -> list[tuple[str, str]]:
    """The names of layers that put as many zeros on opposite sides, and of the convolutions that alone take their output, each
    used once in a pass. Some convolutions (TensorFlow's "same" ones) have such a layer of their own."""
    modules = dict(split_model.model.named_modules())
    paddings = [name for name, module in modules.items() if _pads_alike(module)]
    of_weight = {id(module.weight): name for name, module in modules.items() if _can_pad(module)}
    outputs: dict[int, tuple[Tensor, str]] = {}
    times: Counter[str] = Counter()
    takers: dict[str, list[str]] = defaultdict(list)  # of each padding, the convolutions that take it; "" for anything else

    def made(name: str, output: Tensor) -> None:
        times[name] += 1
        outputs[id(output)] = output, name

    def used(tensor: Tensor, weight: Tensor | None) -> None:
        convolution = of_weight.get(id(weight), "")
        times[convolution] += 1
        if id(tensor) in outputs:
            takers[outputs[id(tensor)][1]].append(convolution)

    hooks = [
        modules[name].register_forward_hook(lambda module, inputs, output, name=name: made(name, output)) for name in paddings
    ]
    try:
        with evaluating(split_model.model), _Uses(used):
            split_model.features(example)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(name, takers[name][0]) for name in paddings if len(takers[name]) == 1 and times[name] == 1]
    return [(padding, taker) for padding, taker in pairs if taker and times[taker] == 1]


def _can_pad(module: nn.Module) -> bool:
    return _can_be_folded_into(module) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pads_alike(module: nn.Module) -> bool:
    if not isinstance(module, nn.ConstantPad2d | nn.ZeroPad2d) or module.value != 0:
        return False
    left, right, top, bottom = module.padding
    return left == right >= 0 and top == bottom >= 0


def _can_be_folded_into(module: nn.Module) -> bool:
    # A weight that is computed anew in each pass (weight normalisation) cannot be replaced.
    return isinstance(module, nn.Conv2d) and "weight" in module._parameters


def _can_be_folded(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
