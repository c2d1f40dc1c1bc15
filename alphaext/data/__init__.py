"""Images and their labels: where they come from, and how they become tensors."""

from __future__ import annotations

from .images import ArrayImages, DatasetImages, FileImages, ImageReadError, LabelledImages, decode_image
from .list_files import read_list, write_list
from .loading import ImageBatch, Transform, image_batches
from .long_tailed import long_tailed_counts, make_long_tailed
from .sources import from_torchvision, open_images, read_arrays, read_cifar, read_image_folder
from .texts import TEXT_SUFFIXES, Texts, read_texts
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    make_transform,
    small_test_transform,
    small_train_transform,
    test_transform,
    train_transform,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "TEXT_SUFFIXES",
    "ArrayImages",
    "DatasetImages",
    "FileImages",
    "ImageBatch",
    "ImageReadError",
    "ImageTransform",
    "LabelledImages",
    "Texts",
    "Transform",
    "decode_image",
    "from_torchvision",
    "image_batches",
    "long_tailed_counts",
    "make_long_tailed",
    "make_transform",
    "open_images",
    "read_arrays",
    "read_cifar",
    "read_image_folder",
    "read_list",
    "read_texts",
    "small_test_transform",
    "small_train_transform",
    "test_transform",
    "train_transform",
    "write_list",
]
