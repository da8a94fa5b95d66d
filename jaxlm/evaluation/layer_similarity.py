"""How much each layer changes the residual stream, and what standing twice does to the loss: where to deepen a model.

Depth up-scaling duplicates layers whose output is close to their input (Yi, arXiv 2403.04652, on depth upscaling: the
16 middle layers of 32, by cosine). The cosine is cheap, the loss is what counts; both are here, so that one can see
whether the first foretells the second.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.layers.context import LOCAL
from jaxlm.models.language_model import LanguageModel, self_mask
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.losses import targets_of, token_sums


@dataclasses.dataclass(frozen=True)
class Span:
    """Layers that follow one another.

    Attributes:
      first, last: numbers of its layers, the last included.
      cosine: between the residual stream before and after it, the mean over tokens.
      loss: nats a target, of the model in which it stands twice: layers 0 to `last`, then `first` to the end.
    """

    first: int
    last: int
    cosine: float
    loss: float

    def order(self, depth: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What `UpscaleDepth.order` is to be for a stack of `depth` layers in which it stands twice."""
        return (0, self.last + 1), (self.first, depth)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What a model's layers do.

    Attributes:
      loss: nats a target, of the model as it is.
      spans: one for each layer it may begin with.
      tokens: targets that were looked at.
    """

    loss: float
    spans: tuple[Span, ...]
    tokens: int

    @property
    def mildest(self) -> Span:
        """The span whose duplication hurts least."""
        return min(self.spans, key=lambda span: span.loss)


def layer_report(model: LanguageModel, batches: Iterable[Mapping[str, np.ndarray]], span: int = 1) -> LayerReport:
    """Looks at every run of `span` layers of a decoder or an encoder.

    Args:
      model: with unrolled layers (`jaxlm.models.unrolled`, `pretrained.load`). Blocks of one kind are compiled once.
      batches: with targets, docs/architecture.md.
      span: layers that are looked at, and duplicated, together.

    Raises:
      ValueError: the model has two stacks or several heads, or fewer layers than `span`; or there are no batches.
    """
    architecture = model.config.architecture
    if architecture is Architecture.ENCODER_DECODER or model.future is not None:
        raise ValueError(
            "Layers are compared in one stack with one head; take the encoder or decoder out of an encoder-decoder "
            "(surgery.EncoderDecoderToDecoder), and the trunk of a multi-token model."
        )
    stack = model.encoder if model.decoder is None else model.decoder
    side = "decoder" if architecture.has_decoder_features else "encoder"
    depth = len(stack.layers)
    if not 1 <= span <= depth:
        raise ValueError(f"A span of {span} layers does not fit a stack of {depth}; choose 1 to {depth}.")

    def around(batch):
        mask, present = self_mask(batch, architecture), batch[f"{side}_segment_ids"] > 0
        return stack.surroundings(mask, batch[f"{side}_positions"], present=present)

    @jax.jit
    def embedded(batch):
        x = model.embedding(batch[f"{side}_input_tokens"], batch[f"{side}_positions"], context=LOCAL)
        for block in (stack.prologue or {}).values():
            x, _ = block(x, around(batch), LOCAL)
        return x

    @functools.partial(jax.jit, static_argnums=0)
    def through(graph, values, x, batch):
        return nnx.merge(graph, values)(x, around(batch), LOCAL)[0]

    @jax.jit
    def nats(x, batch):
        targets, weights = targets_of(batch)
        total, _, _ = token_sums(model, stack.finish(x, LOCAL), targets, weights, context=LOCAL, config=LossConfig())
        return total

    @jax.jit
    def cosines(before, after, batch):
        present = batch[f"{side}_segment_ids"] > 0
        before, after = before.astype(jnp.float32), after.astype(jnp.float32)
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = (before * after).sum(-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
        return jnp.where(present, cosine, 0.0).sum(), present.sum()

    blocks = [nnx.split(stack.layers[str(i)]) for i in range(depth)]
    starts = range(depth - span + 1)
    loss, doubled, cosine, weight, tokens = 0.0, np.zeros(len(starts)), np.zeros(len(starts)), 0.0, 0.0
    for batch in batches:
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        streams = [embedded(batch)]
        for block in blocks:
            streams.append(through(*block, streams[-1], batch))
        loss += float(nats(streams[-1], batch))
        weight += float(targets_of(batch)[1].sum())
        for start in starts:
            found, count = cosines(streams[start], streams[start + span], batch)
            cosine[start] += float(found)
            x = streams[start + span]
            for block in blocks[start:]:
                x = through(*block, x, batch)
            doubled[start] += float(nats(x, batch))
        tokens += float(count)
    if not weight:
        raise ValueError("There are no targets to look at; give batches with loss weights.")
    spans = zip(starts, (cosine / tokens).tolist(), (doubled / weight).tolist(), strict=True)
    return LayerReport(loss / weight, tuple(Span(i, i + span - 1, c, nll) for i, c, nll in spans), round(weight))
