#!/usr/bin/env bash
# Repeat timings of the trainer; sets up what is missing first.
#
#   bash run.sh [N] [--recipe R] [--data DIR]   N runs (default 2), then the table of compare_runs.py
#   bash run.sh ab A.py B.py N [--recipe R] [--data DIR]   N runs of each of two trainers, interleaved
#   bash run.sh test [pytest arguments]         the tests
#   bash run.sh setup                           only the environment
#   bash run.sh --help
#
# Run i has seed i and its own log under logs/<arm>/. A series that was interrupted continues where it stopped:
# N counts the runs that ended by themselves, whether they finished, diverged or crashed. Nothing is deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run.sh: error: $1" >&2; exit 2; }
usage() { sed -n '2,11s/^# \{0,1\}//p' run.sh; }

is_number() { case "$1" in '' | *[!0-9]* | 0*) return 1 ;; esac; }

hash_of() { python -c 'import hashlib, sys; print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' "$@"; }

setup() {  # a virtual environment if none is active, and the pinned packages, once
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
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
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "the active environment has $(python --version); Splits needs Python 3.11 or newer"
    local stamp
    stamp="$(python -c 'import sys; print(sys.prefix)')/.splits-$(hash_of requirements.txt | cut -c1-16)"
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
}

finished() {  # ARM SEED: whether that run ended by itself
    local log
    for log in "$1/run-$(printf %03d "$2")"*.txt; do
        [ ! -e "$log" ] || ! tail -n 1 "$log" | grep -qE '^status: (done|diverged|crashed)' || return 0
    done
    return 1
}

run_one() {  # TRAINER ARM SEED: one run with a log of its own; bad input and interruption end the series
    local trainer=$1 arm=$2 seed=$3 attempt=2 log code=0 stem
    stem="$arm/run-$(printf %03d "$seed")"
    log="$stem.txt"
    while [ -e "$log" ]; do
        log="$stem-try$attempt.txt" attempt=$((attempt + 1))
    done
    echo "run.sh: $arm, run $seed of $runs -> $log"
    if [ "$gpus" -gt 1 ]; then
        torchrun --standalone --nproc_per_node="$gpus" "$trainer" "${options[@]}" --seed "$seed" --out "$log" || code=$?
        # torchrun has one code for all failures; the log says what it was, and there is none after bad input.
        [ "$code" -eq 0 ] || [ -e "$log" ] || code=2
    else
        python "$trainer" "${options[@]}" --seed "$seed" --out "$log" || code=$?
    fi
    [ ! -e "$log" ] || ! tail -n 1 "$log" | grep -q '^status: interrupted' || code=130
    case $code in
        0) ;;
        2) exit 2 ;;
        130 | 143) echo "run.sh: interrupted; the same command continues the series" >&2; exit 130 ;;
        *) echo "run.sh: run $seed failed (exit code $code); it is kept and counted" >&2 ;;
    esac
}

choose() {  # recipe and data, where the command line leaves them open; options of the trainer
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if [ -z "$recipe" ]; then
        if [ "$gpus" -eq 0 ] || [ -n "$data" ]; then
            recipe=$([ "$gpus" -eq 0 ] && echo tiny || echo sprint)
        elif [ -e data/fineweb10B/manifest.json ]; then
            recipe=short
        else
            recipe=tiny
            echo "run.sh: no FineWeb in data/fineweb10B (get it: python data/fineweb.py), so recipe tiny on its own text;"
            echo "        with shards of your own: bash run.sh --recipe sprint --data DIR"
        fi
    fi
    name=$recipe
    if [ -n "$data" ]; then
        name="$recipe-$(basename "$data")"
    elif [ "$recipe" = tiny ]; then
        data=data/default
        python data/prepare.py --default || exit 2
    else
        data=data/fineweb10B
    fi
    options=(--recipe "$recipe" --data "$data")
}

runs="" recipe="" data="" trainers=(train_gpt.py)
case "${1:-}" in
    test) shift; setup; exec python -m pytest "$@" ;;
    setup) setup; exit 0 ;;
    -h | --help) usage; exit 0 ;;
    ab)
        [ $# -ge 4 ] || die "ab needs two trainer files and a number of runs: bash run.sh ab A.py B.py N"
        trainers=("$2" "$3") runs=$4
        shift 4
        for trainer in "${trainers[@]}"; do [ -f "$trainer" ] || die "trainer $trainer does not exist"; done
        ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --recipe | --data) [ $# -ge 2 ] || die "$1 needs a value"; [ "$1" = --recipe ] && recipe=$2 || data=$2; shift 2 ;;
        --recipe=*) recipe=${1#*=}; shift ;;
        --data=*) data=${1#*=}; shift ;;
        -* | *[!0-9]*) die "unknown argument '$1'; see bash run.sh --help" ;;
        *) [ -z "$runs" ] || die "two numbers of runs, $runs and $1; give one"; runs=$1; shift ;;
    esac
done
runs=${runs:-2}
is_number "$runs" || die "number of runs '$runs' must be a whole number from 1"
setup
choose

arms=()
for trainer in "${trainers[@]}"; do
    # The arm's name holds the hash of what runs, so that logs of two versions never mix.
    kernels="$(dirname "$trainer")/triton_kernels.py"
    [ -f "$kernels" ] || die "$trainer needs a triton_kernels.py beside it"
    stem=$([ "$trainer" = train_gpt.py ] || echo "-$(basename "$trainer" .py)")
    arms+=("logs/$name$stem-$(hash_of "$trainer" "$kernels" | cut -c1-8)")
done
[ "${#arms[@]}" -eq 1 ] || [ "${arms[0]##*-}" != "${arms[1]##*-}" ] || die "${trainers[0]} and ${trainers[1]} are the same program"
mkdir -p "${arms[@]}" 2>/dev/null || die "folder ${arms[0]} cannot be made here; check permissions and space"

for ((seed = 1; seed <= runs; seed++)); do
    # AB BA BA AB: over four runs of each, a steady drift of the machine cancels.
    case $(((seed - 1) % 4))-${#arms[@]} in
        *-1) order="0" ;;
        0-2 | 3-2) order="0 1" ;;
        *) order="1 0" ;;
    esac
    for i in $order; do
        finished "${arms[$i]}" "$seed" || run_one "${trainers[$i]}" "${arms[$i]}" "$seed"
    done
done
if [ "$runs" -eq 1 ]; then
    echo "run.sh: one run is no sample, so there is no table; bash run.sh 2 adds the second"
    exit 0
fi
python compare_runs.py "${arms[@]}"
