"""Our TPU attention kernels: against float64, counted block by block, watched for races, compiled ahead of time."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import ahead_of_time, conformance, masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends.pallas_tpu import PallasTpuBackend
from pallas_kernels.biases import AlibiBias, DenseBias, RelativeBias
from pallas_kernels.plans import HIDDEN
from pallas_kernels.tpu import attention as tpu_attention
from pallas_kernels.tpu import attention_backward, attention_forward, block_sizes, schedule
from pallas_kernels.tpu.attention import TpuKernels
from pallas_kernels.tpu.block_sizes import Blocks

SMALL = Blocks(128, 128, 128, 128)
ORDINARY = ("packed prefix", "block sparse", "relative", "dropout")


def ordinary(names, *others):
    """`names`, and `others` in the complete set only: each compiles for seconds."""
    return [*names, *(pytest.param(name, marks=pytest.mark.full) for name in others)]


def others(cases, *names):
    return [name for name in cases if name not in names]


@pytest.fixture
def small_blocks(monkeypatch):
    """The backend with blocks of 128, so that the few keys of a test make several."""
    monkeypatch.setitem(ATTENTION.backends, "pallas_tpu", PallasTpuBackend(TpuKernels(SMALL, SMALL)))


@pytest.mark.parametrize("name", ordinary(ORDINARY, *others(conformance.CASES, *ORDINARY)))
def test_float32(name, small_blocks):
    conformance.check("pallas_tpu", name, jnp.float32)


@pytest.mark.parametrize("name", ordinary(["packed prefix"], *others(conformance.CASES, "packed prefix")))
def test_bfloat16(name, small_blocks):
    conformance.check("pallas_tpu", name, jnp.bfloat16)


@pytest.mark.parametrize("name", ordinary(["dense bias"], "full"))
def test_blocks_of_the_table(name):
    """All 200 keys are in one block here, in tiles of 128, and nothing is listed."""
    conformance.check("pallas_tpu", name, jnp.float32)


def test_nothing_leaks(small_blocks):
    conformance.check_nothing_leaks("pallas_tpu", jnp.float32)


@pytest.mark.parametrize(
    "name, by_heads", [pytest.param("packed prefix", False, marks=pytest.mark.full), ("block sparse", True)]
)
def test_parts_where_lists_have_no_room(name, by_heads, small_blocks, monkeypatch):
    """One example, or one key head of one, at a time: each is a list of 8 entries here, all are 16 and 32."""
    monkeypatch.setattr(schedule, "MOST_ENTRIES", 10)
    in_parts, used = tpu_attention._in_parts, []
    monkeypatch.setattr(tpu_attention, "_in_parts", lambda *args: used.append(args[-1]) or in_parts(*args))
    conformance.check("pallas_tpu", name, jnp.float32)
    assert used == [by_heads]


def taken_in_parts(monkeypatch):
    """A list that gets (examples of a part, whether by heads) of each call that is taken in parts."""
    in_parts, taken = tpu_attention._in_parts, []
    monkeypatch.setattr(tpu_attention, "_in_parts", lambda *args: taken.append(args[-2:]) or in_parts(*args))
    return taken


@pytest.mark.parametrize(
    ("batch", "length", "part"), [(4096, 2048, None), (8192, 2048, 4096), (4098, 2048, 2049), (4097, 1024, None)]
)
def test_lists_number_4096_examples(batch, length, part, monkeypatch):
    """More are taken in parts, of a size that divides them; rows of one block of scores need no list."""
    taken = taken_in_parts(monkeypatch)
    x, ids = jax.ShapeDtypeStruct((batch, length, 1, 64), jnp.float32), jax.ShapeDtypeStruct((batch, length), jnp.int32)
    attend = lambda x, ids: attention(x, x, x, mask=masks.Causal() & masks.Segments(ids), backend="pallas_tpu")  # noqa: E731
    assert jax.eval_shape(attend, x, ids).shape == x.shape
    assert taken == ([] if part is None else [(part, False)])


def test_parts_of_several_examples(small_blocks, monkeypatch):
    """Four examples, two at a time: output and gradients are those of another backend."""
    monkeypatch.setattr(schedule, "MOST_EXAMPLES", 2)
    taken, rng = taken_in_parts(monkeypatch), np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(4, 256, heads, 64)), jnp.float32) for heads in (2, 1))
    mask = masks.Causal() & masks.Segments(np.sort(rng.integers(1, 4, (4, 256)), axis=1))

    def found(backend):
        loss = lambda q, k: (attention(q, k, k, mask=mask, backend=backend) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(q, k)

    for ours, theirs in zip(*(jax.tree.leaves(found(backend)) for backend in ("pallas_tpu", "xla")), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert set(taken) == {(2, False)}


@pytest.mark.parametrize("name", ordinary(["relative"], "packed prefix", "dense bias", "block sparse"))
def test_parts_where_sums_have_no_room(name, small_blocks, monkeypatch):
    """dk and dv of one block of keys at a time."""
    monkeypatch.setattr(block_sizes, "vmem", lambda chip: 1)
    conformance.check("pallas_tpu", name, jnp.float32)


LENGTH = 512
IDS = np.zeros((2, LENGTH), np.int32)
IDS[0, :140], IDS[0, 140:256], IDS[0, 256:400], IDS[1, :300] = 1, 2, 3, 1
VISITED = {
    "packed prefix": masks.PrefixLM(np.full((2, LENGTH), 200, np.int32)) & masks.Segments(IDS),
    "documents": masks.Segments(IDS),
    "window": masks.Causal() & masks.Window(100, 0),
    "longformer": masks.Window(40, 40) | masks.GlobalTokens(3),
    "block sparse": masks.BlockSparse.of_map(np.random.default_rng(0).random((1, 2, 4, 4)) < 0.4, (128, 128)),
    "nothing": masks.KVLength(np.zeros(2, np.int32)),
}


@pytest.mark.parametrize(
    "name", ordinary(["packed prefix", "block sparse"], *others(VISITED, "packed prefix", "block sparse"))
)
def test_visits_exactly_the_visible_blocks(name, monkeypatch):
    """Both kernels compute a block of a head once if any pair of it is visible, and mask it unless all are."""
    visits = {"forward": collections.Counter(), "backward": collections.Counter()}

    def count(kernel, here, masked):
        step = here.step
        place = step.example, step.head, step.query_block, step.key_block
        jax.debug.callback(lambda *place: visits[kernel].update([(*map(int, place), masked)]), *place)

    attend, differentiate = attention_forward._attend, attention_backward._differentiate
    monkeypatch.setattr(
        attention_forward,
        "_attend",
        lambda row, here, *rest: (count("forward", here, rest[1]), attend(row, here, *rest)),
    )
    monkeypatch.setattr(
        attention_backward,
        "_differentiate",
        lambda here, *rest: (count("backward", here, rest[2]), differentiate(here, *rest)),
    )
    monkeypatch.setitem(ATTENTION.backends, "pallas_tpu", PallasTpuBackend(TpuKernels(SMALL, SMALL)))
    mask = VISITED[name]
    q, k = jnp.ones((2, LENGTH, 2, 64)), jnp.ones((2, LENGTH, 1, 64))
    jax.grad(lambda q: attention(q, k, k, mask=mask, backend="pallas_tpu").sum())(q)
    jax.effects_barrier()

    dense = np.broadcast_to(mask.dense(LENGTH, LENGTH), (2, 2, LENGTH, LENGTH))
    blocks = dense.reshape(2, 2, 4, 128, 4, 128)
    some, all_ = blocks.any((3, 5)), blocks.all((3, 5))
    expected = collections.Counter((*map(int, place), bool(not all_[place])) for place in zip(*np.nonzero(some)))
    assert visits == {"forward": expected, "backward": expected}


@pytest.mark.parametrize("group", [1, 2])
def test_lists_open_and_close_rows_and_scopes(group):
    """Each row of blocks is opened first and closed last; so is each group of heads, and what sees nothing is there."""
    state = (np.random.default_rng(1).random((2, 1, 3, 5)) < 0.4).astype(np.int8)
    state[1, 0, 1] = HIDDEN
    plan = masks.Plan(jnp.asarray(state), (128, 128))
    walk = schedule.listed(plan, 2, 4, group)
    steps = [walk.step(0, 0, n, walk.place, walk.notes) for n in range(int(walk.count))]
    rows, scopes = [], []
    for step in steps:
        row = int(step.example), int(step.head), int(step.query_block)
        assert bool(step.opens_row) == (not rows or rows[-1] != row)
        assert bool(step.opens_scope) == (not scopes or scopes[-1] != row[0])
        rows.append(row)
        scopes.append(row[0])
    for number, step in enumerate(steps):
        assert bool(step.closes_row) == (rows[number + 1 :][:1] != [rows[number]])
        assert bool(step.closes_scope) == (scopes[number + 1 :][:1] != [scopes[number]])
    assert sorted(set(rows)) == rows_of(2, group, 3)
    idle = [step for step in steps if not step.partial and not step.full]
    assert [(int(s.example), int(s.query_block)) for s in idle] == [
        (e, i) for e in range(2) for _ in range(group) for i in range(3) if not state[e, 0, i].any()
    ]


def rows_of(*sizes):
    return [tuple(map(int, place)) for place in np.ndindex(*sizes)]


@pytest.mark.parametrize("name", ["packed prefix", "block sparse"])
def test_no_races_and_no_memory_read_before_it_is_written(name, small_blocks, no_races):
    q, k, v, *_ = conformance.inputs(conformance.CASES[name], jnp.float32)
    mask = conformance.options(conformance.CASES[name])["mask"]

    def gradients(backend):
        def loss(*arrays):
            return jnp.sum(attention(*arrays, mask=mask, backend=backend) ** 2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    with (
        no_races(),
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")),
    ):
        found = jax.block_until_ready(gradients("pallas_tpu"))
    for x, y in zip(found, gradients("xla")):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_under_vmap_jit_and_checkpoint(small_blocks):
    """A batch of calls, each with its own mask, is as many calls."""
    q, k, v, *_ = conformance.inputs(conformance.CASES["packed prefix"], jnp.float32)
    ends = jnp.array([[70, 0], [10, 130]], jnp.int32)

    def loss(q, end):
        return jnp.sum(attention(q, k, v, mask=masks.PrefixLM(end), backend="pallas_tpu") ** 2)

    gradient = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))
    found = gradient(jnp.stack([q, 2 * q]), ends)
    for n, factor in enumerate((1, 2)):
        np.testing.assert_allclose(found[n], jax.grad(loss)(factor * q, ends[n]), rtol=1e-5, atol=1e-6)


def test_blocks_fit_the_lengths():
    wanted = Blocks(1024, 1024, 512, 512)
    assert block_sizes.fitted(wanted, 4096, 4096) == wanted
    assert block_sizes.fitted(wanted, 200, 90) == Blocks(256, 128, 256, 128)
    assert block_sizes.fitted(wanted, 1500, 3000) == Blocks(768, 1024, 384, 512)  # not 2 blocks of 1024 for 1500
    assert block_sizes.fitted(wanted, 4096, 4096, within=(256, 384)) == Blocks(256, 384, 256, 384)


@pytest.mark.parametrize("chip", [*block_sizes.VMEM, "another"])
@pytest.mark.parametrize("size", [64, 80, 128, 256, 512])
def test_every_chip_and_size_has_blocks(chip, size):
    for blocks in (block_sizes.forward(chip, size), block_sizes.backward(chip, size)):
        assert blocks.queries % blocks.sub_queries == 0 and blocks.keys % blocks.sub_keys == 0
        assert blocks.sub_queries % 128 == 0 and blocks.sub_keys % 128 == 0


def refusal(platform="cpu", kind="cpu", dtype=jnp.float32, mask=None, length=256):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    x = jax.ShapeDtypeStruct((1, length, 1, 64), dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        with pytest.raises(UnsupportedAttention) as error:
            jax.eval_shape(lambda x: attention(x, x, x, mask=mask or masks.Full(), backend="pallas_tpu"), x)
    return str(error.value)


def test_refusals_say_what_and_who_can():
    assert "pallas_tpu cannot: it runs on TPUs, and interpreted on CPUs, not on a gpu." in refusal("gpu", "NVIDIA H200")
    assert "not for 'tpu v4'" in refusal("tpu", "TPU v4")
    assert "bfloat16 or float32, not in float16" in refusal(dtype=jnp.float16)
    assert "not made of key intervals" in refusal(mask=masks.Dense(np.ones((1, 1, 256, 256), bool)))
    sparse = masks.BlockSparse(np.zeros((1, 1, 4, 2), np.int32), np.ones((1, 1, 4), np.int32), (64, 64))
    assert "BlockSparse.block=(64, 64) is not in multiples of 128" in refusal(mask=sparse)
    many = masks.BlockSparse(np.zeros((1, 1, 512, 256), np.int32), np.ones((1, 1, 512), np.int32), (128, 128))
    said = refusal(mask=many, length=512 * 128)
    assert "a list of 131072 blocks is longer than the 110000 that scalar memory holds" in said
    assert set(said.partition("Backends that can: ")[2].rstrip(".").split(", ")) == {"xla", "xla_blocks", "xla_chunked"}


WHY_NOT = ahead_of_time.why_not("v6e:2x2")
compiles = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
FEATURES = {
    "packed prefix": dict(mask=lambda ids: masks.PrefixLM(ids) & masks.Segments(ids)),
    "longformer": dict(mask=lambda ids: (masks.Window(90, 90) | masks.GlobalTokens(5)) & masks.Segments(ids)),
    "block sparse": dict(
        mask=lambda ids: (
            masks.BlockSparse(ids[:, :16].reshape(1, 2, 4, 2), ids[:, :8].reshape(1, 2, 4), (128, 128)) & masks.Causal()
        )
    ),
    "no mask": dict(mask=lambda ids: masks.Full()),
    "alibi": dict(bias=lambda table: AlibiBias(table[0])),
    "relative": dict(bias=RelativeBias, learned=True),
    "dense bias": dict(bias=lambda table: DenseBias(jnp.zeros((1, 2, 512, 512)) + table[0, 0], True), learned=True),
    "soft cap": dict(soft_cap=20.0),
    "dropout": dict(dropout_rate=0.1, dropout_key=jax.random.key(0)),
    "head size 80": dict(size=80),
    "head size 256": dict(size=256),
    "float32": dict(dtype=jnp.float32),
}
CHIPS = [*ahead_of_time.TPUS]


def compiled(
    topology,
    length=512,
    size=64,
    dtype=jnp.bfloat16,
    mask=FEATURES["packed prefix"]["mask"],
    bias=None,
    learned=False,
    **call,
):
    """Forward and backward together, for a TPU."""

    def loss(q, k, v, table, ids):
        given = bias and bias(table)
        return attention(q, k, v, mask=mask(ids), bias=given, backend="pallas_tpu", **call).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((1, length, heads, size), dtype) for heads in (2, 1))
    table, ids = jax.ShapeDtypeStruct((32, 2), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    return ahead_of_time.compile_for(topology, jax.grad(loss, range(4 if learned else 3)), q, k, k, table, ids)


@compiles
@pytest.mark.parametrize(
    "topology, feature",
    [
        pytest.param(chip, name, marks=[] if chip == "v6e:2x2" and name in ORDINARY else pytest.mark.full)
        for chip in CHIPS
        for name in FEATURES
    ],
)
def test_compiles(topology, feature, small_blocks):
    compiled(topology, **FEATURES[feature])


@compiles
def test_the_compiler_is_told_the_work(small_blocks):
    """Two products forward and five backward over all blocks, since nobody knows beforehand which a mask hides."""
    program = compiled("v6e:2x2")
    pairs, size = 2 * 512 * 512, 64
    costs = [cost for _, cost in ahead_of_time.declared_costs(program)]
    assert [cost.flops for cost in costs] == [2 * pairs * 2 * size, 2 * pairs * 5 * size]
    assert all(cost.transcendentals == pairs for cost in costs)
    q, k = 2 * 512 * size * 2, 512 * size * 2
    assert all(cost.bytes > 2 * q + 2 * k for cost in costs)
    assert program.cost_analysis()["flops"] >= 2 * pairs * 7 * size


@compiles
@pytest.mark.full
@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("length, size", [(2048, 64), (4096, 128), (4096, 256), (32768, 128), (131072, 128)])
def test_compiles_with_the_blocks_of_the_table(topology, length, size):
    """And takes memory for a few arrays of the size of q, not for scores."""
    memory = ahead_of_time.memory(compiled(topology, length=length, size=size))
    q = 2 * length * max(size, 128) * 2
    assert memory.temporaries < 16 * q
