#!/usr/bin/env bash
# Trains the quickstart model on this machine: ./launch/local.sh [--dry-run] [--gin_file=...] [--gin.NAME=value ...]
# A gin file that is given is read after the quickstart's own.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options -- "$@"
train "$(hardware)" --gin_file=gin_configs/runs/quickstart.gin "${arguments[@]}"
