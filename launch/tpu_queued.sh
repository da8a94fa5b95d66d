#!/usr/bin/env bash
# Trains on one or several slices of Cloud TPU VMs (multislice) from a queue: asks for them, waits until they are there,
# sends this clone to all hosts, trains on all as one job.
#   ./launch/tpu_queued.sh --name=mine --zone=us-east5-a --type=v6e-256 --slices=2 [--dry-run] --gin_file=my_run.gin \
#     --gin.MODEL_DIR=/mnt/runs/mine --setup='mountpoint -q /mnt/runs || sudo mount 10.0.0.2:/runs /mnt/runs'
#   --name      of the request; the slices are called so too, with -0, -1, ... if there are several
#   --type      accelerator type of a slice, as gcloud names it
#   --slices    how many; the batch is split over them (MeshConfig.slices)
#   --setup, --existing, --spot, --version, --project    as of tpu_vm.sh
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/tpu.sh
source "$here/tpu.sh"

options name zone type slices=1 setup= existing=no spot=no version= project= -- "$@"
number slices "$slices"
yes_or_no existing "$existing"
yes_or_no spot "$spot"
tpu_version "$type"
place
nodes=("$name")
create=(--accelerator-type="$type" --runtime-version="$version" --node-id="$name")
if ((slices > 1)); then
  nodes=()
  for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
  create=("${create[@]:0:2}" --node-count="$slices" --node-prefix="$name")
  arguments+=(--gin.MeshConfig.slices="$slices")
fi
[[ "$spot" == no ]] || create+=(--spot)
if [[ "$existing" == no ]]; then
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${create[@]}"
fi
state="$(quoted gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')"
run bash -c "until state=\$($state) && [ \"\$state\" = ACTIVE ]; do
  case \"\$state\" in FAILED | SUSPEND*) echo \"the request is \$state\" >&2; exit 1 ;; esac
  sleep 60
done"
train_on_nodes
say "delete the slices when they are not needed:" \
  "$(quoted gcloud compute tpus queued-resources delete "$name" --force "${where[@]}")"
