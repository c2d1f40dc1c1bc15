"""Images with labels from where they are: list files, folders of class folders, arrays, torchvision's data sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Subset

from ..utils.callers import warn_caller
from ..utils.checks import check_choice, check_class_names
from ..utils.files import LONGEST_START, PathLike, open_file, what_it_is
from ..utils.packages import require
from ..utils.text import did_you_mean, one_form, same_names
from .images import ArrayImages, DatasetImages, FileImages, LabelledImages
from .list_files import existing_folder, read_list

# Those of torchvision's ImageFolder, so that both see the same images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Files that describe images, and are none.
_NOTES = (".txt", ".md", ".json", ".csv", ".xml", ".yaml", ".yml")

_PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_images(
    source: PathLike,
    *,
    root: PathLike | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    part: str | None = None,
) -> LabelledImages:
    """Open images by what ``source`` is.

    Args:
        source: a list file (``.txt``, see :func:`read_list`), a folder of class folders (:func:`read_image_folder`), an
            ``.npz`` file (:func:`read_arrays`), or ``"cifar10:train"``, ``"cifar10:test"``, ``"cifar100:train"``,
            ``"cifar100:test"`` (:func:`read_cifar`, which downloads nothing here).
        root: for a list, the folder that its paths are relative to; for CIFAR, the folder that holds it. Not for others.
        num_classes: N, where the source alone does not tell; a source that tells must agree.
        class_names: the names of all classes in the order of their labels; a folder's labels follow them, other sources that
            have names must agree.
        part: which part of an ``.npz`` file that holds several: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        The images.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a source of another form, a ``root`` missing or too many, or what the reader of that source refuses.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from alphaext.data import write_list
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_list(folder / "train.txt", ["cat/1.jpg", "dog/1.jpg"], [0, 1])
        >>> open_images(folder / "train.txt", root=folder)
        FileImages(2 images, 2 classes)
    """
    text = os.fspath(source)
    cifar, _, cifar_part = text.partition(":")
    if cifar in ("cifar10", "cifar100") and cifar_part:
        if root is None:
            raise ValueError(f"source {text!r} needs root, the folder that holds CIFAR")
        return _agreeing(read_cifar(cifar, root, cifar_part), text, num_classes, class_names)
    path = Path(text)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {text!r}: source must be a list file (.txt), a folder of class folders, an .npz file, "
            "or one of cifar10:train, cifar10:test, cifar100:train, cifar100:test"
        )
    if path.is_file() and path.suffix.lower() == ".txt":
        if root is None:
            raise ValueError(f"source {text!r} is a list and needs root, the folder that its paths are relative to")
        return read_list(path, root, num_classes=num_classes, class_names=class_names)
    if path.exists() and not path.is_dir() and path.suffix.lower() != ".npz":
        raise ValueError(f"source must be a list (.txt), a folder of class folders or an .npz file, got {text!r}")
    if root is not None:
        raise ValueError(f"root is for lists and CIFAR, but source {text!r} is neither; got root {os.fspath(root)!r}")
    if path.is_dir():
        return _agreeing(read_image_folder(path, class_names=class_names), text, num_classes, class_names)
    images = read_arrays(path, num_classes=num_classes, part=part)
    if class_names is not None and images.class_names is None:
        images = ArrayImages(images.pixels, images.labels, images.source, num_classes, class_names)
    return _agreeing(images, text, num_classes, class_names)


def read_image_folder(root: PathLike, *, class_names: Sequence[str] | None = None) -> FileImages:
    """Read a folder of class folders: ``root/class name/.../image``, the layout of torchvision's ``ImageFolder``.

    Files that are hidden or have no image suffix are passed over, with a warning that counts those that may be images; so is
    what archivers and file managers leave behind. A class folder may be empty.

    Args:
        root: the folder.
        class_names: of all classes, in the order of their labels: give the training folder's to the validation and test
            folders, so that labels agree where a class has no folder. Default: the class folders, sorted by name.

    Returns:
        The images, by class folder and then by path, both sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, no images in them, or a class folder that is not in ``class_names``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.jpg", "cat/2.png", "dog/1.jpg", "dog/notes.txt"):
        ...     (folder / name).parent.mkdir(exist_ok=True)
        ...     (folder / name).touch()
        >>> images = read_image_folder(folder)
        >>> [images.name(i) for i in range(3)], images.labels, images.class_names
        (['cat/1.jpg', 'cat/2.png', 'dog/1.jpg'], tensor([0, 0, 1]), ('cat', 'dog'))
    """
    folder = existing_folder(root, "root")
    with os.scandir(folder) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not _is_left_over(entry.name))
    if not found:
        raise ValueError(f"root must hold a folder for each class, got none in {str(folder)!r}")
    names = tuple(found) if class_names is None else check_class_names(class_names, None)
    if class_names is None:
        check_class_names(names, None)
    label_of = {one_form(name): label for label, name in enumerate(names)}
    unknown = [name for name in found if one_form(name) not in label_of]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        meant = did_you_mean(unknown[0], names)
        raise ValueError(
            f"class folders must be among the {len(names)} class_names, got {', '.join(map(repr, unknown[:5]))}{more} "
            f"in {str(folder)!r}{meant}"
        )
    if len(found) > 1 and class_names is None and {name.lower() for name in found} <= _PART_NAMES:
        raise ValueError(
            f"root must hold a folder for each class, got {', '.join(found)} in {str(folder)!r}: give one of these"
        )
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for name in found:
        before = len(paths)
        paths += _image_paths(folder, name, others)
        labels += [label_of[one_form(name)]] * (len(paths) - before)
    if not paths:
        raise ValueError(
            f"root must hold images ({', '.join(IMAGE_SUFFIXES)}) in its class folders, got none in {str(folder)!r}"
        )
    if others:
        listed = ", ".join(f"{number} {ending or 'without ending'}" for ending, number in others.most_common())
        warn_caller(f"{folder}: files of other endings than images have are passed over: {listed}")
    return FileImages(folder, paths, labels, class_names=names)


def _is_left_over(name: str) -> bool:
    return name.startswith((".", "@eaDir", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini", "lost+found")


def _image_paths(root: Path, class_folder: str, others: Counter[str]) -> list[str]:
    """The images below a class folder, relative to ``root``: by folder and then by name, both sorted; counts other files."""
    found: list[tuple[str, list[str]]] = []
    # Each with the folders that it lies in: links are followed, as data sets are often made of them, but not back up, which
    # would go on for ever.
    waiting: list[tuple[str, frozenset[str]]] = [(class_folder, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(root / folder)
        if real in above:
            continue
        images = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if _is_left_over(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append((f"{folder}/{entry.name}", above | {real}))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append(entry.name)
                elif not entry.name.lower().endswith(_NOTES):
                    others[os.path.splitext(entry.name)[1].lower()] += 1
        found.append((folder, sorted(images)))
    return [f"{folder}/{name}" for folder, images in sorted(found) for name in images]


def read_arrays(
    path: PathLike,
    *,
    images: str | None = None,
    labels: str | None = None,
    names: str | None = "names",
    num_classes: int | None = None,
    part: str | None = None,
) -> ArrayImages:
    """Read images from the arrays of an ``.npz`` file, into memory.

    Args:
        path: the file.
        images: name of the array of pixels, uint8 [n, height, width] or [n, height, width, 1] (gray) or [n, height, width, 3].
            Default: ``x``, ``images``, ``data`` or ``pixels``, alone or with the part before or behind, as in ``train_images``
            and ``x_train``.
        labels: name of the array of labels, integers [n] or [n, 1]. Default: ``y``, ``labels``, ``targets`` likewise.
        names: name of the array of the class names, text [N]; the default is passed over where the file has no such array, None
            always.
        num_classes: N; default, the number of names, or without names the largest label plus one.
        part: of a file that holds several, ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        The images, called ``file.npz[0]`` and so on.

    Raises:
        FileNotFoundError: no such file.
        TypeError: arrays of other types, or of Python objects (which are never unpickled).
        ValueError: no ``.npz``, an array that is not in it, shapes or lengths or numbers of classes that disagree.

    Example:
        >>> import numpy, tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "digits.npz"
        >>> numpy.savez(path, x=numpy.zeros((3, 8, 8), numpy.uint8), y=[0, 1, 1])
        >>> images = read_arrays(path)
        >>> image, label = images[2]
        >>> images.name(2), image.size, label
        ('digits.npz[2]', (8, 8), 1)
    """
    file = Path(path)
    with open_file(file) as opened:
        what = what_it_is(opened.read(LONGEST_START))
    if what not in ("", "a ZIP archive", "an array of NumPy"):
        raise ValueError(f"{file} is {what}, not an .npz file")
    try:
        archive = np.load(file, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{file} is not an .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{file} is not an .npz file: it holds a single array")
    with archive:
        if images is None or labels is None:
            found = _found_arrays(archive.files, part)
            images, labels = images or found[0], labels or found[1]
        pixels = _array(archive, file, images, "images")
        label_ids = _array(archive, file, labels, "labels")
        pixels = pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels
        label_ids = label_ids[:, 0] if label_ids.ndim == 2 and label_ids.shape[1] == 1 else label_ids
        class_names = None
        if names is not None and (names in archive or names != "names"):
            texts = _array(archive, file, names, "names")
            if texts.dtype.kind != "U" or texts.ndim != 1:
                raise TypeError(f"{file}: names ({names!r}) must be text [N], got {texts.dtype} {list(texts.shape)}")
            class_names = [str(text) for text in texts]
    try:
        if len(pixels) == 0:
            raise ValueError("there are no images in it")
        return ArrayImages(pixels, label_ids, file.name, num_classes, class_names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from None


def _found_arrays(present: Sequence[str], part: str | None) -> tuple[str, str]:
    """The names of the images and of the labels in an archive; x and y where there are none of the usual ones."""
    of_part = [part] if part is not None else ["train", "val", "test"]
    pairs = []
    affixes = [("", ""), *((f"{each}_", "") for each in of_part), *(("", f"_{each}") for each in of_part)]
    for before, after in affixes:
        images = [f"{before}{name}{after}" for name in ("x", "X", "images", "data", "pixels", "image", "imgs")]
        labels = [f"{before}{name}{after}" for name in ("y", "Y", "labels", "targets", "fine_labels", "label", "target")]
        pairs += [(one, other) for one in images for other in labels if one in present and other in present]
    if len(pairs) > 1 and part is None:
        listed = " or ".join(f"images={one!r}, labels={other!r}" for one, other in pairs)
        raise ValueError(f"images and labels must be named where there are several: {listed}")
    return pairs[0] if pairs else ("x", "y")


def _array(archive: Any, file: Path, key: str, role: str) -> npt.NDArray[Any]:
    if key not in archive:
        raise ValueError(
            f"{file} has no array {key!r} for {role}; it has {', '.join(sorted(archive.files)) or 'none'}; "
            "read_arrays(..., images=, labels=) names others"
        )
    try:
        array = archive[key]
    except MemoryError:
        raise
    except Exception as error:  # what NumPy and zipfile make of damaged bytes knows no limits
        if "allow_pickle" in str(error):
            raise TypeError(f"{file}: {role} ({key!r}) must be an array of numbers or text, got Python objects") from None
        raise ValueError(f"{file}: {role} ({key!r}) cannot be read: {error}") from error
    if array.ndim == 0:
        raise ValueError(f"{file}: {role} ({key!r}) must have one entry an image or class, got a single value")
    return np.asarray(array)


def from_torchvision(dataset: Any, name: str) -> DatasetImages:
    """Take the images of a torchvision data set, or of any that is made like one.

    Args:
        dataset: its items are ``(PIL image, label)``, so it is made without ``transform`` and ``target_transform``; its labels
            are in ``targets``, ``labels`` or ``_labels``, the names of its classes in ``classes`` where there are any. Torch's
            ``Subset`` and ``ConcatDataset`` of such data sets are data sets too.
        name: what to call it; its images are ``name[0]`` and so on.

    Returns:
        The images. They are read through ``dataset`` when asked for.

    Raises:
        TypeError: items of another kind, or no labels.
        ValueError: a transform of the labels, an empty data set, or labels that disagree with its length, its first item or its
            classes.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> fake = FakeData(size=4, num_classes=2)
        >>> fake.targets = [fake[i][1] for i in range(4)]
        >>> from_torchvision(fake, "fake")
        DatasetImages(4 images, 2 classes)
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a text that is not empty, got {name!r}")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset must have a length and items, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} has no images")
    labels, classes = _labels_and_classes(dataset)
    images = DatasetImages(dataset, labels, name, class_names=classes)
    images.load(0)
    item_label = int(np.asarray(dataset[0][1]).item())
    if item_label != int(images.labels[0]):
        raise ValueError(
            f"dataset {name!r} lists label {int(images.labels[0])} for its first item, but that has label {item_label}"
        )
    return images


def _labels_and_classes(dataset: Any) -> tuple[npt.NDArray[Any], list[str] | None]:
    """The labels of a data set in torchvision's manner, or of a subset or a concatenation of such, and its classes' names."""
    if getattr(dataset, "target_transform", None) is not None:
        raise ValueError("dataset must have no target_transform: it would change the labels of its items, but not all at once")
    if isinstance(dataset, ConcatDataset):
        parts = [_labels_and_classes(part) for part in dataset.datasets]
        if any(classes != parts[0][1] for _, classes in parts):
            raise ValueError("dataset must concatenate data sets of the same classes, got different names of classes")
        return np.concatenate([labels for labels, _ in parts]), parts[0][1]
    if isinstance(dataset, Subset):
        labels, classes = _labels_and_classes(dataset.dataset)
        return labels[np.asarray(dataset.indices, dtype=np.int64)], classes
    attribute = next((key for key in ("targets", "labels", "_labels") if getattr(dataset, key, None) is not None), None)
    if attribute is None:
        raise TypeError(
            f"dataset must have its labels in targets, labels or _labels, {type(dataset).__name__} has none of them"
        )
    labels = np.asarray(getattr(dataset, attribute))
    named = getattr(dataset, "classes", None)
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return flat, None if named is None else [str(entry) for entry in named]


def read_cifar(name: str, root: PathLike, part: str, download: bool = False) -> ArrayImages:
    """Read CIFAR-10 or CIFAR-100, into memory, through torchvision, which checks the files' MD5 before it opens them.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder that holds the unpacked archive (``cifar-10-batches-py`` or ``cifar-100-python``).
        part: ``"train"`` (50,000 images) or ``"test"`` (10,000).
        download: fetch it if it is not there (170 MB).

    Returns:
        The images, 32x32 RGB, called ``cifar100:train[0]`` and so on.

    Raises:
        ImportError: torchvision is not installed.
        FileNotFoundError: it is not there, or not whole.
        ValueError: another name or part.

    Example:
        >>> try:
        ...     read_cifar("cifar100", "no such folder", "train")
        ... except FileNotFoundError as error:
        ...     print(str(error)[:47])
        no whole copy of cifar100 in 'no such folder' (
    """
    check_choice(name, "name", ("cifar10", "cifar100"))
    check_choice(part, "part", ("train", "test"))
    datasets = require("torchvision.datasets", "CIFAR needs", "'alphaext[vision]'")
    make = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        dataset = make(os.fspath(root), train=part == "train", download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no whole copy of {name} in {os.fspath(root)!r} ({error}); read_cifar(..., download=True) fetches it"
        ) from error
    return ArrayImages(dataset.data, dataset.targets, f"{name}:{part}", class_names=dataset.classes)


def _agreeing(
    images: LabelledImages, source: str, num_classes: int | None, class_names: Sequence[str] | None
) -> LabelledImages:
    """``images``, after checking that what is known of the classes is what was asked for."""
    if num_classes is not None and images.num_classes != num_classes:
        raise ValueError(f"source {source!r} has {images.num_classes} classes, but num_classes is {num_classes}")
    if class_names is not None and images.class_names is not None and not same_names(class_names, images.class_names):
        if len(class_names) != len(images.class_names):
            raise ValueError(f"source {source!r} has {images.num_classes} classes, but class_names has {len(class_names)}")
        first = next(i for i, name in enumerate(images.class_names) if one_form(name) != one_form(class_names[i]))
        raise ValueError(
            f"source {source!r} calls class {first} {images.class_names[first]!r}, class_names {class_names[first]!r}"
        )
    return images
