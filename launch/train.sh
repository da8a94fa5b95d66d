#!/usr/bin/env bash
# What every machine of a job runs: installs the packages for its hardware once, then trains.
#   ./launch/train.sh [--dry-run] --gin_file=my_run.gin [--gin.NAME=value ...] [--xla_preset=...] [--distributed=on]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options -- "$@"
train "$(hardware)" "${arguments[@]}"
