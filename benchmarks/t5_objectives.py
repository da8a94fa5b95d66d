"""What `objective_distributions.py` compares with: t5's preprocessors, loaded from an installed t5 without its package.

Importing t5 as a whole wants mesh-tensorflow's surroundings; the file of its preprocessors wants babel alone.
"""

import functools
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import seqio
import tensorflow as tf

Pair = tuple[np.ndarray, np.ndarray]


def load() -> ModuleType:
    """t5.data.preprocessors.

    Raises:
      ImportError: it is not installed.
    """
    package = importlib.util.find_spec("t5")
    if package is None or not package.submodule_search_locations:
        raise ImportError("t5 is not installed: pip install --no-deps --target=FOLDER t5 babel, and --reference=FOLDER")
    path = pathlib.Path(package.submodule_search_locations[0]) / "data" / "preprocessors.py"
    spec = importlib.util.spec_from_file_location("t5_preprocessors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version() -> str:
    """Of t5."""
    return importlib.metadata.version("t5")


class T5Objectives:
    """T5's objectives on given token sequences, one after the other; each result is (inputs, targets) with EOS."""

    def __init__(self, preprocessors: ModuleType, vocabulary: seqio.Vocabulary):
        self._t5 = preprocessors
        feature = seqio.Feature(vocabulary, add_eos=True)
        self._features = {"inputs": feature, "targets": feature}

    def span_corruption(
        self, texts: Sequence[np.ndarray], noise_density: float, mean_span_length: float, seed: int
    ) -> Iterator[Pair]:
        """`t5.data.preprocessors.span_corruption` after its cutting of texts."""
        mask = functools.partial(self._t5.random_spans_noise_mask, mean_noise_span_length=mean_span_length)
        return self._denoise(
            texts,
            seed,
            noise_density=noise_density,
            noise_mask_fn=mask,
            inputs_fn=self._t5.noise_span_to_unique_sentinel,
            targets_fn=self._t5.nonnoise_span_to_unique_sentinel,
        )

    def prefix_lm(self, texts: Sequence[np.ndarray], seed: int) -> Iterator[Pair]:
        """`t5.data.preprocessors.prefix_lm` after its cutting of texts."""
        return self._denoise(
            texts,
            seed,
            noise_density=0.5,
            noise_mask_fn=self._t5.random_prefix_noise_mask,
            inputs_fn=self._t5.drop_nonnoise_tokens,
            targets_fn=self._t5.drop_noise_tokens,
        )

    def spans_hidden(self, texts: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[Pair]:
        """What T5 makes of these masks (True: noise) in span corruption."""
        t5, vocabulary = self._t5, self._features["targets"].vocabulary
        seeds = tf.zeros((2, 2), tf.int32)  # neither function draws

        def hide(record):
            parts = (t5.noise_span_to_unique_sentinel, t5.nonnoise_span_to_unique_sentinel)
            return tuple(part(record["targets"], record["mask"], vocabulary, seeds) for part in parts)

        return self._ended(_dataset(texts, masks).map(hide))

    def prefix_cut(self, texts: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[Pair]:
        """What T5 makes of these masks (True: visible) in prefix LM."""
        t5, vocabulary = self._t5, self._features["targets"].vocabulary
        seeds = tf.zeros((2, 2), tf.int32)

        def cut(record):
            parts = (t5.drop_nonnoise_tokens, t5.drop_noise_tokens)
            return tuple(part(record["targets"], record["mask"], vocabulary, seeds) for part in parts)

        return self._ended(_dataset(texts, masks).map(cut))

    def _denoise(self, texts, seed, **how) -> Iterator[Pair]:
        with seqio.map_seed_manager(seed):
            dataset = self._t5.denoise(_dataset(texts), self._features, **how)
        return self._ended(dataset.map(lambda record: (record["inputs"], record["targets"])))

    def _ended(self, dataset: tf.data.Dataset) -> Iterator[Pair]:
        end = np.array([self._features["targets"].vocabulary.eos_id], np.int32)
        for inputs, targets in dataset.as_numpy_iterator():
            yield np.concatenate([inputs, end]), np.concatenate([targets, end])


def _dataset(texts: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None) -> tf.data.Dataset:
    def ragged(parts: Sequence[np.ndarray]) -> tf.RaggedTensor:
        return tf.RaggedTensor.from_row_lengths(np.concatenate(parts), [len(part) for part in parts])

    columns = {"targets": ragged(texts)} | ({} if masks is None else {"mask": ragged(masks)})
    return tf.data.Dataset.from_tensor_slices(columns)
