"""Named surgeries: rules that stand for several. What each keeps of the function is tested by exact property.

A causal decoder becomes a prefix decoder or an encoder, and back, without any: the parameters are the same
(`Stage.architecture`, or another `LanguageModelConfig.architecture`).
"""

import abc
import dataclasses
import enum
import re

import numpy as np

from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.surgery.leaves import Draft
from jaxlm.checkpoints.surgery.rules import (
    Constant,
    Copy,
    Drop,
    Fill,
    Fresh,
    Join,
    Keep,
    Merge,
    PickLayers,
    Rename,
    Resize,
    Rule,
    Scale,
)

# What the branches of a block write to the residual stream with.
_BRANCH_END = re.compile(
    r"(?:attention|cross_attention|mixer)/output/(?:kernel|bias)"
    r"|feed_forward/(?:(?:shared/)?down/(?:kernel|bias)|experts/down)"
)


class Recipe(Rule):
    """A rule that stands for others."""

    @abc.abstractmethod
    def rules(self, draft: Draft) -> tuple[Rule, ...]:
        """The rules, for what is there."""

    def apply(self, draft: Draft) -> None:
        for rule in self.rules(draft):
            rule.apply(draft)


class Gate(enum.Enum):
    """Whether a branch that is new to the model works from the first step.

    OPEN: it does. CLOSED: its last matrix is zero, so that it adds nothing until that has been trained.
    """

    OPEN = "open"
    CLOSED = "closed"


@dataclasses.dataclass(frozen=True)
class UpscaleDepth(Rule):
    """A deeper stack of the layers of a shallower one (Yi, arXiv 2403.04652; SOLAR, arXiv 2312.15166).

    With closed copies the deeper model computes what the shallower one did, wherever the layers in `order` come back to
    where they left off (0-23 then 8-31: layers 8-23 stand twice, and their second copies are closed); not so with
    post-norm, where a closed branch is still normed. In a stack whose layers alternate (windows, experts), choose an
    order that keeps each layer's place in the pattern.

    Attributes:
      order: see `PickLayers`.
      copies: whether the branches of layers that stand there a second time are open.
      stack: the name before the layers' numbers.
    """

    order: tuple[int | tuple[int, ...], ...]
    copies: Gate = Gate.OPEN
    stack: str = "decoder/layers"

    def __post_init__(self):
        object.__setattr__(self, "copies", Gate(self.copies))

    def apply(self, draft: Draft) -> None:
        pick = PickLayers(self.order, self.stack)
        pick.apply(draft)
        if self.copies is Gate.CLOSED:
            for new, old in enumerate(pick.layers):
                if old in pick.layers[:new]:
                    self._close(draft, f"{self.stack}/{new}/")

    def _close(self, draft: Draft, layer: str) -> None:
        """Scales the last matrices of a layer's branches by 0."""
        parts = [name.removeprefix(layer) for name in draft.leaves if name.startswith(layer)]
        ends = [part for part in parts if _BRANCH_END.fullmatch(part)]
        open_still = {part.split("/")[0] for part in parts} - {end.split("/")[0] for end in ends}
        if unknown := sorted(branch for branch in open_still if not re.search("norms?$", branch)):
            raise CheckpointError(
                f"UpscaleDepth cannot close {layer}{unknown[0]}, whose last matrix it does not know; leave copies "
                f"'open', or write a Scale by 0 for it after a PickLayers."
            )
        Scale("|".join(re.escape(layer + end) for end in ends), 0.0).apply(draft)


class CrossAttention(enum.Enum):
    """What a decoder's new cross-attention starts from.

    SELF_ATTENTION: the same layer's self-attention, norms included (T5Gemma, arXiv 2504.06225, balanced). FRESH: its
    initialisation (T5Gemma, unbalanced; BERT2BERT, arXiv 1907.12461).
    """

    SELF_ATTENTION = "self_attention"
    FRESH = "fresh"


@dataclasses.dataclass(frozen=True)
class DecoderToEncoderDecoder(Recipe):
    """A decoder as an encoder-decoder with cross-attention (T5Gemma, arXiv 2504.06225), its encoder a decoder too.

    With a closed gate the decoder's logits are those of the decoder it comes from, whatever the encoder reads. Tables
    of relative positions are copied too, though a bidirectional encoder reads half of its buckets in another way.

    Attributes:
      cross_attention: see `CrossAttention`; fresh where the encoder has another width.
      gate: see `Gate`.
      encoder_path: the checkpoint of another decoder, of another size perhaps, which becomes the encoder, with its own
        embedding (`LanguageModelConfig.encoder_embedding`); None takes the same decoder twice.
    """

    cross_attention: CrossAttention = CrossAttention.SELF_ATTENTION
    gate: Gate = Gate.OPEN
    encoder_path: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "cross_attention", CrossAttention(self.cross_attention))
        object.__setattr__(self, "gate", Gate(self.gate))

    def rules(self, draft: Draft) -> tuple[Rule, ...]:
        apart = any(name.startswith("encoder_embedding/") for name in draft.model)
        rules: list[Rule] = []
        if self.encoder_path is None:
            rules.append(Copy("decoder/(.*)", r"encoder/\1"))
            rules += [Copy("embedding/(.*)", r"encoder_embedding/\1")] * apart
        else:
            there = (Keep("(?:decoder|embedding)/.*"), Rename("decoder/(.*)", r"encoder/\1"))
            there += (Rename("embedding/(.*)", r"encoder_embedding/\1") if apart else Drop("embedding/.*"),)
            rules.append(Join(self.encoder_path, rules=there))
        if self.cross_attention is CrossAttention.FRESH:
            rules.append(Fresh(r"decoder/.*/cross_attention(?:_norms)?/.*"))
        else:
            rules.append(Copy(r"(decoder/.*)/attention((?:_norms)?/(?!relative/).*)", r"\1/cross_attention\2"))
        if self.gate is Gate.CLOSED:
            rules.append(Constant(r"decoder/.*/cross_attention/output/(?:kernel|bias)", 0.0))
        return tuple(rules)


class Side(enum.Enum):
    """A stack of an encoder-decoder."""

    ENCODER = "encoder"
    DECODER = "decoder"


@dataclasses.dataclass(frozen=True)
class EncoderDecoderToDecoder(Recipe):
    """One stack of an encoder-decoder, without cross-attention (arXiv 2204.05832, appendix E.4).

    The model computes what the decoder did where cross-attention adds nothing: exact where its last matrix is zero, a
    start for training otherwise.

    Attributes:
      keep: the stack that is kept.
    """

    keep: Side = Side.DECODER

    def __post_init__(self):
        object.__setattr__(self, "keep", Side(self.keep))

    def rules(self, draft: Draft) -> tuple[Rule, ...]:
        if self.keep is Side.DECODER:
            return Drop("encoder(?:_embedding)?/.*"), Drop(r"decoder/.*/cross_attention(?:_norms)?/.*")
        rules: tuple[Rule, ...] = (Drop("decoder/.*"), Rename("encoder/(.*)", r"decoder/\1"))
        if any(name.startswith("encoder_embedding/") for name in draft.leaves):
            rules += (Drop("embedding/.*"), Rename("encoder_embedding/(.*)", r"embedding/\1"))
        return rules


@dataclasses.dataclass(frozen=True)
class Upcycle(Recipe):
    """Dense feed-forward layers as mixtures of experts that are all the same (sparse upcycling, arXiv 2212.05055).

    The function stays the same where the weights of a token's experts add up to 1 (`MixtureOfExpertsConfig.normalize`)
    and no shared expert is added. Routers are initialised.
    """

    def rules(self, draft: Draft) -> tuple[Rule, ...]:
        one = Merge((r"(.*/feed_forward)/(gate|up|down)/kernel",), r"\1/experts/\2", axis=0, stack=True)
        many = Resize(r".*/feed_forward/experts/(?:gate|up|down)", axis=0, fill=Fill.REPEATED)
        return one, many, Fresh(r".*/feed_forward/router")


@dataclasses.dataclass(frozen=True)
class WidenFeedForward(Recipe):
    """Feed-forward layers with more hidden units: the new ones are initialised, and their way out is closed.

    The function stays the same, whatever the old and new widths.
    """

    def rules(self, draft: Draft) -> tuple[Rule, ...]:
        into = Resize(r".*/feed_forward/(?:gate|up)/(?:kernel|bias)", axis=-1, fill=Fill.INITIAL)
        return into, Resize(r".*/feed_forward/down/kernel", axis=0, fill=Fill.ZEROS)


@dataclasses.dataclass(frozen=True)
class WidenResidual(Recipe):
    """A model of a multiple of the width: every channel of the residual stream stands there several times.

    Net2Net's widening (arXiv 1511.05641; bert2BERT, arXiv 2110.07143, "function-preserving initialisation"): what reads
    the stream shares its weights out among the copies, what writes to it writes the same to each. Heads, head size and
    hidden width stay; blocks are dense. The function stays the same, for norms of either kind, where nothing is scaled
    by the model's width (`EmbeddingConfig.scale_by_width`, `HeadConfig.scale_by_width`, a parametrisation but the
    standard). Where the output is the embedding, the final norm's scale shares out for it and must be there. Copies
    train alike until something tells them apart: dropout, or noise.
    """

    def rules(self, draft: Draft) -> tuple[Rule, ...]:
        name = "embedding/tokens"
        old, new = draft.leaves[name].shape[1], draft.wanted(self, name).shape[1]
        if new % old:
            raise CheckpointError(
                f"WidenResidual goes from a width to a multiple of it, not from {old} to {new}: norms would weigh the "
                f"channels unequally; choose {-(-new // old) * old}."
            )
        last = r"(?:encoder|decoder)/norm/(?:scale|bias)"
        tied = "vocabulary_head/kernel" not in draft.leaves
        decoders = any(leaf.startswith("decoder/") for leaf in draft.leaves)
        final = f"{'decoder' if decoders else 'encoder'}/norm"  # what a tied embedding multiplies
        output, offset = rf"{final}/(?:scale|bias)", 0.0
        if tied and new > old:
            offset = self._offset(draft, f"{final}/scale", new // old)
        rules = (
            (r"embedding/(?:tokens|positions|types)", -1, Fill.REPEATED),
            (r"embedding/norm/(?:scale|bias)", 0, Fill.REPEATED),
            (r".*/(?:cross_)?attention/(?:query|key|value)/kernel", 0, Fill.SHARED),
            (r".*/(?:cross_)?attention/output/(?:kernel|bias)", -1, Fill.REPEATED),
            (r".*/feed_forward/(?:gate|up)/kernel", 0, Fill.SHARED),
            (r".*/feed_forward/down/(?:kernel|bias)", -1, Fill.REPEATED),
            (r".*_norms/(?:before|after)/(?:scale|bias)", 0, Fill.REPEATED),
            *(((output, 0, Fill.SHARED),) if tied else ()),
            (last, 0, Fill.REPEATED),
            (r"vocabulary_head/kernel", 0, Fill.SHARED),
        )
        resized = tuple(Resize(p, axis, new, fill) for p, axis, fill in rules if _matches(draft, p))
        # Of offset + scale, not of the scale alone, each copy has its share.
        return (*resized, _Add(f"{final}/scale", offset * (old / new - 1.0))) if offset else resized

    def _offset(self, draft: Draft, scale: str, copies: int) -> float:
        """`NormConfig.scale_offset` of the final norm: scales start at 1 less of it."""
        if scale not in draft.leaves:
            raise CheckpointError(
                f"WidenResidual would make the logits {copies} times as large: the output is the embedding, and "
                f"{scale} is not there to divide them; untie it first (HeadConfig.tied = False, Copy and Transpose)."
            )
        start = draft.initial(scale)
        if np.ptp(start):
            raise CheckpointError(
                f"WidenResidual sees by the model's initial {scale} what is added to it (NormConfig.scale_offset), but "
                f"finds {start.min():g} to {start.max():g} there, not one number; start from a fresh model."
            )
        return 1.0 - float(start[0])


@dataclasses.dataclass(frozen=True)
class _Add(Rule):
    """Adds to one leaf."""

    name: str
    term: float

    def apply(self, draft: Draft) -> None:
        leaf = draft.leaves[self.name]
        draft.leaves[self.name] = leaf.changed(f"plus {self.term:g}", lambda x: x + np.asarray(self.term, x.dtype))


def _matches(draft: Draft, pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in draft.leaves)
