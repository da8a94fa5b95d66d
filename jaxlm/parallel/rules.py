"""Logical-axis rules: which mesh axes split which named dimension. Data, not code.

A parameter or an activation names its dimensions (`("embed", "mlp")`); a rule maps each name to mesh axes. A mesh
axis splits at most one dimension of an array, the first that asks for it: under the default rules an activation
`("batch", "length", "embed")` gives `fsdp` to the batch, a parameter `("embed", "mlp")` gives it to `embed`.
"""

import math
from collections.abc import Mapping

from jax.sharding import Mesh, PartitionSpec

Rules = tuple[tuple[str, tuple[str, ...]], ...]

DEFAULT_RULES: Rules = (
    ("batch", ("slices", "stage", "data", "fsdp", "expert")),
    ("layers", ("stage",)),
    ("length", ("sequence",)),
    ("embed", ("fsdp",)),
    ("mlp", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("vocab", ("tensor",)),
    ("experts", ("expert",)),
)
"""Data parallel, FSDP, tensor parallel (Megatron's split), expert parallel, and layers dealt to pipeline stages.

Outside of the layers (embedding, head) a pipeline's stages share the batch out. Names without a rule are replicated.
"""


def spec(
    axes: tuple[str | None, ...],
    rules: Rules,
    mesh: Mesh,
    shape: tuple[int, ...] | None = None,
    *,
    reasons: list[str] | None = None,
) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh.

    Args:
      axes: the logical name of each dimension; None or an unknown name is replicated.
      rules: (logical name, mesh axes) pairs.
      mesh: its axes of degree 1 are left out of the answer.
      shape: the array's shape. A dimension that the degrees do not divide is replicated.
      reasons: a list that receives one sentence for each dimension replicated for that cause.

    Raises:
      ValueError: a rule names an axis that the mesh lacks, or `shape` and `axes` differ in length.
    """
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"The logical axes {axes} do not fit an array of shape {shape}: name each dimension once.")
    table: Mapping[str, tuple[str, ...]] = dict(rules)
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for dimension, name in enumerate(axes):
        wanted = table.get(name, ())
        if unknown := [axis for axis in wanted if axis not in mesh.shape]:
            raise ValueError(f"The rule for {name!r} names {unknown}, but the mesh has axes {tuple(mesh.shape)}.")
        chosen = tuple(axis for axis in wanted if mesh.shape[axis] > 1 and axis not in taken)
        degree = math.prod(mesh.shape[axis] for axis in chosen)
        if shape is not None and shape[dimension] % degree:
            if reasons is not None:
                reasons.append(
                    f"{name} ({shape[dimension]}) is not a multiple of {degree} ({' x '.join(chosen)}), "
                    f"so it is replicated."
                )
            chosen = ()
        taken.update(chosen)
        entries.append(chosen or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*(entry[0] if entry and len(entry) == 1 else entry for entry in entries))


def degree(mesh: Mesh, partition: PartitionSpec, dimension: int) -> int:
    """How many ways `partition` splits a dimension."""
    entry = partition[dimension] if dimension < len(partition) else None
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def mesh_axes(partition: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that `partition` uses."""
    names: list[str] = []
    for entry in partition:
        names.extend((entry,) if isinstance(entry, str) else entry or ())
    return tuple(names)
