#!/usr/bin/env bash
# One host: its CPU, one of its GPUs, or several.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [--devices=DEVICES] [--dry-run] EXPERIMENT [FLAGS ...]

Runs `python -m experiments.EXPERIMENT FLAGS ...` on the chosen devices of this host.

  --devices=auto      what JAX finds first (the default)
  --devices=cpu       the CPU as one device
  --devices=cpu:8     the CPU as eight virtual devices, to try a mesh without accelerators
  --devices=gpu       every GPU
  --devices=gpu:0,2   the GPUs 0 and 2
  --dry-run           print the command instead of running it

environment:
  PYTHON                          the interpreter (.venv/bin/python here if there is one, else python)
  XLA_PYTHON_CLIENT_MEM_FRACTION  the share of a GPU's memory that JAX takes at the start (0.9)

example: launch/local.sh --devices=gpu:0,1 ddpm --preset=cifar10 --config.optim.learning_rate=3e-4
END
}

die() {
  echo "error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
devices=auto
dry_run=

while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --devices=*) devices=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -*) die "unknown flag $1 before the experiment's name (--help lists all)" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die "which experiment? (--help shows how)"

name=$1
shift
if [[ ! $name =~ ^[a-z][a-z0-9_]*$ || ! -f $root/experiments/$name.py ]]; then
  known=$(cd "$root/experiments" && printf '%s\n' *.py | sed -n 's/^\([a-z].*\)\.py$/\1/p' | paste -sd' ')
  die "no experiment $name; there are: $known"
fi

settings=("PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
case $devices in
  auto) ;;
  cpu) settings+=(JAX_PLATFORMS=cpu) ;;
  cpu:*)
    count=${devices#cpu:}
    [[ $count =~ ^[1-9][0-9]*$ ]] || die "--devices=$devices: expected a number of virtual devices, as in cpu:8"
    settings+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$count")
    ;;
  gpu | gpu:*)
    # The CPU stays reachable behind the GPUs (callbacks need it); jax would also fall back to it, but the program
    # insists on the first of these (diffrl.train.mesh.init_distributed).
    settings+=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}")
    if [[ $devices == gpu:* ]]; then
      chosen=${devices#gpu:}
      [[ $chosen =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--devices=$devices: expected numbers of GPUs, as in gpu:0,1"
      settings+=("CUDA_VISIBLE_DEVICES=$chosen")
    fi
    ;;
  *) die "--devices=$devices: expected auto, cpu, cpu:COUNT, gpu or gpu:INDEX,INDEX" ;;
esac

python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
fi
command -v "$python" > /dev/null || die "no $python here: set PYTHON to the interpreter that diffrl is installed for"

command=(env "${settings[@]}" "$python" -m "experiments.$name" "$@")
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
