"""Small models with random parameters, for tests of scoring."""

import jax

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.mamba import MambaConfig
from jaxlm.layers.mamba_block import MambaBlockConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import RelativePositions, Rope
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig
from jaxlm.models.language_model import LanguageModel

ROPE = Rope()


def make_model(
    architecture, *, position=ROPE, shared=None, embedded=None, window=None, recurrent=False, vocab_size=40, seed=0
):
    """Two layers of width 16 whose random logits are far apart."""
    attention = AttentionConfig(num_heads=2, head_dim=8, position=None if embedded else position, window=window)
    cross = AttentionConfig(num_heads=2, head_dim=8)
    parts = {"feed_forward": FeedForwardConfig(hidden=32), "norm": NormConfig()}

    def stack(**crossing):
        block = BlockConfig(attention=attention, **crossing, **parts)
        if recurrent:
            block = MambaBlockConfig(mixer=MambaConfig(inner=32, step_rank=2, state=4), norm=NormConfig())
        return StackConfig(blocks=(block,), num_layers=2, relative_positions=shared, final_norm=NormConfig())

    both = architecture is Architecture.ENCODER_DECODER
    config = LanguageModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        width=16,
        embedding=EmbeddingConfig(positions=embedded),
        head=HeadConfig(tied=True),
        init=InitConfig(std=0.3),
        encoder=stack() if both or architecture is Architecture.ENCODER else None,
        decoder=stack(cross_attention=cross) if both else stack() if architecture.has_decoder_features else None,
    )
    return LanguageModel(config, key=jax.random.key(seed))


T5_TABLE = RelativePositions(buckets=8, max_distance=16)


def as_pretrained(module, vocabulary):
    """A model as if it had been read from a folder, with a context of 64."""
    return Pretrained(
        model=module,
        config=module.config,
        vocabulary=vocabulary,
        no_vocabulary=None,
        start_id=0,
        input_end_id=None,
        eos_ids=(1,),
        context_length=64,
        source="a model",
    )
