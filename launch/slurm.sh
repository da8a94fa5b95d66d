#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster: ./launch/slurm.sh --nodes=2 --gpu=h100 [--dry-run] --gin_file=my_run.gin \
#     --gin.MODEL_DIR=/shared/runs/mine
#   --nodes, --gpus-per-node   how many; each GPU is a process, which is what jax expects under Slurm
#   --gpu        h100 or h200: the preset of compiler flags
#   --name       of the job
#   --time       limit, such as 24:00:00; two minutes before it the run saves, ends and is queued again
#   --partition, --account     by default the cluster's own
#   --cell       of a study: the job runs this cell alone, as one process with the GPUs of one node;
#                python -m jaxlm.study --commands='./launch/slurm.sh --nodes=1 --gpu=h100' prints such a line for each
#   --options    more options of sbatch, separated by spaces: --options='--qos=high --exclusive'
# This clone, its .venv and MODEL_DIR must be on storage that all nodes share. Environment variables go along, so secrets
# need not be named here.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options nodes gpu gpus-per-node=8 name=jaxlm time= partition= account= cell= options= -- "$@"
number nodes "$nodes"
number gpus-per-node "$gpus_per_node"
[[ "$gpu" == h[12]00 ]] || die "--gpu is '$gpu'; there are compiler flags for h100 and h200."
tasks="$gpus_per_node"
train=("$venv/bin/python" -m jaxlm.train --distributed=on --xla_preset="$gpu" "${arguments[@]}")
if [[ -n "$cell" ]]; then
  ((nodes == 1)) || die "a cell of a study runs on one node, with the workers of other cells beside it; write --nodes=1."
  tasks=1
  train=("$venv/bin/python" -m jaxlm.study --cell="$cell" --xla_preset="$gpu" "${arguments[@]}")
fi

ensure_environment "$(lock_for gpu)"

batch=(--job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" --gpus-per-node="$gpus_per_node")
batch+=(--signal=TERM@120 --requeue --open-mode=append --chdir="$root")
for option in time partition account; do
  [[ -z "${!option}" ]] || batch+=("--$option=${!option}")
done
read -ra more <<<"$options"
# Processes that were asked to end and saved, or that hung, make the file (jaxlm/exit_status.py): srun may report the status
# of another one, which it stopped meanwhile.
run sbatch "${batch[@]}" "${more[@]}" \
  --wrap="export JAXLM_AGAIN=\$PWD/slurm-\$SLURM_JOB_ID.again
srun --kill-on-bad-exit=1 $(quoted "${train[@]}"); status=\$?
[ ! -e \$JAXLM_AGAIN ] || { rm \$JAXLM_AGAIN; scontrol requeue \$SLURM_JOB_ID; }
exit \$status"
