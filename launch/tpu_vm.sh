#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs, through gcloud: makes the slice, sends this clone to its hosts, trains on all.
#   ./launch/tpu_vm.sh --name=mine --zone=us-east5-a --type=v6e-16 [--dry-run] --gin_file=my_run.gin \
#     --gin.MODEL_DIR=/mnt/runs/mine --setup='mountpoint -q /mnt/runs || sudo mount 10.0.0.2:/runs /mnt/runs'
#   --name      of the slice
#   --type      accelerator type, as gcloud names it
#   --setup     a command for each host before training, such as mounting the storage that all hosts share
#   --existing  yes: the slice is there already
#   --spot      yes: a spot slice, cheaper, which may be taken away
#   --version   runtime version; by default the one for the type
#   --project   by default gcloud's own
# MODEL_DIR must be on storage that all hosts share. Started again with --existing=yes, it goes on where it was.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/tpu.sh
source "$here/tpu.sh"

options name zone type setup= existing=no spot=no version= project= -- "$@"
yes_or_no existing "$existing"
yes_or_no spot "$spot"
tpu_version "$type"
place
if [[ "$existing" == no ]]; then
  create=(--accelerator-type="$type" --version="$version")
  [[ "$spot" == no ]] || create+=(--spot)
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${create[@]}"
fi
nodes=("$name")
train_on_nodes
say "delete the slice when it is not needed: $(quoted gcloud compute tpus tpu-vm delete "$name" "${where[@]}")"
