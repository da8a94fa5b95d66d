"""The page beside a trace: idle time, the longest operations, and collectives that nothing else ran beside."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from jaxlm.training.profile import Operation, Profile, ProfileConfig, operations_of, summarize

MS = 1e6  # nanoseconds


def operation(name, begin, end, device="/device:TPU:0"):
    return Operation(name, device, begin * MS, end * MS)


def test_exposed_collectives_and_idle_time():
    """Device 0: computes 0-4 and 6-8, gathers 3-7. Device 1 computes 0-10."""
    page = summarize(
        [
            operation("fusion.1", 0, 4),
            operation("all-gather-start.2", 3, 3.5),
            operation("all-gather.2", 3, 7),
            operation("all-gather-done.2", 6.5, 7),
            operation("fusion.1", 6, 8),
            operation("fusion.7", 0, 10, "/device:TPU:1"),
        ],
        steps=(5, 6),
    )
    assert "Steps 5 to 6 on 2 devices: 5.00 ms a step" in page
    # Of 20 device-milliseconds 2 are idle, 4 gather, and of these 2 (from 4 to 6) alone.
    assert "idle 10.0%, collectives in flight 20.0%, of these exposed 10.0%" in page
    lines = page.splitlines()
    assert lines[4].split() == ["fusion.7", "1", "2.500", "50.0%"]
    assert lines[5].split() == ["fusion.1", "2", "1.500", "30.0%"]
    assert lines[-1].split() == ["all-gather", "2", "1.000", "0.500"]


def test_kinds_of_collectives():
    kinds = {
        "all-reduce.3": "all-reduce",
        "all-gather-done": "all-gather",
        "reduce-scatter.1": "reduce-scatter",
        "ragged-all-to-all.2": "ragged-all-to-all",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)": "all-reduce",
        "fusion.all": None,
    }
    assert {name: operation(name, 0, 1).collective for name in kinds} == kinds


def trace(*planes):
    """A trace of planes (name, {line: [(name, begin, end in us, stats)]}), through the profiler's own format."""
    text = ""
    for number, (plane, lines) in enumerate(planes):
        names = sorted({event[0] for events in lines.values() for event in events})
        stats = sorted({key for events in lines.values() for event in events for key in event[3]})
        body = f'id: {number} name: "{plane}"\n'
        for line_id, (line, events) in enumerate(lines.items()):
            body += f'lines {{ id: {line_id} name: "{line}"\n'
            for name, begin, end, values in events:
                body += f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {begin * 10**6} "
                body += f"duration_ps: {(end - begin) * 10**6}\n"
                for key, value in values.items():
                    kind = "int64_value" if isinstance(value, int) else "str_value"
                    shown = value if isinstance(value, int) else f'"{value}"'
                    body += f"stats {{ metadata_id: {stats.index(key) + 1} {kind}: {shown} }}\n"
                body += "}\n"
            body += "}\n"
        for kind, entries in (("event", names), ("stat", stats)):
            for i, entry in enumerate(entries):
                body += f'{kind}_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{entry}" }} }}\n'
        text += f"planes {{ {body} }}\n"
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def test_what_is_read_of_a_tpus_and_a_gpus_trace():
    """Of a TPU its operations alone; of a GPU kernels by their instruction; loops are what is in them."""
    found = operations_of(
        trace(
            (
                "/device:TPU:0",
                {
                    "Steps": [("7", 0, 50, {})],
                    "XLA Modules": [("jit_step(123)", 0, 50, {})],
                    "XLA Ops": [
                        ("%while.3 = (s32[]) while(...)", 0, 40, {}),
                        ("%fusion.1 = bf16[8,128] fusion(...)", 1, 9, {}),
                    ],
                    "Async XLA Ops": [("%all-gather-start.2 = (...) all-gather-start(...)", 2, 30, {})],
                },
            ),
            (
                "/device:GPU:1",
                {
                    "Stream #20(Compute)": [
                        ("wrapped_gemm_kernel", 5, 8, {"hlo_op": "dot.4", "hlo_module": "jit_step"})
                    ],
                    "Framework Ops": [("dot.4", 5, 8, {})],
                },
            ),
            (
                "/host:CPU",
                {
                    "python": [("PjitFunction(step)", 0, 2, {})],
                    "tf_XLAEigen/1": [
                        ("dot.9", 3, 4, {"hlo_op": "dot.9", "device_ordinal": 2}),
                        ("while.1", 3, 4, {"hlo_op": "while.1", "device_ordinal": 2}),
                    ],
                },
            ),
        )
    )
    seen = {(o.name, o.device): (o.begin, o.end) for o in found}
    assert seen == {
        ("fusion.1", "/device:TPU:0"): (1e3, 9e3),
        ("all-gather-start.2", "/device:TPU:0"): (2e3, 30e3),
        ("dot.4", "/device:GPU:1"): (5e3, 8e3),
        ("dot.9", "cpu:2"): (3e3, 4e3),
    }


def test_a_real_trace_is_summed_up(tmp_path):
    """Through the callback as the loop calls it: steps 3 and 4 of a product on this machine."""
    said = []
    profile = Profile(ProfileConfig.parse("3-4"), tmp_path, said.append)
    step = jax.jit(lambda x: jnp.tanh(x @ x / 256))
    x = step(jnp.ones((256, 256)))
    for number in range(2, 7):
        x = step(x).block_until_ready()
        if profile.is_due(number):
            profile.on_pause(number, x)
    profile.on_end(6)
    (page,) = said
    assert f"Profiled steps 3 to 4: {tmp_path / 'steps_3-4' / 'summary.txt'}" in page
    assert "Steps 3 to 4 on 1 device:" in page and "idle " in page
    assert (tmp_path / "steps_3-4" / "summary.txt").read_text() in page + "\n"
    assert list((tmp_path / "steps_3-4").rglob("*.trace.json.gz")), "a trace for XProf and Perfetto lies beside it"


def test_ranges():
    assert ProfileConfig.parse("20-24") == ProfileConfig(20, 24)
    assert ProfileConfig.parse("7") == ProfileConfig(7, 7)
    for text, message in (("1-3", "at least 2"), ("9-8", "cannot be made"), ("ten", "write --profile=N-M")):
        with pytest.raises(ValueError, match=message):
            ProfileConfig.parse(text)


def test_a_run_that_goes_on_inside_the_range_records_the_rest(tmp_path):
    profile = Profile(ProfileConfig(10, 14), tmp_path)
    assert [step for step in range(20) if profile.is_due(step)] == [9, 10, 11, 12, 13]
