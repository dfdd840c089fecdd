# shellcheck shell=bash disable=SC2034  # the variables are for the script that sources this
# Sourced by the launch scripts: messages, options, dry runs. The script defines usage() and sets DRY_RUN=.

die() {
  echo "error: $*" >&2
  exit 2
}

# One argument as a shell would have to read it: quoted only where it must be.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/\'\\\'\'}"
  fi
}

# A command as one line that can be pasted into a shell.
shown() {
  local line='' word
  for word in "$@"; do line+="${line:+ }$(quoted "$word")"; done
  printf '%s\n' "$line"
}

# Runs a command, or with --dry_run prints it.
run() {
  if [ -n "${DRY_RUN:-}" ]; then
    shown "$@"
  else
    "$@"
  fi
}

need() {
  [ -n "${DRY_RUN:-}" ] || command -v "$1" >/dev/null || die "$1 is not installed; $2"
}

# options "NAMES THAT TAKE A VALUE" "SWITCHES" ARGUMENTS...
# Sets a variable for each --name value or --name=value, 1 for a switch; everything else goes to the array REST, and
# everything after -- unchanged to the array AFTER.
options() {
  local values=" $1 " switches=" $2 --dry_run " name value
  shift 2
  REST=() AFTER=()
  while (($#)); do
    case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      AFTER=("$@")
      return
      ;;
    --*)
      name=${1%%=*}
      if [[ $switches == *" $name "* ]]; then
        [[ $1 != *=* ]] || die "$name takes no value."
        value=1
        shift
      elif [[ $values == *" $name "* ]]; then
        if [[ $1 == *=* ]]; then
          value=${1#*=}
          shift
        else
          (($# > 1)) || die "$name needs a value."
          value=$2
          shift 2
        fi
        [ -n "$value" ] || die "$name needs a value."
      else
        die "unknown option $name; known:$values${switches# }(--help explains them)."
      fi
      name=${name#--}
      [ "$name" = dry_run ] && name=DRY_RUN
      printf -v "$name" '%s' "$value"
      ;;
    *)
      REST+=("$1")
      shift
      ;;
    esac
  done
}

# Leaves a number that arithmetic reads as it is meant: bash takes 08 for octal, and lets what has 20 digits overflow.
# number OPTION VARIABLE
number() {
  [[ ${!2} =~ ^[0-9]+$ ]] || die "$1 must be a whole number, got '${!2}'."
  [[ ${!2} =~ ^0*[0-9]{1,9}$ ]] || die "$1 must be below 1000000000, got '${!2}'."
  printf -v "$2" '%d' "$((10#${!2}))"
}
