"""Native engines of equal sizes that train side by side: on a GPU all of them in one launch an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.training import train_epoch_many
from ..utils.transfers import on_host
from .engine import TrainingDiverged
from .native_engine import NativeEngine, Trained

__all__ = ["EngineGroup", "group_key"]


def group_key(engine: NativeEngine) -> tuple[object, ...]:
    """What engines must have in common to be trained together."""
    shapes = tuple(tuple(tensor.shape) for tensor in engine.trained)
    given = engine.penalty is None, engine.few_offset is None
    return (*shapes, *given, engine.scale.dim(), engine.options.batch_size, engine.trained.state.dtype, id(engine.logits))


class EngineGroup:
    """Trains an epoch of several engines with one call; each gets, to the bit, what it would get alone.

    The engines keep their tensors, as parts of stacked ones.
    """

    def __init__(self, engines: Sequence[NativeEngine]) -> None:
        """``engines`` of one :func:`group_key`, whose logits are all kept (``SharedLogits.all_at_once``)."""
        self.engines = list(engines)
        self._trained = Trained(*map(torch.stack, zip(*(engine.trained for engine in self.engines), strict=True)))
        for engine, *parts in zip(self.engines, *(tensor.unbind(0) for tensor in self._trained), strict=True):
            engine.trained = Trained(*parts)
        self._columns = torch.stack([engine.columns for engine in self.engines])
        self._scale = torch.stack([engine.scale for engine in self.engines])
        # Those of one group all have it or none has.
        self._penalty = _stacked([engine.penalty for engine in self.engines])
        self._few_offset = _stacked([engine.few_offset for engine in self.engines])

    def train(self, epoch: int, multipliers: Sequence[float]) -> list[float | TrainingDiverged]:
        """Train one epoch of each, at its multiple of its learning rate: the mean losses, or what went wrong."""
        first, validation = self.engines[0], self.engines[0].logits.validation
        rows = [engine.rows_of(epoch) for engine in self.engines]
        lrs = [engine.learning_rate(multiplier) for engine, multiplier in zip(self.engines, multipliers, strict=True)]
        options = [engine.step_options(lr) for engine, lr in zip(self.engines, lrs, strict=True)]
        cached = first.logits.training
        results = train_epoch_many(
            *self._trained, rows, cached.logits, cached.base_logsumexp, cached.label_logit,
            cached.few_of_label, self._columns, self._scale, first.options.batch_size, options,
            self._penalty, self._few_offset,
        )  # fmt: skip
        wanted = [results, self._trained.raw]
        if validation is not None:
            wanted.append(validation.hits(self._trained.alpha, self._columns))
        for engine in self.engines:
            engine.draw_ahead(epoch)
        results, raw, *hits = on_host(wanted)
        all_hits = hits[0].unbind(0) if hits else [None] * len(self.engines)
        for engine, of_engine, own_hits in zip(self.engines, raw.unbind(0), all_hits, strict=True):
            engine.keep_measured(of_engine, own_hits)
        return [
            engine.after_epoch(epoch, lr, loss, int(step), int(failed))
            for engine, lr, (loss, step, failed) in zip(self.engines, lrs, results.tolist(), strict=True)
        ]


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All of them as one, or None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
