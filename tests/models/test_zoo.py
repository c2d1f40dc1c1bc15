"""Models by name, and where they are split: features times classifier are the model's own logits."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from alphaext.models.zoo import SmallConvNet, find_classifier, make_model, model_names, split_model

needs_torchvision = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode != 0,
    reason="needs torchvision",
)


def images(n: int = 2, channels: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch)


class Net(nn.Module):
    """A flat image through `body`, then `head`; the head is defined first."""

    def __init__(self, head: nn.Module, body: nn.Module | None = None) -> None:
        super().__init__()
        self.head = head
        self.body = body or nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU())

    def forward(self, batch):
        return self.head(self.body(batch))


def tiny(n: int = 3) -> torch.Tensor:
    return images(n, 3, 4)


# --- SmallConvNet


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_takes_small_images(size, channels):
    model = SmallConvNet(7, in_channels=channels)
    assert model.train()(images(3, channels, size)).shape == (3, 7)
    split = split_model(model, example=images(3, channels, size))
    assert (split.classifier_name, split.in_features, split.num_classes) == ("fc", 192, 7)


def test_small_is_the_network_of_the_study():
    convolutions = [module for module in SmallConvNet(10).modules() if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16, 48, 96, 192]
    assert [c.kernel_size[0] for c in convolutions] == [5, 3, 3, 3]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1]
    assert list(SmallConvNet(10).state_dict())[-2:] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(("arguments", "error"), [((0,), ValueError), ((2.5,), TypeError), ((3, 0), ValueError)])
def test_small_bad_arguments(arguments, error):
    with pytest.raises(error, match="must be"):
        SmallConvNet(*arguments)


# --- make_model


@needs_torchvision
def test_names():
    names = model_names()
    assert names[0] == "small" and {"resnext50_32x4d", "resnet152", "vit_b_16"} <= set(names)
    assert "fasterrcnn_resnet50_fpn" not in names and "quantized_resnet50" not in names


@needs_torchvision
@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_the_seed_decides_the_weights(name):
    before = torch.get_rng_state()
    first, same, other = (make_model(name, 4, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@needs_torchvision
def test_models_are_torchvisions_own():
    from torchvision.models import resnet18

    model = make_model("resnet18", 5)
    resnet18(num_classes=5).load_state_dict(model.state_dict())
    assert model.training and all(p.device.type == "cpu" for p in model.parameters())


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", "got 'resnet5'; did you mean resnet50 or"),
        ("resnt18", "did you mean resnet18"),
        ("resnext50", "did you mean resnext50_32x4d"),
        ("zzz", r"got 'zzz'; alphaext.models.model_names\(\) lists all"),
        ("quantized_resnet50", "must be that of a known model"),
        ("fasterrcnn_resnet50_fpn", "must be that of a known model"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, 5)


@needs_torchvision
def test_bad_arguments_of_make_model():
    with pytest.raises(ValueError, match="in_channels must be 3 for torchvision's resnet18, got 1"):
        make_model("resnet18", 5, in_channels=1)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make_model("resnet18", 0)
    with pytest.raises(TypeError, match="num_classes must be an integer, got 2.0"):
        make_model("small", 2.0)
    with pytest.raises(TypeError, match="name must be text such as 'resnet50', got 5"):
        make_model(5, 5)
    with pytest.raises(ValueError, match="pretrained must be False for 'small'"):
        make_model("small", 5, pretrained=True)


@needs_torchvision
def test_weights_that_cannot_be_downloaded(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionResetError("no network")

    monkeypatch.setattr("torchvision.models.resnet.ResNet18_Weights.get_state_dict", fail)
    with pytest.raises(OSError, match="weights of resnet18 could not be had: ConnectionResetError: no network; .* checkpoint"):
        make_model("resnet18", 5, pretrained=True)


@needs_torchvision
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_pretrained_with_other_classes_gets_a_new_last_layer(monkeypatch, name):
    import torchvision

    published = torchvision.models.get_model(name, weights=None)
    monkeypatch.setattr(torchvision.models, "get_model", lambda asked, **options: published)
    same = make_model(name, 1000, pretrained=True)
    layer = find_classifier(same)
    kept = same.get_submodule(layer).weight.clone()
    assert make_model(name, 1000, pretrained=True).get_submodule(layer).weight.equal(kept)
    model = make_model(name, 5, pretrained=True, seed=1)
    new = model.get_submodule(layer)
    assert new.out_features == 5
    again = make_model(name, 6, pretrained=True, seed=1)
    assert again.get_submodule(layer).out_features == 6
    split_model(model, example=images(2, size=64))


@needs_torchvision
def test_pretrained_inception_gets_new_auxiliary_classifiers(monkeypatch):
    import torchvision

    published = torchvision.models.get_model("googlenet", weights=None, num_classes=11, init_weights=False)
    monkeypatch.setattr(torchvision.models, "get_model", lambda asked, **options: published)
    model = make_model("googlenet", 5, pretrained=True)
    assert (model.fc.out_features, model.aux1.fc2.out_features, model.aux2.fc2.out_features) == (5, 5, 5)
    assert model.aux1.fc1.out_features == 1024


def test_without_torchvision(monkeypatch):
    for name in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install .*torchvision"):
        make_model("resnet18", 5)
    with pytest.raises(ImportError, match="pip install .*timm"):
        make_model("timm:resnet18", 5)
    assert isinstance(make_model("small", 5), SmallConvNet)


# --- timm


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 32), ("vit_tiny_patch16_224", 224), ("mobilenetv3_small_050", 32)])
def test_timm(name, size):
    pytest.importorskip("timm")
    model = make_model(f"timm:{name}", 5, in_channels=1)
    check_parity(model, images(2, 1, size))


def test_timm_unknown_name():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"got 'timm:resnt50'; did you mean timm:resnet50.*timm.list_models\(\) lists all"):
        make_model("timm:resnt50", 5)


# --- parity


def check_parity(model: nn.Module, batch: torch.Tensor) -> None:
    """Features times classifier are the model's logits, found with and without an example; nothing of the model changes."""
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split = split_model(model, example=batch)
    assert split.classifier_name == find_classifier(model) == find_classifier(model, batch)
    features = split.features(batch)
    assert all(module.training for module in model.modules())
    assert features.dtype == torch.float32 and features.shape == (len(batch), split.in_features)
    assert not features.requires_grad and not features.is_inference()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    logits = logits_of(model, batch)
    plain = functional.linear(features, split.classifier.weight, split.classifier.bias)
    torch.testing.assert_close(plain, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v3_small", 32),
        ("efficientnet_b0", 32),
        ("densenet121", 32),
        ("convnext_tiny", 32),
        ("shufflenet_v2_x0_5", 32),
        ("regnet_y_400mf", 32),
        ("swin_t", 32),
        ("googlenet", 32),
    ],
)
def test_torchvision_models(name, size):
    with torch.random.fork_rng():
        check_parity(make_model(name, 7), images(2, size=size))


@needs_torchvision
def test_torchvisions_vision_transformer():
    from torchvision.models import VisionTransformer

    check_parity(VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=7), images())


@needs_torchvision
@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnet152"])
def test_the_backbones_of_the_benchmarks(name):
    split = split_model(make_model(name, 10), example=images(1, size=64))
    assert (split.classifier_name, split.in_features) == ("fc", 2048)
    assert torch.isfinite(split.features(images(1, size=64))).all()


@needs_torchvision
def test_a_model_without_a_linear_layer():
    with pytest.raises(ValueError, match="model must end in an nn.Linear, but this SqueezeNet has none"):
        find_classifier(make_model("squeezenet1_1", 7))


# --- find_classifier


def test_the_classifier_need_not_be_the_last_module():
    model = Net(nn.Linear(6, 5))
    assert find_classifier(model) == "body.1"
    assert find_classifier(model, tiny()) == "head"
    assert split_model(model, example=tiny()).classifier_name == "head"


def test_an_auxiliary_head_that_runs_last_is_not_the_classifier():
    class Two(Net):
        def forward(self, batch):
            features = self.body(batch)
            logits = self.head(features)
            self.seen = self.aside(features)
            return logits

    model = Two(nn.Linear(6, 5))
    model.aside = nn.Linear(6, 5)
    assert find_classifier(model, tiny()) == "head"


def test_a_copy_of_the_output_will_do():
    class Copied(Net):
        def forward(self, batch):
            return super().forward(batch).clone()

    assert find_classifier(Copied(nn.Linear(6, 5)), tiny()) == "head"


def test_a_linear_layer_alone_is_its_own_classifier():
    model = nn.Linear(4, 3)
    split = split_model(model, example=torch.randn(2, 4))
    assert split.classifier is model and split.classifier_name == ""
    assert split.features(torch.ones(2, 4)).equal(torch.ones(2, 4))
    assert len(split.fingerprint()) == 64


@pytest.mark.parametrize(
    "after", [nn.Softmax(dim=1), nn.LogSoftmax(dim=1), nn.ReLU(), nn.ReLU(inplace=True), nn.Hardtanh(-1e-3, 1e-3, inplace=True)]
)
def test_something_behind_the_classifier(after):
    model = nn.Sequential(Net(nn.Linear(6, 5)), after)
    with pytest.raises(ValueError, match=r"output \[3, 5\] is not that of any .*'0.head' \[5, 6\], '0.body.1' \[6, 48\]"):
        find_classifier(model, tiny())
    with pytest.raises(ValueError, match="differ from the model's output by up to"):
        split_model(model, "0.head", tiny())


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, x + 1), lambda x: {"loss": 0, "logits": x}, lambda x: SimpleNamespace(logits=x)]
)
def test_logits_among_what_a_model_returns(wrap):
    class Wrapped(Net):
        def forward(self, batch):
            return wrap(super().forward(batch))

    model = Wrapped(nn.Linear(6, 5))
    split = split_model(model, example=tiny())
    assert split.classifier_name == "head" and torch.equal(split.features(tiny()), model.body(tiny()))


@pytest.mark.parametrize(("wrap", "kind"), [(lambda x: {"scores": x}, "NoneType"), (lambda x: "five", "str")])
def test_an_output_without_logits(wrap, kind):
    class Wrapped(Net):
        def forward(self, batch):
            return wrap(super().forward(batch))

    message = f"must return a tensor of logits, or an object with such logits, got a {kind}; .*'head' \\[5, 6\\]"
    with pytest.raises(ValueError, match=message):
        find_classifier(Wrapped(nn.Linear(6, 5)), tiny())
    with pytest.raises(ValueError, match=message):
        split_model(Wrapped(nn.Linear(6, 5)), "head", tiny())


def test_a_classifier_used_twice():
    class Twice(Net):
        def forward(self, batch):
            self.head(self.body(batch) + 1)
            return self.head(self.body(batch))

    model = Twice(nn.Linear(6, 5))
    for call in (lambda: find_classifier(model, tiny()), lambda: split_model(model, "head", tiny())):
        with pytest.raises(ValueError, match="'head' must be used once in a forward pass .* it is used 2 times"):
            call()
    with pytest.raises(ValueError, match="it is used 2 times"):
        split_model(model, "head").features(tiny())


def test_a_classifier_that_is_not_used():
    model = Net(nn.Linear(6, 5))
    model.unused = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="'unused' must be used once .* it is used 0 times"):
        split_model(model, "unused", tiny())


def test_a_linear_layer_inside_may_be_used_often():
    shared = nn.Linear(6, 6)
    model = Net(nn.Linear(6, 5), nn.Sequential(nn.Flatten(), nn.Linear(48, 6), shared, nn.ReLU(), shared))
    check = split_model(model, example=tiny())
    assert check.classifier_name == "head"


# --- split_model


def test_a_wrong_name():
    model = Net(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"'fc' is not there. Its linear layers: 'head' \[5, 6\], 'body.1' \[6, 48\]"):
        split_model(model, "fc")
    with pytest.raises(ValueError, match="'body.2' is a ReLU"):
        split_model(model, "body.2")
    with pytest.raises(ValueError, match=r"'body.1' makes logits \[3, 6\], but the model returns \[3, 5\]"):
        split_model(model, "body.1", tiny())
    square = Net(nn.Linear(6, 6))
    with pytest.raises(ValueError, match="'body.1' is not the plain linear layer .* differ from the model's output by up to"):
        split_model(square, "body.1", tiny())


class Cosine(nn.Linear):
    def forward(self, features):
        return functional.linear(functional.normalize(features), functional.normalize(self.weight), self.bias)


class Renamed(nn.Linear):
    pass


def test_a_layer_that_does_more_than_a_linear_one():
    for arguments in (("head",), (None, tiny()), ("head", tiny())):
        with pytest.raises(ValueError, match="'head' is not the plain linear layer .* that of Cosine.forward by up to"):
            split_model(Net(Cosine(6, 5)), *arguments)


def test_a_subclass_that_is_a_linear_layer():
    assert split_model(Net(Renamed(6, 5)), example=tiny()).classifier_name == "head"
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    assert split_model(Net(weighted), example=tiny()).classifier_name == "head"


def test_features_with_extra_dimensions():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, batch):
            return self.head(batch)

    with pytest.raises(ValueError, match=r"features must have shape \[3, 4\].*'head' gets \[3, 3, 4, 4\]"):
        split_model(Positions(), example=tiny())


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (None, TypeError, "images must be a tensor of images"),
        ([1.0], TypeError, "got list"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), TypeError, "images must be floating point, got torch.uint8"),
        (torch.zeros(3), ValueError, r"must be a batch of images \[n, ...\], got shape \[3\]"),
        (torch.zeros(2, 1, 4, 4), ValueError, r"the model, a Net, cannot take images \[2, 1, 4, 4\]: RuntimeError"),
    ],
)
def test_bad_images(batch, error, message):
    split = split_model(Net(nn.Linear(6, 5)))
    with pytest.raises(error, match=message):
        split.features(batch)
    assert split.model.training


def test_not_a_model():
    for call in (find_classifier, split_model):
        with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
            call("resnet18")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_dtypes(dtype):
    model = Net(nn.Linear(6, 5)).to(dtype)
    split = split_model(model, example=tiny())
    assert split.features(tiny()).dtype == torch.float32


def test_under_autocast_and_in_inference_mode():
    model = Net(nn.Linear(6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert split_model(model, example=tiny()).features(tiny()).dtype == torch.float32
    with torch.inference_mode():
        features = split_model(model, example=tiny()).features(tiny())
    nn.Linear(6, 5)(features).sum().backward()


def test_modes_are_put_back_one_by_one():
    model = make_model("small", 5)
    model.train()
    model.backbone[1].eval()
    split = split_model(model, example=images())
    modes = [module.training for module in model.modules()]
    statistics = model.backbone[4].running_mean.clone()
    first, second = split.features(images(4)), split.features(images(4)[:2])
    assert [module.training for module in model.modules()] == modes and not all(modes)
    assert torch.equal(statistics, model.backbone[4].running_mean)
    torch.testing.assert_close(first[:2], second)


def test_wrappers_are_taken_off():
    model = Net(nn.Linear(6, 5))
    plain = split_model(model, example=tiny())
    for wrapped, name in ((nn.DataParallel(model), "module.head"), (torch.compile(model), "_orig_mod.head")):
        for classifier in (None, name, "head"):
            split = split_model(wrapped, classifier, tiny())
            assert split.model is model and split.classifier_name == "head"
            assert split.fingerprint() == plain.fingerprint()


def test_hooks_are_gone_even_after_an_error():
    model = Net(nn.Linear(6, 5))
    split = split_model(model, example=tiny())
    with pytest.raises(ValueError, match="cannot take images"):
        split.features(torch.zeros(1, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- fingerprint


def test_the_fingerprint_is_of_what_features_depend_on():
    model = make_model("small", 5)
    split = split_model(model)
    first = split.fingerprint()
    assert len(first) == 64
    with torch.no_grad():
        model.fc.weight.add_(1)
        model.fc.bias.zero_()
    assert split.fingerprint() == first
    assert split_model(make_model("small", 9)).fingerprint() == first  # the same draws, another classifier
    assert split_model(make_model("small", 5, seed=1)).fingerprint() != first
    model.to(memory_format=torch.channels_last)
    assert split.fingerprint() == first
    for change in (
        lambda: model.backbone[0].weight[0, 0, 0, 0].mul_(1.0001),
        lambda: model.backbone[1].running_var[3].add_(1e-3),
    ):
        before = split.fingerprint()
        with torch.no_grad():
            change()
        assert split.fingerprint() != before
    before = split.fingerprint()
    model.double()
    assert split.fingerprint() != before


def test_a_name_that_only_begins_like_the_classifiers_counts():
    class Close(Net):
        def __init__(self):
            super().__init__(nn.Linear(6, 5))
            self.head2 = nn.Linear(6, 6)

        def forward(self, batch):
            return self.head(self.head2(self.body(batch)))

    split = split_model(Close(), example=tiny())
    before = split.fingerprint()
    with torch.no_grad():
        split.model.head2.weight.add_(1)
    assert split.classifier_name == "head" and split.fingerprint() != before


def test_a_replaced_classifier_is_the_one_in_use():
    split = split_model(Net(nn.Linear(6, 5)), example=tiny())
    split.model.head = nn.Linear(6, 8)
    assert split.num_classes == 8
    assert split.features(tiny()).shape == (3, 6)
    assert repr(split) == "SplitModel(Net, classifier_name='head', num_classes=8, in_features=6)"


# --- any shape


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    outputs=st.integers(1, 6),
    batch=st.integers(1, 4),
    bias=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    first=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_stack_of_linear_layers_is_split_at_its_end(widths, outputs, batch, bias, scale, first, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [module for a, b in zip([12, *widths], widths, strict=False) for module in (nn.Linear(a, b), nn.Tanh())]
        head = nn.Linear(widths[-1], outputs, bias=bias)
        model = Net(head, nn.Sequential(nn.Flatten(), *layers))
    with torch.no_grad():
        head.weight.mul_(scale)
    example = torch.randn(batch, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    split = split_model(model, example=example)
    # With two layers of one shape and the same values the outputs could agree, never by chance.
    assert split.classifier_name == "head"
    logits = logits_of(model, example)
    plain = functional.linear(split.features(example), head.weight, head.bias)
    torch.testing.assert_close(plain, logits, rtol=1e-5, atol=1e-5 * float(logits.detach().abs().max()))
