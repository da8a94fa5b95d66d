"""Converts trained models: a run into a Hugging Face folder, which `transformers` loads, and back. No torch is needed.

python -m tools.convert_checkpoint runs/mine exported                   # the newest intact checkpoint, with tokenizer
python -m tools.convert_checkpoint runs/mine exported --step=2000 --averaged --dtype=bfloat16
python -m tools.convert_checkpoint runs/mine exported --verify          # and compares logits with transformers'
python -m tools.convert_checkpoint runs/mine --dry-run                  # which tensor holds which parameter
python -m tools.convert_checkpoint some-llama runs/llama --to jaxlm     # a folder like a run's

The way back is seldom needed: warm starts, generation and evaluation take Hugging Face folders as they are
(docs/interchange.md).
"""

import argparse
import pathlib
import sys

import jax.numpy as jnp

from jaxlm.checkpoints import conversion, pretrained
from jaxlm.checkpoints.huggingface import families, folder
from jaxlm.checkpoints.huggingface.tensors import resolve
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.sources import Source, open_source


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if something is wrong, or --verify finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a run's folder, one of its steps, or a Hugging Face folder")
    parser.add_argument("out", nargs="?", help="the folder to write; it must not exist")
    parser.add_argument("--to", choices=("hf", "jaxlm"), default="hf", help="what to write (default: hf)")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest intact one)")
    parser.add_argument("--averaged", action="store_true", help="the parameters' moving average")
    parser.add_argument("--family", help="a model_type of transformers (default: the first that can express the model)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the tensors")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="largest size of a file")
    parser.add_argument("--verify", action="store_true", help="load both sides and compare logits; needs transformers")
    parser.add_argument("--verify_text", help="a file with text to compare on (default: this tool's description)")
    parser.add_argument("--dry-run", action="store_true", help="print the table of names and write nothing")
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read pickled tensors (.bin), weights only; needs torch, and a folder that is trusted",
    )
    parser.add_argument(
        "--ignore",
        default="",
        metavar="FIELD,...",
        help="fields of config.json to pass over although no adapter knows them: they change nothing that is computed",
    )
    args = parser.parse_args(arguments)
    try:
        return convert(args)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1


def convert(args: argparse.Namespace) -> int:
    """What the command line says; returns the exit status."""
    if args.dry_run:
        return dry_run(args)
    if args.out is None:
        raise ValueError("There is no folder to write to; give one after the source, or --dry-run.")
    source, out = opened(args), pathlib.Path(args.out)
    weights = "ema_params" if args.averaged else "params"
    about = pretrained.describe(source)
    if about.vocabulary is None:
        print(f"No tokenizer is written: {about.no_vocabulary}", file=sys.stderr)
    if args.to == "jaxlm":
        conversion.to_jaxlm(source, out)
        print(f"{args.source} is in {out}, as a checkpoint of step 0.")
    else:
        family = conversion.to_hugging_face(
            source,
            out,
            weights=weights,
            family=args.family,
            dtype=jnp.dtype(args.dtype),
            shard_bytes=int(args.shard_gb * 2**30),
        )
        print(f"{source.folder} is in {out}, as a {family.architecture}.")
    return verify(args, out) if args.verify else 0


def opened(args: argparse.Namespace) -> Source:
    """The source that the command line names."""
    report = lambda line: print(line, file=sys.stderr)  # noqa: E731
    options = {"ignore": ignored(args), "allow_pickle": args.allow_pickle}
    return open_source(args.source, args.step, report=report, **options)


def ignored(args: argparse.Namespace) -> tuple[str, ...]:
    """The fields of `config.json` that the command line passes over."""
    return tuple(filter(None, args.ignore.split(",")))


def verify(args: argparse.Namespace, out: pathlib.Path) -> int:
    """Loads both sides and prints how their logits differ."""
    from jaxlm.checkpoints.huggingface.verify import compare

    text = __doc__ if args.verify_text is None else pathlib.Path(args.verify_text).read_text()
    ours, theirs = (args.source, out) if args.to == "hf" else (out, pathlib.Path(args.source))
    if not (theirs / folder.CONFIG).exists():
        raise ValueError(f"{theirs} is no Hugging Face folder: there is nothing to compare with; leave out --verify.")
    step, averaged = (args.step, args.averaged) if args.to == "hf" else (None, False)
    model = pretrained.load(ours, step=step, averaged=averaged, compute="float32")
    found = compare(model, theirs, text, jnp.dtype(args.dtype) if args.to == "hf" else None)
    print("\n".join(map(str, found)))
    return 0 if all(difference.small for difference in found) else 1


def dry_run(args: argparse.Namespace) -> int:
    """Prints one line a tensor, and what is missing on either side."""
    path = pathlib.Path(args.source)
    if (path / folder.CONFIG).exists():
        found = folder.names_in(path, ignore=ignored(args), allow_pickle=args.allow_pickle)
        adapter, shapes = found.family, found.shapes
        table = resolve(found.table, shapes)
        missing = [f"{path} {fault}" for fault in folder.mismatches(found, table)]
        passed = folder.passed_over(found, table)
    else:
        source = opened(args)
        config = pretrained.describe(source).config
        shapes = conversion.parameters_of(source, "ema_params" if args.averaged else "params").shapes
        adapter = families.by_model(config, args.family)
        table, missing, passed = resolve(adapter.table(config), shapes), [], []
    print(f"{adapter.architecture}:")
    for entry in table:
        row = "" if entry.row is None else f"[{entry.row}]"
        print(f"  {entry.name} {list(entry.shape(shapes))} <-> {', '.join(path + row for path in entry.paths)}")
    for name in passed:
        print(f"  {name} is no part of the architecture")
    print("\n".join(missing) or f"Nothing is missing on either side: {len(table)} tensors, {len(shapes)} parameters.")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
