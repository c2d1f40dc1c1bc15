"""A repaired classifier put back where its model came from, after showing that the scores are the composed ones."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.split import run_model, split_model
from ..utils.checks import check_choice, check_kind, check_number, if_given
from ..utils.files import PathLike, check_output_file, whole_file
from ..utils.modules import evaluating
from ..utils.packages import require
from ..utils.seeds import noise
from ..utils.tensors import TensorLike, check_floating
from .files import require_safetensors
from .layouts import join
from .onnx import onnx_content, run_onnx
from .reader import Checkpoint, open_checkpoint
from .writer import check_repaired, file_content, write_verified

EXPORT_FORMATS = ("same", "safetensors", "linear", "onnx")

# How far scores may be off, in parts of the largest one: rows are rounded to the file's dtype, and a score is a sum of
# thousands.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_RANDOM_FEATURES = 64
_RANDOM_IMAGES = 4


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` wrote, and what was verified before.

    Differences are absolute, of scores; compare them with ``largest_score``.

    Attributes:
        path: the file.
        format: one of :data:`EXPORT_FORMATS`.
        size: bytes.
        few_classes: rows that are new.
        batch: what the scores were of: ``"images"`` (those given), ``"random images"`` or ``"random features"``.
        samples: how many.
        largest_score: the largest absolute score.
        tolerance: what was allowed, in parts of ``largest_score``.
        largest_difference: of the written file's scores from the composed ones (features times the repaired classifier).
        largest_base_difference: of the written file's scores of all other classes from those of the original.
        unchanged_bytes: bytes of the file that are the original's; None unless ``format="same"``, and of a file written anew.
        onnx_checked_by: what read the ONNX file back: ``"onnxruntime"``, ``"onnx.reference"``, or ``"onnx.checker"``, which
            checks the form alone; None for other formats.
        onnx_difference: of the scores that it computed, for another number of images than the file was traced with, from the
            model's; None where it did not compute any.
    """

    path: Path
    format: str
    size: int
    few_classes: int
    batch: str
    samples: int
    largest_score: float
    tolerance: float
    largest_difference: float
    largest_base_difference: float
    unchanged_bytes: int | None
    onnx_checked_by: str | None
    onnx_difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        lines = [
            f"wrote {self.path} ({self.format}, {self.size:,} bytes), {self.few_classes} rows new",
            f"verified: scores of {self.samples} {self.batch}, up to {self.largest_score:.3g}: at most "
            f"{self.largest_difference:.2g} off the composed ones, of base classes {self.largest_base_difference:.2g} off the "
            f"original ones (allowed: {self.tolerance * self.largest_score:.2g})",
        ]
        if self.unchanged_bytes is not None:
            lines.append(f"{self.unchanged_bytes:,} bytes are those of the original")
        if self.onnx_checked_by is not None:
            what = (
                "form checked"
                if self.onnx_difference is None
                else f"scores at most {self.onnx_difference:.2g} from the model's"
            )
            lines.append(f"{what} by {self.onnx_checked_by}")
        return "\n".join(lines)


def export(
    checkpoint: Checkpoint,
    linear: nn.Module,
    few_classes: TensorLike,
    output: PathLike,
    *,
    format: str = "same",
    model: nn.Module | None = None,
    classifier: str | None = None,
    example: Tensor | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    keep_original: bool = False,
) -> ExportReport:
    """Write a repaired classifier for use, once it is shown that what is written scores as it should.

    The new file is read back, as any user of it would read it, and scores a batch: with ``model``, images, through the whole
    model with the file's state; without, random features, through the file's classifier. Its scores must be the composed ones,
    features times ``linear``, and those of all classes but the few must be those of the original, to rounding. Only then does
    the file take its name.

    Args:
        checkpoint: of the trained model, as read.
        linear: its repaired classifier ``[N, D]``, for example ``AlphaNet.fold()``.
        few_classes: ids of the repaired classes, ``[F]``.
        output: the new file.
        format: ``"same"``, the checkpoint's own file with new rows (:func:`write_repaired`); ``"safetensors"``, the model's
            whole state under plain names; ``"linear"``, the classifier alone (``.safetensors`` or ``torch.save``'s form, by the
            name); ``"onnx"``, the whole model, for any number of images.
        model: a module that the checkpoint fits (:meth:`Checkpoint.load_into`), or whose backbone a bare classifier belongs to.
            It is copied, not changed. Needed for ``"onnx"``.
        classifier: dotted name of the model's last linear layer; None finds it.
        example: images ``[n, C, H, W]`` as the model takes them; None makes random ones of the size that the model says, or
            224.
        tolerance: how far scores may be off, in parts of the largest; None goes by the file's dtype: 1e-4 for float32, 1e-2 for
            float16, 5e-2 for bfloat16, 1e-8 for float64.
        overwrite: replace a file that is there.
        keep_original: keep what is changed beside the output, for :func:`alphaext.checkpoints.undo`; ``"same"`` alone.

    Returns:
        What was verified, with the largest differences.

    Raises:
        ImportError: a package that the format needs is not installed; before any work.
        TypeError, ValueError: for arguments that do not fit, as for :func:`write_repaired` and :func:`split_model`, and for
            scores that are off by more than ``tolerance``. No file is written then.
        OSError: the disk is full or fails.

    Example:
        >>> import tempfile
        >>> from alphaext.checkpoints import read_checkpoint
        >>> folder, model = tempfile.mkdtemp(), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> torch.save(model.state_dict(), folder + "/model.pth")
        >>> checkpoint = read_checkpoint(folder + "/model.pth")
        >>> linear = checkpoint.linear()
        >>> _ = linear.weight.data[3].mul_(2)
        >>> report = export(checkpoint, linear, [3], folder + "/repaired.pth")
        >>> report.few_classes, report.batch, report.largest_base_difference
        (1, 'random features', 0.0)
    """
    check_kind(checkpoint, Checkpoint, "checkpoint", what="a Checkpoint")
    check_choice(format, "format", EXPORT_FORMATS)
    target = check_output_file(output, "output", overwrite=overwrite)
    if target.suffix == ".safetensors":
        require_safetensors()
    for package in ("onnx", "onnxscript") if format == "onnx" else ():
        require(package, "format='onnx' needs the package", "onnx onnxscript")
    suffix = {"safetensors": ".safetensors", "onnx": ".onnx"}.get(format)
    if suffix is not None and target.suffix != suffix:
        raise ValueError(f"output must end in {suffix} for format={format!r}, got {str(target)!r}")
    if keep_original and format != "same":
        raise ValueError(f"keep_original must be False for format={format!r}, which is no copy of the checkpoint")
    if model is None:
        needless = "example" if example is not None else "classifier" if classifier is not None else None
        if needless is not None or format == "onnx":
            raise ValueError(f"model must be given {'for ' + repr(format) if needless is None else 'with ' + needless}")
    few, weight, bias = check_repaired(checkpoint, linear, few_classes)
    allowed = if_given(check_number, tolerance, "tolerance", above=0)
    if model is None:
        batch: _Batch = _Features(checkpoint, weight, bias, few)
    else:
        batch = _Images(checkpoint, weight, bias, few, model, classifier, example)
    batch.tolerance = max(TOLERANCES[checkpoint.dtype], TOLERANCES[batch.dtype]) if allowed is None else allowed
    unchanged, onnx_checked_by, onnx_difference = None, None, None
    if format == "same":
        options = {"overwrite": overwrite, "keep_original": keep_original}
        unchanged = write_verified(checkpoint, linear, few, target, **options, verify=batch.check)
    elif format == "onnx":
        assert isinstance(batch, _Images)
        onnx_checked_by, onnx_difference = _write_onnx(batch, target, overwrite)
    else:
        tensors = batch.state() if format == "safetensors" else _named("", weight, bias, checkpoint.dtype)
        content = file_content(tensors, _notes(checkpoint), safetensors=target.suffix == ".safetensors")
        with whole_file(target, overwrite=overwrite) as file:
            file.write(content)
            file.flush()
            name = batch.classifier_name if format == "safetensors" else None
            batch.check(open_checkpoint(file.name, classifier=name or None, num_classes=checkpoint.num_classes))
    return ExportReport(
        path=target,
        format=format,
        size=target.stat().st_size,
        few_classes=len(few),
        batch=batch.what,
        samples=len(batch.composed),
        largest_score=batch.largest_score,
        tolerance=batch.tolerance,
        largest_difference=batch.largest_difference,
        largest_base_difference=batch.largest_base_difference,
        unchanged_bytes=unchanged,
        onnx_checked_by=onnx_checked_by,
        onnx_difference=onnx_difference,
    )


class _Batch:
    """Something to score, with its scores by the original classifier and by the composed one.

    Attributes:
        what: what the samples are.
        original: ``[n, N]``.
        composed: ``[n, N]``.
        classifier_name: of the linear layer in the state.
        dtype: in which scores are computed.
        tolerance: how far scores may be off, in parts of the largest one.
    """

    what: str
    original: Tensor
    composed: Tensor
    classifier_name: str
    dtype: torch.dtype
    tolerance: float
    largest_difference = math.nan
    largest_base_difference = math.nan

    def __init__(self, checkpoint: Checkpoint, weight: Tensor, bias: Tensor | None, few: Tensor) -> None:
        self.checkpoint, self.weight, self.bias = checkpoint, weight, bias
        self.base = torch.ones(len(weight), dtype=torch.bool, device="cpu")
        self.base[few] = False

    @property
    def largest_score(self) -> float:
        """Of the composed ones; a ValueError where it is not finite."""
        largest = float(self.composed.abs().max())
        if not math.isfinite(largest):
            raise ValueError(f"the model's scores of {self.what} must be finite, got up to {largest}")
        return largest

    def scores(self, written: Checkpoint) -> Tensor:
        """``[n, N]`` by a file that was written, read back."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """The whole state with the repaired classifier."""
        raise NotImplementedError

    def check(self, written: Checkpoint) -> None:
        """Hold the scores of a file that was written, read back, against the composed and the original ones."""
        self.check_scores(self.scores(written))

    def check_scores(self, scores: Tensor) -> None:
        limit = self.tolerance * self.largest_score
        self.largest_difference = float((scores - self.composed).abs().max())
        base = (scores - self.original)[:, self.base].abs()
        self.largest_base_difference = float(base.max()) if base.numel() else 0.0
        for difference, what in (
            (self.largest_difference, "the composed ones (features times linear)"),
            (self.largest_base_difference, "the original ones in columns that should not change"),
        ):
            # Written so that NaN fails too.
            if not difference <= limit:
                raise ValueError(
                    f"scores of {len(scores)} {self.what} with the repaired classifier are off by up to {difference:.3g} from "
                    f"{what}; tolerance={self.tolerance:g} of the largest score allows {limit:.3g}; nothing was written"
                )


class _Features(_Batch):
    """Random features: what there is without a model."""

    what = "random features"

    def __init__(self, checkpoint: Checkpoint, weight: Tensor, bias: Tensor | None, few: Tensor) -> None:
        super().__init__(checkpoint, weight, bias, few)
        self.features = checkpoint.prepare_features(noise(_RANDOM_FEATURES, weight.shape[1]).to(weight.dtype))
        self.original = functional.linear(self.features, checkpoint.weight, checkpoint.bias)
        self.composed = functional.linear(self.features, weight, bias)
        self.dtype = weight.dtype
        joined = checkpoint.experts > 1 or checkpoint.feature_normalization != "none"
        self.classifier_name = "classifier" if joined and checkpoint.backbone else checkpoint.classifier

    def scores(self, written: Checkpoint) -> Tensor:
        return functional.linear(self.features, written.weight, written.bias)

    def state(self) -> dict[str, Tensor]:
        return {**self.checkpoint.backbone, **_named(self.classifier_name, self.weight, self.bias, self.checkpoint.dtype)}


class _Images(_Batch):
    """Images through a copy of the model, on the CPU."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weight: Tensor,
        bias: Tensor | None,
        few: Tensor,
        model: nn.Module,
        classifier: str | None,
        example: Tensor | None,
    ) -> None:
        super().__init__(checkpoint, weight, bias, few)
        check_kind(model, nn.Module, "model", what="a torch module")
        duplicate = copy.deepcopy(model).cpu().eval()
        self.what = "random images" if example is None else "images"
        self.images = _random_images(duplicate) if example is None else _check_example(example)
        try:
            self.split = split_model(duplicate, classifier, self.images)
        except ValueError as error:
            if example is not None:
                raise
            raise ValueError(f"{error}; that was noise in place of example, which may have to be given") from error
        self.classifier_name, self.dtype = self.split.classifier_name, self.split.classifier.weight.dtype
        self._load(checkpoint)
        features = self.split.features(self.images).to(weight.dtype)
        self.original = self.run(self.images)
        self.composed = functional.linear(features, weight, bias)

    def scores(self, written: Checkpoint) -> Tensor:
        self._load(written)
        return self.run(self.images)

    def state(self) -> dict[str, Tensor]:
        self.compose()
        return {name: tensor for name, tensor in self.split.model.state_dict().items() if isinstance(tensor, Tensor)}

    def run(self, images: Tensor) -> Tensor:
        """``[n, N]`` by the model as it is now."""
        with evaluating(self.split.model):
            scores: Tensor = run_model(self.split.model, images.to(self.dtype))
        return scores.to(self.weight.dtype)

    def compose(self) -> nn.Module:
        """The model with the repaired classifier."""
        with torch.no_grad():
            self.split.classifier.weight.copy_(self.weight)
            if self.bias is not None:
                self.split.classifier.bias.copy_(self.bias)
        return self.split.model

    def _load(self, checkpoint: Checkpoint) -> None:
        # A classifier alone belongs to the backbone that the model has.
        load = checkpoint.load_into if checkpoint.backbone else checkpoint.load_classifier_into
        load(self.split.model, self.classifier_name)


def _check_example(example: Tensor) -> Tensor:
    check_kind(example, Tensor, "example", what="a tensor of images [n, C, H, W]")
    check_floating(example, "example")
    if example.dim() < 2 or len(example) == 0:
        raise ValueError(f"example must be images [n, C, H, W], at least one, got {list(example.shape)}")
    return example.detach().cpu()


def _random_images(model: nn.Module) -> Tensor:
    """Noise in the size that the model says it takes, in as many channels as its first convolution."""
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    size = getattr(model, "image_size", None)
    if not isinstance(size, int):
        configuration = getattr(model, "pretrained_cfg", {})  # timm's
        size = configuration.get("input_size", (224,))[-1] if isinstance(configuration, dict) else 224
    return noise(_RANDOM_IMAGES, channels, size, size)


def _named(classifier: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return {join(classifier, name): tensor.to(dtype) for name, tensor in tensors.items()}


def _notes(checkpoint: Checkpoint) -> dict[str, str]:
    """What a plain classifier does not show: its classes' names, and what its features have to be."""
    notes: dict[str, str] = {}
    if checkpoint.class_names is not None:
        notes["class_names"] = json.dumps(checkpoint.class_names, ensure_ascii=False)
    if checkpoint.experts > 1 or checkpoint.feature_normalization != "none":
        notes["experts"] = str(checkpoint.experts)
        notes["feature_normalization"] = checkpoint.feature_normalization
    return notes


def _write_onnx(batch: _Images, target: Path, overwrite: bool) -> tuple[str, float | None]:
    """Write the model with the repaired classifier; returns what read the file back, and how far off its scores were."""
    model = batch.compose()
    batch.check_scores(batch.run(batch.images))
    # Two images to trace with, because a batch of one would be taken for a constant; three to try, to see that it is not.
    traced, tried = (torch.cat([batch.images] * 3)[:count].to(batch.dtype) for count in (2, 3))
    with evaluating(model):
        content = onnx_content(model, traced)
    with whole_file(target, overwrite=overwrite) as file:
        file.write(content)
        file.flush()
        scores, checked_by = run_onnx(Path(file.name), tried)
        if scores is None:
            return checked_by, None
        difference, limit = float((scores - batch.run(tried)).abs().max()), batch.tolerance * batch.largest_score
        if not difference <= limit:
            raise ValueError(
                f"the ONNX file's scores, computed by {checked_by}, are off by up to {difference:.3g} from the model's; "
                f"tolerance={batch.tolerance:g} of the largest score allows {limit:.3g}; nothing was written"
            )
    return checked_by, difference
