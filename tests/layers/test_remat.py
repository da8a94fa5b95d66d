"""Which activations a policy keeps: what runs twice, what lies on the host, what is refused (values: test_stack.py)."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.context import LOCAL
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, ParameterMaker, Parametrization, PathKey
from jaxlm.layers.remat import Remat, SaveNamed, name_activation, offloads
from jaxlm.layers.stack import Stack, StackConfig
from pallas_kernels.masks import Causal

BLOCK = BlockConfig(AttentionConfig(2, 8, backend="pallas_tpu"), FeedForwardConfig(32), NormConfig())
MAKE = ParameterMaker(InitConfig(), Parametrization(), width=16)


def equations(jaxpr):
    needed = {id(value) for user in jaxpr.eqns for value in user.invars} | {id(value) for value in jaxpr.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":  # what a kernel does inside is its own affair
            if needed & {id(value) for value in equation.outvars}:  # jax 0.11 leaves one that nobody needs to XLA
                yield equation
            continue
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def gradient_program(policy):
    """Equations of a stack's gradient, whose block stands once in a loop forward and once in a loop backward."""
    config = StackConfig((BLOCK,), num_layers=2, remat=policy)
    stack = nnx.eval_shape(lambda: Stack(config, MAKE, dtype=jnp.dtype("float32"), key=PathKey(jax.random.key(0))))
    graph, values = nnx.split(stack)

    def loss(values, x):
        out, _ = nnx.merge(graph, values)(x, Causal(), jnp.zeros((1, 128), jnp.int32), context=LOCAL)
        return out.sum()

    x = jax.ShapeDtypeStruct((1, 128, 16), jnp.float32)
    return list(equations(jax.make_jaxpr(jax.grad(loss))(values, x).jaxpr))


def counts(policy):
    """(runs of attention's forward kernel, products, arrays moved to the host and back)."""
    program = gradient_program(policy)
    kernels = [e for e in program if e.primitive.name == "pallas_call"]
    return (
        len([e for e in kernels if e.params["name"] == "attention_forward"]),
        len([e for e in program if e.primitive.name == "dot_general" and e.outvars[0].aval.ndim == 2]),
        len([e for e in program if e.primitive.name == "device_put"]),
    )


def test_what_a_policy_computes_again():
    """Seven linear layers, two more products each for gradients, and one to compute it again where that is needed."""
    kernels, products, moved = {}, {}, {}
    for policy in Remat:
        kernels[policy], products[policy], moved[policy] = counts(policy)
    again = {Remat.DOTS_NO_BATCH, Remat.FULL}
    assert {policy for policy, runs in kernels.items() if runs == 2} == again, kernels
    assert {policy for policy, runs in kernels.items() if runs == 1} == set(Remat) - again, kernels
    assert products[Remat.NONE] == products[Remat.DOTS] == products[Remat.DOTS_NO_BATCH]
    assert products[Remat.NONE] < products[Remat.BLOCK] <= products[Remat.FULL]
    assert products[Remat.OFFLOAD] == products[Remat.BLOCK]
    assert {policy for policy in Remat if moved[policy]} == {policy for policy in Remat if offloads(policy)}
    assert offloads(Remat.OFFLOAD) and not offloads(Remat.BLOCK) and offloads(SaveNamed(on_host=("up",)))


def test_named_lists_do_what_they_say():
    everything = SaveNamed(on_device=("query", "key", "value", "attention_out", "attention_lse", "gate", "up"))
    assert counts(everything)[0] == 1
    assert counts(everything)[1] < counts(Remat.BLOCK)[1]
    assert counts(SaveNamed(on_host=("block_input", "up")))[2] == 4  # two arrays, there and back


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(on_host=("block_inputs",)), "'block_inputs', which does not exist; did you mean 'block_input'?"),
        (dict(on_device=("zzz",)), "'zzz', which does not exist: there are"),
        (dict(on_device=("up",), on_host=("up",)), "on the device and on the host; choose one"),
    ],
)
def test_names_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", "[?]")):
        SaveNamed(**arguments)
    with pytest.raises(ValueError, match="no activation 'mine'"):
        name_activation(jnp.zeros(1), "mine")
