"""Checkpoints of trained models: read in the formats of the field, and written again with repaired few rows.

Here are the public names. ``checkpoint_files`` opens a file, ``checkpoint_formats`` knows where in it things are,
``checkpoint_reader`` makes a :class:`Checkpoint` of it, ``checkpoint_bytes`` copies it with some rows changed, and
``checkpoint_writer`` decides on those rows.

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

from .checkpoint_reader import FORMATS, Checkpoint, normalize_expert_features, read_checkpoint
from .checkpoint_writer import save_linear, write_repaired

__all__ = ["FORMATS", "Checkpoint", "normalize_expert_features", "read_checkpoint", "save_linear", "write_repaired"]
