# shellcheck shell=bash
# What the gcloud scripts share: what a TPU is called, sending this clone to a slice, training there. Sourced.

# tpu_version <type>: sets `preset` and a default for `version`, the machine's image, from --type (v5litepod-16, v6e-8).
tpu_version() {
  case "$1" in
    v5litepod-*) preset=v5e image=v2-alpha-tpuv5-lite ;;
    v5p-*) preset=v5p image=v2-alpha-tpuv5 ;;
    v6e-*) preset=v6e image=v2-alpha-tpuv6e ;;
    tpu7x-*) die "TPU7x is reached through GKE alone; use launch/gke.sh." ;;
    *) die "--type is '$1'; it is a type of slice as gcloud names it: v5litepod-16, v5p-128, v6e-8, ..." ;;
  esac
  version="${version:-$image}"
}

# place: the flags that say where a slice is.
place() { where=(--zone="$zone"); [[ -z "$project" ]] || where+=(--project="$project"); }

# stop_training: asks the hosts to end and waits for them, with `on_nodes` as train_on_nodes sets it.
stop_training() {
  trap - INT TERM
  say "stopping: the hosts save and end."
  run_on_all "${on_nodes[@]}" --command="pkill -TERM -f '[j]axlm.train'" || true
  wait
  exit 75
}

# train_on_nodes: sends what is committed here to all hosts of the slices `nodes`, and trains there until the end. Asked to
# stop (Ctrl-C, SIGTERM), it asks the hosts, which save and end.
train_on_nodes() {
  local command archive="${TMPDIR:-/tmp}/jaxlm-$name.tar.gz"
  on_nodes=(gcloud compute tpus tpu-vm ssh NODE --worker=all "${where[@]}")
  [[ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ]] || say "what is not committed is not sent."
  run git -C "$root" archive --format=tar.gz --prefix=jaxlm/ --output="$archive" HEAD
  run_on_all gcloud compute tpus tpu-vm scp "$archive" NODE:jaxlm.tar.gz --worker=all "${where[@]}"
  command="tar xzf jaxlm.tar.gz && cd jaxlm && ${setup:+{ $setup; \} && }"
  command+="$(quoted ./launch/train.sh --distributed=on --xla_preset="$preset" "${arguments[@]}")"
  trap stop_training INT TERM
  run_on_all "${on_nodes[@]}" --command="$command"
  trap - INT TERM
}
