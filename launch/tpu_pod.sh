#!/usr/bin/env bash
# A Cloud TPU slice: the same command on every worker.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh [--dry-run] COMMAND

  create                      make the slice
  install                     copy the committed tree (HEAD) to every worker and install it there
  run EXPERIMENT [FLAGS ...]  start `python -m experiments.EXPERIMENT FLAGS ...` on every worker, in the background
  tail                        follow the log of one worker
  stop                        SIGTERM to every worker: the run saves a checkpoint and ends
  delete                      delete the slice (gcloud asks first)

  --dry-run                   print the gcloud commands instead of running them

environment:
  TPU_NAME     the slice (required)
  ZONE         its zone, as in us-central2-b (required)
  PROJECT      the Google Cloud project (gcloud's own default)
  TPU_TYPE     what to create, as in v4-32 (required by create)
  TPU_VERSION  its software (tpu-ubuntu2204-base)
  SPOT=1       create it as a spot slice
  WORKER       whose log to follow (0)

example: TPU_NAME=big ZONE=us-central2-b launch/tpu_pod.sh run ddpm --preset=imagenet64 --workdir=/mnt/shared/ddpm

The workdir of a run with several workers must be a folder that all of them share.
END
}

die() {
  echo "error: $*" >&2
  exit 2
}

dry_run=
execute() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() { # tpu VERB ARGUMENT ...
  execute gcloud compute tpus tpu-vm "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

on_all() { # on_all REMOTE_COMMAND
  tpu ssh "$TPU_NAME" --worker=all "--command=$1"
}

create() {
  [[ ${TPU_TYPE:-} ]] || die "TPU_TYPE is not set; choose one, as in TPU_TYPE=v4-32"
  tpu create "$TPU_NAME" "--accelerator-type=$TPU_TYPE" "--version=${TPU_VERSION:-tpu-ubuntu2204-base}" \
    ${SPOT:+--spot}
}

install() {
  local archive=${TMPDIR:-/tmp}/diffrl.$$.tar.gz
  # shellcheck disable=SC2064  # the name of now, not of then
  trap "rm -f '$archive'" EXIT
  execute git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  tpu scp "$archive" "$TPU_NAME:diffrl.tar.gz" --worker=all
  local steps=(
    'mkdir -p diffrl'
    'tar -xzf diffrl.tar.gz -C diffrl'
    'cd diffrl'
    # The image's own Python may be older than 3.11; uv brings one.
    'python3 -m pip install --quiet --user uv'
    'python3 -m uv venv --quiet --allow-existing --python 3.12 .venv'
    'python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tpu]"'
  )
  on_all "$(printf '%s && ' "${steps[@]}")echo installed"
}

run() {
  (($#)) || die "which experiment? as in: run ddpm --preset=imagenet64"
  [[ -f $root/experiments/$1.py ]] || die "no experiment $1 in $root/experiments"
  local line
  line=$(printf '%q ' .venv/bin/python -m "experiments.$1" "${@:2}")
  on_all "cd diffrl && { DIFFRL_DISTRIBUTED=1 nohup $line> run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
}

main() {
  while [[ ${1:-} == -* ]]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=1 ;;
      *) die "unknown flag $1 before the command (--help lists all)" ;;
    esac
    shift
  done
  local command=${1:-}
  [[ $command =~ ^(create|install|run|tail|stop|delete)$ ]] ||
    die "command '$command': expected create, install, run, tail, stop or delete (--help explains them)"
  [[ ${TPU_NAME:-} ]] || die "TPU_NAME is not set; name the slice, as in TPU_NAME=big"
  [[ ${ZONE:-} ]] || die "ZONE is not set; say where the slice is, as in ZONE=us-central2-b"
  [[ $dry_run ]] || command -v gcloud > /dev/null || die "gcloud is not on PATH; install the Google Cloud CLI"
  case $command in
    create) create ;;
    install) install ;;
    run) run "${@:2}" ;;
    tail) tpu ssh "$TPU_NAME" "--worker=${WORKER:-0}" "--command=tail -n 50 -F diffrl/run.log" ;;
    stop) on_all 'xargs kill -TERM < diffrl/run.pid' ;;
    delete) tpu delete "$TPU_NAME" ;;
  esac
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
main "$@"
