# shellcheck shell=bash
# What the launch scripts share: their options, saying what is run, Python and its packages, and training. Sourced.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${JAXLM_VENV:-$root/.venv}"
dry_run=false

say() { printf 'jaxlm: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# options [<name>[=<default>] ...] -- "$@": sets a variable for each --name=value (chips_per_host for --chips-per-host),
# `dry_run` for --dry-run, and `arguments` to the rest, which are jaxlm.train's. A name without a default must be given.
# --help shows the comment at the top of the script.
options() {
  # Names with an underscore, because the options become variables.
  local _word _name _known=() _required=()
  while [[ "$1" != -- ]]; do
    _name="${1%%=*}"
    _known+=("$_name")
    if [[ "$1" == *=* ]]; then printf -v "${_name//-/_}" %s "${1#*=}"; else _required+=("$_name"); fi
    shift
  done
  shift
  arguments=()
  for _word in "$@"; do
    _name="${_word%%=*}"
    _name="${_name#--}"
    case "$_word" in
      --help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
      --dry-run) dry_run=true ;;
      --gin*=* | --xla_preset=* | --profile=*) arguments+=("$_word") ;;
      --distributed=* | --coordinator_address=* | --process_*=* | --start_timeout=*) arguments+=("$_word") ;;
      --*=*)
        [[ " ${_known[*]} " == *" $_name "* ]] ||
          die "there is no option --$_name; there are ${_known[*]/#/--} --dry-run, and jaxlm.train's --gin_file=... and" \
            "--gin.NAME=..."
        [[ -n "${_word#*=}" ]] || die "--$_name is empty; write --$_name=VALUE, or leave it out."
        printf -v "${_name//-/_}" %s "${_word#*=}"
        ;;
      *) die "'$_word' is no option; options are written --name=value, see $0 --help." ;;
    esac
  done
  for _name in "${_required[@]}"; do
    _word="${_name//-/_}"
    [[ -n "${!_word:-}" ]] || die "needs --$_name=...; see $0 --help."
  done
}

# number <name> <value>: whether an option's value is a number above 0.
number() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "--$1 is '$2'; it is a number of at least 1."; }

# yes_or_no <name> <value>: whether an option's value is one of these.
yes_or_no() { [[ "$2" == yes || "$2" == no ]] || die "--$1 is '$2'; it is yes or no."; }

# quoted <words...>: a command as one can paste it.
quoted() {
  local word line=()
  for word in "$@"; do
    if [[ -z "$word" || "$word" == *[!A-Za-z0-9_./:=,@%+-]* ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    line+=("$word")
  done
  printf '%s' "${line[*]}"
}

# run <command...>: prints the command; with --dry-run that is all. What is printed can be pasted and does the same.
run() {
  if $dry_run; then
    printf '%s\n' "$(quoted "$@")"
  else
    say "$(quoted "$@")"
    "$@"
  fi
}

# run_with_input <text> <command...>: runs the command with the text as its standard input.
run_with_input() {
  if $dry_run; then
    printf "%s <<'END'\n%s\nEND\n" "$(quoted "${@:2}")" "$1"
  else
    say "$(quoted "${@:2}")"
    "${@:2}" <<<"$1"
  fi
}

# run_on_all <command...>: for each of `nodes`, the command with its name in the place of NODE, all at the same time;
# fails if one fails.
run_on_all() {
  local node pid pids=() status=0
  for node in "${nodes[@]}"; do
    if $dry_run; then
      printf '%s &\n' "$(quoted "${@//NODE/$node}")"
    else
      say "$(quoted "${@//NODE/$node}") &"
      "${@//NODE/$node}" &
      pids+=($!)
    fi
  done
  if $dry_run; then
    printf 'wait\n'
  else
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    return "$status"
  fi
}

# The seqio extra's TensorFlow has no wheels above Python 3.13; the lock files are resolved for .python-version.
supported="3.12 3.13"

# is_python <executable> <versions>: whether it runs and is one of them.
is_python() {
  "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] not in '$2'.split())" >/dev/null 2>&1
}

# Prints a supported Python: the version of .python-version if there is one on the PATH, in pyenv's versions or among
# uv's, else another from there.
find_python() {
  local pyenv_versions uv_pythons versions candidate
  pyenv_versions="${PYENV_ROOT:-$HOME/.pyenv}/versions"
  uv_pythons="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"
  for versions in "$(cat "$root/.python-version")" "$supported"; do
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3 python \
      "$pyenv_versions"/3.1[23]*/bin/python "$uv_pythons"/cpython-3.1[23]*/bin/python3; do
      if is_python "$candidate" "$versions"; then
        command -v "$candidate"
        return
      fi
    done
  done
  die "needs Python 3.12 or 3.13 and found neither on the PATH, in $pyenv_versions nor in $uv_pythons;" \
    "get one with 'apt-get install python3.12 python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12'."
}

make_venv() {
  local python
  python="$(find_python)"
  $dry_run || say "making $venv with $("$python" --version)"
  if command -v uv >/dev/null; then
    run uv venv --quiet --allow-existing --python "$python" "$venv"
  elif "$python" -c 'import ensurepip' 2>/dev/null; then
    run "$python" -m venv "$venv"
  else
    die "$python has no ensurepip, so it cannot make a virtual environment;" \
      "get it with 'apt-get install python3-venv', or install uv (https://docs.astral.sh/uv)."
  fi
}

# forget_others <lock file>: what other lock files had installed no longer holds where this one has other pins.
forget_others() {
  local other
  for other in "$venv"/.installed-*; do
    [[ ! -e "$other" ]] || ! grep -Fxvqf "$1" "$other" || rm "$other"
  done
}

# ensure_environment <lock file>: afterwards $venv/bin/python has exactly these pins. Instant when nothing changed: a
# copy of the lock file that was installed last is kept, made only after success.
ensure_environment() {
  local lock="$1" name marker
  name="$(basename "$lock" .lock.txt)"
  marker="$venv/.installed-$name"
  if [[ -x "$venv/bin/python" ]] && ! is_python "$venv/bin/python" "$supported"; then
    die "$venv holds another Python than 3.12 or 3.13; remove that folder and run this again."
  fi
  if [[ "$(cat "$marker" 2>/dev/null)" == "$(cat "$lock")" && -x "$venv/bin/python" ]]; then
    return
  fi
  make_venv
  $dry_run || forget_others "$lock"
  $dry_run || say "installing $(grep -c '==' "$lock") pinned packages into $venv (once; a few minutes)"
  if command -v uv >/dev/null; then
    run uv pip install --quiet --python "$venv/bin/python" --requirement "$lock"
  else
    run "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --requirement "$lock"
  fi || die "installing $lock failed, see above; check the network and run this again, it continues where it stopped."
  run cp "$lock" "$marker"
}

# Compiled programs outlive the process and the clone, so that the second run starts in seconds.
use_compilation_cache() {
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/jaxlm/xla}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.1}"
}

# What this machine computes with: tpu, gpu or cpu; JAXLM_HARDWARE says otherwise.
hardware() {
  if [[ -n "${JAXLM_HARDWARE:-}" ]]; then
    echo "$JAXLM_HARDWARE"
  elif compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
    echo gpu
  elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then # the latter has others too
    echo tpu
  else
    echo cpu
  fi
}

# lock_for <hardware>: the lock file of the packages that it needs.
lock_for() {
  case "$1" in
    tpu) echo "$root/requirements/tpu.lock.txt" ;;
    gpu) echo "$root/requirements/cuda.lock.txt" ;;
    *) echo "$root/requirements/base.lock.txt" ;;
  esac
}

# train <hardware> <arguments...>: trains on this machine, as the one process of a job or as one of several; does not
# return.
train() {
  ensure_environment "$(lock_for "$1")"
  use_compilation_cache
  run export JAX_COMPILATION_CACHE_DIR="$JAX_COMPILATION_CACHE_DIR"
  run export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="$JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
  if [[ "$1" == cpu ]]; then
    # jax is told so: an installed libtpu would look for TPUs first and complain for a screenful.
    run export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
    # Large pages for large buffers (glibc 2.35 and later): without, the kernel maps them anew each step, page by page.
    run export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
  fi
  run cd "$root" || exit
  run exec "$venv/bin/python" -m jaxlm.train "${@:2}"
}
