"""A decoder becomes an encoder-decoder and goes on training: which parameters move when (T5Gemma, arXiv 2504.06225)."""

import jax
import pytest
from flax import nnx

from jaxlm.checkpoints import stored
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.configuration import resolve
from jaxlm.models import build_model
from jaxlm.run import RunConfig

EACH_STEP = (
    "run.RunConfig.samples = None\nEVAL_PERIOD = 0\nCHECKPOINT_PERIOD = 1\nmanager.CheckpointConfig.keep_last = 20\n"
    "WIDTH = 16\nHIDDEN = 32\nNUM_HEADS = 2\nNUM_KV_HEADS = 1\nHEAD_DIM = 8\n"
)
WIDE = ("WIDTH=24", "HIDDEN=40", "NUM_HEADS=3", "NUM_KV_HEADS=3")
ADAPT = """
TRAIN_STEPS = 4
TASK_FEATURE_LENGTHS = {{'inputs': 16, 'targets': 16}}
run.RunConfig.warm_start = @warm_start.WarmStart()
warm_start.WarmStart.path = '{decoder}'
warm_start.WarmStart.rules = (@surgery.DecoderToEncoderDecoder(),)
surgery.DecoderToEncoderDecoder.cross_attention = 'fresh'
surgery.DecoderToEncoderDecoder.encoder_path = '{encoder}'
models.LanguageModelConfig.encoder = @encoder/layers.StackConfig()
models.LanguageModelConfig.encoder_width = 24
models.LanguageModelConfig.encoder_embedding = @layers.EmbeddingConfig()
encoder/layers.FeedForwardConfig.hidden = 40
encoder/layers.AttentionConfig.num_heads = 3
encoder/layers.AttentionConfig.num_kv_heads = 3
run.RunConfig.stages = (@alone/stages.Stage(), @stages.Stage())
alone/stages.Stage.steps = 2
alone/stages.Stage.freeze = ('^(?!.*cross_attention)',)
stages.Stage.steps = None
stages.Stage.freeze = ()
"""
IMPORTS = ("run", "checkpoints.manager")
MODULES = ("layers", "models", "checkpoints.surgery", "checkpoints.warm_start", "training.stages")


@pytest.fixture(scope="module")
def unbalanced(workshop):
    """Decoders of two sizes, and a run that makes one model of them: cross-attention alone for two of four steps."""
    gin = workshop.gin("donor", EACH_STEP, imports=IMPORTS)

    def donor(name, *bindings):
        model = build_model(resolve(RunConfig, workshop.arguments(name, gin, *bindings)).model, key=jax.random.key(0))
        with CheckpointManager(workshop.folder / name, CheckpointConfig(), model.layouts) as manager:
            manager.save(1, {"params": nnx.to_pure_dict(nnx.state(model))})
        return workshop.folder / name

    text = EACH_STEP + ADAPT.format(decoder=donor("small"), encoder=donor("wide", *WIDE))
    gin = workshop.gin("both", text, model="encoder_decoder", objective="prefix_lm", imports=(*IMPORTS, *MODULES))
    return workshop.train("both", gin)


def moved(folder, same_arrays, first, last):
    """Names of the parameters that differ between two steps, and of those that do not."""
    a, b = (stored.open_checkpoint(folder / "checkpoints", step) for step in (first, last))
    names = [path for path in a.leaves if path[0] == "params"]
    same = {path for path in names if same_arrays(a, b, [path])}
    return {"/".join(path[1:]) for path in set(names) - same}, {"/".join(path[1:]) for path in same}


def test_cross_attention_is_trained_alone_first(unbalanced, same_arrays):
    """t5gemma (iii): the tree of the first stage differs in cross-attention, and nowhere else."""
    changed, kept = moved(unbalanced, same_arrays, 1, 2)
    assert changed and all("cross_attention" in name for name in changed)
    assert kept and not any("cross_attention" in name for name in kept)
    changed, kept = moved(unbalanced, same_arrays, 3, 4)
    assert not kept and any(name.startswith("encoder/") for name in changed)
