# shellcheck shell=bash
# Functions shared by the launch scripts, which source this file.
dry_run=${dry_run:-no}

die() { # die MESSAGE: one line on stderr, status 2
  printf 'error: %s\n' "$1" >&2
  exit 2
}

quoted() { # quoted WORD...: the words quoted for a shell
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

need() { # need NAME VALUE: fails if the value is empty
  [ -n "$2" ] || die "$1 is missing; --help shows what is needed"
}

value() { # value FLAG REST...: the value that follows a flag
  [ $# -ge 2 ] && [ -n "$2" ] && [ "${2#--}" = "$2" ] || die "$1: no value; give one"
  printf '%s' "$2"
}

check_name() { # check_name NAME: what Google Cloud and Kubernetes both accept
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "name '$1' is not possible; use lower-case letters, digits and -, starting with a letter, at most 40"
}

help_if_asked() { # help_if_asked ARGUMENT...: prints `usage` and exits, with status 2 if there is no argument
  [ $# -gt 0 ] || { usage >&2; exit 2; }
  case $1 in -h | --help) usage; exit 0 ;; esac
  case " $* " in *" -- "*) ;; *" --help "* | *" -h "*) usage; exit 0 ;; esac # after -- it is the run's
}

parse() { # parse "--FLAG..." "--SWITCH..." ARGUMENT...: sets a variable for each, and the arrays positional and rest
  # A flag has a value, a switch sets its variable to yes; --dry-run is $dry_run. What follows -- is rest.
  local flags=$1 switches=$2 known word
  shift 2
  positional=() rest=()
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift; rest=("$@"); return ;;
      -*) ;;
      *) positional+=("$1"); shift; continue ;;
    esac
    word=${1#--}
    word=${word//-/_}
    for known in $flags; do
      if [ "$1" = "$known" ]; then
        known=$(value "$@")
        printf -v "$word" %s "$known"
        shift 2
        continue 2
      fi
    done
    for known in $switches; do
      if [ "$1" = "$known" ]; then
        printf -v "$word" yes
        shift
        continue 2
      fi
    done
    die "$1 is not an option of launch/${0##*/}; --help lists them"
  done
}
