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

from . import reference
from .baselines.registry import BASELINES, BaselineResult, run_baseline
from .checkpoints import Checkpoint, read_checkpoint, save_linear, write_repaired
from .classes import ClassSplit, class_counts, class_means, split_classes
from .data.images import ImageReadError, LabelledImages
from .data.long_tailed import make_long_tailed
from .data.sources import open_images
from .doctor.check import check_classifier_order, check_data
from .features.extraction import extract
from .features.store import Features, read_features, write_features
from .head.alphanet import AlphaNet
from .head.neighbors import (
    build_members,
    nearest_classes,
    neighbor_distances,
    pool_classes,
    reduce_classifiers,
    residual_directions,
    submodule_inputs,
)
from .metrics.accuracy import per_class_accuracy, split_accuracy
from .metrics.class_table import class_table, write_class_table
from .metrics.comparison import Comparison, compare
from .metrics.evaluation import bootstrap_intervals, expected_calibration_error, per_class, split_metrics
from .metrics.predictions import Predictions, predict, predict_logits
from .models.split import SplitModel, find_classifier, split_model
from .models.zoo import make_model
from .ops import build_info
from .ops import head as ops
from .pretraining.train import TrainResult, train_model
from .repairing.repair import Repair, repair
from .training.many import SweepRun, fit_many
from .training.presets import PRESETS, preset_options
from .training.result import FitResult
from .training.single import fit
from .utils.environment import __version__

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
    "__version__",
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
