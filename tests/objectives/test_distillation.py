"""Distillation: the loss is the formula; a student that is its teacher learns nothing; teachers read the same text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.layers import (
    Alibi,
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    InitConfig,
    MambaBlockConfig,
    MambaConfig,
    NormConfig,
    Rope,
    StackConfig,
)
from jaxlm.layers.context import LOCAL
from jaxlm.models import HeadConfig, LanguageModelConfig, build_model
from jaxlm.objectives.base import Distillation, LossConfig
from jaxlm.objectives.distillation import Taught, refuses_teacher, teacher_batch
from jaxlm.objectives.losses import cross_entropy_sums
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training.parameters import split_model
from jaxlm.training.teacher import Teacher, check_teacher

VOCAB, START = 23, 0
STACK = StackConfig(
    (BlockConfig(AttentionConfig(2, 8, position=Rope()), FeedForwardConfig(24), NormConfig()),),
    1,
    final_norm=NormConfig(),
)
DECODER = LanguageModelConfig(
    Architecture.CAUSAL_DECODER, VOCAB, 16, EmbeddingConfig(), HeadConfig(), InitConfig(std=0.3), decoder=STACK
)


def batch_of(*texts, length):
    """A decoder's batch of one row, of texts packed."""
    rng = np.random.default_rng(0)
    tokens, ids, places = (np.zeros((1, length), np.int32) for _ in range(3))
    at = 0
    for number, text in enumerate(texts, 1):
        tokens[0, at : at + len(text)], ids[0, at : at + len(text)] = text, number
        places[0, at : at + len(text)] = np.arange(len(text))
        at += len(text)
    inputs = np.where(places == 0, START, np.roll(tokens, 1, axis=1))
    return {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": (ids > 0) * rng.uniform(0.5, 1.5, ids.shape).astype(np.float32),
        "decoder_segment_ids": ids,
        "decoder_positions": places,
    }


def text(seed, length):
    return np.random.default_rng(seed).integers(1, VOCAB, length).astype(np.int32)


BATCH = batch_of(text(1, 5), text(2, 6), length=12)


def model(seed, config=DECODER):
    return build_model(config, key=jax.random.key(seed))


def loss_of(student, teacher, batch, **config):
    """The loss and its gradient by the student's parameters, both as jaxlm takes them."""
    definition, params, _ = split_model(student)
    distillation = Distillation("", **config.pop("distillation", {}))
    config = LossConfig(distillation=distillation, **config)

    def loss(params):
        taught = Taught(definition.merge(params), teacher, START)
        terms, metrics, _ = cross_entropy_sums(taught, batch, context=LOCAL, config=config)
        return terms["cross_entropy"], metrics

    return jax.value_and_grad(loss, has_aux=True)(params)


def same(found, expected, tolerance=1e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * scale


def test_the_loss_is_the_formula():
    """Against the definition with all logits at hand, in chunks of 4 tokens, every term on."""
    student, teacher = model(1), model(2)
    options = {"z_loss": 1e-2, "label_smoothing": 0.1}
    (found, metrics), gradient = loss_of(
        student, teacher, BATCH, distillation={"temperature": 2.0, "share": 0.7}, token_chunk=4, **options
    )
    definition, params, _ = split_model(student)

    def formula(params):
        pupil = definition.merge(params)
        z, y = (m.head(m.hidden_states(BATCH)[0]) for m in (pupil, teacher))
        log_p, soft = jax.nn.log_softmax(z), jax.nn.log_softmax(z / 2.0)
        known = jax.lax.stop_gradient(jax.nn.log_softmax(y / 2.0))
        label = jnp.take_along_axis(log_p, BATCH["decoder_target_tokens"][..., None], -1)[..., 0]
        hard = -0.9 * label - 0.1 * log_p.mean(-1)
        soft = (jnp.exp(known) * (known - soft)).sum(-1)
        tokens = 0.3 * hard + 0.7 * 4.0 * soft + 1e-2 * jax.nn.logsumexp(z, -1) ** 2
        return (BATCH["decoder_loss_weights"] * tokens).sum()

    expected, expected_gradient = jax.value_and_grad(formula)(params)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    same(gradient, expected_gradient)
    weight = BATCH["decoder_loss_weights"].sum()
    assert all(float(of[1]) == pytest.approx(weight, rel=1e-6) for of in metrics.values())
    assert float(metrics["teacher_divergence"][0]) > 0.1 * weight


def test_a_student_that_is_its_teacher_learns_nothing():
    """well_read_students (ii): divergence 0, gradient 0; and the teacher is a constant."""
    student = model(1)
    (loss, metrics), gradient = loss_of(student, model(1), BATCH)
    _, usual = loss_of(student, model(2), BATCH)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(usual))
    assert abs(float(loss)) <= 1e-5 and abs(float(metrics["teacher_divergence"][0])) <= 1e-5
    assert all(float(jnp.abs(x).max()) <= 1e-6 * size for x in jax.tree.leaves(gradient))


def test_what_does_not_count_reaches_nothing():
    """NaN in the teacher's or the student's logits at tokens of weight 0."""
    masked = BATCH | {"decoder_loss_weights": BATCH["decoder_loss_weights"] * (BATCH["decoder_segment_ids"] == 1)}
    (expected, _), gradient = loss_of(model(1), model(2), masked)
    outside = masked | {"decoder_target_tokens": np.where(masked["decoder_segment_ids"] == 1, 3, VOCAB + 5)}
    inside = masked | {"decoder_target_tokens": np.where(masked["decoder_segment_ids"] == 1, 3, 3)}
    for found, of in zip(loss_of(model(1), model(2), outside), loss_of(model(1), model(2), inside), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, of)
    assert np.isfinite(float(expected)) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


BLOCK = STACK.blocks[0]
WINDOW, ALIBI = (
    dataclasses.replace(BLOCK, attention=dataclasses.replace(BLOCK.attention, **changed))
    for changed in ({"window": (2, 1)}, {"position": Alibi()})
)


@pytest.mark.parametrize(
    "architecture, block, changed",
    [
        (Architecture.CAUSAL_DECODER, BLOCK, {}),
        (Architecture.PREFIX_DECODER, BLOCK, {}),
        (Architecture.CAUSAL_DECODER, WINDOW, {}),
        (Architecture.PREFIX_DECODER, WINDOW, {}),
        (Architecture.CAUSAL_DECODER, ALIBI, {"future_tokens": 1, "future_block": ALIBI}),
    ],
    ids=["causal", "prefix", "causal window", "prefix window", "several tokens ahead"],
)
def test_a_decoder_reads_an_encoder_decoders_batch_as_one_text(architecture, block, changed):
    """Packed pairs in two rows, one without inputs: hidden states at the targets are those of the joined texts."""
    # Two layers: the second reads what the inputs' columns saw in the first.
    stack = dataclasses.replace(STACK, blocks=(block,), num_layers=2)
    teacher = model(3, dataclasses.replace(DECODER, architecture=architecture, decoder=stack, **changed))
    pairs = [(text(4, 3), text(5, 4)), (text(6, 5), text(7, 2)), (text(8, 0), text(9, 3))]
    encoder, decoder = batch_of(*(pair[0] for pair in pairs), length=10), batch_of(*(p[1] for p in pairs), length=11)
    batch = decoder | {
        "encoder_input_tokens": encoder["decoder_target_tokens"],
        "encoder_segment_ids": encoder["decoder_segment_ids"],
        "encoder_positions": encoder["decoder_positions"],
    }
    made = teacher_batch(jax.tree.map(jnp.asarray, batch), Taught(None, teacher, START))
    found = np.asarray(teacher.hidden_states(made)[0])[0, 10:]
    at = 0
    for inputs, targets in pairs:
        joined = batch_of(np.concatenate([inputs, targets]), length=len(inputs) + len(targets))
        seen = min(len(inputs) + 1, joined["decoder_positions"].shape[1]) if len(inputs) else 0
        joined["decoder_causal_attention"] = (joined["decoder_positions"] < seen).astype(np.int32)
        expected = np.asarray(teacher.hidden_states(joined)[0])[0, len(inputs) :]
        np.testing.assert_allclose(found[at : at + len(targets)], expected, atol=1e-5 * np.abs(expected).max())
        at += len(targets)


def test_a_state_that_runs_along_the_row_cannot_join_two_texts():
    """Refused for an encoder-decoder's inputs and targets, in one sentence; not for a decoder's rows."""
    mamba = MambaBlockConfig(mixer=MambaConfig(inner=32, step_rank=2, state=4), norm=NormConfig())
    config = dataclasses.replace(DECODER, decoder=dataclasses.replace(STACK, blocks=(mamba,)))
    teacher = Teacher(config, None, {}, START, "runs/teacher", None)
    crossed = dataclasses.replace(BLOCK, cross_attention=AttentionConfig(2, 8))
    student = dataclasses.replace(
        DECODER,
        architecture=Architecture.ENCODER_DECODER,
        encoder=STACK,
        decoder=dataclasses.replace(STACK, blocks=(crossed,)),
    )
    parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
    options = {"vocabulary": None, "row_length": 8}
    check_teacher(teacher, config, SpanCorruption(), parallel, **options)
    check_teacher(dataclasses.replace(teacher, config=DECODER), student, SpanCorruption(), parallel, **options)
    with pytest.raises(ValueError, match="runs/teacher has a layer of MambaConfig, which .* as one text") as error:
        check_teacher(teacher, student, SpanCorruption(), parallel, **options)
    assert str(error.value).count(". ") == 0


def test_which_teacher_can_teach_whom():
    decoder, encoder = Architecture.CAUSAL_DECODER, Architecture.ENCODER
    assert refuses_teacher(Architecture.ENCODER_DECODER, decoder) is None
    assert refuses_teacher(Architecture.PREFIX_DECODER, decoder) is None
    assert "use a teacher that is one of causal_decoder" in refuses_teacher(decoder, Architecture.PREFIX_DECODER)
    assert "use a teacher that is one of encoder" in refuses_teacher(encoder, decoder)
    with pytest.raises(ValueError, match="a share in 0..1 and a temperature above 0, got 1.5"):
        Distillation("there", share=1.5)
