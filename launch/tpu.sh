#!/usr/bin/env bash
# A Cloud TPU slice, from creation to deletion, by gcloud; see `launch/tpu.sh --help`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/tpu.sh VERB NAME --zone ZONE [options]

  plan --type TYPE -- ARGUMENTS...
                          what a run would take on such a slice, and whether it fits: compiled on this machine, which
                          needs no TPU (kdsearch_jax.inspect ARGUMENTS --target tpu:TYPE)
  create NAME --type TYPE [--queued] [--spot] [--version V] [-- gcloud's own flags]
                          a slice such as v5litepod-8 or v6e-8; --queued waits in line for one
  wait NAME               until a queued slice is there (fails where it never will be)
  install NAME [--bucket B]
                          this checkout on all workers; bucket B becomes the folder `bucket` in their home
  send NAME PATH...       files or folders of yours (teacher, data, model) into the home of all workers
  run NAME -- MODULE ARGUMENTS...
                          python -m MODULE ARGUMENTS on all workers, in the background, from their home
  logs NAME [--worker K]  follows the output (of worker 0); ends with the run, and with its status
  stop NAME               SIGTERM: the run saves a checkpoint and ends
  fetch NAME FROM TO      copies a path of worker 0's home to this machine
  status [NAME]           what runs; without NAME, everything in the zone that costs money
  delete NAME [--queued] [--yes]
                          ends all cost of the slice; --queued as at create; --yes asks nothing

  --project P             instead of gcloud's own default
  --dry-run               prints the commands and runs none
END
}

help_if_asked "$@"
verb=$1
shift
zone='' project='' type='' version='' bucket='' worker=0 queued=no spot=no yes=no dry_run=no
parse "--zone --project --type --version --bucket --worker" "--queued --spot --yes --dry-run" "$@"

if [ "$verb" = plan ]; then
  need --type "$type"
  # shellcheck disable=SC2154 # parse sets it
  [ ${#positional[@]} = 0 ] || die "plan: ${positional[0]} is not possible; give the run's arguments after --"
  [ ${#rest[@]} -gt 0 ] || die "plan: no run; give its arguments after --, such as -- --config cifar10_resnet20"
  run "${PYTHON:-python3}" -m kdsearch_jax.inspect "${rest[@]}" "--target=tpu:$type"
  exit
fi

name=${positional[0]:-}
[ "$verb" = status ] || need NAME "$name"
[ -z "$name" ] || check_name "$name"
need --zone "$zone"
place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
vm=(gcloud compute tpus tpu-vm)
line=(gcloud compute tpus queued-resources)

arguments() { # arguments LEAST MOST: refuses other numbers of words after the verb
  [ ${#positional[@]} -ge "$1" ] && [ ${#positional[@]} -le "$2" ] ||
    die "$verb: ${#positional[@]} words after it are not possible; --help shows the form"
}

on_workers() { # on_workers WHICH WORD...: runs a command of launch/worker.sh there
  local which=$1
  shift
  run "${vm[@]}" ssh "$name" "${place[@]}" "--worker=$which" "--command=$(quoted bash kdsearch/worker.sh "$@")"
}

runtime_version() { # the machine image of a type, from Google's table
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) die "--type: no machine image is known for '$type'; give it by --version" ;;
  esac
}

case $verb in
  create)
    arguments 1 1
    need --type "$type"
    [ -n "$version" ] || version=$(runtime_version)
    more=()
    [ "$spot" = no ] || more+=(--spot)
    stop_line="launch/tpu.sh delete $name --zone $(quoted "$zone")"
    [ -z "$project" ] || stop_line+=" --project $(quoted "$project")"
    [ "$queued" = no ] || stop_line+=" --queued"
    # Also printed before, because interrupting gcloud leaves the machines running.
    printf 'This costs money until you run:  %s\n' "$stop_line" >&2
    if [ "$queued" = yes ]; then
      run "${line[@]}" create "$name" "--node-id=$name" "${place[@]}" "--accelerator-type=$type" \
        "--runtime-version=$version" ${more[@]+"${more[@]}"} ${rest[@]+"${rest[@]}"}
    else
      run "${vm[@]}" create "$name" "${place[@]}" "--accelerator-type=$type" "--version=$version" \
        ${more[@]+"${more[@]}"} ${rest[@]+"${rest[@]}"}
    fi
    printf 'This costs money until you run:  %s\n' "$stop_line" >&2
    ;;
  wait)
    arguments 1 1
    describe=("${line[@]}" describe "$name" "${place[@]}" "--format=value(state.state)")
    if [ "$dry_run" = yes ]; then
      run "${describe[@]}"
      exit 0
    fi
    while :; do
      state=$("${describe[@]}")
      printf '%s %s\n' "$(date +%H:%M:%S)" "$state"
      case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDED | SUSPENDING | DELETING)
          printf 'error: %s failed: it is %s; delete it and create it again\n' "$name" "$state" >&2
          exit 1
          ;;
      esac
      sleep "${KDSEARCH_POLL:-30}"
    done
    ;;
  install)
    arguments 1 1
    scratch=/tmp/kdsearch-wheel
    if [ "$dry_run" = no ]; then
      scratch=$(mktemp -d)
      trap 'rm -rf "$scratch"' EXIT
    fi
    run python3 -m pip wheel --quiet --no-deps "--wheel-dir=$scratch/kdsearch" "$(cd "$here/.." && pwd)"
    run cp "$here/worker.sh" "$scratch/kdsearch/"
    run "${vm[@]}" scp --recurse "$scratch/kdsearch" "$name:" "${place[@]}" --worker=all
    on_workers all install ${bucket:+"$bucket"}
    ;;
  send)
    arguments 2 1000
    run "${vm[@]}" scp --recurse "${positional[@]:1}" "$name:" "${place[@]}" --worker=all
    ;;
  run)
    arguments 1 1
    [ ${#rest[@]} -gt 0 ] || die "run: nothing to run; give it after --, such as -- kdsearch_jax.search --resume"
    on_workers all start "${rest[@]}"
    ;;
  logs)
    arguments 1 1
    on_workers "$worker" follow
    ;;
  stop)
    arguments 1 1
    on_workers all stop
    ;;
  fetch)
    arguments 3 3
    run "${vm[@]}" scp --recurse "$name:${positional[1]}" "${positional[2]}" "${place[@]}" --worker=0
    ;;
  status)
    arguments 0 1
    if [ -n "$name" ]; then
      on_workers all status
    else
      run "${vm[@]}" list "${place[@]}"
      run "${line[@]}" list "${place[@]}"
    fi
    ;;
  delete)
    arguments 1 1
    more=()
    [ "$yes" = no ] || more+=(--quiet)
    if [ "$queued" = yes ]; then
      run "${line[@]}" delete "$name" "${place[@]}" --force ${more[@]+"${more[@]}"}
    else
      run "${vm[@]}" delete "$name" "${place[@]}" ${more[@]+"${more[@]}"}
    fi
    ;;
  *) die "$verb is not a verb of launch/tpu.sh; --help lists them" ;;
esac
