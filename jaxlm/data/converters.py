"""Feature converters: how an architecture lays `Example`s out in rows (seqio's feature converters, packed form).

What each makes of two examples, inputs [7 8 5 1] targets [3 9 1] and inputs [8 4 1] targets [6 1], column by column:

Causal and prefix decoder (seqio.LMFeatureConverter without inputs, PrefixLMFeatureConverter with), 13 columns: targets
follow inputs, and the loss is on targets.

    decoder_target_tokens      7 8 5 1 3 9 1   8 4 1 6 1   0
    decoder_input_tokens       0 7 8 5 1 3 9   0 8 4 1 6   0     shifted right inside each segment, from pad_id
    decoder_loss_weights       0 0 0 0 1 1 1   0 0 0 1 1   0
    decoder_positions          0 1 2 3 4 5 6   0 1 2 3 4   0
    decoder_segment_ids        1 1 1 1 1 1 1   2 2 2 2 2   0
    decoder_causal_attention   1 1 1 1 1 0 0   1 1 1 1 0   0     prefix decoder only

`decoder_causal_attention` marks one column more than the inputs have. The model reads `decoder_input_tokens`, which is
shifted: the last input token is read in the column after the last input, where the first target is predicted. Without
inputs it marks the first column (where pad_id is read), and a prefix decoder is then a causal one.

Encoder-decoder (seqio.EncDecFeatureConverter), 8 encoder and 6 decoder columns:

    encoder_input_tokens       7 8 5 1   8 4 1   0          decoder_target_tokens      3 9 1   6 1   0
    encoder_positions          0 1 2 3   0 1 2   0          decoder_input_tokens       0 3 9   0 6   0
    encoder_segment_ids        1 1 1 1   2 2 2   0          decoder_loss_weights       1 1 1   1 1   0
                                                            decoder_positions          0 1 2   0 1   0
                                                            decoder_segment_ids        1 1 1   2 2   0

Encoder (seqio.EncoderFeatureConverter): inputs [8 9 9 1] targets [8 7 4 1] weights [0 1 1 0], and one more:

    encoder_input_tokens       8 9 9 1   8 3 9 1   0
    encoder_target_tokens      8 7 4 1   8 3 6 1   0
    encoder_loss_weights       0 1 1 0   0 0 1 0   0        from the objective, which knows what it masked
    encoder_positions          0 1 2 3   0 1 2 3   0
    encoder_segment_ids        1 1 1 1   2 2 2 2   0

`dataset_ids` and `objective_ids` lie beside the loss. An example with `segments` (several texts) takes one segment id a
text; in a decoder's row each text's targets follow its own inputs. Lengths, not ids, tell what is padding: id 0 inside
an example is a token like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FeatureConverter:
    """Lays examples out in rows for an architecture. Made by `feature_converter`.

    Attributes:
      architecture: which tokens see which.
      lengths: columns of a row, {"decoder": T, "encoder": S} or one of them.
      pad_id: fills rows and begins the decoder's input.
    """

    architecture: Architecture
    lengths: Mapping[str, int]
    pad_id: int = 0

    @property
    def capacity(self) -> tuple[int, ...]:
        """Columns an example's `size` must fit in: (T,), (S,), or (S, T) for the encoder-decoder."""
        return tuple(self.lengths[stack] for stack in ("encoder", "decoder") if stack in self.lengths)

    @property
    def loss_stack(self) -> str:
        """ "decoder" or "encoder": where the loss is."""
        return "decoder" if self.architecture.has_decoder_features else "encoder"

    @property
    def features(self) -> dict[str, tuple[tuple[int], np.dtype]]:
        """{name: (shape of one row, type)}."""
        names = {stack: ["segment_ids", "positions", "input_tokens"] for stack in self.lengths}
        names[self.loss_stack] += ["target_tokens", "loss_weights"]
        if self.architecture is Architecture.PREFIX_DECODER:
            names["decoder"].append("causal_attention")
        shapes = {f"{stack}_{name}": (self.lengths[stack],) for stack in names for name in names[stack]}
        shapes |= dict.fromkeys(("dataset_ids", "objective_ids"), (self.lengths[self.loss_stack],))
        return {
            name: (shape, np.dtype(np.float32 if name.endswith("loss_weights") else np.int32))
            for name, shape in shapes.items()
        }

    def size(self, example: Example) -> tuple[int, ...]:
        """Columns the example takes, in the order of `capacity`."""
        if self.architecture is Architecture.ENCODER:
            return (len(example.targets),)
        if self.architecture is Architecture.ENCODER_DECODER:
            return (len(example.inputs), len(example.targets))
        return (len(example.inputs) + len(example.targets),)

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """A batch whose row i holds the examples `rows[i]`, in order; an empty row is all padding.

        Raises:
          ValueError: the examples of a row do not fit in it, or an aligned example's lengths differ.
        """
        if not self.architecture.has_encoder_features:
            rows = _apart(rows)
        examples = [example for row in rows for example in row]
        row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        inputs = [example.inputs for example in examples]
        targets = [example.targets for example in examples]
        input_sizes, target_sizes = _sizes(inputs), _sizes(targets)
        weights = _weights(examples, target_sizes)
        segments = _segments(examples, target_sizes, "segments")
        # Segment ids of a row go on from one example to the next, the same way in both stacks.
        base = _bases(row_of, examples)
        if self.architecture is Architecture.ENCODER_DECODER:
            input_segments = _segments(examples, input_sizes, "input_segments")
            encoder = _Stack(len(rows), self.lengths["encoder"], row_of, input_sizes, base, input_segments, "inputs")
            decoder = _Stack(len(rows), self.lengths["decoder"], row_of, target_sizes, base, segments, "targets")
            batch = {"encoder_input_tokens": encoder.lay(_joined(inputs), self.pad_id), **encoder.ids("encoder")}
            batch |= self._decoder(decoder, _joined(targets), weights)
            loss = decoder
        elif self.architecture is Architecture.ENCODER:
            if not np.array_equal(input_sizes, target_sizes):
                raise ValueError(
                    "An encoder needs one target at each input, but an example has inputs and targets of different "
                    "lengths; use an objective whose layout is aligned, such as masked_lm."
                )
            loss = _Stack(len(rows), self.lengths["encoder"], row_of, target_sizes, base, segments, "targets")
            batch = {
                "encoder_input_tokens": loss.lay(_joined(inputs), self.pad_id),
                "encoder_target_tokens": loss.lay(_joined(targets), self.pad_id),
                "encoder_loss_weights": loss.lay(weights, 0),
                **loss.ids("encoder"),
            }
        else:
            has_inputs = bool(input_sizes.any())
            tokens = _joined([part for pair in zip(inputs, targets) for part in pair] if has_inputs else targets)
            sizes = input_sizes + target_sizes
            loss = _Stack(len(rows), self.lengths["decoder"], row_of, sizes, base, segments, "examples")
            if has_inputs:
                of_target = loss.within >= np.repeat(input_sizes, sizes)
                all_weights = np.zeros(len(tokens), np.float32)
                all_weights[of_target] = weights
                weights = all_weights
            batch = self._decoder(loss, tokens, weights)
            if self.architecture is Architecture.PREFIX_DECODER:
                # <=, not <: one column more than the inputs, see above.
                prefix = np.repeat(input_sizes, sizes) if has_inputs else 0
                batch["decoder_causal_attention"] = loss.lay((loss.positions <= prefix).astype(np.int32), 0)
        batch["dataset_ids"] = loss.constant([example.dataset for example in examples])
        batch["objective_ids"] = loss.constant([example.objective for example in examples])
        return batch

    def _decoder(self, stack: _Stack, tokens: np.ndarray, weights: np.ndarray) -> Batch:
        shifted = np.empty_like(tokens)
        shifted[1:] = tokens[:-1]
        shifted[stack.firsts] = self.pad_id
        return {
            "decoder_target_tokens": stack.lay(tokens, self.pad_id),
            "decoder_input_tokens": stack.lay(shifted, self.pad_id),
            "decoder_loss_weights": stack.lay(weights, 0),
            **stack.ids("decoder"),
        }


def feature_converter(architecture: Architecture, lengths: Mapping[str, int], pad_id: int = 0) -> FeatureConverter:
    """The converter of an architecture.

    Args:
      architecture: which tokens see which.
      lengths: seqio's task feature lengths, {"inputs": N, "targets": M}. A decoder's row has N + M columns, an
        encoder's M, an encoder-decoder's N and M. "inputs" may be left out except for an encoder-decoder.
      pad_id: fills rows and begins the decoder's input.

    Raises:
      ValueError: a length is missing, unknown or not positive.
    """
    unknown = set(lengths) - {"inputs", "targets"}
    needed = ("inputs", "targets") if architecture is Architecture.ENCODER_DECODER else ("targets",)
    bad = [name for name in lengths if not isinstance(lengths[name], int) or lengths[name] < 0]
    if unknown or bad or any(not lengths.get(name) for name in needed):
        raise ValueError(
            f"The feature lengths {dict(lengths)} do not make a row for the {architecture.value}; give a positive "
            f"length for {' and '.join(needed)}, e.g. {dict.fromkeys(needed, 512)}."
        )
    if architecture is Architecture.ENCODER_DECODER:
        columns = {"encoder": lengths["inputs"], "decoder": lengths["targets"]}
    elif architecture is Architecture.ENCODER:
        columns = {"encoder": lengths["targets"]}
    else:
        columns = {"decoder": lengths.get("inputs", 0) + lengths["targets"]}
    return FeatureConverter(architecture, columns, pad_id)


class _Stack:
    """Where the tokens of a batch's examples go in rows of `length` columns, for one stack.

    All arrays are flat over the batch's tokens, examples one after the other; numpy then does a batch in a few calls,
    whatever the number of examples.

    Attributes:
      sizes: tokens of each example, [n].
      within: position inside the example, [tokens].
      positions: position inside the segment: the same, unless examples hold several.
      firsts: flat index of the first token of each segment.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        row_of: np.ndarray,
        sizes: np.ndarray,
        base: np.ndarray,
        segments: np.ndarray | None,
        what: str,
    ):
        self._shape, self.sizes = (rows, length), sizes
        total = int(sizes.sum())
        starts = np.cumsum(sizes) - sizes
        used = np.bincount(row_of, sizes, minlength=rows).astype(np.int64)
        if rows and used.max() > length:
            raise ValueError(
                f"The {what} of a row take {used.max()} columns, but it has {length}; raise the feature lengths, or "
                f"shorten the examples."
            )
        order = np.arange(total, dtype=np.int32)
        self.within = order - np.repeat(starts.astype(np.int32), sizes)
        self._target = None  # rows that are full to the last column need no scattering
        if total < rows * length:
            gaps = np.arange(rows) * length - (np.cumsum(used) - used)  # padding before each row
            self._target = order + np.repeat(gaps.astype(np.int32), used)
        self.firsts = starts[sizes > 0]
        self.positions = self.within
        self._segment_ids = np.repeat((base + 1).astype(np.int32), sizes)
        if segments is not None:
            self._segment_ids += segments - 1
            new = np.zeros(total, bool)
            new[1:] = segments[1:] != segments[:-1]
            new[self.firsts] = True
            self.firsts = np.flatnonzero(new)
            self.positions = order - np.repeat(self.firsts.astype(np.int32), np.diff(self.firsts, append=total))

    def lay(self, values: np.ndarray, fill: float) -> np.ndarray:
        """Values of all tokens in their places, [rows, length]."""
        if self._target is None:
            return values.reshape(self._shape)
        out = np.full(self._shape, fill, values.dtype)
        out.reshape(-1)[self._target] = values
        return out

    def constant(self, values: Sequence[int]) -> np.ndarray:
        """A value an example, at each of its tokens, int32 [rows, length]; 0 is padding."""
        if not any(values):
            return np.zeros(self._shape, np.int32)
        return self.lay(np.repeat(np.array(values, np.int32), self.sizes), 0)

    def ids(self, stack: str) -> Batch:
        return {
            f"{stack}_segment_ids": self.lay(self._segment_ids, 0),
            f"{stack}_positions": self.lay(self.positions, 0),
        }


def _apart(rows: Sequence[Sequence[Example]]) -> Sequence[Sequence[Example]]:
    """Rows in which the texts of an example are examples of their own, where targets must follow their inputs."""
    examples = [example for row in rows for example in row]
    if all(example.segments is None for example in examples) or not any(len(example.inputs) for example in examples):
        return rows
    return [[text for example in row for text in _texts(example)] for row in rows]


def _texts(example: Example) -> list[Example]:
    segments, input_segments = example.segments, example.input_segments
    if segments is None:
        return [example]
    if input_segments is None:
        if len(example.inputs):
            raise ValueError(
                "An example of several texts (`segments`) has inputs that do not tell to which they belong; give "
                "`input_segments` as well."
            )
        input_segments = segments[:0]
    return [
        dataclasses.replace(
            example,
            inputs=example.inputs[input_segments == text],
            targets=example.targets[segments == text],
            weights=None if example.weights is None else example.weights[segments == text],
            segments=None,
            input_segments=None,
        )
        for text in np.union1d(input_segments, segments)
    ]


def _sizes(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.fromiter(map(len, parts), np.int64, len(parts))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else np.zeros(0, np.int32)


def _weights(examples: Sequence[Example], sizes: np.ndarray) -> np.ndarray:
    if all(example.weights is None for example in examples):
        return np.ones(int(sizes.sum()), np.float32)
    weights = [np.ones(n) if e.weights is None else e.weights for e, n in zip(examples, sizes)]
    return np.concatenate(weights).astype(np.float32, copy=False)


def _segments(examples: Sequence[Example], sizes: np.ndarray, name: str) -> np.ndarray | None:
    """Each token's segment inside its example, int32 [tokens] from 1, or None where every example is one text."""
    parts = [getattr(example, name) for example in examples]
    if all(part is None for part in parts):
        return None
    return np.concatenate([np.ones(n, np.int32) if part is None else part for part, n in zip(parts, sizes)])


def _bases(row_of: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """Segment ids taken in its row before each example, [n]."""
    counts = np.ones(len(examples), np.int64)
    for i, example in enumerate(examples):
        for segments in (example.segments, example.input_segments):
            if segments is not None and len(segments):
                counts[i] = max(counts[i], segments[-1])
    before = np.cumsum(counts) - counts
    first = np.searchsorted(row_of, row_of)  # index of the first example in the same row
    return before - before[first]
