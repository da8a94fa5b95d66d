"""Run with 8 devices by test_pipeline.py: models in pipeline stages against the same models on one device."""

import dataclasses
import functools
import json
import tempfile

import jax
import numpy as np
from small_models import decoder, packed_batch

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.context import Context
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig
from jaxlm.layers.positions import RelativePositions
from jaxlm.layers.stack import Remat
from jaxlm.layers.stacking import unstack
from jaxlm.models.language_model import LanguageModel
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.parallel.stages import Pipeline
from jaxlm.training.parameters import flatten, map_infos
from jaxlm.training.prefetch import to_devices
from jaxlm.training.state import abstract_model, state_shardings, working_copy


@dataclasses.dataclass(frozen=True)
class Run:
    """A model on a mesh, with parameters that do not depend on it."""

    model: object
    parallel: Parallelism

    @functools.cached_property
    def parts(self):
        return abstract_model(lambda key: LanguageModel(self.model, key=key, stages=self.parallel.stages))

    @functools.cached_property
    def params(self):
        """Any numbers, of each layer its own; NaN in identity layers."""
        definition, shapes, infos = self.parts

        def draw(info):
            def one(name):
                rng = np.random.default_rng(list(name.encode()))
                shape = info.shape[1:] if info.stacked else info.shape
                return rng.normal(size=shape).astype(np.float32) * 0.2 + (info.role == "vector")

            value = np.stack([one(name) for name in info.names]) if info.stacked else one(info.names[0])
            value[list(info.identities)] = np.nan
            return value

        return jax.device_put(map_infos(draw, infos), state_shardings(shapes, infos, self.parallel))

    def loss_and_gradient(self, batch, dropout_key=None):
        """float, and {path: gradient} with layers one by one."""
        definition, _, infos = self.parts
        context = Context(ops=ShardedOps(self.parallel), dropout_key=dropout_key)
        side = "encoder" if self.model.architecture is Architecture.ENCODER else "decoder"

        @jax.jit
        @jax.value_and_grad
        def loss(params, batch):
            model = definition.merge(working_copy(params, infos, self.parallel))
            hidden, extra = model.hidden_states(batch, context=context)
            weights = (batch[f"{side}_segment_ids"] > 0) / 100
            total, _ = context.ops.cross_entropy(
                *model.output(hidden, context=context), batch[f"{side}_input_tokens"], weights
            )
            return total + sum(extra.losses.values(), 0.0) / 100

        value, grads = loss(self.params, to_devices(batch, self.parallel))
        return float(value), flatten(unstack(jax.device_get(grads), definition.layouts))


def encoder_decoder(model):
    """The decoder's blocks as encoder and, with cross-attention, as decoder; T5's biases, one table a stack."""
    (block,) = model.decoder.blocks
    plain = dataclasses.replace(block, attention=dataclasses.replace(block.attention, position=None))
    crossing = dataclasses.replace(plain, cross_attention=AttentionConfig(4, 8))
    encoder = dataclasses.replace(
        model.decoder, blocks=(plain,), relative_positions=RelativePositions(8, 16), num_layers=2
    )
    return dataclasses.replace(
        model,
        architecture=Architecture.ENCODER_DECODER,
        encoder=encoder,
        # A block before the pattern, outside of the pipeline.
        decoder=dataclasses.replace(encoder, blocks=(crossing,), prologue=(crossing,)),
    )


def with_experts(model):
    """Its feed-forward layers are experts. Their balance is taken over a microbatch, so it is left out."""
    (block,) = model.decoder.blocks
    experts = MixtureOfExpertsConfig(32, num_experts=4, experts_per_token=2, balance_loss=0.0, z_loss=1.0)
    block = dataclasses.replace(block, feed_forward=experts)
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, blocks=(block,)))


def as_encoder(model):
    return dataclasses.replace(model, architecture=Architecture.ENCODER, encoder=model.decoder, decoder=None)


prefix = {"decoder_causal_attention": np.tile(np.arange(16) % 8 < 3, (8, 1)).astype(np.int32)}
text = packed_batch(0) | prefix
text |= {name.replace("decoder", "encoder"): value for name, value in packed_batch(1, length=12).items()}

SIX = decoder(layers=6, dropout=0.1)
MODELS = {
    "decoder": SIX,
    "prefix decoder": dataclasses.replace(
        SIX, architecture=Architecture.PREFIX_DECODER, decoder=dataclasses.replace(SIX.decoder, remat=Remat.NONE)
    ),
    "encoder": as_encoder(decoder(layers=2)),
    "experts": with_experts(decoder()),
    "encoder-decoder": encoder_decoder(decoder(dropout=0.1)),
}


def staged(mesh, pipeline, **options):
    return ParallelConfig(mesh, pipeline=pipeline, **options)


CASES = {  # six layers in stages of two: two identity layers
    ("decoder", "stage x fsdp x tensor"): staged(MeshConfig(stage=2, fsdp=2, tensor=2), Pipeline(4)),
    ("decoder", "4 stages"): staged(MeshConfig(stage=4, data=1), Pipeline(8)),
    ("prefix decoder", "2 rounds"): staged(MeshConfig(stage=2, data=1), Pipeline(4, 2, "stage")),
    ("encoder", "stage x sequence"): staged(MeshConfig(stage=2, data=1, sequence=2), Pipeline(2)),
    ("experts", "stage x expert"): staged(MeshConfig(stage=2, data=1, expert=2), Pipeline(4)),
    # What is stored is cut over `data` too, and gathered once, before the pipeline (ZeRO-1).
    ("encoder-decoder", "stage x data"): staged(
        MeshConfig(stage=2, data=2), Pipeline(4), state_rules=(("embed", ("data",)),)
    ),
}

key = jax.random.key(1)
one_device = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
answer, runs, alone = {}, {}, {}
for (name, case), parallel in CASES.items():
    if name not in alone:
        runs[name, "alone"] = Run(MODELS[name], one_device)
        alone[name] = runs[name, "alone"].loss_and_gradient(text, key)
    loss, grads = alone[name]
    mesh = parallel.mesh
    count = 8 if mesh.data == -1 else mesh.stage * mesh.data * mesh.expert * mesh.sequence
    runs[name, case] = Run(MODELS[name], parallel.on(jax.devices()[:count]))
    other_loss, other = runs[name, case].loss_and_gradient(text, key)
    total = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert grads.keys() == other.keys()
    answer[f"{name}, {case}"] = {
        "loss": abs(other_loss - loss) / loss,
        # Law 3: ||g - g'|| <= 1e-5 max(||g||, 1e-3 ||all g||), leaf by leaf; NaN is not <= anything.
        "gradients": float(
            np.max([np.linalg.norm(g - other[p]) / max(np.linalg.norm(g), 1e-3 * total) for p, g in grads.items()])
        ),
    }


def restored(saved, wanted):
    """Whether what one run saved is what another restores, byte by byte, and identity layers are zeros."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted.params)
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointManager(folder, CheckpointConfig(), saved.parts[0].layouts) as manager:
            manager.save(1, {"params": saved.params})
        with CheckpointManager(folder, CheckpointConfig(), wanted.parts[0].layouts) as manager:
            found = manager.restore({"params": shapes}).state["params"]
    expected = naming.flatten(jax.tree.map(lambda x: np.nan_to_num(np.asarray(x)), wanted.params))
    return all(np.asarray(leaf).tobytes() == expected[path].tobytes() for path, leaf in naming.flatten(found).items())


plain, four, rounds = runs["decoder", "alone"], runs["decoder", "4 stages"], runs["prefix decoder", "2 rounds"]
answer["restored"] = [restored(*pair) for pair in ((four, rounds), (rounds, plain), (plain, four))]
four_padded = four.parts[2]["decoder"]["layers"]["0"]["attention"]["query"]["kernel"]
answer["identities"] = [four_padded.identities, four_padded.depth, four_padded.size / four_padded.shape[0]]
kernel = runs["encoder-decoder", "stage x data"].params["decoder"]["layers"]["0"]["attention"]["query"]["kernel"]
answer["stored"] = kernel.size // kernel.addressable_shards[0].data.size
print(json.dumps(answer))
