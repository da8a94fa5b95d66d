"""Lays texts out in rows, one a row, as a model of labels reads them; and says which column holds which token."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.pretrained import Description
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.config import LanguageModelConfig

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows of `length` columns.

    Attributes:
      architecture: which features are made.
      length: columns (T).
      start_id: what a decoder reads before the text, or None.
      end_id: what an encoder-decoder's encoder reads after it, or None.
      pad_id: fills rows.
    """

    architecture: Architecture
    length: int
    start_id: int | None = None
    end_id: int | None = None
    pad_id: int = 0

    @property
    def first(self) -> int:
        """The column of a text's first token."""
        return int(self.start_id is not None)

    @property
    def room(self) -> int:
        """Tokens of a text that fit."""
        return self.length - self.first - (self.end_id is not None)

    def batch(self, texts: Sequence[np.ndarray]) -> Batch:
        """A row for each text: features by seqio's names, and "text" [B, T], 1 on the columns of its own tokens.

        Args:
          texts: ids; what has no room is cut off at the end.
        """
        shape = (len(texts), self.length)
        tokens, used, text = np.full(shape, self.pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, ids in enumerate(texts):
            ids = ids[: self.room]
            end = self.first + len(ids)
            tokens[row, self.first : end] = ids
            text[row, self.first : end] = 1
            if self.start_id is not None:
                tokens[row, 0] = self.start_id
            if self.end_id is not None:
                tokens[row, end] = self.end_id
                end += 1
            used[row, :end] = 1
        stack = "decoder" if self.architecture.has_decoder_features else "encoder"
        positions = np.where(used > 0, np.arange(self.length, dtype=np.int32), 0)
        batch = {f"{stack}_input_tokens": tokens, f"{stack}_segment_ids": used, f"{stack}_positions": positions}
        if self.architecture is Architecture.PREFIX_DECODER:
            batch["decoder_causal_attention"] = used  # the whole text is read in both directions
        return batch | {"text": text}


def text_rows(about: Description, body: LanguageModelConfig, longest: int, limit: int | None) -> TextRows:
    """The rows in which a body reads texts of a task.

    Args:
      about: the trained model it is of.
      body: from `jaxlm.models.labeller.body_config`.
      longest: tokens of the task's longest text.
      limit: columns at most; None is what the model was trained on.

    Raises:
      ValueError: `limit` is beyond the model's learned positions, or leaves no room.
    """
    decoder = body.architecture.has_decoder_features
    of_two = about.config.architecture is Architecture.ENCODER_DECODER
    pad_id = 0 if about.vocabulary is None else about.vocabulary.info().pad_id
    # A decoder that is now read as an encoder gets no start: every token sees the text itself.
    start, end = about.start_id if decoder else None, about.input_end_id if of_two else None
    if decoder and about.config.architecture is Architecture.ENCODER:
        start = pad_id  # trained to read and now to continue: as the loaders lay out a decoder's rows
    positions = body.embedding.positions
    most = positions.max_length if isinstance(positions, LearnedPositions) else None
    if limit is not None and most is not None and limit > most:
        raise ValueError(
            f"max_length is {limit}, but the model has learned positions for {most}; set it to at most {most}."
        )
    limit = limit or most or about.context_length
    added = int(start is not None) + int(end is not None)
    length = -(-(longest + added) // 8) * 8
    if limit is not None:
        length = min(length, limit)
    if length <= added:
        raise ValueError(f"Rows of {length} columns have no room for a token of the text; raise max_length.")
    return TextRows(body.architecture, length, start, end, pad_id)
