"""Everything measured about the way to Hugging Face models and back, one word a table.

    python -m benchmarks.interchange convert     # memory and speed of converting a model of 1B parameters
    python -m benchmarks.interchange families    # logits, hidden states, gradients and texts beside transformers'

Each word writes results/interchange_<word>.json; further arguments go to its module, benchmarks/interchange_<word>.py.
"""

import runpy
import sys

TABLES = ("convert", "families")


def main() -> None:
    """Runs the table that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(f"Say which table: python -m benchmarks.interchange {'|'.join(TABLES)}")
    table = sys.argv.pop(1)
    runpy.run_module(f"benchmarks.interchange_{table}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
