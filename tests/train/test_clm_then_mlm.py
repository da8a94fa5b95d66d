"""Causal, then masked language modelling (arXiv 2507.00994): what a switch keeps, whether in one run or on a branch."""

import contextlib
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import stored
from jaxlm.layers.stack import StackConfig
from jaxlm.models.language_model import LanguageModel
from jaxlm.parallel.parallelism import Memory
from jaxlm.run import with_architecture
from jaxlm.training.digest import digest
from tests.evaluation.models import make_model

RUN = (
    "run.RunConfig.samples = None\nEVAL_PERIOD = 0\nCHECKPOINT_PERIOD = 2\nmanager.CheckpointConfig.keep_every = 2\n"
    "WIDTH = 16\n"
    "vocabularies.ByteVocabulary.named_tokens = ('[MASK]',)\n"
    "optimizers.OptimizerConfig.learning_rate = @schedules.WarmupStableDecay()\n"
    "schedules.WarmupStableDecay:\n    peak = 1e-2\n    warmup = 2\n    decay = %DECAY\n"
)
BIPHASIC = (
    "TRAIN_STEPS = 10\nDECAY = 3\n"
    "run.RunConfig.stages = (@causal/stages.Stage(), @masked/stages.Stage())\n"
    "causal/stages.Stage:\n    steps = 4\n    architecture = 'causal_decoder'\n    objective = @full_lm.FullLM()\n"
    "masked/stages.Stage:\n    steps = 6\n    architecture = 'encoder'\n    objective = @masked_lm.MaskedLM()\n"
)
IMPORTS = (
    *("run", "checkpoints.manager", "checkpoints.branch", "data.vocabularies", "objectives.full_lm"),
    *("objectives.masked_lm", "training.optimizers", "training.schedules", "training.stages"),
)


@pytest.fixture(scope="module")
def runs(workshop):
    """A run of two stages; a trunk of the first alone, at a constant rate; a branch from it for the second."""
    options = {"model": "encoder", "imports": IMPORTS}
    causal = "models.LanguageModelConfig.architecture = 'causal_decoder'\n"
    trunk = workshop.gin(
        "trunk", RUN + "TRAIN_STEPS = 6\nDECAY = 0\n" + causal, model="encoder", imports=(*IMPORTS, "models")
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        whole = workshop.train("whole", workshop.gin("whole", RUN + BIPHASIC, **options))
    (whole / "said.txt").write_text(said.getvalue())
    started = workshop.train("trunk", trunk)
    branch = f"run.RunConfig.branch = @branch.Branch()\nbranch.Branch.path = '{started}'\nbranch.Branch.step = 4\n"
    return whole, started, workshop.train("branch", workshop.gin("branch", RUN + BIPHASIC + branch, **options))


def test_a_branch_is_the_run_it_would_have_been(runs, metrics, same_arrays):
    """Bit for bit: the trunk's checkpoint is the one run's, and from there on so is every step of the branch."""
    whole, trunk, branch = runs
    at = {run: stored.open_checkpoint(run / "checkpoints", 4) for run in (whole, trunk)}
    assert same_arrays(at[whole], at[trunk], at[whole].leaves)
    found = {run: metrics(run) for run in runs}
    assert list(found[branch]) == [5, 6, 7, 8, 9, 10]
    assert found[branch] == {step: found[whole][step] for step in found[branch]}
    assert found[trunk][6] != found[whole][6], "the trunk goes on causally"
    assert same_arrays(*(stored.open_checkpoint(run / "checkpoints", 10) for run in (whole, branch)), at[whole].leaves)


def test_the_switch_keeps_parameters_and_moments_and_says_so(runs):
    """Digests before and after the seam are in the log; the text is read on."""
    folder = runs[0]
    line = " ".join((folder / "said.txt").read_text().split())
    found = re.search(
        r"Stage 2 begins after step 4: masked_lm, encoder; parameters (\w{8}) as before, optimizer (\w{8}) as before; "
        r"data go on\.",
        line,
    )
    assert found, line
    assert found[1] != found[2]
    before, after = (stored.open_checkpoint(folder / "checkpoints", step).data for step in (4, 6))
    assert before["data"] == after["data"] and after["clocks"] == before["clocks"] and after["step"] == 6


def test_a_digest_sees_every_bit():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.int32(3)}
    same = jax.tree.map(jnp.copy, tree)
    assert int(digest(tree)) == int(digest(same))
    for change in (
        {"a": tree["a"].at[1, 2].set(np.nextafter(np.float32(5), 6))},
        {"a": tree["a"][:, ::-1]},
        {"a": tree["a"].reshape(3, 2)},
        {"n": jnp.int32(4)},
        {"b": -tree["b"]},
    ):
        assert int(digest({**tree, **change})) != int(digest(tree)), change
    assert int(digest({"a": tree["a"], "c": tree["b"], "n": tree["n"]})) != int(digest(tree)), "names count"
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    host = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind=Memory.HOST.value)
    assert int(digest({**tree, "b": jax.device_put(tree["b"], host)})) == int(digest(tree)), "wherever they lie"


def test_with_the_causal_mask_the_encoder_is_the_decoder():
    """The same parameters in the stack that is named encoder, read causally: the decoder's states, bit for bit."""
    decoder = make_model(Architecture.CAUSAL_DECODER)
    assert isinstance(decoder.config.decoder, StackConfig)
    encoder = make_model(Architecture.ENCODER)
    encoder.embedding, encoder.encoder = decoder.embedding, decoder.decoder
    if decoder.vocabulary_head is not None:
        encoder.vocabulary_head = decoder.vocabulary_head
    encoder.config = with_architecture(encoder.config, Architecture.CAUSAL_DECODER)
    assert isinstance(encoder, LanguageModel) and encoder.decoder is None
    rng = np.random.default_rng(0)
    batch = {
        "decoder_input_tokens": jnp.asarray(rng.integers(2, 40, (2, 12)), jnp.int32),
        "decoder_segment_ids": jnp.asarray([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3]),
        "decoder_positions": jnp.asarray([[*range(7), *range(5)], [*range(9), 0, 0, 0]]),
    }
    states = [model.hidden_states(batch)[0] for model in (encoder, decoder)]
    logits = [model.head(hidden) for model, hidden in zip((encoder, decoder), states)]
    assert np.array_equal(*states) and np.array_equal(*logits)
    later = {**batch, "decoder_input_tokens": batch["decoder_input_tokens"].at[:, 6].set(3)}
    assert np.array_equal(encoder.hidden_states(later)[0][:, :6], states[0][:, :6]), "nothing sees what follows"
    encoder.config = with_architecture(encoder.config, Architecture.ENCODER)
    full = {name.replace("decoder", "encoder"): x for name, x in batch.items()}
    assert not np.allclose(encoder.hidden_states(full)[0][:, 0], states[0][:, 0]), "under the full mask it does"
