from __future__ import annotations

import doctest
import importlib
import json
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from alphaext.data import transforms
from alphaext.data.transforms import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    make_transform,
    small_test_transform,
    small_train_transform,
    train_transform,
)

pytest.importorskip("torchvision", reason="transforms are torchvision's")
Image = pytest.importorskip("PIL.Image", reason="images need Pillow")

MAKERS: dict[str, Callable[[], ImageTransform]] = {
    "test": lambda: transforms.test_transform(24, 32),
    "gray test": lambda: transforms.test_transform(24, 32, channels=1),
    "train": lambda: train_transform(24),
    "gray train": lambda: train_transform(24, channels=1),
    "plain train": lambda: train_transform(24, flip=False, jitter=0),
    "small test": lambda: small_test_transform(28, channels=1),
    "small train": lambda: small_train_transform(32, mean=CIFAR_MEAN, std=CIFAR_STD),
    "small train of digits": lambda: small_train_transform(28, channels=1, padding=2, flip=False),
}


@pytest.fixture(params=MAKERS)
def transform(request: pytest.FixtureRequest) -> ImageTransform:
    return MAKERS[request.param]()


def picture(seed: int = 0, size: tuple[int, int] = (50, 40), mode: str = "RGB") -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(importlib.import_module("alphaext.data.transforms"), extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


def test_the_test_transform_is_the_published_one() -> None:
    from torchvision.transforms import v2

    published = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    for size in ((300, 400), (500, 260), (40, 900)):
        image = picture(size=size)
        assert torch.equal(transforms.test_transform()(image), published(image))


@pytest.mark.parametrize(("size", "width", "height"), [(40, 48, 32), (32, 32, 60), (24, 100, 7)])
def test_shapes_and_dtypes(transform: ImageTransform, size: int, width: int, height: int) -> None:
    side, channels = transform.description["image_size"], transform.description["channels"]
    for mode in ("RGB", "L"):
        tensor = transform(picture(size=(width, height), mode=mode))
        assert tensor.shape == (channels, side, side) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def test_values_are_normalized() -> None:
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    values = transforms.test_transform(24, 32)(white)[:, 0, 0]
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(values, expected)
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    assert small_test_transform(32)(red)[:, 0, 0].tolist() == [1, -1, -1]
    assert small_test_transform(32, channels=1)(red)[0, 0, 0] == pytest.approx(2 * round(0.299 * 255) / 255 - 1)


def test_gray_images_and_their_color_copies_give_the_same(transform: ImageTransform) -> None:
    gray = picture(mode="L")
    assert torch.equal(transform.seeded(gray, 3), transform.seeded(gray.convert("RGB"), 3))


def test_small_images_of_the_right_size_are_not_resampled() -> None:
    image = picture(size=(28, 28), mode="L")
    tensor = small_test_transform(28, channels=1, mean=[0], std=[1])(image)
    torch.testing.assert_close(tensor[0] * 255, torch.from_numpy(np.asarray(image).astype(np.float32)))


def test_padding_moves_the_image_by_no_more_than_itself() -> None:
    transform = small_train_transform(32, channels=1, mean=[0], std=[1], padding=3, flip=False)
    image = Image.new("L", (32, 32))
    image.putpixel((16, 16), 255)
    places = set()
    for seed in range(200):
        [(_, row, column)] = transform.seeded(image, seed).nonzero().tolist()
        places.add((row - 16, column - 16))
    assert {row for row, _ in places} == set(range(-3, 4)) == {column for _, column in places}


def test_only_random_transforms_draw(transform: ImageTransform) -> None:
    image = picture()
    state = torch.random.get_rng_state()
    first = transform(image)
    drew = not torch.equal(state, torch.random.get_rng_state())
    assert drew == transform.random == ("train" in transform.description["name"])
    torch.random.set_rng_state(state)
    assert torch.equal(transform(image), first)


def test_a_seed_gives_one_result_and_disturbs_nobody(transform: ImageTransform) -> None:
    image = picture()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = transform.seeded(image, 2**62)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(transform.seeded(image, 2**62), first)
    different = len({transform.seeded(image, seed).numpy().tobytes() for seed in range(8)})
    assert different > 4 if transform.random else different == 1


def test_seeds_are_checked(transform: ImageTransform) -> None:
    for seed, error in ((-1, ValueError), (2**63, ValueError), (0.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="seed must be"):
            transform.seeded(picture(), seed)  # type: ignore[arg-type]


def test_threads_do_not_draw_from_each_others_seeds() -> None:
    transform, image = train_transform(16), picture()
    expected = [transform.seeded(image, seed) for seed in range(40)]
    results: dict[int, torch.Tensor] = {}

    def work(first: int) -> None:
        for seed in range(first, 40, 4):
            results[seed] = transform.seeded(image, seed)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(40))


class Seeded(Dataset[Any]):
    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.rand(index)
        return self.transform.seeded(picture(index), 1000 + index)


def test_workers_give_what_the_main_process_gives() -> None:
    seeded = Seeded(train_transform(16))
    loader = DataLoader(seeded, batch_size=1, num_workers=2, multiprocessing_context="fork")
    for index, batch in enumerate(loader):
        assert torch.equal(batch[0], seeded[index])


def test_a_fork_while_another_thread_draws_does_not_hang() -> None:
    with transforms._drawing:
        loader = DataLoader(
            Seeded(train_transform(16)), batch_size=1, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        batches = list(loader)
    assert len(batches) == 6


def test_default_devices_do_not_matter(transform: ImageTransform) -> None:
    image = picture()
    expected = transform.seeded(image, 1)
    with torch.device("meta"):
        assert torch.equal(transform.seeded(image, 1), expected)


# Descriptions


def test_descriptions_make_the_same_again(transform: ImageTransform) -> None:
    image = picture()
    for again in (make_transform(json.loads(json.dumps(transform.description))), pickle.loads(pickle.dumps(transform))):
        assert again == transform and hash(again) == hash(transform) and again.random == transform.random
        assert torch.equal(again.seeded(image, 1), transform.seeded(image, 1))


def test_a_description_is_a_copy() -> None:
    transform = transforms.test_transform()
    transform.description["mean"][0] = 0
    transform.description["image_size"] = 1
    assert transform.description["mean"] == list(IMAGENET_MEAN) and transform.description["image_size"] == 224
    assert transform == transforms.test_transform()


def test_equal_transforms_are_described_alike() -> None:
    assert small_test_transform(32) == small_test_transform(32, mean=np.float64([0.5] * 3).tolist(), std=(0.5, 0.5, 0.5))
    assert small_train_transform(32) == small_train_transform(32, padding=4)
    assert transforms.test_transform(channels=1).description["mean"] == [0.449]
    everything = [make() for make in MAKERS.values()]
    for i, one in enumerate(everything):
        assert [j for j, other in enumerate(everything) if one == other] == [i]
    assert everything[0] != everything[0].description


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 32), st.sampled_from([1, 3]), st.floats(0, 1), st.floats(0.01, 2), st.booleans())
def test_any_description_comes_back(size: int, more: int, channels: int, mean: float, std: float, flip: bool) -> None:
    for transform in (
        transforms.test_transform(size, size + more, [mean], [std], channels),
        train_transform(size, [mean], [std], channels, flip=flip, jitter=mean),
        small_train_transform(size, channels, [mean], [std], flip=flip),
    ):
        assert make_transform(json.loads(json.dumps(transform.description))) == transform


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "tset"}, ValueError, "name must be one of test, train, small test, small train, got 'tset'"),
        ({"name": None}, ValueError, "got None"),
        ({"crop": 3}, ValueError, "the description of a 'test' transform has unknown crop"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        ({"image_size": 2.5}, TypeError, "image_size must be an integer, got 2.5"),
        ({"resize": 16}, ValueError, "resize must be at least 24, got 16"),
        ({"channels": 4}, ValueError, "channels must be 1 or 3, got 4"),
        ({"mean": 0.5}, TypeError, "mean must be a sequence of numbers, got 0.5"),
        ({"mean": "0.5"}, TypeError, "mean must be a sequence of numbers"),
        ({"mean": ["0.5"]}, TypeError, "mean must be a number, finite, got '0.5'"),
        ({"mean": [0.5, 0.5]}, ValueError, "mean must have a value for each of 3 channels, or one for all"),
        ({"mean": [float("nan")]}, ValueError, "mean must be finite, got nan"),
        ({"std": [0.0]}, ValueError, "std must be finite and above 0"),
        ({"std": []}, ValueError, "std must have a value for each"),
    ],
)
def test_wrong_descriptions_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_transform({**transforms.test_transform(24, 32).description, **change})


def test_incomplete_descriptions_are_refused() -> None:
    description = transforms.test_transform().description
    del description["std"], description["mean"]
    with pytest.raises(ValueError, match="the description of a 'test' transform lacks mean, std"):
        make_transform(description)
    with pytest.raises(TypeError, match="description must be a dict, got str"):
        make_transform("test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: train_transform(jitter=1.5), ValueError, "jitter must be finite and at least 0 and at most 1, got 1.5"),
        (
            lambda: train_transform(jitter="a"),
            TypeError,
            "jitter must be a number, finite and at least 0 and at most 1, got 'a'",
        ),
        (lambda: train_transform(flip=1), TypeError, "flip must be True or False, got 1"),
        (lambda: small_train_transform(32, padding=-1), ValueError, "padding must be between 0 and 32, got -1"),
        (lambda: small_train_transform(0), ValueError, "image_size must be at least 1"),
    ],
)
def test_options_of_training_transforms_are_checked(
    make: Callable[[], ImageTransform], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_only_pil_images_are_taken(transform: ImageTransform) -> None:
    with pytest.raises(TypeError, match="image must be a PIL image, got Tensor"):
        transform(torch.zeros(3, 32, 32))  # type: ignore[arg-type]
