#!/usr/bin/env bash
# Runs an experiment on this machine, from any folder:
#
#   launch/local.sh experiments.cloak --images=photos --output_dir=out
#   launch/local.sh --cpu_devices=4 experiments.cloak --toy    # 4 devices on the CPU
#
# Overridable through the environment: PYTHON, XLA_FLAGS, XLA_PYTHON_CLIENT_MEM_FRACTION, and
# DETERMINISTIC=1 for bit-equal repetitions on a GPU (slower).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
usage="usage: $0 [--cpu_devices=N] MODULE [FLAG...]"

while [[ ${1:-} == --* ]]; do
  case $1 in
    --cpu_devices=[1-9]*)
      export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${1#*=}"
      ;;
    --help)
      echo "$usage"
      exit 0
      ;;
    *)
      echo "unknown option $1; $usage" >&2
      exit 2
      ;;
  esac
  shift
done
if (($# == 0)); then
  echo "$usage" >&2
  exit 2
fi

if [[ ${DETERMINISTIC:-0} == 1 ]]; then
  XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true"
fi
export XLA_FLAGS="${XLA_FLAGS:-}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

exec "${PYTHON:-python3}" -m "$@"
