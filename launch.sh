#!/usr/bin/env bash
# From a fresh clone to a ready server:  ./launch.sh [MODEL] [options] [-- SGLang options]
#
#   --no-install    use the python3 that is on the PATH, install nothing
#   --install-only  make the virtual environment and stop
#   --help          this help, and that of `lim serve`, whose options follow; installs nothing
set -euo pipefail

UV_VERSION=0.13.9
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

fail() {
  printf 'launch.sh: %s\n' "$1" >&2
  exit 1
}

find_python() {
  local name
  for name in python3 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "needs Python 3.11 or 3.12, found neither: install one and put it on the PATH"
}

# Digest of the files that the environment is made from: another digest, another installation.
fingerprint() {
  cat "$here/requirements.lock" "$here/pyproject.toml" "$here/launch.sh" | cksum
  printf '%s\n' "$here"
}

install_once() {
  local stamp=$venv/.lim-installed python
  if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
    return
  fi
  python=$(find_python)
  printf 'Installing into %s (once, about 9 GB)\n' "$venv" >&2
  # Scripts of an environment hold the path of the folder where the environment was made.
  if [[ ! -f $stamp ]] || ! grep -qxF "$here" "$stamp"; then
    "$python" -m venv --clear "$venv"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
  "$venv/bin/uv" pip sync --python "$venv/bin/python" --require-hashes "$here/requirements.lock"
  mkdir -p "$venv/tmp"  # uv leaves a lock file there
  TMPDIR=$venv/tmp "$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps --editable "$here"
  rm -rf "$venv/tmp"
  fingerprint >"$stamp"
}

# Options of `lim serve`: from docs/cli.md, whose table is that of the program, before there is one.
help() {
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  if "$venv/bin/python" -c 'import typer, lim_sglang' 2>/dev/null; then
    exec "$venv/bin/python" -m lim_sglang serve --help
  fi
  awk -F ' [|] ' '
    /^## / { wanted = /^## `lim serve/ }
    wanted && /^[|] `/ {
      gsub(/^[|] |`| [|]$/, "")
      printf "  %s\n      %s [default: %s]\n", $1, $NF, $2
    }' "$here/docs/cli.md"
}

install=true
serve=true
arguments=()
while (($#)); do
  case $1 in
    --no-install) install=false ;;
    --help)
      help
      exit
      ;;
    --install-only) serve=false ;;
    --)
      arguments+=("$@")
      break
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

python=python3
if $install; then
  install_once
  python=$venv/bin/python
fi
if $serve; then
  exec "$python" -m lim_sglang serve ${arguments[@]+"${arguments[@]}"}
fi
