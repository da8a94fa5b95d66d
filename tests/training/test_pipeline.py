"""Law 3 for pipelines: models in stages have the loss and gradients of one device, with dropout on."""

import json


def test_pipelines_agree_in_loss_and_gradients_leaf_by_leaf(run_python):
    """Decoder, prefix decoder, encoder, experts, encoder-decoder; GPipe and rounds; identity layers; checkpoints."""
    output = run_python(["tests/training/pipeline_program.py"], devices=8, timeout=900).stdout
    answer = json.loads(output.strip().splitlines()[-1])
    assert answer.pop("restored") == [True, True, True]
    assert answer.pop("identities") == [[6, 7], 6, 32 * 4 * 8 * 6 / 8]
    assert answer.pop("stored") == 4  # in stages, and over `data`
    assert len(answer) == 6
    for name, found in answer.items():
        assert found["loss"] <= 1e-6, (name, answer)
        assert found["gradients"] <= 1e-5, (name, answer)
