"""Alpha Net for PyTorch: rebuild the weak rows of a trained long-tailed classifier out of its strong ones.

What most people call is here; everything else is in its package: ``alphaext.metrics.compare``, ``alphaext.data.open_images``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .utils.environment import __version__
from .utils.lazy import load_at_first_use

if TYPE_CHECKING:
    from . import (  # noqa: F401  (packages are found without an import of their own)
        baselines,
        checkpoints,
        classes,
        commands,
        data,
        doctor,
        features,
        head,
        metrics,
        models,
        ops,
        pretraining,
        reference,
        repairing,
        sklearn,
        study,
        training,
    )
    from .classes import ClassSplit, class_counts, class_means, split_classes
    from .head.alphanet import AlphaNet
    from .ops.extension import build_info
    from .repairing.loader import extract_features, repair_model
    from .repairing.new_classes import add_classes
    from .repairing.preset import Repair
    from .repairing.recommend import recommend
    from .repairing.repair import repair
    from .training.many import fit_many
    from .training.result import FitResult
    from .training.single import fit
else:
    __getattr__, __dir__ = load_at_first_use(__name__)

__all__ = [
    "AlphaNet",
    "ClassSplit",
    "FitResult",
    "Repair",
    "__version__",
    "add_classes",
    "build_info",
    "class_counts",
    "class_means",
    "extract_features",
    "fit",
    "fit_many",
    "recommend",
    "repair",
    "repair_model",
    "split_classes",
]
