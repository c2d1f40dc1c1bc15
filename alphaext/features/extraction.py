"""Images to cached features, once: by one process or many, stoppable at any time, going on where it stopped."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.images import ImageReadError, LabelledImages
from ..data.loading import Transform
from ..models.split import SplitModel
from ..utils.callers import warn_caller
from ..utils.checks import PRECISIONS, check_choice, check_integer, check_kind
from ..utils.files import PathLike, read_json, write_json
from ..utils.processes import Group, process_group
from ..utils.progress import task_bar
from .computing import Computed, Computing, Task
from .extraction_folder import ExtractionFolder, wait_for
from .shards import IDENTITY_FILE, Shard, ShardPlan, Unreadable, read_identity
from .store import DTYPES, SIDECAR_FILE, Features, as_json, differences, printable, read_features

# How long processes work before they tell each other how far they are and whether all is well: far below the time after which a
# waiting process gives another up, far above what the telling takes.
_SECONDS_A_ROUND = 30.0

# On one thread torch computes convolutions of 1 x 1 of fewer than 16 images by a slower way (seen in 2.14).
_BATCH_SIZES = {"cpu": 16, "cuda": 64}


def extract(
    split_model: SplitModel,
    images: LabelledImages,
    folder: PathLike,
    *,
    transform: Transform,
    dtype: str = "float16",
    precision: str = "float32",
    batch_size: int | None = None,
    processes: int = 0,
    workers: int = 0,
    passes: int = 1,
    device: str | torch.device | None = None,
    skip_unreadable: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    title: str = "extracting",
) -> Features:
    """Compute what goes into the classifier for each image, and keep it in a folder of cached features.

    The work is cut into shards of some hundred images. What is interrupted, by Ctrl-C, a kill, a full disk or an unreadable
    image, goes on at the last shard when the same call is made again. Processes started by ``torchrun`` share the shards;
    ``folder`` must then be on a file system that all of them see. The result has the same bits however many processes and
    workers made it and however often it was interrupted, on the same kind of processor or GPU, with the same versions and as
    many threads in each process that computes; see docs/reference/extraction.md.

    On a CPU a copy of the model computes, with channels last and batch normalisations folded into convolutions: features are
    those of the model but for rounding. ``processes=os.cpu_count()`` is then fastest. By default nothing is started, and
    nothing that holds for the whole process is changed.

    A folder that already holds what is asked for is returned as it is. One that holds, or has begun, the features of another
    model, other images or other settings is left untouched, with an error that says what differs.

    Args:
        split_model: the model, from :func:`alphaext.models.split_model`. It computes in eval mode, on ``device``; afterwards
            it is as and where it was.
        images: what to extract; their labels must be classes of the model.
        folder: where to. It is made if need be.
        transform: of each image, such as :func:`alphaext.data.test_transform`, the usual one for cached features.
        dtype: of the features on disk, ``"float16"`` or ``"float32"``, whatever the model computes in.
        precision: ``"float32"``: the model computes in its own dtype (default); ``"bfloat16"``: its products and convolutions
            in bfloat16 (autocast), which is faster on processors and GPUs that have it.
        batch_size: images that go through the model together. Default: what the folder says, or else 16 on a CPU, where larger
            ones leave the caches, and 64 on a GPU.
        processes: that compute on this machine's CPU, each on one thread, with ``workers`` of its own and keeping the memory
            that it frees. 0: this process computes, with torch's threads.
        workers: processes that read and transform images while the model computes; 0: whoever computes reads too.
        passes: features of each image: above 1 only with a random transform, which draws anew in each pass. Row ``p * m + i``
            is then image ``i`` of ``m`` in pass ``p``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``. Default: a GPU where there is one; under ``torchrun`` each process's own.
        skip_unreadable: leave out images that cannot be read, with a warning, instead of stopping at the first. The sidecar
            names them, and no row stands for them.
        seed: of a random transform. What an image draws depends on this, its pass and its index alone.
        progress: show how far it is, in a line now and then where standard error is no terminal; None shows a bar where it is
            one, and else nothing.
        title: before the bar.

    Returns:
        The :class:`~alphaext.features.Features`, as :func:`alphaext.features.read_features` opens them. Their ``metadata`` has
        ``model`` and ``images`` (fingerprints), ``transform``, ``num_images``, ``passes``, ``seed`` (None where nothing was
        drawn), ``precision``, ``batch_size``, ``skipped`` (index, name and reason of each image left out), ``device`` (and how
        it computed), ``seconds`` (of all processes and runs together, without waiting and joining) and ``versions``.

    Raises:
        TypeError, ValueError: arguments of a wrong type, out of range or that disagree; a label beyond the model's classes; a
            folder with something else in it; another process that extracts into it. All this before any work.
        ImageReadError: an image cannot be read; the error names it. After repair, the same call goes on.
        ValueError: features that are not finite, or too large for float16; the error names the image.
        OSError: the disk is full, or has too little room from the start; the error names the file or, at the start, both sizes.
        RuntimeError: one of the ``processes`` was killed.
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
            identity = _identity(split_model, images, transform, dtype, precision, passes, seed)
            identity["batch_size"] = _batch_size(batch_size, Path(folder), group.device)
            plan = ShardPlan.of(len(images), identity["passes"], identity["batch_size"])
            workers = check_integer(workers, "workers", minimum=0)
            processes = check_integer(processes, "processes", minimum=0)
            if processes and group.device.type != "cpu":
                raise ValueError(f"processes must be 0 on {group.device}, got {processes}: they compute on CPUs")
            class_names = _class_names(images, split_model.num_classes)
        _check_same_everywhere(group, identity)
        several = group.world_size > 1
        place = ExtractionFolder(Path(folder), identity, plan, skip_unreadable=bool(skip_unreadable), several=several)
        with ExitStack() as held:
            with group.together():
                state = place.start(held) if group.is_main else None
            state = group.broadcast_object(state)
            if state is not None:
                shards = _Shards(images, place)
                tasks = shards.tasks([state["missing"][position] for position in group.share(len(state["missing"]))])
                computing = Computing(split_model, images, transform, seed, precision, workers, group.device)
                computed = computing.apart(tasks, processes) if processes else computing.here(tasks)
                total, shown = len(images) * plan.passes, progress if group.is_main else False
                with task_bar(shown, title, unit=f"{images.noun}s", total=total, done=state["done"]) as report:
                    _in_rounds(group, shards.written(computed), report)
                    with group.together():
                        if group.is_main:
                            place.join(images.labels, class_names)
        with group.together():
            wait_for(place.path / SIDECAR_FILE, several=several)
            features = read_features(place.path)
            if class_names is not None and features.class_names != class_names:
                # Features do not depend on what classes are called: names that came later are taken.
                if group.is_main:
                    write_json(place.path / SIDECAR_FILE, {**features.metadata, "class_names": class_names})
                features = replace(features, class_names=class_names)
        skipped = features.metadata["skipped"]
        if skipped and group.is_main:
            names = ", ".join(repr(image["name"]) for image in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
            warn_caller(f"{len(skipped)} of {len(images)} images cannot be read and are left out: {names}")
        return features


class _Shards:
    """The shards that fall to one process: batches become shards, and shards are written."""

    def __init__(self, images: LabelledImages, place: ExtractionFolder) -> None:
        self.images, self.place = images, place

    def tasks(self, numbers: Sequence[int]) -> Iterator[Task]:
        """The batches of these shards."""
        for number in numbers:
            for place, batch in enumerate(self.place.plan.batches(number)):
                yield Task(number, place, batch)

    def written(self, computed: Generator[Computed, None, None]) -> Iterator[int]:
        """Write each shard when its batches are there; yields, batch by batch, how many images that were."""
        wait_for(self.place.path / IDENTITY_FILE, several=self.place.several)
        parts: dict[int, dict[int, Computed]] = defaultdict(dict)
        # Closed at once where this ends: what computes is to end its processes, and not when the garbage collector comes to it.
        with closing(computed):
            for part in computed:
                self._check(part)
                number = part.task.shard
                parts[number][part.task.place] = part
                yield len(part.task.batch.images)
                if len(parts[number]) == len(self.place.plan.batches(number)):
                    # Only now, so that a GPU has had a next batch to go on with.
                    self.place.write(number, self._shard([part for _, part in sorted(parts.pop(number).items())]))

    def _shard(self, parts: Sequence[Computed]) -> Shard:
        indices = [index for part in parts for index in part.indices]
        started = time.monotonic()
        rows = self._rows([part.features for part in parts if part.features is not None], indices)
        return Shard(
            rows,
            np.array(indices, dtype=np.int64),
            tuple(self._left_out(index, error) for part in parts for index, error in part.unreadable),
            sum(part.seconds for part in parts) + time.monotonic() - started,
            next((part.device for part in parts if part.features is not None), ""),
        )

    def _left_out(self, index: int, error: ImageReadError) -> Unreadable:
        return Unreadable(index, self.images.name(index), error.reason or str(error))

    def _check(self, part: Computed) -> None:
        if part.failure is not None:
            raise ValueError(part.failure)
        if part.unreadable and not self.place.skip_unreadable:
            raise part.unreadable[0][1]

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
                    report(step or 0)
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


def _batch_size(asked: int | None, folder: Path, device: torch.device) -> int:
    """The batch size that is asked for, or else that of the folder's features, or else the device's."""
    if asked is not None:
        return check_integer(asked, "batch_size", minimum=1)
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        if (folder / SIDECAR_FILE).exists():
            return int(read_json(folder / SIDECAR_FILE, "a sidecar")["batch_size"])
        return int(read_identity(folder)["batch_size"])
    return _BATCH_SIZES.get(device.type, 64)


def _identity(
    split_model: SplitModel,
    images: LabelledImages,
    transform: Transform,
    dtype: str,
    precision: str,
    passes: int,
    seed: int,
) -> dict[str, Any]:
    """All that the features depend on, but for the batch size."""
    _check_types(split_model, images, transform)
    check_choice(dtype, "dtype", DTYPES)
    check_choice(precision, "precision", PRECISIONS)
    passes = check_integer(passes, "passes", minimum=1)
    if passes > 1 and not transform.random:
        raise ValueError(
            f"passes must be 1 with a transform that draws nothing, got {passes}: all passes would give the same features"
        )
    seed = check_integer(seed, "seed", minimum=0)
    _check_labels(images, split_model.num_classes)
    return {
        "model": split_model.fingerprint(),
        "images": images.fingerprint(),
        "transform": as_json(transform.description, "transform.description"),
        "dtype": dtype,
        "width": split_model.in_features,
        "num_classes": split_model.num_classes,
        "num_images": len(images),
        "passes": passes,
        "seed": seed if transform.random else None,
        "precision": precision,
    }


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
        return None if names is None else tuple(map(printable, names))
    warn_caller(
        f"images have names for {len(names)} classes and the model has {num_classes}: the features are kept without names"
    )
    return None


def _check_same_everywhere(group: Group, identity: Mapping[str, Any]) -> None:
    for rank, other in enumerate(group.all_gather_object(identity)):
        found = differences(identity, other)
        if found:
            raise ValueError(
                f"all processes must extract the same, but in process {group.rank} and in {rank}: {'; '.join(found)}"
            )
