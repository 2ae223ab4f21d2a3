#!/usr/bin/env bash
# One command for the owner of an NVIDIA GPU: the GPU tests, then export, TensorRT build, comparison and timing, and a
# report in benchmarks/.
#
#     benchmarks/gpu_check.sh                     papercut
#     benchmarks/gpu_check.sh --install           installs tiue with TensorRT into the current environment first
#     benchmarks/gpu_check.sh --model sd15        Stable Diffusion 1.5's shapes with random weights: speed only
#
# Other options go to gpu_check.py; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ "${1:-}" = --install ]; then
    shift
    "$python" -m pip install -e ".[dev,trt]"
fi
if ! "$python" -c 'from tiue_cli.cli.app import main; import tokenizers, pytest' 2>/dev/null; then
    echo "tiue is not installed for $python: run benchmarks/gpu_check.sh --install" >&2
    exit 1
fi
exec "$python" benchmarks/gpu_check.py "$@"
