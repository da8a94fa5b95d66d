"""Writes a run's model as a Hugging Face folder, which `transformers` loads with `from_pretrained`. No torch is needed.

python -m tools.convert_checkpoint runs/mine exported                   # the newest intact checkpoint
python -m tools.convert_checkpoint runs/mine exported --step=2000 --averaged --dtype=bfloat16
python -m tools.convert_checkpoint runs/mine exported --dry-run         # which tensor holds which parameter

The way back needs no conversion: `WarmStart.path` takes a Hugging Face folder (docs/interchange.md).
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints import stored
from jaxlm.checkpoints.huggingface import families, folder
from jaxlm.checkpoints.huggingface.tensors import Shape, resolve
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.configuration import resolve as resolve_configuration
from jaxlm.models.config import LanguageModelConfig, ModelConfig
from jaxlm.run import RunConfig


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("out", help="the folder to write; it must not exist")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest intact one)")
    parser.add_argument("--averaged", action="store_true", help="the parameters' moving average")
    parser.add_argument("--family", help="a model_type of transformers (default: the first that can express the model)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shard_gb", type=float, default=5.0, help="largest size of a file")
    parser.add_argument("--dry-run", action="store_true", help="print the table of names and write nothing")
    args = parser.parse_args(arguments)
    try:
        checkpoint = open_run(pathlib.Path(args.run), args.step)
        model = model_of(checkpoint)
        weights = "ema_params" if args.averaged else "params"
        shapes = shapes_of(checkpoint, weights)
        if args.dry_run:
            print(table(model, shapes, args.family))
            return 0
        family = folder.export(
            args.out,
            model,
            shapes,
            reader(checkpoint, weights),
            family=args.family,
            dtype=jnp.dtype(args.dtype),
            shard_bytes=int(args.shard_gb * 2**30),
        )
    except (ValueError, CheckpointError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    print(f"Step {checkpoint.step:,} of {args.run} is in {args.out}, as a {family.architecture}.")
    return 0


def open_run(run: pathlib.Path, step: int | None) -> stored.StoredCheckpoint:
    """A verified checkpoint of a run.

    Raises:
      CheckpointError: there is none.
    """
    if step is not None:
        return stored.open_checkpoint(run / "checkpoints", step)
    found = stored.open_latest(run / "checkpoints", report=lambda line: print(line, file=sys.stderr))
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint; give a run's folder.")
    return found


def model_of(checkpoint: stored.StoredCheckpoint) -> LanguageModelConfig:
    """The model by the configuration saved with its parameters.

    Raises:
      ValueError: it is no `LanguageModelConfig`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        gin = pathlib.Path(scratch) / "config.gin"
        gin.write_text(checkpoint.config)
        model: ModelConfig = resolve_configuration(RunConfig, [f"--gin_file={gin}"]).model
    if not isinstance(model, LanguageModelConfig):
        raise ValueError(f"A {type(model).__name__} has no Hugging Face class here; export one of its parts by itself.")
    return model


def shapes_of(checkpoint: stored.StoredCheckpoint, weights: str) -> dict[str, Shape]:
    """{path: shape} of the parameters, layers one by one.

    Raises:
      CheckpointError: it has no such weights.
    """
    shapes = {"/".join(path[1:]): leaf.shape for path, leaf in checkpoint.leaves.items() if path[0] == weights}
    if not shapes:
        raise CheckpointError(f"{checkpoint.folder} holds no {weights}; leave out --averaged.")
    return shapes


def reader(checkpoint: stored.StoredCheckpoint, weights: str) -> Callable[[str], np.ndarray]:
    """path -> the parameter, read when it is asked for."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def value(path: str) -> np.ndarray:
        name = (weights, *path.split("/"))
        leaf = checkpoint.leaves[name]
        return np.asarray(checkpoint.read({name: stored.Request((name,), None, leaf.shape, leaf.dtype, here)})[name])

    return value


def table(model: LanguageModelConfig, shapes: dict[str, Shape], family: str | None) -> str:
    """One line a tensor: name, shape, the parameters in it."""
    adapter = families.by_model(model, family)
    lines = [f"{adapter.architecture}:"]
    for entry in resolve(adapter.table(model), shapes):
        row = "" if entry.row is None else f"[{entry.row}]"
        lines.append(f"  {entry.name} {list(entry.shape(shapes))} <- {', '.join(p + row for p in entry.paths)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
