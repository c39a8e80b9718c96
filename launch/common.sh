# shellcheck shell=bash
# What the launch scripts share. Sourced by them; does nothing by itself.
dry_run=${dry_run:-no}

die() { # die MESSAGE: one line on stderr, status 2
  printf 'error: %s\n' "$1" >&2
  exit 2
}

quoted() { # quoted WORD...: the words as a shell reads them back
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

run() { # run COMMAND...: runs it, or with --dry-run prints it
  if [ "$dry_run" = yes ]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

need() { # need NAME VALUE: refuses an empty value
  [ -n "$2" ] || die "$1 is missing; --help shows what is needed"
}

value() { # value FLAG REST...: the value that follows a flag
  [ $# -ge 2 ] && [ -n "$2" ] && [ "${2#--}" = "$2" ] || die "$1: no value; give one"
  printf '%s' "$2"
}

check_name() { # check_name NAME: what Google Cloud and Kubernetes both accept
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "name '$1' is not possible; give lower-case letters, digits and -, from a letter, at most 40"
}
