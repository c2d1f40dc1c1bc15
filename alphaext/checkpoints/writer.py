"""Classifiers written to files: alone, or into a copy of their checkpoint in which few rows differ and nothing else."""

from __future__ import annotations

import io
import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..head.alphanet import AlphaNet
from ..utils.checks import check_kind
from ..utils.files import PathLike, check_output_file, whole_file, without_nan
from ..utils.linear import linear_parameters
from ..utils.tensors import TensorLike, check_class_ids
from .files import container, read_payload, require_safetensors
from .layouts import KeyPath
from .reader import Checkpoint, open_checkpoint
from .row_edits import RowEdit, changed_bytes, check_copy, copy_with
from .undo import keep_changes

# How many rounding errors of its dtype a number may be off: a division and a multiplication back, and sums in another order.
_ROUNDINGS = 8


def save_linear(
    linear: nn.Module, path: PathLike, *, metadata: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a linear layer as ``{weight, bias}``, which ``nn.Linear.load_state_dict`` and :func:`read_checkpoint` read.

    Args:
        linear: ``nn.Linear`` or a module with ``weight`` ``[N, D]`` and ``bias`` ``[N]`` or None.
        path: ``.safetensors`` for that format; any other for ``torch.save``'s.
        metadata: what to write beside the tensors, anything that JSON can hold; in :attr:`Checkpoint.metadata` afterwards.
            Under ``"class_names"``, N texts become :attr:`Checkpoint.class_names`.
        overwrite: replace a file that is there.

    Raises:
        TypeError: no linear layer, an :class:`AlphaNet` (fold it first), metadata that JSON cannot hold.
        ValueError: a layer that is not finite, a file that is there already, a directory that is not.
        ImportError: ``.safetensors``, and the package is not installed.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/linear.pth"
        >>> save_linear(nn.Linear(8, 4), path, metadata={"method": "tau"})
        >>> read_checkpoint(path).metadata
        {'method': 'tau'}
    """
    weight, bias = _parameters(linear)
    texts = metadata_texts(metadata)
    target = check_output_file(path, "path", overwrite=overwrite)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    content = file_content(tensors, texts, safetensors=target.suffix == ".safetensors")
    with whole_file(target, overwrite=overwrite) as file:
        file.write(content)


def file_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, safetensors: bool) -> bytes:
    """The bytes of a file with these tensors and texts, in the one format or in ``torch.save``'s."""
    content = OrderedDict(
        (name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)) for name, tensor in tensors.items()
    )
    if safetensors:
        require_safetensors()
        from safetensors.torch import save

        return save(content, metadata={"format": "pt", **metadata})
    if metadata:
        # An attribute of the dictionary, not a key of it: strict loaders refuse keys that they do not know.
        content.alphaext_metadata = dict(metadata)  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_repaired(
    checkpoint: Checkpoint, linear: nn.Module, few_classes: TensorLike, path: PathLike, *, overwrite: bool = False
) -> None:
    """Write the checkpoint's file again with new few rows in the classifier, and every other byte as it was.

    Whatever code loaded the file loads the new one: keys, containers, devices, shared memory are those of the original, because
    the file is copied and the rows are written where they are. Rows are kept in the file's dtype. LWS's scales stay, and what
    is stored is divided by them; each expert of RIDE gets its part. Before the new file takes its name it is read back: the
    rows must be right and all other bytes those of the original.

    A file in the form from before torch 1.6 is not copied. It is read and saved anew: the same content, on the CPU, in today's
    form.

    Args:
        checkpoint: as read; its file is read again.
        linear: the repaired classifier, ``[N, D]``, whose other rows are those of the checkpoint.
        few_classes: ids of the rows to write, ``[F]``.
        path: the new file.
        overwrite: replace a file that is there, be it the checkpoint itself.

    Raises:
        TypeError: no linear layer, ids that are not integers.
        ValueError: a classifier that was not made from this checkpoint (another shape, another base row), normalised experts
            (use :func:`save_linear`), a row that cannot be stored (a scale of zero, a number beyond the file's dtype), a file
            that has changed since it was read, or one that is there already. No file is written then.
        OSError: the disk is full or fails; the file that was there stays.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> torch.save({"fc.weight": torch.ones(4, 8), "conv.weight": torch.ones(8, 3, 1, 1)}, folder + "/model.pth")
        >>> checkpoint = read_checkpoint(folder + "/model.pth")
        >>> linear = checkpoint.linear()
        >>> _ = linear.weight.data[3].fill_(0.5)
        >>> write_repaired(checkpoint, linear, [3], folder + "/repaired.pth")
        >>> torch.load(folder + "/repaired.pth", weights_only=True)["fc.weight"][:, 0]
        tensor([1.0000, 1.0000, 1.0000, 0.5000])
    """
    write_verified(checkpoint, linear, few_classes, path, overwrite=overwrite)


def write_verified(
    checkpoint: Checkpoint,
    linear: nn.Module,
    few_classes: TensorLike,
    path: PathLike,
    *,
    overwrite: bool = False,
    keep_original: bool = False,
    verify: Callable[[Checkpoint], None] | None = None,
) -> int | None:
    """:func:`write_repaired`, with a last word for ``verify``: it gets the new file, read, before the file takes its name.

    Returns:
        How many bytes of the file are those of the original; None of a file that was written anew.
    """
    check_kind(checkpoint, Checkpoint, "checkpoint", what="a Checkpoint")
    few, weight, bias = check_repaired(checkpoint, linear, few_classes)
    target = check_output_file(path, "path", overwrite=overwrite)
    in_safetensors = container(checkpoint.path) == "safetensors"
    if in_safetensors != (target.suffix == ".safetensors"):
        raise ValueError(
            f"path must {'' if in_safetensors else 'not '}end in .safetensors, for the format stays that of {checkpoint.path}; "
            f"got {str(target)!r}"
        )
    if keep_original and container(checkpoint.path) == "legacy":
        raise ValueError(f"keep_original must be False for {checkpoint.path}: a file from before torch 1.6 is written anew")
    edits = _edits(checkpoint, few, weight, bias)
    with _editable(checkpoint.path, target.parent) as source, whole_file(target, overwrite=overwrite) as file:
        changes = changed_bytes(source, edits, checkpoint.path)
        copy_with(source, file, changes)
        same = check_copy(source, Path(file.name), changes)
        written = open_checkpoint(file.name, **checkpoint._options)
        _check_written(checkpoint, written, few, weight, bias)
        if verify is not None:
            verify(written)
        if keep_original:
            keep_changes(source, Path(file.name), changes, target)
    return same if source == checkpoint.path else None


@contextmanager
def _editable(path: Path, folder: Path) -> Iterator[Path]:
    """The file itself, or one from before torch 1.6 written anew: a temporary file in ``folder``."""
    if container(path) != "legacy":
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        torch.save(read_payload(path).content, file)
        file.flush()
        yield Path(file.name)


def check_repaired(checkpoint: Checkpoint, linear: nn.Module, few_classes: TensorLike) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check that ``linear`` is the checkpoint's classifier but for its few rows.

    Returns:
        The few classes' ids, and the layer's weight and bias on the CPU in the checkpoint's effective dtype.
    """
    weight, bias = _parameters(linear)
    few = check_class_ids(few_classes, checkpoint.num_classes, "few_classes").cpu()
    if len(few) == 0:
        raise ValueError("few_classes is empty: there is no row to write")
    if weight.shape != checkpoint.weight.shape:
        raise ValueError(
            f"linear must have the shape of the classifier of {checkpoint.path}, {list(checkpoint.weight.shape)}, "
            f"got {list(weight.shape)}"
        )
    if (bias is None) != (checkpoint.bias is None):
        has, lacks = ("linear", "the checkpoint") if checkpoint.bias is None else ("the checkpoint", "linear")
        raise ValueError(
            f"{has} has a bias and {lacks} has none; save_linear writes such a classifier as a file of its own "
            "(a constant on the few scores, few_bias, makes a bias)"
        )
    epsilon = max(torch.finfo(weight.dtype).eps, torch.finfo(checkpoint.weight.dtype).eps)
    weight = weight.to("cpu", checkpoint.weight.dtype)
    bias = None if bias is None else bias.to("cpu", checkpoint.weight.dtype)
    rows, original = _with_bias(weight, bias), _with_bias(checkpoint.weight, checkpoint.bias)
    difference = (rows - original).abs().amax(dim=1)
    off = difference > _ROUNDINGS * epsilon * original.abs().amax(dim=1)
    off[few] = False
    if bool(off.any()):
        worst = int(torch.where(off, difference, -1.0).argmax())
        raise ValueError(
            f"linear: this classifier was not made from this checkpoint, {checkpoint.path}: {int(off.sum())} of its "
            f"{len(off) - len(few)} rows that are not among few_classes differ, that of {_class(checkpoint, worst)} by "
            f"{float(difference[worst]):.3g}"
        )
    return few, weight, bias


def _edits(checkpoint: Checkpoint, few: Tensor, weight: Tensor, bias: Tensor | None) -> list[RowEdit]:
    """The rows as the file has to store them."""
    layout, stored = checkpoint._layout, checkpoint._stored
    if layout.normalized:
        raise ValueError(
            f"{checkpoint.path} keeps normalised experts, in which the length of a class's column is lost: a composed row "
            "cannot be written back; save_linear, or export with format='safetensors' or 'linear', writes the classifier itself"
        )
    new: dict[KeyPath, Tensor] = {}
    divisor = _scales_of(checkpoint, few)
    parts = weight[few].double().chunk(len(layout.weights), dim=1)
    for key_path, part in zip(layout.weights, parts, strict=True):
        new[key_path] = part * len(layout.weights) / divisor[:, None]
    if layout.gains is not None:
        lengths = new[layout.weights[0]].norm(dim=1)
        new[layout.gains] = lengths.reshape(len(few), *stored[layout.gains].shape[1:])
    if bias is not None:
        # Each expert's bias moves by as much as their mean does.
        assert checkpoint.bias is not None
        moved = (bias - checkpoint.bias)[few].double()
        for key_path in layout.biases:
            alone = len(layout.biases) == 1
            new[key_path] = bias[few].double() / divisor if alone else stored[key_path][few].double() + moved
    edits = []
    for key_path, wide in new.items():
        values = wide.to(stored[key_path].dtype)
        finite = torch.isfinite(values).reshape(len(few), -1).all(dim=1)
        if not bool(finite.all()):
            class_id = int(few[~finite][0])
            raise ValueError(
                f"the row of {_class(checkpoint, class_id)} cannot be stored as {values.dtype} in {' / '.join(key_path)} of "
                f"{checkpoint.path}: it goes up to {float(wide[~finite][0].abs().max()):.3g}"
            )
        edits.append(RowEdit(key_path, stored[key_path], few, values))
    return edits


def _scales_of(checkpoint: Checkpoint, few: Tensor) -> Tensor:
    """What LWS multiplies the few rows by; ones without it."""
    if checkpoint._layout.scales is None:
        return torch.ones(len(few), dtype=torch.float64, device="cpu")
    scales = checkpoint._stored[checkpoint._layout.scales].reshape(-1)[few]
    useless = scales.abs() < torch.finfo(scales.dtype).tiny
    if bool(useless.any()):
        class_id = int(few[useless][0])
        raise ValueError(
            f"the scale of {_class(checkpoint, class_id)} in {checkpoint.path} is {float(scales[useless][0]):.3g}: no stored "
            "row times that is the composed one; save_linear writes the classifier itself"
        )
    return scales.double()


def _check_written(checkpoint: Checkpoint, written: Checkpoint, few: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the file that was written against what it should be, as any reader of it finds it."""
    if written._layout != checkpoint._layout:
        raise ValueError(f"{checkpoint.path} has changed since it was read: it is another checkpoint now")
    rows, wanted = _with_bias(written.weight, written.bias), _with_bias(weight, bias)
    original = _with_bias(checkpoint.weight, checkpoint.bias)
    base = torch.ones(len(rows), dtype=torch.bool, device="cpu")
    base[few] = False
    if not torch.equal(rows[base], original[base]):
        raise ValueError(f"{checkpoint.path} has changed since it was read: other rows than the few are not as they were")
    # RIDE's biases cancel in their mean, so what they are measured by is the largest of them.
    size = torch.maximum(wanted[few].abs().amax(dim=1), _largest_part(checkpoint, few))
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in (*checkpoint._stored.values(), weight))
    off = (rows - wanted)[few].abs().amax(dim=1) > _ROUNDINGS * epsilon * size
    if bool(off.any()):
        class_id = int(few[off][0])
        raise ValueError(
            f"the row of {_class(checkpoint, class_id)} does not survive being stored in {checkpoint.path}: read back it is "
            f"off by {float((rows - wanted)[class_id].abs().max()):.3g}; save_linear writes the classifier itself"
        )


def _largest_part(checkpoint: Checkpoint, few: Tensor) -> Tensor:
    parts = [checkpoint._stored[key_path][few].abs().to(checkpoint.weight.dtype) for key_path in checkpoint._layout.biases]
    if checkpoint.experts == 1:
        return torch.zeros(len(few), dtype=checkpoint.weight.dtype, device="cpu")
    return torch.stack(parts).amax(dim=0)


def metadata_texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Texts as they are, anything else as JSON: what safetensors can hold, and what reads back the same from both formats."""
    try:
        return {
            str(key): value if isinstance(value, str) else json.dumps(without_nan(value), ensure_ascii=False)
            for key, value in (metadata or {}).items()
        }
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON can hold: {error}") from error


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(linear, AlphaNet):
        raise TypeError(
            "linear must be a plain linear layer, got an AlphaNet, whose weight is the original one; give its fold()"
        )
    return linear_parameters(linear)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def _class(checkpoint: Checkpoint, class_id: int) -> str:
    return f"class {class_id}" if checkpoint.class_names is None else f"class {class_id} ({checkpoint.class_names[class_id]})"
