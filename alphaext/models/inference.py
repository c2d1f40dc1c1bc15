"""A model as it computes fastest on a CPU: the same features but for rounding, several times as many images a second."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..utils.modules import evaluating
from .split import PARITY, SplitModel


def for_cpu(split_model: SplitModel, example: Tensor) -> tuple[SplitModel, int]:
    """A copy of a model for inference on a CPU: channels last, batch normalisations folded into the convolutions before them.

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
    pairs = _followed_by_norms(fast, example)
    for convolution_name, norm_name in pairs:
        convolution, norm = fast.model.get_submodule(convolution_name), fast.model.get_submodule(norm_name)
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        fast.model.set_submodule(convolution_name, fuse_conv_bn_eval(convolution.eval(), norm.eval()))
        fast.model.set_submodule(norm_name, _rest_of(norm))
    difference = (fast.features(example) - expected).abs().max()
    if not difference <= PARITY.get(fast.classifier.weight.dtype, 1e-4) * expected.abs().max():
        return _copied(split_model), 0
    return fast, len(pairs)


def _copied(split_model: SplitModel) -> SplitModel:
    model = copy.deepcopy(split_model.model).to(memory_format=torch.channels_last)
    return SplitModel(model, split_model.classifier_name)


def _rest_of(norm: nn.BatchNorm2d) -> nn.Module:
    """What a batch normalisation does after normalising: timm's has an activation."""
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    return nn.Sequential(*parts)


def _followed_by_norms(split_model: SplitModel, example: Tensor) -> list[tuple[str, str]]:
    """The names of convolutions and of the batch normalisations that take their output, each used once in a pass."""
    modules = dict(split_model.model.named_modules())
    convolutions = {name: module for name, module in modules.items() if _can_be_folded_into(module)}
    norms = {name: module for name, module in modules.items() if _can_be_folded(module)}
    outputs: dict[int, tuple[Tensor, str]] = {}
    uses: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []

    def made(name: str, output: Tensor) -> None:
        uses[name] += 1
        outputs[id(output)] = output, name  # kept, so that no other tensor gets its id

    def taken(name: str, inputs: Tensor) -> None:
        uses[name] += 1
        if id(inputs) in outputs:
            pairs.append((outputs[id(inputs)][1], name))

    hooks = [
        convolution.register_forward_hook(lambda module, inputs, output, name=name: made(name, output))
        for name, convolution in convolutions.items()
    ]
    hooks += [
        norm.register_forward_pre_hook(lambda module, inputs, name=name: taken(name, inputs[0])) for name, norm in norms.items()
    ]
    try:
        with evaluating(split_model.model):
            split_model.features(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if uses[pair[0]] == uses[pair[1]] == 1]


def _can_be_folded_into(module: nn.Module) -> bool:
    # A weight that is computed anew in each pass (weight normalisation) cannot be replaced.
    return isinstance(module, nn.Conv2d) and "weight" in module._parameters


def _can_be_folded(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
