#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a JobSet of one or several slices (multislice), in an image made from
# launch/Dockerfile:
#   ./launch/gke.sh --name=mine --image=REGISTRY/jaxlm:1 --type=v6e --topology=4x4 --slices=2 --claim=runs [--dry-run] \
#     --gin_file=my_run.gin
#   --name      of the JobSet
#   --type      v5e, v5p, v6e or tpu7x
#   --topology  chips of a slice: 4x4, 4x4x8
#   --claim     persistent volume claim, readable and writable by many, mounted at /runs: where the run's folder lies
#   --cell      of a study: the job runs this cell alone, on a slice of one host; python -m jaxlm.study
#               --commands='./launch/gke.sh ...' prints such a line for each. The study's folder must lie under /runs
#   --slices    how many; the batch is split over them (MeshConfig.slices)
#   --chips-per-host   4, or 8 for hosts of v5e and v6e with all chips of a 2x4
#   --secret    a Kubernetes secret whose entries become environment variables (WANDB_API_KEY); only its name is shown
#   --restarts  how often a job that ended is started again, to go on where it was (10)
#   --namespace  of the cluster (default)
# The cluster needs node pools of that type and the JobSet controller. xpk makes such clusters; its workloads are JobSets
# like this one, so nothing else is needed of it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options name image type topology claim slices=1 chips-per-host=4 secret= cell= restarts=10 namespace=default -- "$@"
number slices "$slices"
number chips-per-host "$chips_per_host"
number restarts "$restarts"
case "$type" in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p | v6e) accelerator="tpu-$type-slice" ;;
  tpu7x) accelerator=tpu7x ;;
  *) die "--type is '$type'; there are v5e, v5p, v6e and tpu7x." ;;
esac
[[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology is '$topology'; it is like 4x4 or 2x2x4."
chips=$((${topology//x/*}))
((chips >= chips_per_host)) || chips_per_host=$chips
((chips % chips_per_host == 0)) || die "a slice of $topology has $chips chips, not a multiple of $chips_per_host a host."
hosts=$((chips / chips_per_host))
((slices == 1)) || arguments+=(--gin.MeshConfig.slices="$slices")
command=""
train=(python -m jaxlm.train --distributed=on --xla_preset="$type" --gin.MODEL_DIR="/runs/$name")
if [[ -n "$cell" ]]; then
  ((hosts * slices == 1)) ||
    die "a cell of a study runs on one host, with the workers of other cells beside it; $slices x $topology has" \
      "$((hosts * slices)) hosts of $chips_per_host chips."
  train=(python -m jaxlm.study --cell="$cell" --xla_preset="$type")
fi
for argument in "${train[@]}" "${arguments[@]}"; do
  argument="${argument//\\/\\\\}"
  command+="${command:+, }\"${argument//\"/\\\"}\""
done
from_secret=""
[[ -z "$secret" ]] || from_secret="
              envFrom:
              - secretRef: {name: $secret}"

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 600
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: jaxlm
              image: $image
              command: [$command]
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits: {google.com/tpu: $chips_per_host}
              volumeMounts:
              - {name: runs, mountPath: /runs}$from_secret
            volumes:
            - name: runs
              persistentVolumeClaim: {claimName: $claim}"
run_with_input "$manifest" kubectl create --namespace="$namespace" --filename=- || die "not submitted, see above. If it is" \
  "there from before and has ended: $(quoted kubectl delete jobset "$name" --namespace="$namespace"), then this again; it" \
  "goes on where it was."
say "follow it: $(quoted kubectl logs --namespace="$namespace" --follow --selector=jobset.sigs.k8s.io/jobset-name="$name")"
