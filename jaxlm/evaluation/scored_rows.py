"""How texts to be scored are laid out in rows: contexts read once, continuations beside each other.

A `Unit` is a context and the continuations scored after it. In a decoder's row it looks so, for the context c0 c1 c2
and the continuations a0 a1 a2 and b0 b1, column by column:

    input tokens    c0 c1 c2   a0 a1   b0   0        the last token of a continuation is predicted, never read
    positions        0  1  2    3  4    3   0
    segment ids      1  1  1    1  1    1   0
    scored at             2          2          the context's last column predicts a0 and b0,
              and               3  4    5       the columns of a0 a1 b0 predict a1 a2 b1

Each continuation sees the context and itself: at most two runs of keys a query, the mask algebra's normal form
(`pallas_kernels.masks.Intervals`), which every kernel takes. Distances in the row are then no longer distances in the
text: biases by relative position go by the numbers in `positions` (`pallas_kernels.biases.PlacedBias`), and what knows
columns alone cannot share a context so (`can_share`). Such models, and single continuations, are ordinary segments with
the ordinary mask.

An encoder-decoder has the context in its encoder and a decoder segment for each continuation, all of which see the one
encoder segment. An encoder has one segment for each scored token, masked (Salazar et al. 2020, arXiv 1910.14659).
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig
from jaxlm.models.config import LanguageModelConfig

Features = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """What lies together in one row.

    Attributes:
      context: int32 [M], as the model reads it: with whatever begins a row. For an encoder, the whole text.
      continuations: int32 [N] each. For an encoder, one token: that which belongs at `masked`.
      masked: for an encoder, the column to mask.
    """

    context: np.ndarray
    continuations: tuple[np.ndarray, ...]
    masked: int = 0

    @property
    def scored(self) -> int:
        """Number of tokens that get a score."""
        return sum(len(tokens) for tokens in self.continuations)


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Columns of a row.

    Attributes:
      lengths: of each stack, in the order of `Layout.columns`.
      scored: how many tokens of a row can be scored.
    """

    lengths: tuple[int, ...]
    scored: int


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredBatch:
    """Rows to run a model on.

    Attributes:
      features: as in docs/architecture.md, [B, T] each.
      at: int32 [B, N], columns whose hidden states are scored.
      labels: int32 [B, N], the tokens that follow them.
      where: (row, first column of `at`) of each unit, in the order of units in rows.
    """

    features: Features
    at: np.ndarray
    labels: np.ndarray
    where: list[tuple[int, int]]


def can_share(config: LanguageModelConfig) -> bool:
    """Whether several continuations can stand beside each other in a row after one context, with the same numbers.

    In an encoder-decoder always. In a decoder if every layer is `Attention` without a window: a state that runs along
    the row would see the other continuations in between, and kernels are told how far a window reaches along columns.
    """
    if config.architecture is Architecture.ENCODER_DECODER:
        return True
    if config.architecture is Architecture.ENCODER or config.future_tokens:
        return False
    stack = config.decoder or config.encoder
    return all(
        block.running_state is None and type(block.attention) is AttentionConfig and block.attention.window is None
        for block in stack.all_blocks
    )


class Layout(abc.ABC):
    """How an architecture's rows are filled."""

    @abc.abstractmethod
    def columns(self, unit: Unit) -> tuple[int, ...]:
        """Columns that the unit takes in each stack."""

    @abc.abstractmethod
    def batch(self, rows: Sequence[Sequence[Unit]], count: int, shape: RowShape) -> ScoredBatch:
        """`count` rows of which the first hold the units `rows`, the others nothing."""


class _Scored:
    """Collects which columns are scored, and with which labels."""

    def __init__(self, count: int, width: int):
        self.at, self.labels = np.zeros((2, count, width), np.int32)
        self.where: list[tuple[int, int]] = []
        self._row, self._used = -1, 0

    def begin(self, row: int) -> None:
        """A unit of `row` begins."""
        if row != self._row:
            self._row, self._used = row, 0
        self.where.append((row, self._used))

    def add(self, columns: np.ndarray, labels: np.ndarray) -> None:
        """Scores `labels` at `columns` of the unit's row."""
        stop = self._used + len(labels)
        self.at[self._row, self._used : stop] = columns
        self.labels[self._row, self._used : stop] = labels
        self._used = stop


def _stack(name: str, count: int, length: int) -> Features:
    names = ("input_tokens", "positions", "segment_ids")
    return {f"{name}_{kind}": np.zeros((count, length), np.int32) for kind in names}


def _place(
    features: Features, name: str, row: int, start: int, tokens: np.ndarray, segment: int, first: int = 0
) -> int:
    """Writes a run of tokens, whose positions count from `first`; returns the column after it."""
    stop = start + len(tokens)
    features[f"{name}_input_tokens"][row, start:stop] = tokens
    features[f"{name}_positions"][row, start:stop] = np.arange(first, first + len(tokens))
    features[f"{name}_segment_ids"][row, start:stop] = segment
    return stop


@dataclasses.dataclass(frozen=True)
class DecoderLayout(Layout):
    """Rows of a causal or prefix decoder, as in the module's table.

    Attributes:
      prefix: whether the context is visible in both directions.
      shares: whether units may have several continuations; the mask is then given by `decoder_visible_keys`.
    """

    prefix: bool
    shares: bool

    @override
    def columns(self, unit: Unit) -> tuple[int, ...]:
        return (len(unit.context) + unit.scored - len(unit.continuations),)

    @override
    def batch(self, rows: Sequence[Sequence[Unit]], count: int, shape: RowShape) -> ScoredBatch:
        (length,) = shape.lengths
        features, scored = _stack("decoder", count, length), _Scored(count, shape.scored)
        if self.shares:
            visible = features["decoder_visible_keys"] = np.zeros((count, 2, 2, length), np.int32)
        elif self.prefix:
            features["decoder_causal_attention"] = np.zeros((count, length), np.int32)
        columns = np.arange(length + 1, dtype=np.int32)
        for row, units in enumerate(rows):
            start = 0
            for segment, unit in enumerate(units, 1):
                scored.begin(row)
                context_end = _place(features, "decoder", row, start, unit.context, segment)
                if self.shares:
                    seen = context_end if self.prefix else columns[start + 1 : context_end + 1]
                    visible[row, 0, 0, start:context_end], visible[row, 1, 0, start:context_end] = start, seen
                elif self.prefix:
                    features["decoder_causal_attention"][row, start:context_end] = 1
                end = context_end
                for tokens in unit.continuations:
                    begin = end
                    end = _place(features, "decoder", row, begin, tokens[:-1], segment, len(unit.context))
                    if self.shares:
                        visible[row, :, 0, begin:end] = [[start], [context_end]]
                        visible[row, 0, 1, begin:end] = begin
                        visible[row, 1, 1, begin:end] = columns[begin + 1 : end + 1]
                    scored.add(np.concatenate([columns[context_end - 1 : context_end], columns[begin:end]]), tokens)
                start = end
        return ScoredBatch(features, scored.at, scored.labels, scored.where)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderLayout(Layout):
    """The context in the encoder, a segment of the decoder for each continuation.

    Attributes:
      start_id: begins each continuation.
    """

    start_id: int

    @override
    def columns(self, unit: Unit) -> tuple[int, ...]:
        return len(unit.context), unit.scored

    @override
    def batch(self, rows: Sequence[Sequence[Unit]], count: int, shape: RowShape) -> ScoredBatch:
        encoder_length, length = shape.lengths
        features = _stack("encoder", count, encoder_length) | _stack("decoder", count, length)
        seen = features["decoder_encoder_segment_ids"] = np.zeros((count, length), np.int32)
        scored = _Scored(count, shape.scored)
        start = np.array([self.start_id], np.int32)
        for row, units in enumerate(rows):
            encoder_end = end = segment = 0
            for number, unit in enumerate(units, 1):
                scored.begin(row)
                encoder_end = _place(features, "encoder", row, encoder_end, unit.context, number)
                for tokens in unit.continuations:
                    begin, segment = end, segment + 1
                    end = _place(features, "decoder", row, begin, np.concatenate([start, tokens[:-1]]), segment)
                    seen[row, begin:end] = number
                    scored.add(np.arange(begin, end), tokens)
        return ScoredBatch(features, scored.at, scored.labels, scored.where)


@dataclasses.dataclass(frozen=True)
class EncoderLayout(Layout):
    """A segment for each scored token, in which it is masked.

    Attributes:
      mask_id: the id of [MASK].
    """

    mask_id: int

    @override
    def columns(self, unit: Unit) -> tuple[int, ...]:
        return (len(unit.context),)

    @override
    def batch(self, rows: Sequence[Sequence[Unit]], count: int, shape: RowShape) -> ScoredBatch:
        (length,) = shape.lengths
        features, scored = _stack("encoder", count, length), _Scored(count, shape.scored)
        for row, units in enumerate(rows):
            end = 0
            for segment, unit in enumerate(units, 1):
                scored.begin(row)
                masked = end + unit.masked
                end = _place(features, "encoder", row, end, unit.context, segment)
                features["encoder_input_tokens"][row, masked] = self.mask_id
                scored.add(np.array([masked]), unit.continuations[0])
        return ScoredBatch(features, scored.at, scored.labels, scored.where)
