#!/usr/bin/env bash
# Runs an experiment on this machine, from any folder:
#
#   launch/local.sh experiments.cloak --images=photos --output_dir=out
#   launch/local.sh --cpu_devices=4 experiments.cloak --toy    # 4 devices on the CPU
#   launch/local.sh --processes=2 --cpu_devices=1 experiments.cloak --images=photos
#
# --processes=N starts N processes that share the work; each but the first writes what it says into
# a file of its own (AFR_LOGS). Without --cpu_devices each takes its share of the GPUs. --dry_run
# prints the command of each process in place of running it.
#
# Overridable through the environment: PYTHON, XLA_FLAGS, XLA_PYTHON_CLIENT_MEM_FRACTION,
# AFR_COORDINATOR, AFR_LOGS, and DETERMINISTIC=1 for bit-equal repetitions on a GPU (slower).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
usage="usage: $0 [--processes=N] [--cpu_devices=N] [--dry_run] MODULE [FLAG...]"
processes=1 cpu_devices='' is_dry=''

while [[ ${1:-} == --* ]]; do
  case $1 in
    --processes=[1-9]*) processes=${1#*=} ;;
    --cpu_devices=[1-9]*) cpu_devices=${1#*=} ;;
    --dry_run) is_dry=1 ;;
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
settings=(
  XLA_FLAGS="${XLA_FLAGS:-}"
  XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
)
if [[ -n $cpu_devices ]]; then
  settings+=(JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$cpu_devices")
fi
program=("${PYTHON:-python3}" -m "$@")

if ((processes > 1)); then
  coordinator=${AFR_COORDINATOR:-127.0.0.1:$((20000 + RANDOM % 20000))}
  settings+=(AFR_COORDINATOR="$coordinator" AFR_NUM_PROCESSES="$processes")
  # What comes from the network stays there.
  settings+=(no_proxy="${no_proxy:+$no_proxy,}${coordinator%:*}")
fi

# Sets `command`: all that process $1 is.
make_command() {
  command=(env "${settings[@]}")
  if ((processes > 1)); then
    command+=(AFR_PROCESS_ID="$1")
    if [[ -z $cpu_devices ]] && ((gpus > 1)); then
      command+=(JAX_LOCAL_DEVICE_IDS="$(seq -s, "$(($1 * gpus / processes))" \
        "$((($1 + 1) * gpus / processes - 1))")")
    fi
  fi
  command+=("${program[@]}")
}

gpus=0
if ((processes > 1)) && [[ -z $cpu_devices ]] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
  if ((gpus % processes)); then
    echo "$gpus GPUs cannot be shared by $processes processes; $usage" >&2
    exit 2
  fi
fi
if [[ -n $is_dry ]]; then
  for ((index = 0; index < processes; index++)); do
    make_command "$index"
    printf '%q ' "${command[@]}"
    echo
  done
  exit 0
fi
if ((processes == 1)); then
  make_command 0
  exec "${command[@]}"
fi

logs=${AFR_LOGS:-$(mktemp -d)}
mkdir -p "$logs"
echo "the processes from 1 on write to $logs/process-*.log" >&2
children=()
for ((index = 1; index < processes; index++)); do
  make_command "$index"
  "${command[@]}" >"$logs/process-$index.log" 2>&1 &
  children+=($!)
done
make_command 0
"${command[@]}" &
children+=($!)
# Jobs in the background ignore SIGINT.
trap 'kill -TERM "${children[@]}" 2>/dev/null || :' INT TERM

# The exit code of the first process, or of another where that did not fail.
code=0
for child in "${children[@]}"; do
  one=0
  wait "$child" || one=$?
  while kill -0 "$child" 2>/dev/null; do # A trapped signal ends `wait` early.
    one=0
    wait "$child" || one=$?
  done
  if ((one)); then code=$one; fi
done
exit "$code"
