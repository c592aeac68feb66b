#!/usr/bin/env bash
# Everything for a machine with a GPU in one call: measures its ceilings, builds, tests, compares, prints a short table.
#
#   bench/gpu.sh 2>&1 | tee gpu.log                     needs torch, Triton, pytest, pytest-benchmark, nvcc; no network
#   bench/gpu.sh --parts build,compare -- --only rows   some parts; what follows -- goes to bench.side_by_side
#   bench/gpu.sh --dry-run --device cpu                 every part on tiny shapes, nothing built: does the script work?
#
# PYTHON (python3): the interpreter. KD_WHEELS (.whl): a folder of other libraries' wheels (bench/peers.txt), used if it
# is there. KD_RESULTS (bench/results): where results go. OUT: a folder that gets a copy. KD_SECONDS (465): for all of
# it. KD_COMMIT: which commit this is, where git does not know.
#
# A part has a time limit. One that fails is reported at the end, stops no other, and makes the exit status 1. Results
# are on disk after every comparison.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

device=cuda parts=ceilings,wheels,build,tests,compare,sampler,ops dry_run=0
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --parts) parts=$2; shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        --) shift; break ;;
        *) echo "bench/gpu.sh: unknown argument $1; see the head of the script" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-python3}
wheels=${KD_WHEELS:-.whl}
seconds=${KD_SECONDS:-465}
tiny=() tests=(tests)
if [ "$dry_run" = 1 ]; then
    tiny=(--tiny) tests=(tests/test_bench.py)
    KD_RESULTS=${KD_RESULTS:-$(mktemp -d)}
fi
results=${KD_RESULTS:-bench/results}
mkdir -p "$results"
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

failed=()
part() { # name, limit in seconds, command
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    [[ ",$parts," == *",$name,"* ]] || return 0
    limit=$((limit < seconds - SECONDS ? limit : seconds - SECONDS))
    if [ "$limit" -lt 5 ]; then
        failed+=("$name: no time left")
        return 0
    fi
    echo "== $name (at most $limit s)"
    # An interrupt, so that what was measured is written; a shell in the background would have had it ignored.
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@"
    status=$?
    echo "== $name: status $status after $((SECONDS - begin)) s"
    [ "$status" = 0 ] || failed+=("$name: status $status")
}

part ceilings 30 "$python" -m bench.ceilings --device "$device" "${tiny[@]}" --out "$results/gpu_ceilings.json"

if compgen -G "$wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    part wheels 40 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --upgrade --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi

if [ "$dry_run" = 0 ]; then
    # For this GPU alone: 9.0 is sm_90a. Without nvidia-smi setup.py's own list holds.
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 2> /dev/null | tr -d '.')
    if [ -n "$capability" ]; then
        export KD_CUDA_ARCHS=${KD_CUDA_ARCHS:-${capability/#90/90a}}
    fi
    part build 90 "$python" setup.py -q build_ext --inplace
fi

part tests 140 "$python" -m pytest -q -m gpu --continue-on-collection-errors "${tests[@]}"

part compare 250 "$python" -m bench.side_by_side --device "$device" --plan cuda "${tiny[@]}" \
    --out "$results/gpu_side_by_side.json" "$@"

part sampler 75 "$python" -m bench.sampling --device "$device" "${tiny[@]}" --rows 16 64 256 1024 --seconds 3 \
    --out "$results/gpu_sampling.json"

part ops 90 "$python" -m pytest -q bench --device "$device" "${tiny[@]}" --benchmark-only --benchmark-quiet \
    --benchmark-json "$results/gpu_ops.json"

[ -z "${OUT:-}" ] || cp "$results"/gpu_* "$OUT"/

echo
if [ -f "$results/gpu_side_by_side.json" ]; then
    "$python" -m bench.report "$results/gpu_side_by_side.json"
fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "every part of $parts succeeded in $SECONDS s; results in $results${OUT:+ and $OUT}"
