"""The mesh dataclass refuses what cannot be, and rules give each mesh axis to at most one dimension."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.parallel.mesh import MESH_AXES, MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.parallel.rules import DEFAULT_RULES, spec


def test_data_takes_what_the_others_leave():
    assert MeshConfig(fsdp=2, tensor=2).degrees(8) == dict.fromkeys(MESH_AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}
    assert MeshConfig().degrees(8)["data"] == 8
    assert MeshConfig(data=2, fsdp=4).degrees(8)["fsdp"] == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(fsdp=0), "MeshConfig.fsdp is 0; it must be at least 1"),
        (lambda: MeshConfig(tensor=-1), "MeshConfig.tensor is -1"),
        (lambda: MeshConfig(data=-2), "-1 .all remaining devices. or at least 1"),
        (lambda: MeshConfig(fsdp=3).degrees(8), "multiply to 3, which does not divide the 8 devices"),
        (lambda: MeshConfig(data=2, fsdp=2).degrees(8), "multiply to 4, but there are 8 devices"),
    ],
)
def test_impossible_degrees_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_axes_are_automatic_so_that_indexing_works():
    mesh = MeshConfig().make(jax.devices()[:1])
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


class FakeMesh:
    """Only what `spec` reads of a mesh, so that the rules are tested without eight devices."""

    shape = dict.fromkeys(MESH_AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 16), P("fsdp", "tensor")),
        (("vocab", "embed"), (32, 8), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), (4, 8, 2, 16), P(None, "fsdp", "tensor")),
        # An activation gives fsdp to the batch, so embed stays whole.
        (("batch", "length", "embed"), (8, 16, 8), P(("data", "fsdp"))),
        (("batch", "length", "vocab"), (8, 16, 32), P(("data", "fsdp"), None, "tensor")),
        ((None, "unknown"), (3, 3), P()),
    ],
)
def test_default_rules(axes, shape, expected):
    assert spec(axes, DEFAULT_RULES, FakeMesh(), shape) == expected


def test_a_dimension_that_does_not_divide_is_replicated_with_a_reason():
    reasons = []
    assert spec(("embed", "kv_heads"), DEFAULT_RULES, FakeMesh(), (8, 1), reasons=reasons) == P("fsdp")
    assert reasons == ["kv_heads (1) is not a multiple of 2 (tensor), so it is replicated."]


def test_wrong_rules_and_axes_are_refused():
    with pytest.raises(ValueError, match=r"rule for 'embed' names \['row'\]"):
        spec(("embed",), (("embed", ("row",)),), FakeMesh(), (8,))
    with pytest.raises(ValueError, match="name each dimension once"):
        spec(("embed",), DEFAULT_RULES, FakeMesh(), (8, 8))
    with pytest.raises(ValueError, match="make the batch size a multiple of 4"):
        Parallelism(FakeMesh(), ParallelConfig(MeshConfig())).batch_sharding(6)


def test_experts_that_cannot_be_split_are_one_sentence():
    class FourForExperts(FakeMesh):
        shape = FakeMesh.shape | {"expert": 4}

    parallel = Parallelism(FourForExperts(), ParallelConfig(MeshConfig()))
    parallel.check_experts({4, 8})
    Parallelism(FakeMesh(), ParallelConfig(MeshConfig())).check_experts(set())
    with pytest.raises(ValueError, match="MeshConfig.expert splits experts over 4 devices, but the model has none"):
        parallel.check_experts(set())
    with pytest.raises(ValueError, match="The 6 experts of a layer .* make .*num_experts a multiple of 4"):
        parallel.check_experts({6})
