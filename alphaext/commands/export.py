"""``alphaext export``: the repaired checkpoint."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

import alphaext

from ..utils.files import read_json
from . import results
from .options import option
from .shared import CommonOptions, ModelOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Export(CommonOptions, ModelOptions):
    """Write the checkpoint again with a new classifier in it: the rows that differ change, every other byte stays.

    Code that loaded the old file loads the new one. Before the file takes its name it is read back, and with --backbone the
    model is loaded from it and compared on a batch. Other formats: safetensors, linear (the classifier alone), onnx.
    With --undo the original comes out of a repaired file again, to the last byte.

    Example:
        alphaext export --checkpoint trained.pth --repaired alpha-joint --backbone resnext50_32x4d --output repaired.pth
    """

    section: ClassVar[str] = "export"
    repaired: Path | None = option(
        None, metavar="CLASSIFIER", help="the new classifier: a folder that 'fit' or 'baseline' wrote, or a file"
    )
    output: Path = option(metavar="FILE", help="the file to write")
    overwrite: bool = option(False, help="replace a file that is there")
    keep_original: bool = option(False, help="keep the rows that change beside the file, for --undo")
    undo: Path | None = option(None, metavar="FILE", help="write the original of a file that was written with --keep-original")
    format: str = option("same", choices=("same", "safetensors", "linear", "onnx"), help="of the file")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Compare, verify, write; returns what was verified."""
        from torch import nn

        console = results.console_or_quiet(console)
        if self.undo is not None:
            restored = alphaext.checkpoints.undo(self.undo, self.output, overwrite=self.overwrite)
            console.print(f"wrote {self.output}, {restored:,} bytes restored", markup=False, highlight=False, soft_wrap=True)
            return {"path": str(self.output), "restored_bytes": restored}
        if self.repaired is None:
            raise ValueError("--repaired must be given, or repaired in [export] of the configuration: the new classifier")
        checkpoint, without_place = self.read_checkpoint(), False
        linear = results.read_classifier(self.repaired, checkpoint.num_classes, self.classifier_layer)
        bias: Tensor | None = linear.bias
        if bias is None and checkpoint.bias is not None:
            # What has no bias has one of zeros, and the file has a place for it.
            linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)))
        elif bias is not None and checkpoint.bias is None and self.format == "linear":
            checkpoint = replace(checkpoint, bias=checkpoint.weight.new_zeros(len(checkpoint.weight)))
            without_place = True
        changed = changed_rows(checkpoint.linear(), linear)
        if len(changed) == 0:
            raise ValueError(f"repaired must differ from the checkpoint in some row, {str(self.repaired)!r} does in none")
        if len(changed) == checkpoint.num_classes and not self._made_from(checkpoint.path):
            warnings.warn(
                f"every row of the classifier changes: make sure that {str(self.repaired)!r} is for the network in "
                f"{str(checkpoint.path)!r}",
                stacklevel=2,
            )
        if self.saved_model is not None and self.checkpoint is None and self.format == "same":
            return self._save_folder(console, checkpoint, linear, changed)
        # A bias that the network has no place for cannot be tried in it.
        model = None if self.backbone is None or without_place else self.model(checkpoint.num_classes).eval()
        report = alphaext.checkpoints.export(
            checkpoint,
            linear,
            changed,
            self.output,
            format=self.format,
            model=model,
            classifier=None if model is None else self.classifier_layer,
            example=None if model is None else self.example(model),
            overwrite=self.overwrite,
            keep_original=self.keep_original,
        )
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        return {**report.to_dict(), "changed_classes": changed.tolist(), "num_classes": checkpoint.num_classes}

    def _made_from(self, file: Path) -> bool:
        """Whether the new classifier was made from this checkpoint's, as its folder says."""
        run = Path(str(self.repaired)) / results.RUN
        options = read_json(run, "a run of alphaext").get("options", {}) if run.is_file() else {}
        saved = str(options.get("backbone")).removeprefix("hf:")
        source = Path(options.get("classifier") or options.get("checkpoint") or saved)
        return source.exists() and source.samefile(file.parent if source.is_dir() else file)

    def _save_folder(
        self, console: Console, checkpoint: alphaext.checkpoints.Checkpoint, linear: nn.Linear, changed: Tensor
    ) -> dict[str, Any]:
        """A copy of the folder that transformers saved, with the repaired rows in its weights."""

        from ..models.huggingface import copy_folder

        assert self.saved_model is not None
        reports = []

        def write(path: Path) -> None:
            reports.append(alphaext.checkpoints.export(checkpoint, linear, changed, path))

        model = copy_folder(self.saved_model, self.output, write, overwrite=self.overwrite)
        split = alphaext.models.split_model(model, example=self.example(model))
        difference = float((split.classifier.weight - linear.weight).detach().abs().max())
        console.print(f"wrote {self.output}, {len(changed)} rows new", markup=False, highlight=False, soft_wrap=True)
        console.print(f"verified: from_pretrained loads it, with rows at most {difference:.2g} off", highlight=False)
        report = {**reports[0].to_dict(), "path": str(self.output)}
        return {**report, "changed_classes": changed.tolist(), "num_classes": checkpoint.num_classes}


def changed_rows(before: nn.Linear, after: nn.Linear) -> Tensor:
    """Ids of the classes whose row or bias differs between two classifiers of the same shape, int64, ascending."""
    import torch

    if before.weight.shape != after.weight.shape:
        raise ValueError(
            f"repaired must have the checkpoint's shape, {list(before.weight.shape)}, got {list(after.weight.shape)}"
        )
    differs = (before.weight != after.weight.to(before.weight)).any(dim=1)
    biases = [torch.zeros(len(differs)) if layer.bias is None else layer.bias.detach().float() for layer in (before, after)]
    return (differs | (biases[0] != biases[1])).nonzero().flatten()
