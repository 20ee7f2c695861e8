#!/usr/bin/env bash
# Collect as wheels what a GPU image with PyTorch lacks for this project, for a machine that reaches
# no package index: 18 files, 28 MB. Run it where there is one, in the environment of
# `make setup`:
#
#     bash benchmarks/gpu_wheels.sh [FOLDER]      FOLDER: build/wheels
#
# and on the other machine, in this folder:
#
#     python3 -m pip install --no-index --no-deps --upgrade --target /tmp/site FOLDER/*.whl
#     PYTHONPATH=/tmp/site:$PWD python3 benchmarks/gpu_check.py
#
# PyTorch, Triton, numpy, pyarrow and what they need are the image's own. Versions are those of
# constraints.txt. PYTHON_VERSION and CUDA name the image's Python and the CUDA of its PyTorch.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/wheels}
python_version=${PYTHON_VERSION:-3.12}
cuda=${CUDA:-130}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

packages=(
    transformers tokenizers datasets dill multiprocess peft accelerate
    jsonargparse docstring_parser typeshed_client
    hjson pydantic pydantic_core annotated-types typing-inspection typing_extensions
)
image=(--no-deps --only-binary=:all: --python-version "$python_version" --implementation cp)
for glibc in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
    image+=(--platform "${glibc}_x86_64")
done
pip=(python -m pip --quiet --disable-pip-version-check)
"${pip[@]}" download "${image[@]}" -c constraints.txt -d "$out" "${packages[@]}"
"${pip[@]}" download "${image[@]}" -c constraints.txt -d "$work" bitsandbytes

# bitsandbytes has a library for each CUDA; one of them is a tenth of the file.
python - "$work" "$out" "cuda$cuda" <<'EOF'
import re
import sys
import zipfile
from pathlib import Path

source = next(Path(sys.argv[1]).glob("bitsandbytes-*.whl"))
kept = {"cpu", sys.argv[3]}


def is_kept(name: str) -> bool:
    library = re.search(r"libbitsandbytes_(\w+)\.so", name)
    return library is None or library[1] in kept


with (
    zipfile.ZipFile(source) as whole,
    zipfile.ZipFile(Path(sys.argv[2]) / source.name, "w", zipfile.ZIP_DEFLATED) as small,
):
    for name in filter(is_kept, whole.namelist()):
        content = whole.read(name)
        if name.endswith("RECORD"):
            content = b"".join(
                line for line in content.splitlines(keepends=True) if is_kept(line.decode())
            )
        small.writestr(whole.getinfo(name), content)
EOF

# A source package, pure Python where none of its operations is built.
deepspeed=$(grep '^deepspeed==' constraints.txt)
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu \
    "${pip[@]}" wheel --no-deps --no-build-isolation -w "$out" "$deepspeed"
du -sh "$out"
