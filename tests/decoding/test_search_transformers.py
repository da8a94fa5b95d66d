"""Beam search of a decoder and of an encoder-decoder finds the texts and scores that transformers finds."""

import numpy as np
import pytest

from jaxlm.checkpoints import pretrained
from jaxlm.decoding.beam import BeamConfig, EarlyStopping, PowerPenalty, beam_search
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.requests import Finish

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install -e '.[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install -e '.[torch]'")

PROMPTS = np.random.default_rng(0).integers(4, 60, (3, 7))
ENDS = tuple(range(1, 9))  # so that texts of all lengths end


def small_model(kind):
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, tie_word_embeddings=False, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


# By kind of model: (alpha, early stopping here, and there).
SEARCHES = {
    "llama": [(1.0, EarlyStopping.HOPELESS, False), (0.5, EarlyStopping.FULL, True)],
    "t5": [(0.3, EarlyStopping.PROVEN, "never")],
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_beams_are_those_of_transformers(kind, tmp_path):
    model = small_model(kind).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path)
    opened = pretrained.load(tmp_path)
    start = 0 if kind == "t5" else None
    ours = CachedModel(opened.model, start_id=start)
    ended = []
    for alpha, stopping, theirs in SEARCHES[kind]:
        config = BeamConfig(9, width=4, penalty=PowerPenalty(alpha), early_stopping=stopping, num_return=3)
        found = beam_search(ours, PROMPTS.tolist(), config, end_ids=ENDS)
        with torch.no_grad():
            expected = model.generate(
                torch.tensor(PROMPTS), attention_mask=torch.ones(PROMPTS.shape, dtype=torch.int64), max_new_tokens=9,
                num_beams=4, num_return_sequences=3, length_penalty=alpha, early_stopping=theirs, do_sample=False,
                output_scores=True, eos_token_id=list(ENDS), return_dict_in_generate=True,
            )  # fmt: skip
        skip = 1 if kind == "t5" else PROMPTS.shape[1]
        sequences = expected.sequences[:, skip:].reshape(3, 3, -1).tolist()
        scores = expected.sequences_scores.reshape(3, 3)
        for texts, rows, wanted in zip(found, sequences, scores, strict=True):
            np.testing.assert_allclose([text.score for text in texts], wanted, rtol=2e-5)
            for text, row in zip(texts, rows, strict=True):
                end = next((i for i, token in enumerate(row) if token in ENDS), None)
                assert text.tokens.tolist() == row[:end]
                assert text.finish is (Finish.LENGTH if end is None else Finish.STOP)
                ended.append(len(text.tokens))
    assert len(set(ended)) > 3  # lengths differ, so that penalties matter
