"""The commands, from Python: each is a class whose fields are the command's options and whose ``run`` does it.

    from alphaext.commands import Fit

    result = Fit(features="features", classifier="crt", gamma=(0.5, 0.7, 1.0), output="alpha-crt").run()

is ``alphaext fit --features features --classifier crt --gamma 0.5 0.7 1 --output alpha-crt``. What ``run`` returns is what
``--json`` prints; give it a ``rich.console.Console`` to see the tables.
"""

from __future__ import annotations

from .add_classes import AddClasses
from .baseline import Baseline
from .demo import Demo, Info
from .doctor import Doctor
from .evaluate import Evaluate
from .export import Export
from .extract import Extract
from .fit import Fit
from .init import Init
from .options import Options
from .recommend import Recommend
from .repair import Repair
from .report import Report
from .shared import CommonOptions
from .study import Study
from .train import Train

__all__ = [
    "COMMANDS",
    "CONFIGURABLE",
    "AddClasses",
    "Baseline",
    "CommonOptions",
    "Demo",
    "Doctor",
    "Evaluate",
    "Export",
    "Extract",
    "Fit",
    "Info",
    "Init",
    "Recommend",
    "Repair",
    "Report",
    "Study",
    "Train",
]

COMMANDS: dict[str, type[Options]] = {
    "demo": Demo,
    "init": Init,
    "repair": Repair,
    "doctor": Doctor,
    "train": Train,
    "extract": Extract,
    "baseline": Baseline,
    "recommend": Recommend,
    "fit": Fit,
    "evaluate": Evaluate,
    "export": Export,
    "add-classes": AddClasses,
    "study": Study,
    "report": Report,
    "info": Info,
}
"""Each command's options, by its name, in the order of a first use."""

CONFIGURABLE = tuple(cls for cls in COMMANDS.values() if issubclass(cls, CommonOptions))
"""The commands that one TOML file serves."""
