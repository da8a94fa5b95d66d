#!/usr/bin/env bash
# Installs what the tests need, then runs them: ./launch/test.sh [--torch] [--full] [pytest arguments]
# --torch also installs torch, transformers and lm-evaluation-harness (gigabytes) and compares with them.
# Without --full the tests must end within 45 minutes; two cores take 12 to 20 and more, the more the less is compiled already.
# JAXLM_TEST_WORKERS (2) sets pytest's processes.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

limit=45m
packages="test"
arguments=()
for argument in "$@"; do
  case "$argument" in
    --torch) packages="torch" ;;
    --full) limit=0; arguments+=(--full) ;; # 0: no limit
    *) arguments+=("$argument") ;;
  esac
done

ensure_environment "$root/requirements/$packages.lock.txt"
use_compilation_cache
# Products of small matrices in several threads, beside other processes, do little but wait.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
cd "$root"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .

status=0
timeout --foreground --kill-after=30s "$limit" \
  "$venv/bin/python" -m pytest -n "${JAXLM_TEST_WORKERS:-2}" --dist=worksteal --durations=20 "${arguments[@]}" || status=$?
if [[ $status == 124 || $status == 137 ]]; then
  die "the tests took longer than $limit; make the slowest of them faster, or mark them 'full'."
fi
exit "$status"
