"""A model as an ONNX file, and the file's scores."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST_FILE = 2**31  # bytes, the limit of protocol buffers


def onnx_content(model: nn.Module, images: Tensor) -> bytes:
    """The bytes of an ONNX file of ``model`` (in eval mode) from ``images`` to ``logits``, for any number of images.

    Raises:
        ValueError: a model of 2 GiB or more, or one that torch cannot trace.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
    if size >= _LARGEST_FILE:
        raise ValueError(f"model has {size:,} bytes of tensors, but one ONNX file holds less than {_LARGEST_FILE:,}")
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"model, a {type(model).__name__}, cannot be written as ONNX: {str(error).strip()}") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def run_onnx(path: Path, images: Tensor) -> tuple[Tensor | None, str]:
    """Check an ONNX file and compute its scores of ``images``.

    Returns:
        The scores and what computed them: ``"onnxruntime"`` where it is installed, else ``"onnx.reference"``. None and
        ``"onnx.checker"`` where the reference lacks an operator, so that the form alone is checked.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    try:
        name, session = _session(path)
        scores = session.run(None, {"images": images.numpy()})[0]
    except NotImplementedError:
        return None, "onnx.checker"
    return torch.from_numpy(scores), name


def _session(path: Path) -> tuple[str, Any]:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return "onnx.reference", ReferenceEvaluator(str(path))
    return "onnxruntime", runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
