"""Disentangled attention, unbalanced encoder-decoders and gated shared experts compute the same on a mesh."""

import json


def test_meshes_and_one_device_agree(run_python):
    answer = json.loads(run_python(["tests/parallel/family_layers_program.py"], devices=8).stdout.splitlines()[-1])
    assert answer.pop("refusal").startswith("Disentangled attention needs its rows whole")
    assert max(answer.values()) <= 1e-5, answer
