#!/usr/bin/env bash
# Runs an experiment on TPU slices of a GKE cluster, through xpk (a package of its own), which makes
# a JobSet of it and sends it to the cluster's queue:
#
#   AFR_CLUSTER=tpus AFR_IMAGE=REGISTRY/afr_jax:tpu \
#     launch/gke/xpk.sh run1 experiments.train_extractor --data=/shared/people --workdir=/shared/run1
#
# RUN1 is the name of the workload. --dry_run, before it, prints xpk's command in place of running
# it. A slice that is taken away, or misses another, restarts the job, which resumes from the newest
# checkpoint in --workdir.
#
# Overridable through the environment: AFR_TPU_TYPE, AFR_SLICES, AFR_RESTARTS, AFR_PROJECT and
# AFR_ZONE (those of gcloud by default).
set -euo pipefail

usage="usage: AFR_CLUSTER=NAME AFR_IMAGE=IMAGE $0 [--dry_run] WORKLOAD MODULE [FLAG...]"
is_dry=''
if [[ ${1:-} == --dry_run ]]; then
  is_dry=1
  shift
fi
if (($# < 2)) || [[ $1 == -* || -z ${AFR_CLUSTER:-} || -z ${AFR_IMAGE:-} ]]; then
  echo "$usage" >&2
  exit 2
fi

workload=$1
shift
# Hosts of a TPU slice find each other: nothing of AFR_COORDINATOR is needed.
command=(
  xpk workload create
  --cluster="$AFR_CLUSTER" --workload="$workload" --docker-image="$AFR_IMAGE"
  --tpu-type="${AFR_TPU_TYPE:-v5litepod-16}" --num-slices="${AFR_SLICES:-1}"
  --max-restarts="${AFR_RESTARTS:-20}"
  --restart-on-exit-codes=1 # beside 127-255, which xpk has by itself: a host that misses another
  --termination-grace-period-seconds=120
  --command="python -m $(printf '%q ' "$@")"
)
if [[ -n ${AFR_PROJECT:-} ]]; then command+=(--project="$AFR_PROJECT"); fi
if [[ -n ${AFR_ZONE:-} ]]; then command+=(--zone="$AFR_ZONE"); fi

if [[ -n $is_dry ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
