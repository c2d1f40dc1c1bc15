"""Checkpoints of trained models: read in the formats of the field, and written again with repaired few rows.

``files`` opens a file, ``layouts`` knows where in it things are, ``reader`` makes a :class:`Checkpoint` of it, ``row_edits``
copies it with some rows changed, ``writer`` decides on those rows, ``export`` writes a repaired model in other formats.

Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> torch.save({"conv.weight": torch.ones(8, 3, 1, 1), "fc.weight": torch.randn(4, 8)}, folder + "/model.pth")
    >>> checkpoint = read_checkpoint(folder + "/model.pth", num_classes=4)
    >>> linear = checkpoint.linear()
    >>> _ = linear.weight.data[3].mul_(2)
    >>> write_repaired(checkpoint, linear, [3], folder + "/repaired.pth")
    >>> torch.equal(read_checkpoint(folder + "/repaired.pth").weight, linear.weight)
    True
"""

from __future__ import annotations

from .export import ExportReport, export
from .reader import FORMATS, Checkpoint, normalize_expert_features, read_checkpoint
from .undo import undo
from .writer import save_linear, write_repaired

__all__ = [
    "FORMATS",
    "Checkpoint",
    "ExportReport",
    "export",
    "normalize_expert_features",
    "read_checkpoint",
    "save_linear",
    "undo",
    "write_repaired",
]
