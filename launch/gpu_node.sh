#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process: ./launch/gpu_node.sh --gpu=h200 [--dry-run] --gin_file=my_run.gin
#   --gpu   h100 or h200: the preset of compiler flags
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options gpu -- "$@"
[[ "$gpu" == h[12]00 ]] || die "--gpu is '$gpu'; there are compiler flags for h100 and h200."
$dry_run || [[ "$(hardware)" == gpu ]] || die "this machine has no NVIDIA GPU (there is no /dev/nvidia0); see local.sh."
train gpu --xla_preset="$gpu" "${arguments[@]}"
