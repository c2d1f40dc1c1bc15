"""What a classifier gets right: by split, by class, against another one."""

from __future__ import annotations

from .accuracy import label_ranks
from .class_table import ClassRow, class_table, read_class_table, write_class_table
from .comparison import Comparison, compare, mcnemar_p_value
from .confusions import ConfusionRow, confusion_changes, read_confusions, write_confusions
from .evaluation import bootstrap_intervals, expected_calibration_error, per_class, split_accuracy, split_metrics
from .predictions import Predictions, predict, predict_logits

__all__ = [
    "ClassRow",
    "Comparison",
    "ConfusionRow",
    "Predictions",
    "bootstrap_intervals",
    "class_table",
    "compare",
    "confusion_changes",
    "expected_calibration_error",
    "label_ranks",
    "mcnemar_p_value",
    "per_class",
    "predict",
    "predict_logits",
    "read_class_table",
    "read_confusions",
    "split_accuracy",
    "split_metrics",
    "write_class_table",
    "write_confusions",
]
