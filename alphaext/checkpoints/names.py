"""Names of a file's tensors brought to those that a model has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .layouts import is_no_weight

# What other releases call the same tensors: torchvision's DenseNet before 0.3, layer normalisation of the first transformers.
_OTHER_RELEASES = ((r"\.(norm|relu|conv)\.(\d+)\.", r".\1\2."), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))


def aligned(
    given: Mapping[str, Tensor],
    given_classifier: str,
    wanted: Mapping[str, Tensor],
    wanted_classifier: str,
    in_files: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The given tensors under the wanted names: of all ways to rename them, that by which most are found, with their shapes.

    Names may differ by a prefix that all have, or all but the classifier's; by wrappers anywhere in a name (``module``); and
    by what another release of the library called a layer.

    Args:
        given: tensors of the file, without its classifier's.
        given_classifier: the classifier's name in the file.
        wanted: tensors of the model, without its classifier's.
        wanted_classifier: the classifier's name in the model.
        in_files: what the model's library calls its tensors in files, where that differs.

    Example:
        >>> import torch
        >>> list(aligned({"backbone.conv.weight": torch.ones(1)}, "fc", {"conv.weight": torch.ones(1)}, "fc"))
        ['conv.weight']
    """
    best = dict(given)
    weights = [name for name in given if not is_no_weight(name)]
    for have in (_common_prefix([*weights, f"{given_classifier}."]), _common_prefix(weights)):
        for want in (_common_prefix([*wanted, f"{wanted_classifier}."]), _common_prefix(wanted)):
            for change in (_as_it_is, _without_wrappers, _of_this_release):
                names = {change(name.removeprefix(have)): name for name in given}
                places = {change(name.removeprefix(want)): name for name in wanted}
                renamed = {places.get(rest, name): given[name] for rest, name in names.items()}
                if len(renamed) == len(given) and len(places) == len(wanted) and _fits(renamed, wanted) > _fits(best, wanted):
                    best = renamed
    if in_files:
        own = {in_files.get(name, name): name for name in wanted}
        in_file = aligned(given, given_classifier, {name: wanted[place] for name, place in own.items()}, wanted_classifier)
        renamed = {own.get(name, name): tensor for name, tensor in in_file.items()}
        if _fits(renamed, wanted) > _fits(best, wanted):
            best = renamed
    return best


def _as_it_is(name: str) -> str:
    return name


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "model"))


def _of_this_release(name: str) -> str:
    for pattern, replacement in _OTHER_RELEASES:
        name = re.sub(pattern, replacement, name)
    return _without_wrappers(name)


def _fits(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return sum(name in wanted and tensor.shape == wanted[name].shape for name, tensor in given.items())


def _common_prefix(names: Iterable[str]) -> str:
    split = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)
