"""Cross-entropy on a mesh is that of one device, and neither the vocabulary's matrix nor logits travel for it."""

import json

import pytest

TOKENS, WIDTH, VOCABULARY = 4 * 32, 128, 1200  # of sharded_cross_entropy_program.py


@pytest.fixture(scope="module")
def answer(run_python):
    output = run_python(["tests/parallel/sharded_cross_entropy_program.py"], devices=8).stdout
    return json.loads(output.strip().splitlines()[-1])


def test_a_mesh_gives_what_one_device_gives(answer):
    """The sum, the scores, and the gradients of features, matrix and bias."""
    assert len(answer) == 9
    for name, found in answer.items():
        assert len(found["errors"]) == 8 and all(error < 1e-5 for error in found["errors"]), (name, found["errors"])


def test_a_split_vocabulary_stays_where_it_is(answer):
    """On tensor parallel meshes only the features' gradient and numbers a token are added up."""
    for name in ("sum, tensor", "recompute, tensor", "scores, tensor"):
        carried = answer[name]["collectives"]
        assert set(carried) == {"all-reduce"} and carried["all-reduce"] <= TOKENS * WIDTH, (name, carried)
    assert TOKENS * WIDTH < WIDTH * VOCABULARY // 8  # which is a device's part of the matrix


def test_under_fsdp_a_device_gathers_its_part_alone(answer):
    part = WIDTH * VOCABULARY // 4
    for name in ("sum, fsdp and tensor", "sum, kernel", "scores, kernel"):
        carried = answer[name]["collectives"]
        assert carried["all-gather"] == part and carried["reduce-scatter"] == part // 2, (name, carried)
        assert carried["all-reduce"] <= TOKENS * WIDTH, (name, carried)


def test_data_parallel_devices_add_up_gradients_of_their_part(answer):
    carried = answer["sum, rows and length"]["collectives"]
    assert carried.pop("all-reduce") == WIDTH * VOCABULARY // 2
    assert max(carried.values(), default=0) <= TOKENS * WIDTH, carried  # rows brought into the mesh's order
