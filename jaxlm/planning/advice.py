"""What to change when a plan does not fit, and by how much, from shapes alone."""

import dataclasses

from jaxlm.layers.remat import Remat
from jaxlm.planning.memory import gib
from jaxlm.planning.program import Plan, Prepared, policy_name, prepare
from jaxlm.planning.variants import Levers, levers_of

_SPARE = 0.08
"""A plan that leaves a larger share of the memory free could use it."""


def advice(plan: Plan, prepared: Prepared) -> list[str]:
    """Sentences, the most useful first; none where nothing needs to be done.

    Sizes are differences of what shapes say, so that their roughness cancels.
    """
    if plan.limit is None:
        return []
    if plan.fits:
        return _use_of_the_rest(plan)
    missing = plan.peak - plan.limit
    own = levers_of(prepared.run, prepared.machine.num_devices)
    helped: list[tuple[int, str]] = []
    for change, levers in _changes(own):
        try:
            other = prepare(levers.on(prepared.run), prepared.machine)
        except ValueError:
            continue
        saved = prepared.expected.total - other.expected.total
        if saved > 0:
            enough = " and would be enough" if saved >= missing else ""
            helped.append((saved, f"{change} saves about {gib(saved)} a device{enough}."))
    state = prepared.expected.state + prepared.expected.gradients
    found = [f"It needs {gib(missing)} less than it takes on each device."]
    found += [sentence for _, sentence in sorted(helped, reverse=True)]
    if not helped or max(helped)[0] < missing:
        shards = plan.devices // max(1, own.mesh.data)
        found.append(
            f"State and gradients take {gib(state)} a device in {shards} parts; more devices with a larger "
            f"MeshConfig.fsdp, or a chip with more memory, are the way where nothing above is enough."
        )
    return found


def _changes(own: Levers) -> list[tuple[str, Levers]]:
    mesh, found = own.mesh, []
    if mesh.data > 1 and mesh.data % 2 == 0:
        doubled = dataclasses.replace(mesh, data=mesh.data // 2, fsdp=mesh.fsdp * 2)
        found.append((f"MeshConfig.fsdp {mesh.fsdp} -> {doubled.fsdp}", dataclasses.replace(own, mesh=doubled)))
        if mesh.data > 2:
            whole = dataclasses.replace(mesh, data=1, fsdp=mesh.fsdp * mesh.data)
            found.append((f"MeshConfig.fsdp {mesh.fsdp} -> {whole.fsdp}", dataclasses.replace(own, mesh=whole)))
    if mesh.fsdp > 1 and mesh.fsdp % 2 == 0:
        tensor = dataclasses.replace(mesh, fsdp=mesh.fsdp // 2, tensor=mesh.tensor * 2)
        change = f"MeshConfig.tensor {mesh.tensor} -> {tensor.tensor} with fsdp {mesh.fsdp} -> {tensor.fsdp}"
        found.append((change, dataclasses.replace(own, mesh=tensor)))
    if own.remat is not Remat.FULL:
        found.append(
            (f"StackConfig.remat {policy_name(own.remat)!r} -> 'full'", dataclasses.replace(own, remat=Remat.FULL))
        )
    for factor in (2, 4):
        microbatches = own.microbatches * factor
        change = f"StepConfig.microbatches {own.microbatches} -> {microbatches}"
        found.append((change, dataclasses.replace(own, microbatches=microbatches)))
    return found


def _use_of_the_rest(plan: Plan) -> list[str]:
    free = plan.limit - plan.peak
    if free < _SPARE * plan.limit:
        return []
    sentence = f"{gib(free)} a device is free ({free / plan.limit:.0%})"
    if plan.remat == Remat.FULL.value:
        return [f"{sentence}: less rematerialisation or a larger batch could use it; --search tries."]
    return [f"{sentence}: a larger batch could use it."]
