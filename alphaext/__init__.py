"""Alpha Net for PyTorch: rebuild the weak rows of a trained long-tailed classifier out of its strong ones."""

from __future__ import annotations

try:
    import torch  # noqa: F401  (loads the libraries that the extension links to)

    import alphaext._C  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "alphaext._C":
        raise
    raise ImportError(
        f"the extension of this alphaext, in {__path__[0]}, has not been built: run 'pip install -e .' in that checkout, or "
        "start Python elsewhere to use an installed alphaext"
    ) from None

from . import ops, reference
from .backbones import make_model
from .baselines import BASELINES, BaselineResult, run_baseline
from .checkpoints import Checkpoint, read_checkpoint, save_linear, write_repaired
from .class_table import class_table, write_class_table
from .classes import ClassSplit, class_counts, split_classes
from .comparison import Comparison, compare
from .data import open_images
from .doctor import check_classifier_order, check_data
from .evaluation import bootstrap_intervals, expected_calibration_error, per_class, split_metrics
from .extraction import extract
from .features import Features, read_features, write_features
from .images import ImageReadError, LabelledImages
from .joint import TrainResult, train_model
from .long_tailed import make_long_tailed
from .metrics import per_class_accuracy, split_accuracy
from .modules import AlphaNet
from .neighbors import (
    build_members,
    class_means,
    nearest_classes,
    neighbor_distances,
    pool_classes,
    reduce_classifiers,
    residual_directions,
    submodule_inputs,
)
from .ops import build_info
from .predictions import Predictions, predict, predict_logits
from .presets import PRESETS, preset_options
from .repair import Repair, repair
from .splitting import SplitModel, find_classifier, split_model
from .sweep import SweepRun, fit_many
from .training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "BASELINES",
    "PRESETS",
    "AlphaNet",
    "BaselineResult",
    "Checkpoint",
    "ClassSplit",
    "Comparison",
    "Features",
    "FitResult",
    "ImageReadError",
    "LabelledImages",
    "Predictions",
    "Repair",
    "SplitModel",
    "SweepRun",
    "TrainResult",
    "bootstrap_intervals",
    "build_info",
    "build_members",
    "check_classifier_order",
    "check_data",
    "class_counts",
    "class_means",
    "class_table",
    "compare",
    "expected_calibration_error",
    "extract",
    "find_classifier",
    "fit",
    "fit_many",
    "make_long_tailed",
    "make_model",
    "nearest_classes",
    "neighbor_distances",
    "open_images",
    "ops",
    "per_class",
    "per_class_accuracy",
    "pool_classes",
    "predict",
    "predict_logits",
    "preset_options",
    "read_checkpoint",
    "read_features",
    "reduce_classifiers",
    "reference",
    "repair",
    "residual_directions",
    "run_baseline",
    "save_linear",
    "split_accuracy",
    "split_classes",
    "split_metrics",
    "split_model",
    "submodule_inputs",
    "train_model",
    "write_class_table",
    "write_features",
    "write_repaired",
]
