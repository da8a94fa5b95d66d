#!/usr/bin/env bash
# Regenerates requirements/*.lock.txt from the ranges in setup.py; needs uv. Arguments go to `uv pip compile`, e.g.
# --upgrade-package=optax (without any, pins that still fit the ranges stay as they are).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$root"
command -v uv >/dev/null || die "needs uv to resolve the lock files; get it with 'pip install uv'."
compile() {
  uv pip compile setup.py --quiet --python-version="$(cat .python-version)" \
    --no-emit-index-url --no-header --no-annotate "$@"
}
# The base set is resolved under the full set's pins, so that both name the same versions.
compile --extra=seqio --extra=constraints --extra=evaluation --extra=dev \
  --output-file=requirements/test.lock.txt "$@"
compile --constraint=requirements/test.lock.txt --output-file=requirements/base.lock.txt "$@"
# The tests' set with what models are compared with: torch (gigabytes), transformers, lm-evaluation-harness.
compile --constraint=requirements/test.lock.txt --extra=seqio --extra=constraints --extra=dev --extra=torch \
  --extra=harness --output-file=requirements/torch.lock.txt "$@"
# What accelerators need besides has pins of its own.
compile --constraint=requirements/base.lock.txt --extra=tpu --output-file=requirements/tpu.lock.txt "$@"
compile --constraint=requirements/base.lock.txt --extra=cuda --output-file=requirements/cuda.lock.txt "$@"
