"""Rules of a surgery: each gives exactly the numbers it says, on any layout, and a sentence where it does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.surgery import (
    AverageLayers,
    Constant,
    Copy,
    Drop,
    Fill,
    Fresh,
    Join,
    Keep,
    Merge,
    PickLayers,
    Rename,
    Reshape,
    Resize,
    Scale,
    Slice,
    Soup,
    Split,
    Transpose,
)
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.layers.stacking import StackLayout, stack

LAYERS, WIDTH, VOCAB = 4, 6, 10


def made(seed, layers=LAYERS):
    """Parameters of a decoder, unrolled."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return np.asarray(rng.normal(size=shape), np.float32)

    blocks = {str(i): {"kernel": normal(WIDTH, 4), "scale": normal(WIDTH)} for i in range(layers)}
    return {"decoder": {"layers": blocks, "norm": normal(WIDTH)}, "embedding": normal(VOCAB, WIDTH)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs' folders and what is in them."""
    found = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"run{seed}")
        with CheckpointManager(folder / "checkpoints", CheckpointConfig()) as manager:
            manager.save(1, {"params": jax.tree.map(jnp.asarray, made(seed))})
        found.append((str(folder), made(seed)))
    return found


def operated(runs, rules, like, layouts=(), **options):
    """The parameters after surgery on the first run's, and the account."""
    fresh = jax.tree.map(jnp.asarray, like)
    said = []
    started = warm_start(fresh, WarmStart(runs[0][0], rules=tuple(rules), **options), layouts, report=said.append)
    return jax.tree.map(np.asarray, started.params), said[0]


def alone(name, array):
    """A model with one parameter."""
    return {name: np.asarray(array, np.float32)}


def embedding(runs, *rules, like):
    """What becomes of the embedding, in a model with that shape."""
    kept = (Keep("embedding"), *rules)
    return operated(runs, kept, alone("embedding", np.full(like, 7.0)))[0]["embedding"]


def test_layers_are_picked_repeated_and_dropped(runs):
    old = runs[0][1]["decoder"]["layers"]
    order = ((0, 3), (1, 4), 0)
    picked = [0, 1, 2, 1, 2, 3, 0]
    params, said = operated(runs, [PickLayers(order)], made(9, layers=7))
    for new, source in enumerate(picked):
        for name in old["0"]:
            np.testing.assert_array_equal(params["decoder"]["layers"][str(new)][name], old[str(source)][name])
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "taken decoder/layers/0-2/kernel (3 layers)" in lines
    assert "mapped decoder/layers/3-6/kernel <- decoder/layers/1-3,0/kernel (4 layers)" in lines


def test_a_scanned_stack_gets_its_layers_one_by_one(runs):
    """Where layers come from disk, from a mean of others and from initialisation within one array."""
    layouts = (StackLayout(("decoder",), pattern=2, repeats=2),)
    rules = [AverageLayers(((0,), (1, 3), (2,))), Fresh("decoder/layers/3/.*")]
    like = made(9)
    params, _ = operated(runs, rules, stack(like, layouts), layouts)
    old = runs[0][1]["decoder"]["layers"]
    expected = [old["0"], jax.tree.map(lambda a, b: (a + b) / 2, old["1"], old["3"]), old["2"]]
    expected = {str(i): layer for i, layer in enumerate([*expected, like["decoder"]["layers"]["3"]])}
    expected = stack({"decoder": {"layers": expected}}, layouts)["decoder"]["layers"]
    assert jax.tree.structure(params["decoder"]["layers"]) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params["decoder"]["layers"], expected)


def test_a_soup_is_the_mean_of_its_checkpoints(runs):
    params, said = operated(runs, [Soup(tuple(path for path, _ in runs[1:]))], made(9))
    mean = jax.tree.map(lambda *x: np.mean(x, 0, dtype=np.float32), *(values for _, values in runs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, mean)
    assert "the mean of 3" in said and runs[2][0] in said
    params, _ = operated(runs, [Soup((runs[1][0],), coefficients=(0.0, 1.0))], made(9))
    jax.tree.map(np.testing.assert_array_equal, params, runs[1][1])


def test_parts_of_several_checkpoints_join(runs):
    """The decoder of one run, another's as encoder, cross-attention from the decoder's own, closed."""
    first, second = runs[0][1], runs[1][1]
    rules = [
        Copy(r"decoder/layers/(\d+)/kernel", r"decoder/layers/\1/cross"),
        Constant(r"decoder/layers/[01]/cross"),
        Join(runs[1][0], rules=(Keep("decoder/.*"), Rename("decoder/(.*)", r"encoder/\1"))),
    ]
    like = made(9) | {"encoder": made(9)["decoder"]}
    for layer in like["decoder"]["layers"].values():
        layer["cross"] = layer["kernel"]
    params, said = operated(runs, rules, like)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], second["decoder"])
    for i, layer in params["decoder"]["layers"].items():
        np.testing.assert_array_equal(layer["kernel"], first["decoder"]["layers"][i]["kernel"])
        np.testing.assert_array_equal(layer["cross"], layer["kernel"] * (int(i) > 1))
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert any(line.startswith("dropped embedding of") and runs[1][0] in line for line in lines)
    assert "mapped decoder/layers/0-1/cross <- 0 everywhere (2 layers)" in lines


def test_shapes_and_numbers_change_as_said(runs):
    old = runs[0][1]["embedding"]
    np.testing.assert_array_equal(embedding(runs, Transpose("embedding"), like=(WIDTH, VOCAB)), old.T)
    np.testing.assert_array_equal(embedding(runs, Reshape("embedding", (2, -1)), like=(2, 30)), old.reshape(2, 30))
    np.testing.assert_array_equal(embedding(runs, Reshape("embedding"), like=(5, 12)), old.reshape(5, 12))
    np.testing.assert_array_equal(embedding(runs, Slice("embedding", 1, 2, 5), like=(VOCAB, 3)), old[:, 2:5])
    np.testing.assert_array_equal(embedding(runs, Scale("embedding", 0.5), like=(VOCAB, WIDTH)), old * 0.5)
    cut = Split("embedding", ("a", "b"), axis=0, sizes=(4, 6))
    params, _ = operated(runs, [Keep("embedding"), cut], alone("a", old[:4]) | alone("b", old[:6]))
    np.testing.assert_array_equal(params["a"], old[:4])
    np.testing.assert_array_equal(params["b"], old[4:])
    params, _ = operated(
        runs, [Keep("embedding"), cut, Scale("b", 2.0), Merge(("b", "a"), "c", axis=0)], alone("c", old)
    )
    np.testing.assert_array_equal(params["c"], np.concatenate([2 * old[4:], old[:4]]))


def test_layers_become_one_array_and_come_apart(runs):
    """Stacked experts of a dense model's layers, and back: unstacking is the inverse of stacking."""
    old = runs[0][1]["decoder"]["layers"]
    patterns = tuple(rf"decoder/layers/{i}/kernel" for i in range(LAYERS))
    merged = [Keep(r"decoder/layers/\d+/kernel"), Merge(patterns, "experts", axis=0, stack=True)]
    kernels = np.stack([old[str(i)]["kernel"] for i in range(LAYERS)])
    params, _ = operated(runs, merged, alone("experts", kernels))
    np.testing.assert_array_equal(params["experts"], kernels)
    apart = Split("experts", tuple(f"layer{i}" for i in range(LAYERS)), axis=0, unstack=True)
    like = {f"layer{i}": old["0"]["kernel"] for i in range(LAYERS)}
    params, _ = operated(runs, [*merged, apart], like)
    for i in range(LAYERS):
        np.testing.assert_array_equal(params[f"layer{i}"], kernels[i])


@pytest.mark.parametrize("fill", Fill)
def test_a_longer_axis_begins_with_the_old_entries(runs, fill):
    old, size = runs[0][1]["embedding"], VOCAB + 5
    new = embedding(runs, Resize("embedding", 0, fill=fill), like=(size, WIDTH))
    if fill is Fill.SHARED:
        np.testing.assert_allclose(new[:5] + new[VOCAB:], old[:5], rtol=1e-6)
        np.testing.assert_array_equal(new[5:VOCAB], old[5:])
        return
    np.testing.assert_array_equal(new[:VOCAB], old)
    more = new[VOCAB:]
    if fill is Fill.DRAWN:
        assert np.unique(more).size == more.size and np.abs(more - old.mean(0)).max() < 5 * old.std(0).max()
        again = embedding(runs, Resize("embedding", 0, fill=fill), like=(size, WIDTH))
        np.testing.assert_array_equal(new, again, "drawn alike in every process")
        return
    expected = {Fill.ZEROS: 0.0, Fill.MEAN: old.mean(0), Fill.INITIAL: 7.0, Fill.REPEATED: old[:5]}[fill]
    np.testing.assert_allclose(more, np.broadcast_to(expected, more.shape), rtol=1e-6, atol=1e-7)


def test_a_shorter_axis_keeps_the_first_entries(runs):
    old = runs[0][1]["embedding"]
    np.testing.assert_array_equal(embedding(runs, Resize("embedding", 0), like=(4, WIDTH)), old[:4])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Copy("embedding", "decoder/norm")], "Copy gives decoder/norm two values, decoder/norm and embedding; drop"),
        ([Resize("decoder/layers/0/kernel", 2)], r"Resize.axis = 2 does not exist in decoder/layers/0/kernel"),
        ([Rename("embedding", "tokens"), Resize("tokens", 0)], "Resize asks for the model's tokens, which this model"),
        (
            [Split("embedding", ("a", "b"), sizes=(1, 2), axis=1)],
            "Split cannot cut axis 1 of embedding, .*up to 6",
        ),
        ([Merge(("decoder/norm", "embedding"), "x")], r"Merge cannot join decoder/norm .* \[6\] and \[10, 6\]"),
        ([Merge((r"decoder/layers/(\d)/kernel", r"decoder/layers/([01])/scale"), "x")], "without all of its other"),
        ([Merge(("embedding", "embed.*"), "x")], "Merge finds embedding by two of its patterns"),
        ([Reshape("embedding", (7, -1))], r"Reshape cannot make \[7, -1\] of embedding, .* \[10, 6\]"),
        ([Transpose("embedding", (0, 0))], r"Transpose.axes = \(0, 0\) do not permute"),
        ([Slice("embedding", 0, 5, 5)], "Slice leaves nothing of axis 0 of embedding"),
        ([Drop("embedding")], "leaves embedding without values; .*name them in a Fresh rule, or set missing"),
        ([Constant("bias")], "Constant has the pattern 'bias', which matches none of this model's parameters"),
        ([PickLayers((0,), stack="encoder/layers")], "PickLayers is for the layers of encoder/layers, .* none"),
        ([Drop("decoder/layers/1/scale"), AverageLayers(((0, 1),))], "not all of them have scale"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(runs, rules, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        operated(runs, rules, made(9))
    assert "\n" not in str(caught.value)


def test_a_soup_of_different_models_is_refused(runs):
    with pytest.raises(CheckpointError, match="Soup mixes checkpoints of one model, but .* alone has decoder/norm"):
        operated(runs, [Drop("decoder/norm"), Soup((runs[1][0],))], made(9))
    with pytest.raises(ValueError, match="Soup.coefficients has 1 numbers for 2 checkpoints"):
        Soup(("a",), (1.0,))


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxlm.checkpoints.surgery import Fill, PickLayers, Resize, Soup
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.layers.stacking import StackLayout

first, second = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
place = lambda shape, spec: jax.device_put(jnp.full(shape, 7.0), NamedSharding(mesh, spec))
params = {"decoder": {"layers": {"0": {"kernel": place((6, 6, 4), P(None, "fsdp", "tensor")),
                                       "scale": place((6, 6), P(None, "fsdp"))}}, "norm": place((6,), P())},
          "embedding": place((16, 6), P("tensor", "fsdp"))}
rules = (Soup((second,)), PickLayers(((0, 4), (2, 4))), Resize("embedding", 0, fill=Fill.INITIAL))
layouts = (StackLayout(("decoder",), 1, 6),)
started = warm_start(params, WarmStart(first, rules=rules), layouts, report=lambda _: None)
same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), started.params, params)
assert all(jax.tree.leaves(same)), same
print(json.dumps(jax.tree.map(lambda x: np.asarray(x).tolist(), started.params)))
"""


def test_onto_any_mesh(runs, run_python):
    """Eight devices, leaves cut two ways: where they should lie, with the numbers they have on one."""
    out = run_python(["-c", PROGRAM, runs[0][0], runs[1][0]], devices=8).stdout.splitlines()[-1]
    found = jax.tree.map(np.float32, json.loads(out), is_leaf=lambda x: isinstance(x, list))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, runs[0][1], runs[1][1])
    for i, source in enumerate([0, 1, 2, 3, 2, 3]):
        layer = mean["decoder"]["layers"][str(source)]
        for name, value in layer.items():
            np.testing.assert_allclose(found["decoder"]["layers"]["0"][name][i], value, rtol=1e-6)
    np.testing.assert_allclose(found["embedding"][:VOCAB], mean["embedding"], rtol=1e-6)
    assert (found["embedding"][VOCAB:] == 7.0).all()
