#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: what it makes of tiue, within a budget of minutes.
#
#     bash benchmarks/gpu_check.sh                       ten minutes; the report lies in benchmarks/gpu/
#     bash benchmarks/gpu_check.sh --minutes 5 --stages machine,ceilings,pass
#     bash benchmarks/gpu_check.sh --cpu --minutes 3     a rehearsal without a GPU
#     bash benchmarks/gpu_check.sh --install             installs tiue into the current environment first
#
# On a machine without a network, wheels that lie in .whl/ are used from a folder of their own: nothing is installed.
# Other options go to gpu_check.py; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ "${1:-}" = --install ]; then
    shift
    "$python" -m pip install -e ".[dev]"
fi
if compgen -G ".whl/*.whl" >/dev/null; then
    site=${TMPDIR:-/tmp}/tiue-gpu-check-site
    # They were gathered for one Python and system, and depend on each other: all of them or none.
    if "$python" - .whl/*.whl <<'END'
import sys
from pathlib import Path

from pip._vendor.packaging.tags import sys_tags
from pip._vendor.packaging.utils import parse_wheel_filename

here = set(sys_tags())
sys.exit(not all(here & parse_wheel_filename(Path(path).name)[-1] for path in sys.argv[1:]))
END
    then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
        export PYTHONPATH="$site:$PYTHONPATH"
    else
        echo "note: the wheels in .whl/ are for another Python or system: not used" >&2
    fi
fi
if ! "$python" -c 'from tiue_cli.cli.app import main; import diffusers, tokenizers' 2>/dev/null; then
    echo "tiue is not installed for $python: run benchmarks/gpu_check.sh --install, or put its wheels into .whl/" >&2
    exit 1
fi
exec "$python" benchmarks/gpu_check.py "$@"
