"""Everything measured about attention, one word a table.

    python -m benchmarks.attention correctness    # errors against float64, every backend that runs here
    python -m benchmarks.attention memory         # temporaries at 32,768 tokens; blocks against the whole matrix
    python -m benchmarks.attention tpu            # cycles that the TPU compiler expects, no TPU needed
    python -m benchmarks.attention gpu            # times on an H200; without one, registers and spills

Each word writes results/attention_<word>.json; further arguments go to its module, benchmarks/attention_<word>.py.
"""

import runpy
import sys

TABLES = ("correctness", "memory", "tpu", "gpu")


def main() -> None:
    """Runs the table that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(f"Say which table: python -m benchmarks.attention {'|'.join(TABLES)}")
    table = sys.argv.pop(1)
    runpy.run_module(f"benchmarks.attention_{table}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
