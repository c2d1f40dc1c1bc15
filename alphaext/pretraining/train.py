"""Plain training of a backbone together with its classifier: where the checkpoints come from that Alpha Net repairs."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import LabelledImages
from ..data.transforms import ImageTransform
from ..utils.checks import check_integer, check_kind, check_together
from ..utils.files import PathLike, check_output_folder, folder_lock
from ..utils.option_table import check_known, with_options
from ..utils.processes import process_group
from .epochs import default_workers
from .options import JointOptions
from .run import JointRun


@dataclass
class TrainResult:
    """What :func:`train_model` did.

    Attributes:
        history: one dictionary an epoch: ``epoch`` (1 is the first), ``loss`` (mean cross-entropy of the training batches),
            ``lr`` (of the epoch's last step), and with validation images the sixteen metrics of :class:`alphaext.FitResult`.
        selected_epoch: the epoch whose weights the model now has.
        selection: the policy that chose it.
        metrics: of the selected epoch on the validation images, or None without: ``few``, ``medium``, ``many``, ``all``, top-1
            accuracy over samples, a fraction of 1; and each with ``_top5``, ``_class_mean`` and ``_class_mean_top5``.
        resumed_from: epochs that an earlier, interrupted run had done.
        model_path: the state dict of the selected epoch.
        images_per_second: that this run trained on, all processes together; nan if it had nothing left to do.
        seconds: wall-clock time of this run.
    """

    history: list[dict[str, float]] = field(repr=False)
    selected_epoch: int
    selection: str
    metrics: dict[str, float] | None = field(repr=False)
    resumed_from: int
    model_path: Path
    images_per_second: float
    seconds: float


@with_options(fields(JointOptions))
def train_model(
    model: nn.Module,
    images: LabelledImages,
    output_folder: PathLike,
    *,
    transform: ImageTransform,
    val_images: LabelledImages | None = None,
    val_transform: ImageTransform | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **options: Any,
) -> TrainResult:
    """Train a model on labelled images with the cross-entropy of all classes.

    The defaults are those of the representation learning on ImageNet-LT of Kang et al. (ICLR 2020), who train with batches on
    several GPUs at once: SGD with momentum, 90 epochs of batches of 512, learning rate 0.2 down to 0 by a cosine of the epoch.

    Started by ``torchrun``, the processes share each batch (DistributedDataParallel). What an epoch sees is a function of the
    seed and the epoch: neither ``workers`` nor the number of processes changes it. On one machine the same call makes the same
    bits, with ``deterministic`` also on a GPU, as far as the model's own operators do.

    After each epoch the folder has a file ``training.pt``, whole or not at all; the same call goes on from it, to the same bits
    as without the interruption. (The number of processes may be another one; then the bits are others too.) At the end there
    are ``model.pth``, the plain state dict of the selected epoch, and ``history.json``, which grows with the epochs.

    Args:
        model: trained in place, on ``device``; on return it has the weights of the selected epoch and is in eval mode.
            Parameters that do not require gradients are left as they are.
        images: the training images.
        output_folder: made if its parent exists. All processes must see it.
        transform: of the training images, usually a random one.
        val_images: for the accuracy after each epoch, and to select an epoch by; with ``val_transform``.
        val_transform: of the validation images, not random.
        epochs: 90 in Kang et al.
        batch_size: images of a step, of all processes together; 512 there. Where it does not fit into memory, a smaller one
            wants a learning rate that is smaller in the same proportion.
        lr: 0.2 there; for ``"adamw"`` some 1e-3.
        momentum: 0.9 there.
        nesterov: Nesterov momentum.
        weight_decay: 5e-4 there (1e-4 for iNaturalist); of all parameters.
        schedule: ``"cosine"``, down to 0 after ``epochs`` (as there); ``"step"``, times ``lr_factor`` every ``lr_step`` epochs;
            ``"constant"``. It moves once an epoch.
        warmup_epochs: before the schedule begins, epochs in which the rate rises from 0, step by step. None there.
        lr_step: for ``"step"``.
        lr_factor: for ``"step"``.
        optimizer: ``"sgd"``, or ``"adamw"``, which has no use for ``momentum``.
        sampling: ``"instance"`` (as there), ``"class_balanced"`` or ``"square_root"``; see
            :func:`alphaext.pretraining.epochs.epoch_order`. An epoch always has as many images as the data set.
        label_smoothing: a share of the target spread over all classes; none there.
        precision: ``"float32"`` (as there), or ``"bfloat16"``: products and convolutions in bfloat16, weights, their gradients
            and the loss in float32.
        drop_last: leave an incomplete last batch out (as there; each epoch leaves out others), unless it is the only one.
            Otherwise it is kept, but not with less than two images a process.
        sync_batch_norm: statistics of batch normalisation over all processes instead of each its own; GPUs only.
        channels_last: images and weights in torch's memory layout of that name, which libraries of convolutions favour.
        deterministic: on a GPU, cuDNN's deterministic algorithms, instead of those that it measures to be the fastest.
        select: ``"best_all"``, the epoch with the best accuracy over all validation samples (default with validation images; of
            equal epochs the first), or ``"last"`` (default without).
        few_below: in the metrics, classes with fewer training images are few.
        many_above: in the metrics, classes with more are many.
        workers: processes that read images, for each process that trains. Default: one a processor, at most twelve.
        device: default: the GPU of this process where there is one, else the CPU.
        seed: of the order, the augmentation, and the model's own draws (dropout).
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        A :class:`TrainResult`.

    Raises:
        TypeError, ValueError: for arguments out of range or that disagree, labels beyond the model's classes, a folder with the
            training of another model, data set or configuration (the message names what differs), or one that another process
            writes into; all before any training.
        ImageReadError: an image that cannot be read; the message names it.
        FloatingPointError: when something is no longer finite, naming epoch, step and learning rate. The folder keeps the last
            good epoch; the model has the weights of the best epoch so far, as it has after Ctrl-C.

    Example:
        >>> import numpy, tempfile
        >>> from alphaext.models import SmallConvNet
        >>> from alphaext.data import ArrayImages
        >>> from alphaext.data import small_test_transform
        >>> images = ArrayImages(numpy.zeros((12, 8, 8), numpy.uint8), torch.arange(12) % 3, "zeros")
        >>> model, transform = SmallConvNet(3, in_channels=1), small_test_transform(8, channels=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train_model(model, images, folder, transform=transform, epochs=2, lr=0.01, workers=0)
        ...     weights = torch.load(result.model_path, weights_only=True)
        >>> result.selected_epoch, list(weights)[-1]
        (2, 'fc.bias')
    """
    started = time.monotonic()
    check_known(options, [entry.name for entry in fields(JointOptions)])
    settings = JointOptions(**options)
    _check_model(model)
    _check_images(images, transform, "images", "transform")
    check_together(val_images=val_images, val_transform=val_transform)
    validation = None
    if val_images is not None and val_transform is not None:
        _check_images(val_images, val_transform, "val_images", "val_transform")
        if val_transform.random:
            raise ValueError(f"val_transform must not be random, got {val_transform!r}")
        validation = (val_images, val_transform)
    if settings.select == "best_all" and validation is None:
        raise ValueError("select='best_all' needs val_images and val_transform")
    workers = default_workers() if workers is None else check_integer(workers, "workers", minimum=0)
    folder = check_output_folder(output_folder, "output_folder")
    with process_group(device) as group, ExitStack() as stack:
        with group.together():
            run = JointRun(model, settings, (images, transform), validation, folder, workers, group)
            if group.is_main:
                folder.mkdir(exist_ok=True)
                stack.enter_context(folder_lock(folder, "a training"))
                run.check_folder()
        run.resume()
        run.train(progress)
        path = run.finish()
    chosen = run.history[run.selected_epoch - 1]
    return TrainResult(
        history=run.history,
        selected_epoch=run.selected_epoch,
        selection=run.select,
        metrics=None if run.metrics is None else {name: chosen[name] for name in chosen if name not in ("epoch", "loss", "lr")},
        resumed_from=run.resumed_from,
        model_path=path,
        images_per_second=run.trained_images / run.trained_seconds if run.trained_images else math.nan,
        seconds=time.monotonic() - started,
    )


def _check_model(model: nn.Module) -> None:
    check_kind(model, nn.Module, "model")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model must have parameters that require gradients, this {type(model).__name__} has none")


def _check_images(images: LabelledImages, transform: ImageTransform, name: str, transform_name: str) -> None:
    check_kind(images, LabelledImages, name, hint="open_images makes them")
    check_kind(transform, ImageTransform, transform_name)
    if len(images) == 0:
        raise ValueError(f"{name} must not be empty")
