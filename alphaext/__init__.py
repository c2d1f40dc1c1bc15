"""Alpha Net for PyTorch: rebuild the weak rows of a trained long-tailed classifier out of its strong ones."""

from __future__ import annotations

try:
    import torch  # noqa: F401  (loads the libraries that the extension links to)

    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"alphaext could not load its extension ({error}). From a source checkout, build it first with 'pip install -e .'; "
        "if alphaext is installed, leave the checkout's directory, whose source tree hides the installed package"
    ) from error

from . import ops, reference
from .classes import ClassSplit, class_counts, split_classes
from .metrics import per_class_accuracy, split_accuracy
from .modules import AlphaNet
from .neighbors import build_members, class_means, nearest_classes, pool_classes, reduce_classifiers, submodule_inputs
from .ops import build_info
from .sweep import SweepRun, fit_many
from .training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "AlphaNet",
    "ClassSplit",
    "FitResult",
    "SweepRun",
    "build_info",
    "build_members",
    "class_counts",
    "class_means",
    "fit",
    "fit_many",
    "nearest_classes",
    "ops",
    "per_class_accuracy",
    "pool_classes",
    "reduce_classifiers",
    "reference",
    "split_accuracy",
    "split_classes",
    "submodule_inputs",
]
