"""A trained model's file, opened: its classifier as one linear layer, the rest of its state, and both put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.huggingface import HuggingFaceModel
from ..utils.callers import warn_caller
from ..utils.checks import check_integer, check_kind, check_number, check_text, if_given
from ..utils.files import PathLike, read_json
from ..utils.linear import make_linear
from ..utils.tensors import check_finite, floating_tensor
from .files import Payload, read_payload
from .layouts import KeyPath, Layout, check_classifier_tensors, class_names, find_layout, is_no_weight, listed, tensor_at
from .names import aligned

FORMATS = ("classifier-balancing", "state_dict", "linear", "ride")


@dataclass(eq=False)
class Checkpoint:
    """A trained model's file, opened: its classifier as one linear layer, and the rest of its state.

    :func:`read_checkpoint` makes one. All tensors are on the CPU.

    Attributes:
        path: the file.
        format: ``"classifier-balancing"`` (the two networks of Kang et al., ICLR 2020), ``"state_dict"``, ``"linear"`` (a
            classifier alone) or ``"ride"`` (the experts of Wang et al., ICLR 2021).
        weight: ``[N, D]``, what the features are multiplied with: the scales of LWS multiplied in, RIDE's experts side by side.
            float32, or float64 from a file of float64.
        bias: ``[N]`` likewise, or None.
        scales: ``[N]``, the scales of LWS, or None.
        class_names: N names where the file holds them, or None.
        backbone: the rest of the model's state in the file's own dtypes; names without ``module.`` and the like. Empty for
            ``"linear"``.
        classifier: the classifier's name in the model, ``"fc"`` for example; empty for a bare ``{weight, bias}``.
        dtype: in which the file keeps the weight.
        experts: how many experts' features lie side by side in the D columns; 1 but for RIDE.
        feature_normalization: what is done to features before the weight: ``"none"``, or ``"l2"``, each expert's part divided
            by its length (:meth:`prepare_features`).
        metadata: texts that came with the file.
        states: the dictionaries of the file that hold a model, first the one that was read; empty for a bare state dict.
        notes: what :func:`read_checkpoint` warns of.
    """

    path: Path
    format: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    scales: Tensor | None = field(repr=False)
    class_names: tuple[str, ...] | None = field(repr=False)
    backbone: dict[str, Tensor] = field(repr=False)
    classifier: str
    dtype: torch.dtype
    experts: int
    feature_normalization: str
    metadata: dict[str, str] = field(repr=False)
    states: tuple[str, ...]
    notes: tuple[str, ...] = field(repr=False)
    _layout: Layout = field(repr=False)
    _stored: dict[KeyPath, Tensor] = field(repr=False)  # the classifier's tensors as the file has them
    _options: dict[str, Any] = field(repr=False)  # of read_checkpoint, to read a copy in the same way

    @property
    def num_classes(self) -> int:
        """N, the number of classes."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """D, the width of the features."""
        return self.weight.shape[1]

    def linear(self) -> nn.Linear:
        """The classifier as a plain layer of its own, in the dtype of ``weight``.

        Example:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/linear.pth"
            >>> torch.save(nn.Linear(8, 4).state_dict(), path)
            >>> read_checkpoint(path).linear()
            Linear(in_features=8, out_features=4, bias=True)
        """
        return make_linear(self.weight, self.bias)

    def prepare_features(self, features: Tensor) -> Tensor:
        """The features ``[n, D]`` as ``weight`` wants them: normalised where ``feature_normalization`` says so."""
        if self.feature_normalization == "none":
            return features
        return normalize_expert_features(features, self.experts)

    def load_into(self, model: nn.Module, classifier: str) -> None:
        """Give ``model`` all the state of this checkpoint, backbone and classifier; an error comes before any change.

        Names must be the model's, but for a common prefix (``backbone.conv1.weight`` fits ``conv1.weight`` where all have it).
        Kang et al.'s ResNets and ResNeXts have the names of torchvision's, whose ``resnet50``, ``resnet152``,
        ``resnext50_32x4d`` and so on they fit; at 224 pixels they compute the same. A missing ``num_batches_tracked`` of old
        files is no error.

        Args:
            model: changed in place; its dtypes and devices stay.
            classifier: dotted name of its last linear layer, which gets the effective ``weight`` and ``bias``.

        Raises:
            ValueError: missing, unexpected or mis-shaped tensors, which are named; a classifier of another size; a checkpoint
                without a backbone (:meth:`load_classifier_into`) or with several experts.

        Example:
            >>> import tempfile
            >>> model, path = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), tempfile.mkdtemp() + "/model.pth"
            >>> torch.save(model.state_dict(), path)
            >>> read_checkpoint(path, classifier="1").load_into(model, "1")
        """
        layer = self._classifier_of(model, classifier)
        if not self.backbone:
            raise ValueError(f"{self.path} holds a classifier alone, no backbone for model; load_classifier_into() loads that")
        if self.experts > 1 or self.feature_normalization != "none":
            normalized = " and normalised features" if self.feature_normalization == "l2" else ""
            raise ValueError(
                f"{self.path} has {self.experts} expert(s){normalized}, which no single layer of a model stands for; "
                "load the file with the code that wrote it"
            )
        state = model.state_dict()
        own = {f"{classifier}.weight", f"{classifier}.bias"}
        wanted = {name: tensor for name, tensor in state.items() if name not in own}
        given = self._fitting(wanted, classifier, model)
        state.update(given)
        state[f"{classifier}.weight"] = self.weight
        if layer.bias is not None:
            state[f"{classifier}.bias"] = self._bias_or_zero()
        model.load_state_dict(state)
        self._set_input_transform(model)

    def load_backbone_into(self, model: nn.Module, classifier: str) -> None:
        """Give ``model`` the backbone of this checkpoint, and leave its layer ``classifier``, of whatever classes, as it is.

        Raises:
            ValueError: as for :meth:`load_into`.
        """
        if not self.backbone:
            raise ValueError(f"{self.path} holds a classifier alone, no backbone for model")
        own = f"{classifier}."
        wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}
        model.load_state_dict(self._fitting(wanted, classifier, model), strict=False)
        self._set_input_transform(model)

    def _set_input_transform(self, model: nn.Module) -> None:
        """What no state dict says: whether torchvision's GoogLeNet or Inception changes its input, as the published ones do."""
        if not hasattr(model, "transform_input"):
            return
        noted = self.metadata.get("transform_input")
        if self.path.name.startswith(("googlenet-", "inception_v3_google-")):  # as torchvision publishes them
            noted = "true"
        if noted is not None:
            model.transform_input = noted == "true"  # type: ignore[assignment]
            return
        warn_caller(
            f"{self.path} does not say whether the model changes its input, as weights that began as torchvision's do: "
            f"transform_input is {bool(model.transform_input)}; --model-options transform_input=true changes that"
        )

    def _fitting(self, wanted: Mapping[str, Tensor], classifier: str, model: nn.Module) -> dict[str, Tensor]:
        """The backbone's tensors under the names of a model; those that take no part in what it computes may be missing."""
        in_files = model.names_in_files() if isinstance(model, HuggingFaceModel) else None
        given = aligned(self.backbone, self.classifier, wanted, classifier, in_files)
        given = {name: tensor for name, tensor in given.items() if name in wanted or not is_no_weight(name)}
        _check_names(self.path, given, wanted, self.format)
        return {name: tensor for name, tensor in given.items() if name in wanted and tensor.shape == wanted[name].shape}

    def load_classifier_into(self, model: nn.Module, classifier: str) -> None:
        """Give the layer ``classifier`` of ``model`` the effective ``weight`` and ``bias``, and leave all else as it is.

        Raises:
            ValueError: a layer of another size, or one without bias for a checkpoint with one.
        """
        layer = self._classifier_of(model, classifier)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            if layer.bias is not None:
                layer.bias.copy_(self._bias_or_zero())

    def _bias_or_zero(self) -> Tensor:
        return self.weight.new_zeros(self.num_classes) if self.bias is None else self.bias

    def _classifier_of(self, model: nn.Module, classifier: str) -> nn.Linear:
        check_kind(model, nn.Module, "model", what="a torch module")
        try:
            layer = model.get_submodule(classifier)
        except AttributeError:
            layer = None
        if not classifier or not isinstance(layer, nn.Linear):
            linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(f"classifier must name an nn.Linear of model, got {classifier!r}; it has: {listed(linears)}")
        if tuple(layer.weight.shape) != tuple(self.weight.shape):
            raise ValueError(
                f"model's {classifier} has {layer.out_features} classes and {layer.in_features} features, the classifier of "
                f"{self.path} has {self.num_classes} and {self.in_features}"
            )
        bias: Tensor | None = layer.bias
        if bias is None and self.bias is not None:
            raise ValueError(f"model's {classifier} has no bias, the classifier of {self.path} has one")
        return layer


def read_checkpoint(
    path: PathLike,
    *,
    classifier: str | None = None,
    num_classes: int | None = None,
    scale: float = 30.0,
    state: str | None = None,
) -> Checkpoint:
    """Read a trained model's file without running anything that it holds.

    Read are the files of ``torch.save`` (tensors, numbers, texts and plain containers of them; NumPy numbers too) and
    safetensors:

    - state dicts as torchvision and timm have them, also under ``"state_dict"``, ``"model"`` and the like, with ``module.``,
      ``_orig_mod.`` or ``model.`` before the names; an average over training (``"state_dict_ema"``) only where there is nothing
      else; weight normalisation is multiplied in;
    - ``{weight, bias}`` alone;
    - ``state_dict_best`` with ``feat_model`` and ``classifier``, as Kang et al.'s code writes it, and LWS's ``module.scales``,
      which multiply weight and bias row by row;
    - RIDE's experts ``backbone.linears.0 ...``. The logits are their mean: features side by side, weights side by side divided
      by their number, the mean of the biases. Experts without bias are RIDE's normalised layers;
    - LDAM's normalised layer, ``[features, classes]``: it is told from a plain one by the layer before it or by
      ``num_classes``, and a warning says so.

    Args:
        path: the file.
        classifier: dotted name of the last linear layer; None goes by the usual names, then by shape. Where the file has but
            one layer (``{weight, bias}``, Kang et al.'s), that one is meant by any name.
        num_classes: how many classes there must be; None takes what there is.
        scale: what RIDE's normalised layers multiply their cosines by, which the file does not say; 30 as in its code.
        state: which of the file's dictionaries is the model, as in ``"state_dict_ema"`` or ``"models/student"``; None takes the
            usual ones, and a warning names the others.

    Returns:
        The checkpoint, with the effective classifier in float32 (float64 from a file of float64).

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a safetensors file, and the package is not installed.
        ValueError: a file that is no checkpoint or is damaged; no plain linear classifier, several candidates (listed
            with their shapes), another number of classes than ``num_classes``, mis-shaped or non-finite tensors in the
            classifier.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.pth"
        >>> state = {"module.conv.weight": torch.zeros(8, 3, 1, 1), "module.fc.weight": torch.zeros(4, 8)}
        >>> torch.save({"epoch": 90, "state_dict": state}, path)
        >>> checkpoint = read_checkpoint(path)
        >>> checkpoint.classifier, checkpoint.num_classes, list(checkpoint.backbone)
        ('fc', 4, ['conv.weight'])
    """
    checkpoint = open_checkpoint(path, classifier=classifier, num_classes=num_classes, scale=scale, state=state)
    for note in checkpoint.notes:
        warn_caller(note)
    return checkpoint


def open_checkpoint(
    path: PathLike, *, classifier: str | None, num_classes: int | None = None, scale: float = 30.0, state: str | None = None
) -> Checkpoint:
    """:func:`read_checkpoint` without warnings."""
    num_classes = if_given(check_integer, num_classes, "num_classes", minimum=1)
    check_text(classifier, "classifier")
    check_text(state, "state")
    scale = check_number(scale, "scale", above=0)
    file_path = Path(path)
    payload = read_payload(file_path)
    if {"weight", "members", "z", "w2", "b2"} <= set(payload.content):
        # Its weight is the classifier that the Alpha Net was made from, not the repaired one.
        raise ValueError(
            f"{file_path} is the state of an Alpha Net, not a classifier: fold it, AlphaNet.from_state_dict(state).fold(), or "
            "take the classifier.pth that 'alphaext fit' wrote beside it"
        )
    layout = find_layout(payload, file_path, classifier=classifier, num_classes=num_classes, state=state)
    check_classifier_tensors(layout, payload, file_path)
    stored = {key_path: tensor_at(payload.content, key_path) for key_path in layout.classifier_tensors}
    weight, bias = _effective(layout, stored, scale)
    experts, normalization = _feature_notes(payload, layout, weight.shape[1], file_path)
    name = layout.classifier or "weight"
    if num_classes is not None and len(weight) != num_classes:
        raise ValueError(f"num_classes is {num_classes}, but {name} of {file_path} has {len(weight)} classes")
    check_finite(weight, f"the effective weight of {file_path}")
    return Checkpoint(
        path=file_path,
        format=layout.format,
        weight=weight,
        bias=bias,
        scales=None if layout.scales is None else stored[layout.scales].reshape(-1).to(weight.dtype),
        class_names=class_names(payload, len(weight)) or _names_beside(file_path, len(weight)),
        backbone={short: tensor_at(payload.content, key_path) for short, key_path in layout.backbone.items()},
        classifier=layout.classifier,
        dtype=stored[layout.weights[0]].dtype,
        experts=experts,
        feature_normalization=normalization,
        metadata=payload.metadata,
        states=layout.states,
        notes=layout.notes,
        _layout=layout,
        _stored=stored,
        _options={"classifier": classifier, "num_classes": num_classes, "scale": scale, "state": state},
    )


def normalize_expert_features(features: Tensor, experts: int) -> Tensor:
    """Divide each expert's part of every feature by its length, as RIDE's normalised layers do.

    Args:
        features: floating point ``[n, D]``, the experts' features side by side, ``D / experts`` columns each.
        experts: how many.

    Returns:
        ``[n, D]`` in the dtype of ``features``.

    Raises:
        TypeError, ValueError: features that are not ``[n, D]`` floating point, or a D that ``experts`` does not divide.

    Example:
        >>> normalize_expert_features(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), experts=2)
        tensor([[0.6000, 0.8000, 0.0000, 1.0000]])
    """
    experts = check_integer(experts, "experts", minimum=1)
    floating_tensor(features, "features", ("n", "D"))
    if features.shape[1] % experts:
        raise ValueError(f"features must have a multiple of experts={experts} columns, got {features.shape[1]}")
    parts = features.reshape(len(features), experts, features.shape[1] // experts)
    return functional.normalize(parts, dim=2).reshape(features.shape)


def _effective(layout: Layout, stored: Mapping[KeyPath, Tensor], scale: float) -> tuple[Tensor, Tensor | None]:
    wide = torch.float64 if all(tensor.dtype == torch.float64 for tensor in stored.values()) else torch.float32
    weights = [stored[key_path].to(wide) for key_path in layout.weights]
    biases = [stored[key_path].to(wide) for key_path in layout.biases]
    if layout.normalized:
        weights = [functional.normalize(weight, dim=0).t() * scale for weight in weights]
    weight = torch.cat(weights, dim=1) / len(weights) if len(weights) > 1 else weights[0].clone()
    bias = torch.stack(biases).mean(dim=0) if len(biases) > 1 else biases[0].clone() if biases else None
    if layout.gains is not None:
        weight = stored[layout.gains].to(wide).reshape(-1, 1) * functional.normalize(weight, dim=1)
    if layout.scales is not None:
        scales = stored[layout.scales].to(wide).reshape(-1)
        weight = weight * scales[:, None]
        bias = None if bias is None else bias * scales
    return weight.contiguous(), bias


def _feature_notes(payload: Payload, layout: Layout, width: int, path: Path) -> tuple[int, str]:
    """Experts, and what is done to their features: by the layers themselves, or noted beside an exported classifier."""
    if layout.format == "ride" or layout.normalized:
        return len(layout.weights), "l2" if layout.normalized else "none"
    experts, normalization = payload.metadata.get("experts", "1"), payload.metadata.get("feature_normalization", "none")
    if not (experts.isdecimal() and int(experts) and width % int(experts) == 0) or normalization not in ("none", "l2"):
        raise ValueError(
            f"{path} notes experts={experts!r} and feature_normalization={normalization!r}; they must be a number that divides "
            f"its {width} features, and none or l2"
        )
    return int(experts), normalization


def _names_beside(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """The classes' names in the configuration that transformers writes beside a model's file."""
    labels = _configuration(path).get("id2label")
    if not isinstance(labels, Mapping) or set(labels) != set(map(str, range(num_classes))):
        return None
    names = tuple(str(labels[str(label)]) for label in range(num_classes))
    return None if names == tuple(f"LABEL_{label}" for label in range(num_classes)) else names


def _configuration(path: Path) -> dict[str, Any]:
    """What ``config.json`` beside a file says, where it is of transformers; else nothing."""
    beside = path.with_name("config.json")
    try:
        found = read_json(beside, "a configuration") if beside.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if "model_type" in found else {}


def _check_names(path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file_format: str) -> None:
    unexpected = [name for name in given if name not in wanted]
    wrong = {
        "missing": [name for name in wanted if name not in given and not is_no_weight(name)],
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
            for name in wanted
            if name in given and not is_no_weight(name) and given[name].shape != wanted[name].shape
        ],
    }
    if any(wrong.values()):
        hint = ""
        if file_format == "classifier-balancing" and any(name.startswith(("fc_add.", "modulatedatt.")) for name in unexpected):
            hint = "; the model was trained with use_fc or use_selfatt, layers that torchvision's models do not have"
        if _configuration(path):
            hint = (
                "; its config.json is of transformers, whose releases name tensors in different ways: take a function that "
                "makes the model with from_pretrained as the backbone, and --pretrained instead of a checkpoint"
            )
        found = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{path} does not fit model: {found}{hint}")
