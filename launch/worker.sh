#!/usr/bin/env bash
# Runs on each worker of a TPU slice for launch/tpu.sh, which copies it to ~/kdsearch/worker.sh.
#   install [BUCKET]   an environment in kdsearch/venv from the wheel beside this file; the bucket as ~/bucket
#   start MODULE ...   python -m MODULE ... in the background: kdsearch/log, and kdsearch/status when it has ended
#   follow | stop | status
set -euo pipefail
cd "$HOME"
files=kdsearch

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

running() { [ -s "$files/pid" ] && kill -0 "$(cat "$files/pid")" 2>/dev/null; }

install() {
  # The machine images have Python 3.10; uv installs a newer one beside it.
  python3 -m pip install --quiet --user uv
  local uv=(python3 -m uv)
  [ -x "$files/venv/bin/python" ] || "${uv[@]}" venv --quiet --python 3.12 "$files/venv"
  local wheel
  wheel=$(echo "$files"/kdsearch_jax-*.whl)
  [ -e "$wheel" ] || die "no single wheel in $files: run launch/tpu.sh install"
  "${uv[@]}" pip install --quiet --python "$files/venv/bin/python" --reinstall-package kdsearch-jax \
    'jax[tpu]' "kdsearch-jax[tfds,gcs] @ file://$HOME/$wheel"
  rm "$wheel"
  [ $# = 0 ] || mount_bucket "$1"
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet=2
    sudo apt-get install --quiet=2 --yes gcsfuse
  fi
  mkdir -p bucket
  mountpoint --quiet bucket || gcsfuse --implicit-dirs --rename-dir-limit 100000 "$1" bucket
}

start() {
  [ $# -gt 0 ] || die "start: nothing to start"
  ! running || die "a run is in progress here; stop it first"
  [ -x "$files/venv/bin/python" ] || die "kdsearch is not installed here; run launch/tpu.sh install"
  rm -f "$files/status"
  nohup setsid bash "$files/worker.sh" supervise "$@" >"$files/log" 2>&1 </dev/null &
  echo $! >"$files/pid"
}

supervise() { # runs it, forwards SIGTERM, and writes its status
  local status=0 asked=no
  "$files/venv/bin/python" -m "$@" &
  local child=$!
  trap 'asked=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  wait "$child" || status=$?
  while [ "$asked" = yes ] && kill -0 "$child" 2>/dev/null; do # a trap ends `wait` early
    status=0
    wait "$child" || status=$?
  done
  echo "$status" >"$files/status"
}

follow() {
  [ -s "$files/pid" ] || die "no run was started here"
  tail --pid="$(cat "$files/pid")" -n +1 -F "$files/log" 2>/dev/null
  [ -s "$files/status" ] || die "the run ended without a status: it was killed or the machine restarted"
  exit "$(cat "$files/status")"
}

stop() {
  if running; then kill -TERM "$(cat "$files/pid")"; else echo "nothing runs here"; fi
}

status() {
  if running; then
    echo "running"
  elif [ -s "$files/status" ]; then
    echo "ended with status $(cat "$files/status")"
  else
    echo "nothing runs here"
  fi
}

verb=${1:-}
case $verb in
  install | start | supervise | follow | stop | status) shift; "$verb" "$@" ;;
  *) die "'$verb' is not a verb of worker.sh" ;;
esac
