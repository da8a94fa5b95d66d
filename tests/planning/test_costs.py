"""What a compiled program costs: loops multiplied out, collectives named by mesh axis, nothing missing in silence."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.planning.costs import costs, matmul_flops
from jaxlm.planning.hlo import parse
from jaxlm.planning.trips import executions
from pallas_kernels import ahead_of_time
from pallas_kernels.ahead_of_time import writing_no_cache

N = 16


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_products_in_nested_scans_are_multiplied_by_both_trip_counts():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0] @ ws[0], None

    hlo = compiled(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (N, N), (5, 3, N, N))
    assert matmul_flops(hlo) == 2 * N**3 * (5 * 3 + 5)
    # Without XLA's annotations, as on TPUs, the loops' counters are followed.
    bare = hlo.replace("known_trip_count", "something_else")
    assert bare != hlo and matmul_flops(bare) == matmul_flops(hlo)
    assert set(executions(parse(bare)).values()) == {1, 5, 5 * 3}


def test_batched_products_and_branches():
    hlo = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, N, 8), (7, 8, 4))
    assert matmul_flops(hlo) == 2 * 7 * N * 8 * 4
    hlo = compiled(
        lambda x, p: jax.lax.cond(p[0] > 0, lambda y: jnp.sin(y @ y) @ y, lambda y: y, x), (2 * N, 2 * N), (1,)
    )
    assert matmul_flops(hlo) == 2 * 2 * (2 * N) ** 3  # the dearer branch


LOOP_IN_A_BRANCH = """\
HloModule m

%body (p: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %p = (s32[], s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %d = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], s32[], f32[4,4]{1,0}) tuple(%next, %n, %d)
}

%cond (c: (s32[], s32[], f32[4,4])) -> pred[] {
  %c = (s32[], s32[], f32[4,4]{1,0}) parameter(0)
  %ci = s32[] get-tuple-element(%c), index=0
  %cn = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%ci, %cn), direction=LT
}

%yes (y: (s32[], f32[4,4])) -> f32[4,4] {
  %y = (s32[], f32[4,4]{1,0}) parameter(0)
  %yn = s32[] get-tuple-element(%y), index=0
  %yx = f32[4,4]{1,0} get-tuple-element(%y), index=1
  %zero = s32[] constant(0)
  %init = (s32[], s32[], f32[4,4]{1,0}) tuple(%zero, %yn, %yx)
  %w = (s32[], s32[], f32[4,4]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%w), index=2
}

%no (z: f32[4,4]) -> f32[4,4] {
  ROOT %z = f32[4,4]{1,0} parameter(0)
}

%inner (q: (s32[], f32[4,4], pred[])) -> f32[4,4] {
  %q = (s32[], f32[4,4]{1,0}, pred[]) parameter(0)
  %qx = f32[4,4]{1,0} get-tuple-element(%q), index=1
  %qp = pred[] get-tuple-element(%q), index=2
  %five = s32[] constant(5)
  %arg = (s32[], f32[4,4]{1,0}) tuple(%five, %qx)
  ROOT %r = f32[4,4]{1,0} conditional(%qp, %arg, %qx), true_computation=%yes, false_computation=%no
}

ENTRY %main (a: f32[4,4], b: pred[]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %b = pred[] parameter(1)
  %hundred = s32[] constant(100)
  %in = (s32[], f32[4,4]{1,0}, pred[]) tuple(%hundred, %a, %b)
  ROOT %call = f32[4,4]{1,0} call(%in), to_apply=%inner
}
"""


def test_a_loop_in_a_branch_turns_as_often_as_the_branch_is_told():
    """A branch's parameter is the conditional's operand, not its computation's parameter, which holds 100 there."""
    found = costs(LOOP_IN_A_BRANCH, platform="cpu")
    assert found.matmul_flops == 5 * 2 * 4**3 and not found.not_counted


def test_a_loop_that_its_data_end_is_counted_once_and_named():
    hlo = compiled(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x), (N, N))
    found = costs(hlo, platform="cpu")
    assert found.matmul_flops == 2 * N**3
    assert len(found.not_counted) == 1 and "ends when its data say" in found.not_counted[0]
    with pytest.raises(ValueError, match="no known trip count"):
        matmul_flops(hlo)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        costs("nothing")


def module(*lines, parameters="p: f32[8,4]"):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %main ({parameters}) -> f32[8,4] {{\n{body}\n}}\n"


MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",), 2),
        ("replica_groups=[8,2]<=[16]", ("tensor",), 2),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",), 4),
        ("replica_groups=[2,8]<=[8,2]T(1,0)", ("data", "fsdp"), 8),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data'}", ("data",), 2),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(2)4}", ("fsdp",), 4),
        ("replica_groups=mesh['axis_0'=16] {'axis_0'}", ("data", "fsdp", "tensor"), 16),
    ],
)
def test_a_collective_is_named_by_the_axes_its_groups_run_over(groups, axes, size):
    (found,) = costs(
        module(
            "%p = f32[8,4]{1,0} parameter(0)",
            f"ROOT %r = f32[8,4]{{1,0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add",
        ),
        MESH,
    ).collectives
    assert (found.kind, found.axes, found.group, found.count, found.bytes) == ("all-reduce", axes, size, 1, 128)
    assert found.sent == 2 * 128 * (size - 1) / size


def test_permutes_and_gathers():
    found = costs(
        module(
            "%p = bf16[8,4]{1,0} parameter(0)",
            "%g = bf16[32,4]{1,0} all-gather(%p), replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}",
            "ROOT %r = bf16[8,4]{1,0} collective-permute(%p), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}",
            parameters="p: bf16[8,4]",
        ),
        MESH,
    ).collectives
    by_kind = {collective.kind: collective for collective in found}
    assert by_kind["all-gather"].bytes == 4 * 64  # the whole array
    assert by_kind["collective-permute"].axes == ("fsdp",)
    assert by_kind["collective-permute"].sent == 64


def test_a_fusion_reads_the_slice_it_takes_and_writes_the_update_it_makes():
    def scan(x):  # [100, N]: reads a row, writes a row
        return jax.lax.fori_loop(0, 100, lambda i, y: y.at[i].set(jnp.sin(y[i]) * 2), x)

    found = costs(compiled(scan, (100, 64)), platform="cpu")
    row = 64 * 4
    assert 100 * 2 * row <= found.bytes <= 100 * 6 * row + 4 * 100 * row  # not 100 times the whole array
    assert found.bytes < 100 * 100 * row / 10


def test_attributes_may_break_lines_and_computations_have_threads():
    hlo = """HloModule m

%other (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %s = f32[8,4]{1,0} sine(%q), frontend_attributes={kernel_metadata={
}}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %f = f32[8,4]{1,0} fusion(%p), kind=kLoop, calls=%other
}
"""
    assert costs(hlo).bytes == 2 * 8 * 4 * 4


def test_padding_is_not_multiplied():
    """TPUs write a sharded product as a convolution whose window is mostly padding."""
    hlo = module(
        "%p = f32[4,16,1]{2,1,0} parameter(0)",
        "%w = f32[16,16,8]{2,1,0} parameter(1)",
        "ROOT %c = f32[4,8,1]{2,1,0} convolution(%p, %w), window={size=16 pad=15_15 rhs_reversal=1}, "
        "dim_labels=bf0_0io->bf0",
        parameters="p: f32[4,16,1], w: f32[16,16,8]",
    )
    assert costs(hlo).matmul_flops == 2 * 4 * 16 * 8 * 1


def test_kernels_without_a_declared_cost_are_named():
    line = 'ROOT %attention.1 = f32[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config='
    start = "%p = f32[8,4]{1,0} parameter(0)"
    found = costs(module(start, line + '{"custom_call_config":{"body":"x"}}'))
    assert found.flops == 0 and "attention" in found.not_counted[0]
    declared = '{"custom_call_config":{"cost_estimate":{"flops":"70","transcendentals":"1","bytes_accessed":"90"}}}'
    found = costs(module(start, line + declared))
    assert (found.kernel_flops, found.bytes, found.not_counted, found.kernels) == (70, 90, (), {"attention": 1})


def test_a_scanned_sharded_stack_on_a_tpu():
    """Under FSDP: twice the layers are twice the products and collectives, and none hides or counts twice."""
    if reason := ahead_of_time.why_not("v5e:2x2"):
        pytest.skip(reason)
    mesh = MeshConfig(fsdp=4).make(ahead_of_time.devices("v5e:2x2"))
    rows, width = 64, 256

    def place(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(ws, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    def of(layers):
        given = place((layers, width, width), None, "fsdp"), place((4 * rows, width), "fsdp")
        step = jax.jit(jax.grad(loss), out_shardings=given[0].sharding)
        with writing_no_cache():
            return costs(step.lower(*given).compile().as_text(), dict(mesh.shape))

    found, double = of(4), of(8)
    assert found.matmul_flops == 3 * 4 * 2 * rows * width * width
    assert double.matmul_flops == 2 * found.matmul_flops
    assert not found.not_counted and not double.not_counted
    assert {collective.axes for collective in double.collectives} == {("fsdp",)}
    sent, twice = (sum(collective.sent for collective in c.collectives) for c in (found, double))
    assert sent > 4 * width * width * 4 * 3 / 4  # at least one sum of gradients a layer
    assert twice == pytest.approx(2 * sent, rel=0.02)
