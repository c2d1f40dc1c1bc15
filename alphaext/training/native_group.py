"""Native engines of equal sizes that train side by side: on a GPU all of them in one launch an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.training import train_epoch_many
from ..utils.transfers import on_host
from .engine import TrainingDiverged
from .native_engine import NativeEngine

__all__ = ["EngineGroup", "group_key"]

_STACKED = ("_state", "_b2", "_b2_momentum", "_raw", "_alpha")
_OPTIONAL = ("_penalty", "_few_offset")


def group_key(engine: NativeEngine) -> tuple[object, ...]:
    """What engines must have in common to be trained together."""
    shapes = tuple(tuple(getattr(engine, name).shape) for name in _STACKED)
    given = tuple(getattr(engine, name) is None for name in _OPTIONAL)
    return (*shapes, *given, engine._scale.dim(), engine.options.batch_size, engine._state.dtype, id(engine.logits))


class EngineGroup:
    """Trains an epoch of several engines with one call; each gets, to the bit, what it would get alone.

    The engines keep their tensors, as parts of stacked ones.
    """

    def __init__(self, engines: Sequence[NativeEngine]) -> None:
        """``engines`` of one :func:`group_key`, whose logits are all kept (``SharedLogits.all_at_once``)."""
        self.engines = list(engines)
        self._stacked = {name: torch.stack([getattr(engine, name) for engine in self.engines]) for name in _STACKED}
        for name, stacked in self._stacked.items():
            for engine, part in zip(self.engines, stacked.unbind(0), strict=True):
                setattr(engine, name, part)
        self._columns = torch.stack([engine.columns for engine in self.engines])
        self._scale = torch.stack([engine._scale for engine in self.engines])
        # Those of one group all have it or none has.
        penalty, few_offset = (
            None if getattr(self.engines[0], name) is None else torch.stack([getattr(e, name) for e in self.engines])
            for name in _OPTIONAL
        )
        self._optional = penalty, few_offset

    def train(self, epoch: int, multipliers: Sequence[float]) -> list[float | TrainingDiverged]:
        """Train one epoch of each, at its multiple of its learning rate: the mean losses, or what went wrong."""
        first, validation = self.engines[0], self.engines[0].logits.validation
        rows = [engine.rows_of(epoch) for engine in self.engines]
        lrs = [engine.learning_rate(multiplier) for engine, multiplier in zip(self.engines, multipliers, strict=True)]
        options = [engine.step_options(lr) for engine, lr in zip(self.engines, lrs, strict=True)]
        cached = first.logits.training
        state, b2, b2_momentum, raw, alpha = self._stacked.values()
        results = train_epoch_many(
            state, b2, b2_momentum, raw, alpha, rows, cached.logits, cached.base_logsumexp, cached.label_logit,
            cached.few_of_label, self._columns, self._scale, first.options.batch_size, options, *self._optional,
        )  # fmt: skip
        wanted = [results, raw]
        if validation is not None:
            wanted.append(validation.hits(alpha, self._columns))
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
