"""A converted model beside itself in `transformers`: the same logits of the same ids, the same ids of a text.

Needs the `torch` extra.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.files import read_json
from jaxlm.checkpoints.huggingface.folder import CONFIG
from jaxlm.checkpoints.pretrained import Pretrained

_LENGTH = 48  # ids of a row
_AUTO = {
    Architecture.CAUSAL_DECODER: "AutoModelForCausalLM",
    Architecture.PREFIX_DECODER: "AutoModelForCausalLM",
    Architecture.ENCODER: "AutoModelForMaskedLM",
    Architecture.ENCODER_DECODER: "AutoModelForSeq2SeqLM",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two sets of logits differ.

    Attributes:
      what: the ids they are of.
      greatest, mean: of the absolute differences.
      largest: the largest absolute logit.
      ids: whether both tokenizers made the same ids of the text; None where the ids are no text's.
    """

    what: str
    greatest: float
    mean: float
    largest: float
    ids: bool | None = None

    @property
    def small(self) -> bool:
        """Whether it may be float32's rounding, and the ids agree."""
        return self.greatest <= 1e-4 * self.largest and self.ids is not False

    def __str__(self) -> str:
        """One line."""
        line = f"{self.what}: greatest difference {self.greatest:.2e}, mean {self.mean:.2e}"
        line += f", logits up to {self.largest:.3g}"
        return line + {None: "", True: "; the same ids", False: "; OTHER IDS"}[self.ids]


def compare(ours: Pretrained, folder: pathlib.Path, text: str, dtype: np.dtype | None = None) -> list[Difference]:
    """Compares a model of ours with a folder in `transformers`, both in float32.

    Args:
      ours: opened with compute float32.
      folder: the Hugging Face folder; code in it is run, so it must be one that was written here or is trusted.
      text: real text, for ids that are not random.
      dtype: the type the folder's tensors were rounded to; ours are rounded to it as well.

    Raises:
      ValueError: torch or transformers are not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--verify needs torch and transformers ({error}): python -m pip install -e '.[torch]' in the clone."
        ) from None
    own_code = "auto_map" in read_json(folder / CONFIG)
    auto = getattr(transformers, _AUTO[ours.config.architecture])
    theirs = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own_code).eval()
    model = ours.model if dtype is None else _rounded(ours.model, dtype)
    ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, _LENGTH))
    found = [_difference("random ids", model, theirs, ids)]
    if ours.vocabulary is not None and (folder / "tokenizer_config.json").exists():
        row = _ids_of(ours, text)
        their_row = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)(text)["input_ids"]
        found.append(_difference("real text", model, theirs, np.array([row[:_LENGTH]]), row == their_row))
    return found


def _rounded(model: nnx.Module, dtype: np.dtype) -> nnx.Module:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), state))


def _ids_of(ours: Pretrained, text: str) -> list[int]:
    """The ids of a text as the exported tokenizer makes them."""
    start = None if ours.config.architecture.has_encoder_features else ours.start_id
    around = [[] if i is None else [i] for i in (start, ours.input_end_id)]
    return around[0] + ours.vocabulary.encode(text).tolist() + around[1]


def _difference(what: str, model: Any, theirs: Any, ids: np.ndarray, same_ids: bool | None = None) -> Difference:
    import torch

    tokens = torch.tensor(ids)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.architecture is Architecture.ENCODER_DECODER:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    found = np.asarray(_logits(model, ids))[..., : expected.shape[-1]]
    off = np.abs(found - expected)
    return Difference(what, float(off.max()), float(off.mean()), float(np.abs(expected).max()), same_ids)


def _logits(model: Any, ids: Sequence) -> jax.Array:
    """[B, T, V] of one text a row, which an encoder-decoder reads and writes."""
    tokens = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    batch = {}
    for side in ("decoder", "encoder"):
        batch |= {f"{side}_input_tokens": tokens, f"{side}_segment_ids": jnp.ones_like(tokens)}
        batch[f"{side}_positions"] = positions
    batch["decoder_causal_attention"] = jnp.zeros_like(tokens)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, batch):
        model = nnx.merge(graph, state)
        return model.head(model.hidden_states(batch)[0])

    return run(state, batch)
