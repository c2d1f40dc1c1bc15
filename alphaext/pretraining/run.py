"""One joint training: its epochs, the accuracy after each, and the files that it goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, TextColumn
from torch import Tensor, nn
from torch.nn import functional

from ..classes import split_classes
from ..data.images import LabelledImages
from ..data.transforms import ImageTransform
from ..metrics.accuracy import SplitMetrics, label_ranks
from ..models.split import logits_of, run_model
from ..utils.files import whole_file, write_json
from ..utils.modules import computing_in, cudnn_choice, evaluating
from ..utils.processes import Group
from ..utils.progress import task_bar
from ..utils.resume import ResumableTraining, load_optimizer
from ..utils.seeds import derived_seed
from ..utils.tensors import first_true, tensor_bytes
from .epochs import EpochBatches, image_reader
from .options import JointOptions

_STATE, _MODEL, _HISTORY = "training.pt", "model.pth", "history.json"

# The one part of a training's identity that changes while it goes on.
_WEIGHTS = "the digest of the model's weights before training"

# A look at the loss makes the CPU wait for the GPU, so there it is looked at now and then.
_STEPS_BETWEEN_LOOKS = 16

# Of the auxiliary classifiers that GoogLeNet and Inception have while they are trained (Szegedy et al., CVPR 2015).
_AUXILIARY_WEIGHT = 0.3


class JointRun(ResumableTraining):
    """One training: the model and its optimiser, the history, and the best epoch so far.

    Attributes:
        history: see :class:`alphaext.pretraining.TrainResult`.
        selected_epoch: the epoch to select so far; 0 before the first.
        resumed_from: epochs that were done before.
        metrics: makes accuracies out of hits, or None without validation images.
        trained_images: in this process's time, of all processes together.
        trained_seconds: that it took to train on them.
    """

    def __init__(
        self,
        model: nn.Module,
        options: JointOptions,
        data: tuple[LabelledImages, ImageTransform],
        validation: tuple[LabelledImages, ImageTransform] | None,
        folder: Path,
        workers: int,
        group: Group,
    ) -> None:
        super().__init__("the file of a training", {"model": dict, "optimizer": dict, "selected": dict})
        self.model, self.options, self.group = model, options, group
        self.images, self.transform = data
        self.sources = {"images": data} if validation is None else {"images": data, "val_images": validation}
        self.validation, self.folder, self.workers = validation, folder, workers
        self.select = options.select or ("last" if validation is None else "best_all")
        _check_batches(model, options, len(self.images), group)
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        model.to(device=group.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.num_outputs = self._count_outputs()
        self.identity = self._identify()
        self.optimizer = _make_optimizer(options, [parameter for parameter in model.parameters() if parameter.requires_grad])
        self.batches = EpochBatches(
            self.images.labels, options.sampling, options.batch_size, options.seed, group, options.drop_last
        )
        self.metrics = self._make_metrics()
        self.resumed_from = 0
        self.trained_images, self.trained_seconds = 0, 0.0

    def _count_outputs(self) -> int:
        """The model's outputs, found with one image of either kind; the labels must be among them."""
        outputs = 0
        for name, (images, transform) in self.sources.items():
            example = transform.seeded(images.load(0), 0)[None].to(self.group.device)
            with evaluating(self.model), self._autocast():
                logits = run_model(self.model, example)
            if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
                seen = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise ValueError(f"model must return logits [n, N] of n images, got {seen} of one image")
            outputs, largest = logits.shape[1], int(images.labels.max())
            if largest >= outputs:
                raise ValueError(
                    f"{name} must have labels of the model's {outputs} classes, in 0..{outputs - 1}, got {largest}"
                )
        return outputs

    def _identify(self) -> dict[str, Any]:
        """What must be equal for one training to go on from another's file."""
        identity = {**asdict(self.options), "select": self.select}
        for name, (images, transform) in self.sources.items():
            identity[f"the fingerprint of {name}"] = images.fingerprint()
            identity[f"the transform of {name}"] = json.dumps(transform.description, sort_keys=True)
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {parameter.requires_grad}\n".encode())
        for name, tensor in _tensors(self.model).items():
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        identity["the model's class"] = type(self.model).__name__
        identity["the digest of the model's parameters and buffers"] = digest.hexdigest()[:16]
        for tensor in _tensors(self.model).values():
            digest.update(tensor_bytes(tensor))
        identity[_WEIGHTS] = digest.hexdigest()[:16]
        return identity

    def _make_metrics(self) -> SplitMetrics | None:
        if self.validation is None:
            return None
        counts = torch.bincount(self.images.labels, minlength=self.num_outputs)
        split = split_classes(counts, few_below=self.options.few_below, many_above=self.options.many_above)
        return SplitMetrics(split, torch.bincount(self.validation[0].labels, minlength=self.num_outputs))

    def _autocast(self) -> torch.autocast:
        return computing_in(self.options.precision, self.group.device)

    def check_folder(self) -> None:
        """A model that is not of a training in this folder is never overwritten."""
        if (self.folder / _MODEL).exists() and not (self.folder / _STATE).exists():
            raise ValueError(
                f"output_folder {str(self.folder)!r} holds a {_MODEL} but no {_STATE} of a training: choose another folder, or "
                "delete it"
            )

    def resume(self) -> None:
        """Go on from the folder's file, if there is one."""
        group, path = self.group, self.folder / _STATE
        with group.together():
            state = self.load(path, advice=_advice) if path.exists() else None
        done = group.all_gather_object(0 if state is None else len(state["history"]))
        if len(set(done)) > 1:
            raise ValueError(
                f"output_folder must be one that all processes see, but in {str(self.folder)!r} they see {done} epochs done"
            )
        if state is None:
            return
        with self.applying(path):
            self.model.load_state_dict(state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
        self.resumed_from = len(self.history)
        self.selected = (state["selected"] or state["model"]) if group.is_main else None

    def train(self, progress: bool | None) -> None:
        """Train the remaining epochs. Whatever happens, the main process's model ends with the best weights so far."""
        options, group = self.options, self.group
        if len(self.history) >= options.epochs:
            return
        reader = image_reader(self.images, self.transform, self.batches, workers=self.workers, device=group.device)
        steps, columns = len(self.batches), (BarColumn(), TextColumn("{task.description}"))
        shown = progress if group.is_main else False
        try:
            with (
                torch.random.fork_rng([group.device] if group.device.type == "cuda" else []),
                cudnn_choice(deterministic=options.deterministic, fastest=not options.deterministic),
                _synchronized_batch_norms(self.model, options.sync_batch_norm and group.world_size > 1),
                reader as read,
                task_bar(shown, "", *columns, total=options.epochs * steps, done=len(self.history) * steps) as report,
            ):
                network = self._parallel()
                for epoch in range(len(self.history) + 1, options.epochs + 1):
                    _seed_draws(group.device, derived_seed(options.seed, "draws", epoch, group.rank))
                    self.batches.epoch = epoch
                    self._record(self._train_epoch(network, read(), epoch, report), epoch)
                    with group.together():
                        if group.is_main:
                            self._save()
        finally:
            if self.selected:
                self.model.load_state_dict(self.selected)

    def _parallel(self) -> nn.Module:
        if self.group.world_size == 1:
            return self.model
        device = self.group.device
        return nn.parallel.DistributedDataParallel(self.model, device_ids=[device] if device.type == "cuda" else None)

    def _train_epoch(
        self, network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, report: Callable[..., None]
    ) -> float:
        """One epoch; returns its mean loss over the images of all processes."""
        options, device = self.options, self.group.device
        steps, sizes = len(self.batches), self.batches.sizes
        between = 1 if device.type == "cpu" else _STEPS_BETWEEN_LOOKS
        network.train()
        began, images, total = time.monotonic(), 0, 0.0
        losses: list[Tensor] = []
        for step, (inputs, labels) in enumerate(batches):
            rate = options.learning_rate(epoch, step, steps)
            for settings in self.optimizer.param_groups:
                settings["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                loss = self._loss(network(inputs.contiguous(memory_format=self.layout)), labels)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            images += sizes[step]
            if len(losses) == between or step + 1 == steps:
                first = step + 1 - len(losses)
                means = self._look(torch.stack(losses), epoch, first, rate)
                total += sum(mean * size for mean, size in zip(means, sizes[first : step + 1], strict=True))
                losses.clear()
                speed = images / max(time.monotonic() - began, 1e-9)
                text = _description(f"{epoch}/{options.epochs}", total / images, speed, self.history)
                report(0, completed=(epoch - 1) * steps + step + 1, description=text)
        self.trained_images += images
        self.trained_seconds += time.monotonic() - began
        return total / images

    def _loss(self, output: Any, labels: Tensor) -> Tensor:
        if isinstance(output, Tensor):
            outputs = [output]
        elif isinstance(output, tuple) and hasattr(output, "logits"):
            outputs = [output.logits, *(other for other in output if isinstance(other, Tensor) and other is not output.logits)]
        elif isinstance(logits_of(output), Tensor):
            outputs = [logits_of(output)]
        else:
            raise ValueError(f"model must return a tensor of logits in training mode too, got a {type(output).__name__}")
        loss, *others = [
            functional.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing) for logits in outputs
        ]
        return sum((_AUXILIARY_WEIGHT * other for other in others), loss)

    def _look(self, losses: Tensor, epoch: int, first: int, rate: float) -> list[float]:
        """The losses of the steps from ``first`` on, means over the processes, which all find out if one is not finite."""
        means: list[float] = (self.group.sum(losses.double()) / self.group.world_size).tolist()
        for step, mean in enumerate(means, start=first + 1):
            if not math.isfinite(mean):
                raise _diverged(f"the loss is {mean} in epoch {epoch}, step {step} of {len(self.batches)}", rate)
        return means

    def _check_weights(self, epoch: int, rate: float) -> None:
        """A last step may ruin the weights after a loss that was finite; what is not finite is never saved."""
        state = {name: tensor for name, tensor in _tensors(self.model).items() if tensor.is_floating_point()}
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in state.values()])
        if (place := first_true(~finite)) is not None:
            raise _diverged(f"{list(state)[place]} is no longer finite after epoch {epoch}, step {len(self.batches)}", rate)

    def _validate(self, epoch: int, rate: float) -> Tensor:
        """Of each class, validation images ranked first, and among the first five: int64 ``[2, N]``, over all processes."""
        assert self.validation is not None
        (images, transform), group, device = self.validation, self.group, self.group.device
        size = self.options.batch_size // group.world_size
        own = [(index, 0) for index in group.share(len(images))]
        batches = [own[begin : begin + size] for begin in range(0, len(own), size)]
        hits = torch.zeros(2, self.num_outputs, dtype=torch.int64, device="cpu")
        broken = torch.zeros(1, dtype=torch.int64, device="cpu")
        reader = image_reader(images, transform, batches, workers=self.workers, device=device)
        with evaluating(self.model), reader as read:
            for inputs, labels in read():
                with self._autocast():
                    logits = logits_of(self.model(inputs.contiguous(memory_format=self.layout))).float()
                if bool(logits.isnan().any()):
                    broken += 1
                    continue
                ranks = label_ranks(logits, labels)
                for row, best in enumerate((1, 5)):
                    hits[row] += torch.bincount(labels[ranks < best], minlength=self.num_outputs).cpu()
        if int(group.sum(broken)):
            raise _diverged(f"the logits of validation images are NaN after epoch {epoch}, step {len(self.batches)}", rate)
        return group.sum(hits)

    def _record(self, loss: float, epoch: int) -> None:
        """Add an epoch to the history, and keep its weights if it is the one to select so far."""
        steps = len(self.batches)
        rate = self.options.learning_rate(epoch, steps - 1, steps)
        # Each process has its own statistics of batch normalisation: those of the main one are the model's.
        self.group.broadcast(self.model.buffers())
        self._check_weights(epoch, rate)
        entry: dict[str, float] = {"epoch": epoch, "loss": loss, "lr": rate}
        if self.metrics is not None:
            entry.update(self.metrics.of(self._validate(epoch, rate)))
        score = entry["epoch"] if self.select == "last" else entry["all"]
        if self.add_epoch(entry, score):
            self.selected = _plain_state(self.model) if self.group.is_main else None

    def _save(self) -> None:
        self.save(
            self.folder / _STATE,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            # Empty where it is the model as it is now: it need not be there twice.
            selected={} if self.selected_epoch == len(self.history) else self.selected,
        )
        self._write_history()

    def _write_history(self) -> None:
        write_json(
            self.folder / _HISTORY,
            {
                "selection": self.select,
                "selected_epoch": self.selected_epoch,
                "epochs": self.options.epochs,
                "history": self.history,
            },
        )

    def finish(self) -> Path:
        """The selected epoch's weights into every process's model, and into their file."""
        path = self.folder / _MODEL
        if self.group.is_main:
            self.model.load_state_dict(self.selected)
        self.group.broadcast(_tensors(self.model).values())
        self.model.eval()
        with self.group.together():
            if self.group.is_main:
                content: dict[str, Tensor] = OrderedDict(_plain_state(self.model))
                if hasattr(self.model, "transform_input"):  # of torchvision's models, in no state dict
                    noted = str(bool(self.model.transform_input)).lower()
                    content.alphaext_metadata = {"transform_input": noted}  # type: ignore[attr-defined]
                with whole_file(path) as file:
                    torch.save(content, file)
                self._write_history()
        return path


def _make_optimizer(options: JointOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        fused=True,
    )


def _advice(name: str) -> str:
    hint = "hand in the model as it was then, " if name == _WEIGHTS else ""
    return f"; {hint}choose another folder, or delete the file to begin anew"


def _diverged(what: str, rate: float) -> FloatingPointError:
    return FloatingPointError(f"training diverged: {what} (lr {rate:g}); a smaller lr, or warmup_epochs, may help")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, in the usual memory layout, as any code expects it."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in _tensors(model).items()}


def _seed_draws(device: torch.device, seed: int) -> None:
    """Seed what the model draws from, on the CPU and on its own GPU alone."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def _synchronized_batch_norms(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model with synchronised batch normalisations; afterwards with its own again, which share parameters and buffers."""
    originals = {
        name: module
        for name, module in model.named_modules()
        if wanted and isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    }
    for name, module in originals.items():
        model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    try:
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def _check_batches(model: nn.Module, options: JointOptions, samples: int, group: Group) -> None:
    processes = group.world_size
    if options.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes that share it, got {options.batch_size}")
    if samples < 2 * processes:
        raise ValueError(f"images must be at least two for each of {processes} processes, got {samples}")
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if normalised and options.batch_size < 2 * processes:
        raise ValueError(
            f"batch_size must be at least 2 for each of {processes} processes, because the model normalises over batches, "
            f"got {options.batch_size}"
        )
    if options.sync_batch_norm and group.device.type != "cuda":
        raise ValueError(f"sync_batch_norm needs GPUs, got it on {group.device}")


def _description(epoch: str, loss: float, speed: float, history: list[dict[str, float]]) -> str:
    """A training in a few words, for the bar."""
    text = f"epoch {epoch}  {speed:,.0f} images/s  loss {loss:.3f}"
    if history and "all" in history[-1]:
        text += f"  val few {100 * history[-1]['few']:.1f}  all {100 * history[-1]['all']:.1f}"
    return text
