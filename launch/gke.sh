#!/usr/bin/env bash
# A run as a JobSet on a GKE cluster with TPU or GPU nodes, by kubectl; see `launch/gke.sh --help`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/gke.sh VERB NAME [options]

  apply NAME tpu|gpu --image I --accelerator A --nodes N --bucket B [options] -- MODULE ARGUMENTS...
                          starts python -m MODULE ARGUMENTS on N nodes; with --resume among the arguments a restart
                          goes on where it was
  render ...              as apply, but only prints the manifest (gke-tpu.yaml, gke-gpu.yaml filled in)
  status NAME | logs NAME | delete NAME
                          delete ends the run; nodes cost until their pool or cluster is deleted, too

  --image I               as launch/image.sh pushes it
  --accelerator A         tpu: tpu-v5-lite-podslice, tpu-v6e-slice; gpu: nvidia-h100-80gb, nvidia-l4 ...
  --topology T            tpu: 4x4 and so on
  --nodes N               how many nodes (TPU: of a slice)
  --slices S              tpu: how many slices (1)
  --chips C               chips of a node (4 for tpu, 8 for gpu)
  --bucket B              a bucket, seen as /bucket
  --service-account S     the Kubernetes account that may write to it (default)
  --spot                  on spot nodes
  --namespace N, --context C   for kubectl
  --dry-run               prints the commands and runs none
END
}

help_if_asked "$@"
verb=$1
shift
image='' accelerator='' topology='' nodes='' slices=1 chips='' bucket='' service_account=default spot=no dry_run=no
namespace='' context=''
parse "--image --accelerator --topology --nodes --slices --chips --bucket --service-account --namespace --context" \
  "--spot --dry-run" "$@"
kubectl=(kubectl ${context:+"--context=$context"} ${namespace:+"--namespace=$namespace"})

name=${positional[0]:-}
need NAME "$name"
check_name "$name"

number() { # number FLAG VALUE
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1: '$2' is not possible; give a number, at least 1"
}

text() { # text WORD: as a string of JSON, which YAML reads alike
  [[ $1 != *[[:cntrl:]]* ]] || die "an argument has a line break or another control character"
  local escaped=${1//\\/\\\\}
  printf '"%s"' "${escaped//\"/\\\"}"
}

manifest() {
  local kind=${positional[1]:-} content arguments='' word
  case $kind in
    tpu) need --topology "$topology"; chips=${chips:-4} ;;
    gpu) chips=${chips:-8} ;;
    *) die "$verb: '$kind' is not possible after the name; give tpu or gpu" ;;
  esac
  need --image "$image"
  need --accelerator "$accelerator"
  need --nodes "$nodes"
  need --bucket "$bucket"
  number --nodes "$nodes"
  number --slices "$slices"
  number --chips "$chips"
  [ ${#rest[@]} -gt 0 ] || die "$verb: nothing to run; give it after --, such as -- kdsearch_jax.search --resume"
  for word in "${rest[@]}"; do
    word=$(text "$word") || exit # within $(manifest), set -e does not hold
    arguments+="${arguments:+, }$word"
  done
  image=$(text "$image") || exit
  accelerator=$(text "$accelerator") || exit
  topology=$(text "$topology") || exit
  bucket=$(text "$bucket") || exit
  service_account=$(text "$service_account") || exit
  content=$(<"$here/gke-$kind.yaml")
  content=${content//__NAME__/"$name"}
  content=${content//__NODES__/"$nodes"}
  content=${content//__SLICES__/"$slices"}
  content=${content//__CHIPS__/"$chips"}
  [ "$spot" = no ] || content=${content//'# spot: '/}
  content=${content//__ACCELERATOR__/"$accelerator"}
  content=${content//__TOPOLOGY__/"$topology"}
  content=${content//__IMAGE__/"$image"}
  content=${content//__BUCKET__/"$bucket"}
  content=${content//__ACCOUNT__/"$service_account"}
  content=${content//__ARGUMENTS__/"[$arguments]"} # last, because the inserted text must not be substituted again
  printf '%s\n' "$content"
}

[ "$verb" = apply ] || [ "$verb" = render ] || [ ${#positional[@]} = 1 ] || die "$verb: one NAME, and no more words"
case $verb in
  render) manifest ;;
  apply)
    content=$(manifest)
    printf 'This costs money until you run:  launch/gke.sh delete %s   and delete the nodes\n' "$name" >&2
    if [ "$dry_run" = yes ]; then
      printf '%s <<%s\n%s\n%s\n' "$(quoted "${kubectl[@]}" apply --filename=-)" "'END'" "$content" END
    else
      "${kubectl[@]}" apply --filename=- <<<"$content"
    fi
    ;;
  status)
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
    ;;
  logs)
    run "${kubectl[@]}" logs --follow --tail=-1 --container=kdsearch \
      "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run "${kubectl[@]}" delete jobset "$name" ;;
  *) die "$verb is not a verb of launch/gke.sh; --help lists them" ;;
esac
