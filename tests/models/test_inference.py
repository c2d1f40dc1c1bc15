"""A model for inference on a CPU: the same features but for rounding, and the model itself untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alphaext.models.inference import for_cpu
from alphaext.models.split import SplitModel
from alphaext.models.zoo import make_model, split_model


class Network(nn.Module):
    """A convolution, a batch normalisation with numbers of its own, and a classifier; subclasses put more in between."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        with torch.no_grad():
            for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 2)
        self.fc = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.between(images).mean(dim=(2, 3)))
        return logits

    def between(self, images: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolution(images)))


class Shortcut(Network):
    def between(self, images: Tensor) -> Tensor:
        inner = self.convolution(images)
        return self.norm(inner) + inner


class Twice(Network):
    def between(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(self.convolution(images)))


class BatchStatistics(Network):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)


class InPlace(Network):
    def between(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(images).add_(1))


class SameConvolution(nn.Conv2d):
    """With a layer for its padding, as ports from TensorFlow have it."""

    def __init__(self, sides: tuple[int, int, int, int]) -> None:
        super().__init__(3, 3, 3)
        self.static_padding = nn.ZeroPad2d(sides)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(self.static_padding(images), self.weight, self.bias, self.stride, self.padding)


class Padded(Network):
    """Zeros around the images, and what else becomes of them."""

    def __init__(self, layer: nn.Module, then: str = "") -> None:
        super().__init__()
        self.layer, self.then = layer, then
        if not isinstance(layer, SameConvolution):
            self.convolution = nn.Conv2d(3, 3, 3, padding=(0, 2))

    def between(self, images: Tensor) -> Tensor:
        if isinstance(self.layer, SameConvolution):
            return self.norm(self.layer(images))
        padded = self.layer(images)
        features = self.norm(self.convolution(padded))
        if self.then == "its size":
            return features * padded.shape[2]
        if self.then == "itself":
            return features + nn.functional.interpolate(padded, size=features.shape[2:])
        return self.norm(self.convolution(self.layer(features))) if self.then == "both again" else features


class OwnPadding(nn.Conv2d):
    """Its code takes the padding for what it is, and no other."""

    def __init__(self, refuses: bool) -> None:
        super().__init__(3, 3, 3)
        self.refuses, self.zeros = refuses, nn.ZeroPad2d(1)

    def forward(self, images: Tensor) -> Tensor:
        if self.refuses and self.padding != (0, 0):
            raise RuntimeError("padded twice")
        return images + nn.functional.conv2d(self.zeros(images), self.weight, self.bias)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_model_that_fails_as_it_was_changed_stays_as_it_is(refuses: bool) -> None:
    network = Network()
    network.convolution = OwnPadding(refuses)
    split = SplitModel(network, "fc")
    fast, count = for_cpu(split, images())
    assert count == 0 and isinstance(fast.model.convolution.zeros, nn.ZeroPad2d)
    torch.testing.assert_close(fast.features(images()), split.features(images()), rtol=1e-4, atol=1e-5)


def images(size: int = 8) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "folded"), [(Network, 1), (Shortcut, 0), (Twice, 0), (BatchStatistics, 0), (InPlace, 0)])
def test_only_what_can_be_folded_is(kind: type[Network], folded: int) -> None:
    split = SplitModel(kind(), "fc")
    fast, count = for_cpu(split, images()[:2])
    assert count == folded
    torch.testing.assert_close(fast.features(images()), split.features(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "then", "gone"),
    [
        (nn.ZeroPad2d((2, 2, 1, 1)), "", True),
        (nn.ConstantPad2d(1, 0.0), "", True),
        (SameConvolution((1, 1, 1, 1)), "", True),
        (SameConvolution((0, 1, 0, 1)), "", False),
        (nn.ConstantPad2d(1, 0.5), "", False),
        (nn.ZeroPad2d((-1, -1, 0, 0)), "", False),
        (nn.ReflectionPad2d(1), "", False),
        (nn.ZeroPad2d(1), "its size", False),
        (nn.ZeroPad2d(1), "itself", False),
        (nn.ZeroPad2d(1), "both again", False),
    ],
)
def test_zeros_are_left_to_the_convolution(layer: nn.Module, then: str, gone: bool) -> None:
    split = SplitModel(Padded(layer, then), "fc")
    fast, _ = for_cpu(split, images())
    padding = getattr(fast.model.layer, "static_padding", fast.model.layer)
    assert isinstance(padding, nn.Identity) == gone
    torch.testing.assert_close(fast.features(images()), split.features(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "folded"), [("resnet18", 20), ("mobilenet_v3_small", 34), ("vit_b_16", 0), ("small", 4)])
def test_published_architectures(name: str, folded: int) -> None:
    pytest.importorskip("torchvision")
    size = 224 if name == "vit_b_16" else 64
    split = split_model(make_model(name, 3), example=images(size))
    fast, count = for_cpu(split, images(size))
    assert count == folded
    features = split.features(images(size))
    torch.testing.assert_close(fast.features(images(size)), features, rtol=1e-3, atol=1e-4 * float(features.abs().max()))


def test_timm_s_normalisations_keep_their_activation() -> None:
    pytest.importorskip("timm")
    split = split_model(make_model("timm:mobilenetv3_small_050", 3), example=images(64))
    fast, count = for_cpu(split, images(64))
    assert count > 20
    features = split.features(images(64))
    torch.testing.assert_close(fast.features(images(64)), features, rtol=1e-3, atol=1e-4 * float(features.abs().max()))


def test_only_activations_behind_folded_normalisations_are_in_place() -> None:
    class Activated(Network):
        def __init__(self) -> None:
            super().__init__()
            self.behind, self.elsewhere = nn.ReLU6(), nn.ReLU()

        def between(self, images: Tensor) -> Tensor:
            return self.behind(self.norm(self.convolution(self.elsewhere(images))))

    model = Activated()
    fast, _ = for_cpu(SplitModel(model, "fc"), images())
    assert fast.model.behind.inplace and not fast.model.elsewhere.inplace and not model.behind.inplace
    torch.testing.assert_close(fast.features(images()), SplitModel(model, "fc").features(images()), rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was() -> None:
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast, _ = for_cpu(SplitModel(model, "fc"), images())
    assert model.training and isinstance(model.norm, nn.BatchNorm2d) and model.convolution.weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert fast.model is not model and not fast.model._forward_hooks and not model.convolution._forward_hooks
