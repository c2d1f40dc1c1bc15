"""Images to cached features, once: by one process or many, stoppable at any time, going on where it stopped."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
)
from torch import Tensor

from ..data.images import LabelledImages
from ..data.loading import ImageBatch, Transform, image_batches, image_seed
from ..models.zoo import SplitModel
from ..utils.checks import check_choice, check_integer, check_kind
from ..utils.files import PathLike
from ..utils.modules import cudnn_choice
from ..utils.processes import Group, process_group
from ..utils.progress import ImagesPerSecond, task_bar
from .folder import ExtractionFolder, wait_for
from .shards import IDENTITY_FILE, Shard, ShardPlan, Unreadable
from .store import DTYPES, SIDECAR_FILE, Features, as_json, differences, read_features

# How long processes work before they tell each other how far they are and whether all is well: far below the time after which a
# waiting process gives another up, far above what the telling takes.
_SECONDS_A_ROUND = 30.0


def extract(
    split_model: SplitModel,
    images: LabelledImages,
    folder: PathLike,
    *,
    transform: Transform,
    dtype: str = "float16",
    batch_size: int = 64,
    workers: int = 0,
    passes: int = 1,
    device: str | torch.device | None = None,
    skip_unreadable: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Features:
    """Compute what goes into the classifier for each image, and keep it in a folder of cached features.

    The work is cut into shards of some hundred images. What is interrupted, by Ctrl-C, a kill, a full disk or an unreadable
    image, goes on at the last shard when the same call is made again. Processes started by ``torchrun`` share the shards;
    ``folder`` must then be on a file system that all of them see. The result has the same bits however many processes and
    workers made it and however often it was interrupted, as long as they compute on the same kind of device with the same
    number of threads.

    A folder that already holds what is asked for is returned as it is. One that holds, or has begun, the features of another
    model, other images or other settings is left untouched, with an error that says what differs.

    Args:
        split_model: the model, from :func:`alphaext.models.split_model`. It computes in eval mode, on ``device``; afterwards
            it is as and where it was.
        images: what to extract; their labels must be classes of the model.
        folder: where to. It is made if need be.
        transform: of each image, such as :func:`alphaext.data.test_transform`, the usual one for cached features.
        dtype: of the features on disk, ``"float16"`` or ``"float32"``. The model computes in its own dtype all the same;
            autocast is off.
        batch_size: images that go through the model together; 64 by default.
        workers: processes that read and transform images; 0: this process does.
        passes: features of each image: above 1 only with a random transform, which draws anew in each pass. Row ``p * m + i``
            is then image ``i`` of ``m`` in pass ``p``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``. Default: a GPU where there is one; under ``torchrun`` each process's own.
        skip_unreadable: leave out images that cannot be read, with a warning, instead of stopping at the first. The sidecar
            names them, and no row stands for them.
        seed: of a random transform. What an image draws depends on this, its pass and its index alone.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        The :class:`~alphaext.features.Features`, as :func:`alphaext.features.read_features` opens them. Their ``metadata`` has
        ``model`` and ``images`` (fingerprints), ``transform``, ``num_images``, ``passes``, ``seed`` (None where nothing was
        drawn), ``batch_size``, ``skipped`` (index, name and reason of each image left out), ``device``, ``seconds`` (of all
        processes and runs together, without waiting and joining) and ``versions``.

    Raises:
        TypeError, ValueError: arguments of a wrong type, out of range or that disagree; a label beyond the model's classes; a
            folder with something else in it; another process that extracts into it. All this before any work.
        ImageReadError: an image cannot be read; the error names it. After repair, the same call goes on.
        ValueError: features that are not finite, or too large for float16; the error names the image.
        OSError: the disk is full, or has too little room from the start; the error names the file or, at the start, both sizes.
        PeerError: another process of ``torchrun`` failed.
        KeyboardInterrupt: passed on; the shards that are done stay.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from alphaext.models import make_model, split_model
        >>> from alphaext.data import read_arrays
        >>> from alphaext.data import small_test_transform
        >>> folder = tempfile.mkdtemp()
        >>> np.savez(folder + "/data.npz", x=np.zeros((5, 28, 28), dtype=np.uint8), y=[0, 0, 1, 1, 2])
        >>> images, model = read_arrays(folder + "/data.npz"), split_model(make_model("small", 3, in_channels=1))
        >>> transform = small_test_transform(28, channels=1)
        >>> features = extract(model, images, folder + "/train", transform=transform, device="cpu")
        >>> features.features.shape, features.class_counts()
        ((5, 192), tensor([2, 2, 1]))
    """
    with process_group(device) as group:
        with group.together():
            plan, identity = _checked(split_model, images, transform, dtype, batch_size, passes, seed)
            workers = check_integer(workers, "workers", minimum=0)
            class_names = _class_names(images, split_model.num_classes)
        _check_same_everywhere(group, identity)
        several = group.world_size > 1
        place = ExtractionFolder(Path(folder), identity, plan, skip_unreadable=bool(skip_unreadable), several=several)
        with ExitStack() as held:
            with group.together():
                state = place.start(held) if group.is_main else None
            state = group.broadcast_object(state)
            if state is not None:
                share = [state["missing"][position] for position in group.share(len(state["missing"]))]
                work = _Work(split_model, images, transform, seed, place, group.device)
                columns = (MofNCompleteColumn(), BarColumn(), ImagesPerSecond())
                total, shown = len(images) * plan.passes, progress if group.is_main else False
                with task_bar(shown, "{task.description}", *columns, total=total, done=state["done"]) as report:
                    _in_rounds(group, work.shards(share, workers), report)
                    report(0, description="joining")
                    with group.together():
                        if group.is_main:
                            place.join(images.labels, class_names)
                    report(0, description="extracted")
        with group.together():
            wait_for(place.path / SIDECAR_FILE, several=several)
            features = read_features(place.path)
        skipped = features.metadata["skipped"]
        if skipped and group.is_main:
            names = ", ".join(repr(image["name"]) for image in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
            warnings.warn(f"{len(skipped)} of {len(images)} images cannot be read and are left out: {names}", stacklevel=2)
        return features


class _Work:
    """What one process does: its share of the shards."""

    def __init__(
        self,
        split_model: SplitModel,
        images: LabelledImages,
        transform: Transform,
        seed: int,
        place: ExtractionFolder,
        device: torch.device,
    ) -> None:
        self.split_model, self.images, self.transform, self.seed = split_model, images, transform, seed
        self.place, self.device = place, device

    def shards(self, numbers: Sequence[int], workers: int) -> Iterator[int]:
        """Make the shards ``numbers``; yields, batch by batch, how many images that were."""
        wait_for(self.place.path / IDENTITY_FILE, several=self.place.several)
        if not numbers:
            return
        wanted = (
            [(index, image_seed(self.seed, batch.pass_number, index)) for index in batch.images]
            for number in numbers
            for batch in self.place.plan.batches(number)
        )
        reading = image_batches(self.images, self.transform, wanted, workers=workers, pin_memory=self.device.type == "cuda")
        with reading as begin, _on_device(self.split_model, self.device):
            batches = begin()
            yield 0  # the workers are there; what starts threads may do so now
            for number in numbers:
                yield from self._shard(number, batches)

    def _shard(self, number: int, batches: Iterator[ImageBatch]) -> Iterator[int]:
        pending: list[Tensor] = []
        indices: list[int] = []
        unreadable: list[Unreadable] = []
        seconds = 0.0
        for wanted in self.place.plan.batches(number):
            started = time.monotonic()
            batch = next(batches)
            unreadable += self._unreadable(batch)
            if batch.images is not None:
                pending.append(self._features(batch.images))
            indices += batch.indices
            seconds += time.monotonic() - started
            yield len(wanted.images)
        started = time.monotonic()
        # Only now, so that a GPU has had a next batch to go on with.
        rows = self._rows(pending, indices)
        seconds += time.monotonic() - started
        shard = Shard(rows, np.array(indices, dtype=np.int64), tuple(unreadable), seconds, _device_name(self.device))
        self.place.write(number, shard)

    def _unreadable(self, batch: ImageBatch) -> list[Unreadable]:
        if batch.failure is not None:
            raise ValueError(batch.failure)
        if batch.unreadable and not self.place.skip_unreadable:
            raise batch.unreadable[0][1]
        return [Unreadable(index, self.images.name(index), error.reason or str(error)) for index, error in batch.unreadable]

    def _features(self, images: Tensor) -> Tensor:
        try:
            with torch.autocast(self.device.type, enabled=False):
                return self.split_model.features(images.to(self.device, non_blocking=True))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{len(images)} images of {list(images.shape[1:])} at a time are too many for the memory of {self.device}: "
                f"take a batch_size below {self.place.plan.batch_size}, in another folder. {error}"
            ) from error

    def _rows(self, pending: Sequence[Tensor], indices: Sequence[int]) -> npt.NDArray[Any]:
        """The features of a shard in the dtype that they are kept in, checked."""
        dtype = self.place.dtype
        if not pending:
            return np.empty((0, self.place.width), dtype)
        features = torch.cat(list(pending)).to("cpu", torch.float32).numpy()
        with np.errstate(over="ignore"):  # found below
            rows = features.astype(dtype)
        if np.isfinite(rows).all():
            return rows
        row, column = (int(position) for position in np.argwhere(~np.isfinite(rows))[0])
        name, value = self.images.name(indices[row]), float(features[row, column])
        if np.isfinite(value):
            raise ValueError(
                f"the features of image {name!r} are too large for {dtype}: {value:g} in column {column}, where it ends at "
                f'{float(np.finfo(dtype).max):g}; use dtype="float32" (in another folder)'
            )
        raise ValueError(
            f"the features of image {name!r} must be finite, got {value} in column {column}: look for the cause in the model's "
            "weights and in the transformed image"
        )


def _in_rounds(group: Group, steps: Iterator[int], report: Callable[..., None]) -> None:
    """Take all steps of every process, meeting now and then: an error in one soon ends all, and none waits long for a slow one.

    Args:
        group: the processes.
        steps: of this process; each says how much it did.
        report: told, again and again, how much more was done by all of them together.
    """
    own, others, finished = 0, 0, False
    try:
        while True:
            with group.together():
                end_of_round = time.monotonic() + _SECONDS_A_ROUND
                while not finished and (group.world_size == 1 or time.monotonic() < end_of_round):
                    step = next(steps, None)
                    finished = step is None
                    own += step or 0
                    report(step or 0, description="extracting")
            states = group.all_gather_object([own, finished])
            total = sum(done for done, _ in states)
            report(total - own - others)
            others = total - own
            if all(done for _, done in states):
                return
    finally:
        # Now, not when the garbage collector comes to it: its workers are to stop, its half-written file to go.
        if isinstance(steps, Generator):
            steps.close()


def _checked(
    split_model: SplitModel, images: LabelledImages, transform: Transform, dtype: str, batch_size: int, passes: int, seed: int
) -> tuple[ShardPlan, dict[str, Any]]:
    """How the work is cut, and all that the features depend on."""
    _check_types(split_model, images, transform)
    check_choice(dtype, "dtype", DTYPES)
    batch_size = check_integer(batch_size, "batch_size", minimum=1)
    passes = check_integer(passes, "passes", minimum=1)
    if passes > 1 and not transform.random:
        raise ValueError(
            f"passes must be 1 with a transform that draws nothing, got {passes}: all passes would give the same features"
        )
    seed = check_integer(seed, "seed", minimum=0)
    _check_labels(images, split_model.num_classes)
    identity = {
        "model": split_model.fingerprint(),
        "images": images.fingerprint(),
        "transform": as_json(transform.description, "transform.description"),
        "dtype": dtype,
        "width": split_model.in_features,
        "num_classes": split_model.num_classes,
        "num_images": len(images),
        "passes": passes,
        "seed": seed if transform.random else None,
        "batch_size": batch_size,
    }
    return ShardPlan.of(len(images), passes, batch_size), identity


def _check_types(split_model: SplitModel, images: LabelledImages, transform: object) -> None:
    check_kind(split_model, SplitModel, "split_model", hint="split_model(model) makes one")
    check_kind(images, LabelledImages, "images", hint="open_images or from_torchvision makes them")
    needed = ("description", "random", "seeded") if getattr(transform, "random", False) else ("description", "random")
    lacking = [name for name in needed if not hasattr(transform, name)]
    if lacking or not callable(transform) or not isinstance(getattr(transform, "description", None), Mapping):
        raise TypeError(
            "transform must be an ImageTransform, as test_transform makes one, or be called like one and have its description "
            f"(a dict) and random, got {type(transform).__name__}"
        )
    places = {tensor.device for tensor in [*split_model.model.parameters(), *split_model.model.buffers()]}
    if len(places) > 1:
        raise ValueError(f"split_model must be on one device, got {', '.join(sorted(map(str, places)))}")
    if places == {torch.device("meta")}:
        raise ValueError("split_model must have weights, but it is on the meta device")


def _check_labels(images: LabelledImages, num_classes: int) -> None:
    if len(images) == 0:
        raise ValueError("images must not be empty")
    beyond = torch.nonzero(images.labels >= num_classes)
    if len(beyond):
        index = int(beyond[0, 0])
        raise ValueError(
            f"labels must be classes of the model, 0..{num_classes - 1}, got {int(images.labels[index])} for image "
            f"{images.name(index)!r} ({len(beyond)} of {len(images)} images have such labels)"
        )


def _class_names(images: LabelledImages, num_classes: int) -> tuple[str, ...] | None:
    names = images.class_names
    if names is None or len(names) == num_classes:
        return names
    warnings.warn(
        f"images have names for {len(names)} classes and the model has {num_classes}: the features are kept without names",
        stacklevel=3,
    )
    return None


def _check_same_everywhere(group: Group, identity: Mapping[str, Any]) -> None:
    for rank, other in enumerate(group.all_gather_object(identity)):
        found = differences(identity, other)
        if found:
            raise ValueError(
                f"all processes must extract the same, but in process {group.rank} and in {rank}: {'; '.join(found)}"
            )


@contextmanager
def _on_device(split_model: SplitModel, device: torch.device) -> Iterator[None]:
    """The model on ``device``, where convolutions choose the same algorithm each time; then back to where it was."""
    model, before = split_model.model, split_model.device
    try:
        if before != device:
            model.to(device)
        with cudnn_choice(deterministic=True, fastest=False):
            yield
    finally:
        if before != device:
            model.to(before)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
