"""The GPU's training-step benchmark, on shapes that a CPU can run."""

import json

import numpy as np
import pytest

from benchmarks import train_step_gpu
from benchmarks.train_step_gpu import DOES_NOT_FIT, NOT_YET, Case, best, compared, random_batch, sweep
from jaxlm.configuration import resolve
from jaxlm.run import RunConfig

TINY = {
    "NUM_LAYERS": 2,
    "WIDTH": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 2,
    "HEAD_DIM": 16,
    "HIDDEN": 64,
    "VOCAB_SIZE": 64,
}


@pytest.mark.parametrize("side", ["decoder", "encoder_decoder"])
def test_the_cases_are_runs(side, monkeypatch):
    """Of 1B parameters each side of the encoder, and a step of the same files in small can be measured."""
    monkeypatch.setattr(train_step_gpu, "LENGTH", 32)
    whole = train_step_gpu.arguments(Case(side, 4, "none"))
    run = resolve(RunConfig, whole)
    assert run.batch_size == 4 and run.parallel.mesh.fsdp == 1 and run.model.compute.value == "bfloat16"
    assert {stack.num_layers for stack in run.model.stacks.values()} == {16}
    tiny = [f"--gin.{name}={value}" for name, value in TINY.items()]
    monkeypatch.setattr(train_step_gpu, "arguments", lambda case: [*whole, *tiny])
    monkeypatch.setattr(train_step_gpu, "STEPS", 2)
    found = train_step_gpu.with_rates(train_step_gpu.run_jaxlm(Case(side, 4, "none")))
    stacks = 2 if side == "encoder_decoder" else 1
    assert found["tokens"] == 4 * 32 * stacks and len(found["seconds"]) == train_step_gpu.ROUNDS
    assert found["losses"][1] < found["losses"][0] and found["tokens_per_second"] > 0 and found["MFU"] < 1


def test_a_batch_is_whole_documents():
    shapes = {f"decoder_{name}": ((2, 5), np.dtype(np.int32)) for name in ("input_tokens", "segment_ids", "positions")}
    made = random_batch(shapes | {"dataset_ids": ((2, 5), np.dtype(np.int32))}, 11)
    assert made["decoder_positions"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (made["decoder_segment_ids"] == 1).all() and not made["dataset_ids"].any()
    assert 3 <= made["decoder_input_tokens"].min() and made["decoder_input_tokens"].max() < 11


def test_a_sweep_goes_on_where_less_memory_is_needed(monkeypatch, capsys):
    room = {"none": 8, "dots": 16, "block": 16, "full": 64}
    tried = []

    def measure(case, how):
        tried.append((case.remat, case.batch))
        fits = case.batch <= room[case.remat]
        return {"seconds": [0.1], "tokens": case.batch, "model_flops": 1e12} if fits else {DOES_NOT_FIT: 1}

    monkeypatch.setattr(train_step_gpu, "measure", measure)
    rows = sweep("decoder", "run", (4, 8, 16, 32))
    assert tried == [
        *(("none", n) for n in (4, 8, 16)),
        *(("dots", n) for n in (16, 32)),
        ("block", 32),
        ("full", 32),
    ]
    assert best(rows)["batch"] == 32 and best(rows)["remat"] == "full" and best([]) is None
    assert [json.loads(line.removeprefix("decoder ")) for line in capsys.readouterr().out.splitlines()] == rows


def test_sides_are_compared_at_their_best():
    row = {"batch": 1, "remat": "none", "MFU": 0.5}
    device = {
        "decoder": [row | {"tokens_per_second": 10}, row | {"tokens_per_second": 30}],
        "transformers": [row | {"tokens_per_second": 20}],
        "transformers, flash_attention_2": [{"failed": "not installed"}],
    }
    found = compared({"device": device})
    assert found["decoder / transformers"] == 1.5 and found["best"]["fp8"] == NOT_YET
    assert compared({"device": {}})["decoder / transformers"] == NOT_YET
