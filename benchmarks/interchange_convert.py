"""Converting a model of 1B random parameters, each way in a process of its own: peak memory, and speed beside copying.

Memory is what the process has beyond what it had before the conversion, sampled from outside; pages of mapped files,
which the kernel drops when it wants to, are counted apart. Copying is of the converted files, on the same disk, through
the same few megabytes of memory, by the same process right after; both are flushed to the disk.

python -m benchmarks.interchange convert [--width=2048] [--layers=18] [--folder=/tmp]
"""

import argparse
import functools
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

RESULTS = pathlib.Path(__file__).parent / "results" / "interchange_convert.json"
WAYS = ("run_to_hugging_face", "hugging_face_to_hugging_face", "hugging_face_to_run")
_CHUNK = 8 << 20


def model(width: int, layers: int):
    """A Llama of about a billion parameters."""
    from jaxlm.architecture import Architecture
    from jaxlm.layers.attention import AttentionConfig
    from jaxlm.layers.block import BlockConfig
    from jaxlm.layers.embeddings import EmbeddingConfig
    from jaxlm.layers.feed_forward import FeedForwardConfig
    from jaxlm.layers.norms import NormConfig
    from jaxlm.layers.parameters import InitConfig
    from jaxlm.layers.positions import Rope
    from jaxlm.layers.stack import StackConfig
    from jaxlm.models.config import HeadConfig, LanguageModelConfig

    block = BlockConfig(
        AttentionConfig(width // 64, 64, position=Rope()), FeedForwardConfig(width * 11 // 4), NormConfig()
    )
    stack = StackConfig((block,), layers, final_norm=NormConfig())
    return LanguageModelConfig(
        Architecture.CAUSAL_DECODER, 32_000, width, EmbeddingConfig(), HeadConfig(), InitConfig(), decoder=stack
    )


def write_run(folder: pathlib.Path, width: int, layers: int) -> None:
    """A run's folder with random parameters."""
    import numpy as np

    from jaxlm.checkpoints import naming
    from jaxlm.checkpoints.huggingface.folder import parameter_shapes
    from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
    from jaxlm.checkpoints.pretrained import ImportedModel
    from jaxlm.configuration import resolved_text

    config, rng = model(width, layers), np.random.default_rng(0)
    shapes = parameter_shapes(config)
    params = {tuple(p.split("/")): rng.standard_normal(shape, np.float32) for p, shape in shapes.items()}
    with CheckpointManager(folder / "checkpoints", CheckpointConfig()) as manager:
        manager.save(0, {"params": naming.nest(params)}, config=resolved_text(ImportedModel(config, "random numbers")))


def convert(way: str, source: pathlib.Path, out: pathlib.Path) -> None:
    """One conversion."""
    from jaxlm.checkpoints import conversion
    from jaxlm.checkpoints.sources import open_source

    opened = open_source(source)
    if way.endswith("run"):
        conversion.to_jaxlm(opened, out)
    else:
        conversion.to_hugging_face(opened, out, shard_bytes=1 << 30)


def copy(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies a folder's files."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, target.open("wb") as write:
            shutil.copyfileobj(read, write, _CHUNK)


def timed(action, source: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    """Wall and processor seconds of an action, until what it wrote is on the disk."""
    used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    action(source, out)
    for path in out.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def work(way: str, small: pathlib.Path, source: pathlib.Path, scratch: pathlib.Path) -> None:
    """In a process of its own: a small conversion first, so that all is loaded; prints what it did as JSON lines."""
    convert(way, small, scratch / "small")
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    took = timed(functools.partial(convert, way), source, scratch / "out")
    print(json.dumps({"convert": took}), flush=True)
    sys.stdin.readline()
    print(json.dumps({"copy": timed(copy, scratch / "out", scratch / "copy")}), flush=True)


def memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process: its own, and of mapped files."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"own": found["RssAnon"] + found["RssShmem"], "mapped": found["RssFile"]}


def measure(way: str, small: pathlib.Path, source: pathlib.Path, scratch: pathlib.Path) -> dict[str, float]:
    """Starts `work` and watches it."""
    scratch.mkdir()
    command = [sys.executable, __file__, "--work", way, str(small), str(source), str(scratch)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def answer() -> dict:
            while (line := process.stdout.readline()) and not line.startswith("{"):
                pass
            return json.loads(line)

        answer()
        before = peak = memory(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        while not (line := process.stdout.readline()):
            now = memory(process.pid)
            peak = {name: max(peak[name], now[name]) for name in peak}
            time.sleep(0.01)
        os.set_blocking(process.stdout.fileno(), True)
        converted = json.loads(line)["convert"]
        process.stdin.write("\n")
        process.stdin.flush()
        copied = answer()["copy"]
    return {
        "extra_bytes": peak["own"] - before["own"],
        "mapped_bytes": peak["mapped"] - before["mapped"],
        **converted,
        "copy_seconds": copied["seconds"],
        "copy_cpu_seconds": copied["cpu_seconds"],
        "speed_over_copy": copied["seconds"] / converted["seconds"],
        "cpu_speed_over_copy": copied["cpu_seconds"] / converted["cpu_seconds"],
        "written_bytes": sum(p.stat().st_size for p in (scratch / "out").rglob("*") if p.is_file()),
    }


def main() -> None:
    """Measures all ways, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--folder", help="where there is room for five times the model (default: the temporary folder)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], *map(pathlib.Path, args.work[1:]))
        return
    from jaxlm.checkpoints.huggingface.folder import parameter_shapes

    sizes = [4 * math.prod(shape) for shape in parameter_shapes(model(args.width, args.layers)).values()]
    largest = max(sizes)
    results = {
        "parameters": sum(sizes) // 4,
        "largest_tensor_bytes": largest,
        "allowed_extra_bytes": 2 * largest + 200 * 10**6,
        "ways": {},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        root = pathlib.Path(root)
        write_run(root / "run", args.width, args.layers)
        write_run(root / "small_run", 128, 1)
        convert("run_to_hugging_face", root / "small_run", root / "small_folder")
        for way in WAYS:
            kind = "run" if way.startswith("run") else "folder"
            found = measure(way, root / f"small_{kind}", root / kind, root / way)
            if way == "run_to_hugging_face":
                (root / way / "out").rename(root / "folder")
            shutil.rmtree(root / way)
            results["ways"][way] = found
            print(way, json.dumps(found), flush=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
