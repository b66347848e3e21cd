#!/usr/bin/env bash
# Runs an experiment on all hosts of a Cloud TPU VM, through gcloud:
#
#   AFR_TPU=my-tpu launch/tpu_vm.sh --setup
#   AFR_TPU=my-tpu launch/tpu_vm.sh experiments.train_extractor --data=/shared/people --workdir=/shared/run1
#
# --setup copies what git has at HEAD to every host and installs it; once, and after changes.
# --dry_run, before it, prints gcloud's commands in place of running them. All hosts run the same
# command and find each other; their lines come mixed, and the exit code is gcloud's.
#
# Overridable through the environment: AFR_ZONE and AFR_PROJECT (those of gcloud by default),
# AFR_REMOTE (the folder on the hosts), PYTHON (theirs).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
usage="usage: AFR_TPU=NAME $0 [--dry_run] (--setup | MODULE [FLAG...])"
is_dry=''
if [[ ${1:-} == --dry_run ]]; then
  is_dry=1
  shift
fi
if (($# == 0)) || [[ -z ${AFR_TPU:-} || ($1 == -* && $* != --setup) ]]; then
  echo "$usage" >&2
  exit 2
fi

remote=${AFR_REMOTE:-afr_jax}
python=${PYTHON:-python3}
where=()
if [[ -n ${AFR_PROJECT:-} ]]; then where+=(--project="$AFR_PROJECT"); fi
if [[ -n ${AFR_ZONE:-} ]]; then where+=(--zone="$AFR_ZONE"); fi

run() {
  if [[ -n $is_dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$AFR_TPU" "${where[@]}" --worker=all --command="$1"
}

if [[ $1 == --setup ]]; then
  archive=$(mktemp -d)/afr_jax.tar
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git -C "$root" archive --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$AFR_TPU": "${where[@]}" --worker=all
  on_all_hosts "mkdir -p $remote && tar -xf afr_jax.tar -C $remote && $python -m pip install \
--quiet -r $remote/requirements.txt 'jax[tpu]'"
else
  on_all_hosts "cd $remote && $python -m $(printf '%q ' "$@")"
fi
