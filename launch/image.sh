#!/usr/bin/env bash
# The container image of this checkout, by docker; see `launch/image.sh --help`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/image.sh build|push cpu|gpu|tpu TAG [--dry-run]

  build gpu TAG           launch/Dockerfile with the JAX of that backend
  push gpu TAG            the same, and pushes it (docker must be logged in to TAG's registry)
  --dry-run               prints the commands and runs none
END
}

case " $* " in *" --help "* | *" -h "*) usage; exit 0 ;; esac
parse "" "--dry-run" "$@"
[ ${#positional[@]} = 3 ] || die "give three words: build or push, cpu, gpu or tpu, and a tag; --help shows the form"
verb=${positional[0]} backend=${positional[1]} tag=${positional[2]}
case $verb in build | push) ;; *) die "$verb is not a verb of launch/image.sh; give build or push" ;; esac
case $backend in cpu | gpu | tpu) ;; *) die "$backend is not a backend; give cpu, gpu or tpu" ;; esac
root=$(cd "$here/.." && pwd)
run docker build "--file=$here/Dockerfile" "--build-arg=BACKEND=$backend" "--tag=$tag" "$root"
[ "$verb" = build ] || run docker push "$tag"
