#!/usr/bin/env bash
# One session on a GPU: is it right, how fast is it, and where does the time go. Whatever is known is in $OUT at any moment.
#
#     OUT=outputs/gpu bash benchmarks/gpu_session.sh                           from the repository's root; all steps
#     STEPS="4 6" OUT=outputs/gpu bash benchmarks/gpu_session.sh               some of them
#     DEVICE=cpu PY=.venv/bin/python OUT=... bash benchmarks/gpu_session.sh    small shapes on a CPU: does everything run?
#     DRY=1 OUT=... bash benchmarks/gpu_session.sh                             print every command and run none
#
# LIMIT: seconds in all (560). SCALE: a factor for every time limit, for a busy machine (1). PY: the interpreter (python3).
# COMMIT: what the rows say where there is no git. A step that fails, or takes too long, does not stop the others.
set -u
OUT=${OUT:?a folder for the results} DEVICE=${DEVICE:-cuda} PY=${PY:-python3} DRY=${DRY:-} COMMIT=${COMMIT:-}
SCALE=${SCALE:-1} LIMIT=$((${LIMIT:-560} * ${SCALE:-1})) STEPS=${STEPS:-1 2 3 4 5 6}
CACHE=$(mktemp -d)
trap 'rm -rf "$CACHE"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} CUBLAS_WORKSPACE_CONFIG=:4096:8
export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor TORCHINDUCTOR_COMPILE_THREADS=4
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log.txt") 2>&1

say() { echo "== $SECONDS s: $*"; }

wanted() { [[ " $STEPS " == *" $1 "* ]] && say "step $*"; }

# box SECONDS FILE COMMAND...: runs a command for so long at most, its output in a file of $OUT.
box() {
  local limit=$(($1 * SCALE)) left=$((LIMIT - SECONDS)) file=$2 status=0 start=$SECONDS
  shift 2
  if [ -n "$DRY" ]; then
    printf '+'
    printf ' %q' "$@"
    echo
    return
  fi
  ((limit < left)) || limit=$left
  ((limit > 3)) || { say "no time is left for: $*"; return; }
  timeout -s INT -k 6 "$limit" "$@" >> "$OUT/$file" 2>&1 || status=$?
  say "status $status (124, 137: stopped after $limit s), took $((SECONDS - start)) s: $*"
  grep -v Warning "$OUT/$file" | cut -c1-200 | tail -n 30
}

# row SECONDS SUITE ARGUMENTS...: rows of a suite, in a CSV file of its name.
row() { box "$1" "$2.txt" "$PY" -m benchmarks "${@:2}" --device "$DEVICE" --seconds "$TIMED" --csv "$OUT/$2.csv"; }

# pytest SECONDS ARGUMENTS...
pytest() { box "$1" tests.txt "$PY" -m pytest -q -W default -p no:cacheprovider --maxfail=20 --tb=short "${@:2}"; }

if [ "$DEVICE" = cpu ]; then
  FIRST="1x64x8x8" MORE="1x128x4x4" REST="1x256x2x2" IMAGES="1x3x64x64" IMAGE="1x3x64x64" NET="1x3x64x64" SITES="1x64x112x112" TIMED=0.01 MARKED="not slow and not cuda"
else
  FIRST="64x64x56x56 64x128x28x28" MORE="64x256x14x14 64x512x7x7 64x256x56x56" REST="64x512x28x28 64x1024x14x14 64x2048x7x7"
  IMAGES=64x3x224x224 IMAGE=1x3x224x224 NET=64x3x128x128 SITES="1x64x112x112 64x64x112x112" TIMED=0.25 MARKED=cuda
fi

if wanted 1 what is here; then
  [ -n "$DRY" ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv,noheader
  box 60 doctor.txt "$PY" -m drifa_attn doctor
fi
if wanted 2 hazards and tests; then
  box 110 hazards.txt "$PY" -m benchmarks.hazards --device "$DEVICE"
  pytest 110 -m "$MARKED" tests/ops
  [ "$DEVICE" = cpu ] || pytest 45 --device cuda -m "not slow" tests/attention/test_mfa.py tests/attention/test_mifa.py tests/attention/test_rra.py
fi
if wanted 3 the main rows; then
  row 40 layers --op MFA --provider eager auto --shape $FIRST
  row 110 layers --op MFA --provider compile --shape $FIRST $MORE
  row 55 layers --op MFA --provider eager auto --shape $MORE
fi
if wanted 4 where the time goes; then
  box 75 where.txt "$PY" -m benchmarks.where --device "$DEVICE"
fi
if wanted 5 whole networks; then
  row 60 wrap --op "resnet50 plain" "resnet50 SE" "resnet50 MFA" --provider eager auto peers --mode forward --shape $IMAGES $IMAGE
  row 50 wrap --op "resnet50 plain" "resnet50 SE" "resnet50 MFA block" "resnet18 plain" "resnet18 MFA block dense" --provider eager auto peers --mode full --shape $IMAGES
  row 25 sites --provider eager auto peers --mode forward --shape $SITES
  row 35 net --provider eager auto --shape $NET
fi
if wanted 6 the rest; then
  [ "$DEVICE" = cpu ] || box 40 ncu.txt ncu --clock-control none -k regex:chain -c 4 --section LaunchStats --section Occupancy --section SpeedOfLight --section WarpStateStats "$PY" -m benchmarks.where --device "$DEVICE" --once
  row 50 layers --op MFA --provider eager auto --shape $REST
  row 70 layers --op MFA --provider compile --shape $REST
  row 30 layers --op MIFA "MFA /16" --provider eager auto --shape ${FIRST%% *}
fi
[ -z "$COMMIT" ] || sed -i -E "s/,none,(20[0-9]{2}-)/,$COMMIT,\1/" "$OUT"/*.csv
say done
ls "$OUT"
