"""`python -m jaxlm.plan`: the run's own step, for machines that are not there, without the run's data."""

import dataclasses
import json
import pathlib

import jax
import pytest

from jaxlm.chips import Chip
from jaxlm.configuration import resolve
from jaxlm.layers.remat import Remat, SaveNamed
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.planning import report, variants
from jaxlm.planning.advice import advice
from jaxlm.planning.memory import refused
from jaxlm.planning.program import Memory, compile_plan, prepare, with_remat
from jaxlm.planning.topology import topology
from jaxlm.planning.variants import Levers, levers_of, why_left_out, worth_trying
from jaxlm.run import RunConfig, expected_layout, layout_of, open_checked
from pallas_kernels import ahead_of_time

PODS = pathlib.Path(__file__).resolve().parents[2] / "gin_configs" / "runs" / "pods"
TINY = (
    "--gin_file=gin_configs/models/tiny/{model}.gin",
    "--gin_file=gin_configs/objectives/{objective}.gin",
    "--gin_file=gin_configs/data/corpus.gin",
    "--gin_file=gin_configs/runs/pretrain.gin",
    "--gin.MODEL_DIR=nowhere",
    "--gin.TRAIN_STEPS=10",
    "--gin.BATCH_SIZE=8",
)


def tiny(model="causal_decoder", objective="full_lm", lengths="{'targets': 64}", **bindings):
    flags = [flag.format(model=model, objective=objective) for flag in TINY]
    flags += [f"--gin.TASK_FEATURE_LENGTHS={lengths}", *(f"--gin.{name}={value}" for name, value in bindings.items())]
    return resolve(RunConfig, flags)


def test_the_command_plans_without_data_and_saves(run_python, tmp_path):
    flags = [flag.format(model="causal_decoder", objective="full_lm") for flag in TINY]
    flags += ["--gin.TASK_FEATURE_LENGTHS={'targets': 64}", "--gin.MeshConfig.fsdp=2"]
    done = run_python(["-m", "jaxlm.plan", *flags, "--topology=cpu:4", "--search=2", f"--save={tmp_path / 'plan'}"])
    assert "data 2 x fsdp 2" in done.stdout and "temporaries" in done.stdout
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    saved, ranked = written["plan"], written["search"]
    assert len({entry["levers"] for entry in ranked}) == 3 and done.stdout.count("compiling: ") == 2
    assert "fsdp 2" in done.stdout and "further candidates were not compiled" in done.stdout
    assert saved["mesh"] == {"data": 2, "fsdp": 2} and saved["fits"]
    assert saved["memory"]["parameters"] * 2 == saved["parameters"] * 4  # float32 in two parts
    kinds = {collective["kind"] for collective in saved["costs"]["collectives"]}
    axes = {tuple(collective["axes"]) for collective in saved["costs"]["collectives"]}
    assert "all-gather" in kinds and ("fsdp",) in axes
    # Of matrix products alone, the model's own work on a device is nearly all that it does.
    assert saved["model_flops"] / 4 <= 1.05 * saved["costs"]["matmul_flops"]
    assert "| memory, a device |" in (tmp_path / "plan" / "plan.md").read_text()


def test_dimensions_that_the_mesh_cannot_split_are_said():
    """In the table and in Markdown; none where all can be split."""
    if reason := ahead_of_time.why_not("v5e:2x2"):
        pytest.skip(reason)
    found = {}
    for size in (385, 384):
        prepared = prepare(tiny(VOCAB_SIZE=size, **{"MeshConfig.tensor": 2}), topology("v5e:2x2"))
        plan = compile_plan_refused(prepared)
        found[size] = [remark for what, _, remark in report.rows(plan) if what == "not split"]
        assert all(sentence in report.markdown(plan) for sentence in found[size])
    assert found == {385: ["vocab (385) is not a multiple of 2 (tensor), so it is replicated."], 384: []}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v9:2x2"], "There is no topology 'v9:2x2'"),
        ([], "For which machine"),
        (["--topology=cpu:4", "--search=some"], "--search=some is not a number of candidates"),
        (["--topology=cpu:3", "--gin.MeshConfig.fsdp=2"], "does not divide the 3 devices"),
        (["--topology=cpu:3"], "cannot be split over 3 devices"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, run_python):
    own = [flag.format(model="causal_decoder", objective="full_lm") for flag in TINY]
    done = run_python(["-m", "jaxlm.plan", *own, "--gin.TASK_FEATURE_LENGTHS={'targets': 64}", *flags], check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr and done.stderr.startswith("jaxlm.plan: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "model, objective, lengths",
    [
        ("causal_decoder", "full_lm", "{'targets': 64}"),
        ("prefix_decoder", "prefix_lm", "{'targets': 64}"),
        ("encoder_decoder", "span_corruption", "{'inputs': 64, 'targets': 32}"),
        ("encoder", "masked_lm", "{'targets': 64}"),
    ],
)
def test_the_expected_batch_is_what_the_loader_gives(model, objective, lengths, tmp_path):
    (tmp_path / "a.txt").write_text("A text that is long enough to be read and hidden in part. " * 200)
    flags = [flag.format(model=model, objective=objective) for flag in TINY if "corpus" not in flag]
    flags.insert(2, "--gin_file=gin_configs/data/files.gin")
    flags += [f"--gin.TASK_FEATURE_LENGTHS={lengths}", f"--gin.FILES='{tmp_path}/*.txt'"]
    run = resolve(RunConfig, [*flags, f"--gin.DataConfig.cache_directory='{tmp_path}/cache'"])
    loader = open_checked(run, run.phases[0], run.parallel.on(jax.devices()[:1]))
    real, expected = layout_of(loader), expected_layout(run, run.phases[0])
    batch = next(loader)
    loader.close()
    assert expected.features == dict(real.features)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (shape, dtype) for name, (shape, dtype) in expected.features.items()
    }
    assert expected.datasets == real.datasets and expected.objective == real.objective


def test_advice_names_the_lever_and_its_worth():
    if reason := ahead_of_time.why_not("v5e:2x2"):
        pytest.skip(reason)
    run = tiny(BATCH_SIZE=64, WIDTH=1024, NUM_LAYERS=64, HIDDEN=65536, **{"MeshConfig.fsdp": 1})
    prepared = prepare(run, topology("v5e:2x2"))
    assert prepared.expected.state > prepared.machine.chip.memory
    plan = compile_plan_refused(prepared)
    assert not plan.fits
    sentences = advice(plan, prepared)
    assert "It needs" in sentences[0]
    (fsdp,) = [sentence for sentence in sentences if "fsdp 1 -> 4" in sentence]
    other = prepare(
        tiny(BATCH_SIZE=64, WIDTH=1024, NUM_LAYERS=64, HIDDEN=65536, **{"MeshConfig.fsdp": 4}), prepared.machine
    )
    saved = prepared.expected.total - other.expected.total
    assert f"{saved / 2**30:.2f} GiB a device" in fsdp


def compile_plan_refused(prepared):
    """The plan of a step whose compiler refuses, without the minutes that it takes to find out."""

    class Refusing:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 61.50G of 15.75G hbm.")

    return compile_plan(dataclasses.replace(prepared, program=dataclasses.replace(prepared.program, step=Refusing())))


def test_what_a_compiler_says_when_it_refuses():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile: Used 20.00G of 15.75G hbm. Exceeded by 4G")
    assert refused(error) == (20 * 2**30, int(15.75 * 2**30))
    assert refused(jax.errors.JaxRuntimeError("INTERNAL: something else")) is None


def test_the_search_leaves_out_what_cannot_work():
    run, machine = tiny(BATCH_SIZE=4), topology("cpu:1")
    good, bad = worth_trying(run, machine)
    assert {levers.mesh.fsdp for levers, _ in good} == {1}
    assert {levers.remat for levers, _ in good} >= {Remat.NONE, Remat.FULL}
    assert {levers.microbatches for levers, _ in good} == {1, 2, 4}
    assert {entry.levers.microbatches for entry in bad} == {8} and len(bad) == len(good) / 3
    (reason,) = why_left_out(bad)
    assert reason.startswith(f"{len(bad)}: ") and "microbatches" in reason
    # By its shapes, in too little memory: for the state, or for all of some.
    state, totals = good[0][1].expected.state, sorted(prepared.expected.total for _, prepared in good)
    for memory, fitting, said in (
        (state - 1, 0, "Its state alone takes more than"),
        (int(totals[len(totals) // 2] / 1.5), len(totals) // 2, "more than 1.5 times a device's"),
    ):
        small = dataclasses.replace(machine, chip=Chip("small", (), bf16=1e12, hbm=memory, hbm_bandwidth=1e9))
        some, left_out = worth_trying(run, small)
        assert len(some) <= fitting + 1 and any(said in reason for reason in why_left_out(left_out))
    first, prepared = good[0]
    assert first.remat is Remat.NONE and first.microbatches == 1  # all fits: nothing is recomputed
    assert levers_of(first.on(run), 1) == first
    # More is kept, less is expected to be free.
    full = prepare(with_remat(run, Remat.FULL), topology("cpu:1"))
    assert full.expected.saved < prepared.expected.saved and full.expected.state == prepared.expected.state


def test_the_search_tries_meshes_that_split_not_all_after_the_others(monkeypatch):
    """An odd vocabulary, and one key head: devices of the axis `tensor` do a part of their work twice."""
    if reason := ahead_of_time.why_not("v5e:2x2"):
        pytest.skip(reason)
    monkeypatch.setattr(variants, "_policies", lambda own: [Remat.NONE, Remat.FULL])
    good, bad = worth_trying(tiny(VOCAB_SIZE=385, NUM_KV_HEADS=1), topology("v5e:2x2"))
    tensor = [levers.mesh.tensor for levers, _ in good]
    assert set(tensor) == {1, 2, 4} and tensor.index(2) > max(i for i, n in enumerate(tensor) if n == 1)
    assert not any("is replicated" in reason for reason in why_left_out(bad))
    whole, _ = worth_trying(tiny(NUM_KV_HEADS=4, NUM_HEADS=4, VOCAB_SIZE=384), topology("v5e:2x2"))
    tensor = [levers.mesh.tensor for levers, _ in whole]
    assert tensor.index(2) < max(i for i, n in enumerate(tensor) if n == 1)


def test_levers_are_named_by_all_degrees():
    mesh = MeshConfig(fsdp=2, sequence=4)
    assert Levers(mesh, Remat.FULL, 2).name == "fsdp 2, sequence 4, remat full, microbatches 2"


def test_what_a_policy_of_names_keeps_is_counted_by_its_names():
    """On the device alone, beside a block's input, which is there unless it is moved to the host."""
    run, machine = tiny(BATCH_SIZE=16), topology("cpu:1")

    def saved(policy):
        return prepare(with_remat(run, policy), machine).expected.saved

    full, products = saved(Remat.FULL), saved(Remat.DOTS)
    assert saved(SaveNamed(on_host=("block_input",))) == saved(Remat.OFFLOAD) == 0
    assert saved(SaveNamed(on_host=("query", "key", "up"))) == saved(SaveNamed(("product",))) == full
    assert saved(SaveNamed(("attention_out", "attention_lse"), ("up",))) == saved(Remat.BLOCK)
    assert full < saved(SaveNamed(("up",))) < saved(SaveNamed(("up", "gate", "query", "key", "value"))) < products


def test_memory_adds_up():
    memory = Memory(1, 2, 3, arguments=10, temporaries=20, outputs=5, host=0, program=0)
    assert memory.peak == 35


@pytest.mark.parametrize("file", sorted(PODS.glob("*.gin")), ids=lambda path: path.stem)
def test_pod_presets_have_a_batch_for_every_model(file):
    run = resolve(RunConfig, [f"--gin_file={file}"])
    layout = expected_layout(run, run.phases[0])
    assert all(shape[0] == run.batch_size for shape, _ in layout.features.values())


def test_a_step_for_a_tpu_runs_the_kernels_of_a_tpu():
    """A small decoder on four chips, in seconds: what a pod's plan does in minutes."""
    if reason := ahead_of_time.why_not("v6e:2x2"):
        pytest.skip(reason)
    run = tiny(
        lengths="{'targets': 256}",
        COMPUTE="bfloat16",
        REMAT="full",
        WIDTH=256,
        NUM_HEADS=2,
        NUM_KV_HEADS=2,
        HEAD_DIM=128,
        HIDDEN=512,
        **{"MeshConfig.fsdp": 4},
    )
    plan = compile_plan(prepare(run, topology("v6e:2x2")))
    assert plan.fits and plan.limit > 30 * 2**30
    assert plan.costs.kernels["attention_forward"] == 2 * 2  # twice a layer: rematerialisation
    assert plan.costs.kernels["attention_backward"] == 2
    # 8 N products of a layer's matrices (the block's last is not recomputed) and 6 of the head's.
    layer, tokens = 4 * 256 * 256 + 3 * 256 * 512, 8 * 256 // 4
    expected = 2 * (8 * layer - 2 * 256 * 512) * tokens + 6 * 256 * 384 * tokens
    assert plan.costs.matmul_flops == pytest.approx(expected, rel=0.01)
    assert {axis for c in plan.costs.collectives for axis in c.axes} == {"fsdp"}
    assert 0 < plan.estimate.mfu < 1 and plan.estimate.bound in ("compute", "memory", "network")
