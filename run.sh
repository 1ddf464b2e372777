#!/usr/bin/env bash
# Repeat timings of the trainer; sets up what is missing first, then hands over to recordbook/runs.py.
#
#   bash run.sh [N] [--recipe R] [--data DIR]   N runs (default 2), then the table of compare_runs.py
#   bash run.sh golf/train_golf.py N --recipe golf-one --data DIR         the same with another trainer
#   bash run.sh ab A.py B.py N                  N runs of each of two trainers, interleaved ABBA BAAB
#   bash run.sh ab A.py B.py N --until-decided --max M    go on up to M pairs, stop when the difference is sure
#   bash run.sh aa TRAINER.py N                 one trainer as both arms: the noise floor of this machine
#   bash run.sh ab A.py B.py N --lanes 4        four seeds at once, each on its share of the GPUs
#   bash run.sh plan --gain SECONDS --sd S      how many runs a gain needs
#   bash run.sh test [pytest arguments]         the tests
#   bash run.sh setup                           only the environment
#   bash run.sh --help; bash run.sh ab --help   (also aa, plan: all options, what is written where, warm-up)
#
# Run i has seed i and its own log under logs/. A series that was interrupted continues where it stopped: N counts
# the runs that ended by themselves, whether they finished, diverged or crashed. A plan is written before the first
# run, and a ledger has every attempt. Nothing is deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run.sh: error: $1" >&2; exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' run.sh; }

hash_of() { python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:16])' "$1"; }

environment() {  # a virtual environment, if none is active
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if [ ! -x .venv/bin/python ] || [ ! -e .venv/bin/activate ]; then  # an interrupted venv has no activate
            local python
            for python in python3.13 python3.12 python3.11 python3 python; do
                "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
                python=
            done
            [ -n "$python" ] || die "no Python 3.11 or newer on the path; install one, or activate an environment that has it"
            echo "run.sh: making a virtual environment in .venv with $("$python" --version)"
            "$python" -m venv .venv || die "$python cannot make a virtual environment; install its venv module (python3-venv on Debian)"
        fi
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "the active environment has $(python --version 2>/dev/null || echo no python); Splits needs Python 3.11 or newer"
}

packages() {  # the pinned packages, once
    local stamp
    stamp="$(python -c 'import sys; print(sys.prefix)')/.splits-$(hash_of requirements.txt)"
    if [ ! -e "$stamp" ]; then
        echo "run.sh: installing the pinned packages of requirements.txt (once; torch is large)"
        python -m pip install --disable-pip-version-check -r requirements.txt ||
            die "pip could not install requirements.txt (its last lines say why); mend that and run the same command again"
        touch "$stamp"
    fi
    # Compiled kernels are kept between runs: the first start compiles, the next ones load.
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$PWD/.cache/inductor}"
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/.cache/triton}"
    export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="${FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED:-1}"
    export FLASH_ATTENTION_CUTE_DSL_CACHE_DIR="${FLASH_ATTENTION_CUTE_DSL_CACHE_DIR:-$PWD/.cache/flash_attention}"
    # Bytecode too: a Python that may not write it beside its packages compiles 2,600 files at every start, for 11 s.
    local site
    site="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || [ ! -w "$site" ]; then
        unset PYTHONDONTWRITEBYTECODE
        export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$PWD/.cache/bytecode}"
    fi
}

case "${1:-}" in
    test) shift; environment; packages; exec python -m pytest "$@" ;;
    setup) environment; packages; exit 0 ;;
    -h | --help) usage; exit 0 ;;
esac
environment
case " $* " in *" --help "* | *" -h "*) exec python -m recordbook.runs "$@" ;; esac
python -m recordbook.runs check "$@"  # arguments are checked before anything is installed
packages
exec python -m recordbook.runs "$@"
