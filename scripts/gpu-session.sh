#!/bin/bash
# One session on a machine with a GPU, from one archive: checks, benchmark, what cuBLASLt takes, PyTorch beside it, compute-sanitizer.
#
#   scripts/gpu-session.sh pack FILE.tar.gz   on the machine that built: all that travels (the check needs the driver and cuBLASLt, no Node)
#   scripts/gpu-session.sh run FOLDER         in the unpacked archive, on the GPU's machine: results and logs go into FOLDER
#   scripts/gpu-session.sh dry-run FOLDER     the same steps with the emulator, in a checkout: shows that the script works, and no speed
#
# Every step has a limit of time and a log of its own, and none stops the next. UNIFLOW_GPU_CHECK names the check, PYTHON the interpreter
# that has PyTorch. The limits add up to less than ten minutes.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
check=${UNIFLOW_GPU_CHECK:-$root/build/uniflow_gpu_check}
python=${PYTHON:-python3}
failed=0

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# step NAME SECONDS COMMAND…: its output goes to NAME.log; one line says how it ended
step() {
  local name=$1 limit=$(($2 * patience)) begin=$SECONDS status
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) echo "$name: ok, $((SECONDS - begin)) s" ;;
    124 | 137) echo "$name: stopped after $limit s; what it had written stays" ; failed=1 ;;
    *) echo "$name: FAILED ($status), $((SECONDS - begin)) s: $(tail -n 1 "$out/$name.log")" ; failed=1 ;;
  esac
}

# optional NAME TOOL: whether the tool is there; otherwise says that the step is left out
optional() {
  command -v "$2" >/dev/null && return 0
  echo "$1: left out, there is no $2"
  return 1
}

predictions() {
  cat <<'TEXT'
Written down before any run (estimates on paper for an H100 SXM, 15 % either way; nothing here was measured):
  products of the encoder's layers      at least 85 % of the 8192 x 8192 product
  attention [32,1025,16x64]             270 to 320 TFLOP/s, backward 150 to 190
  bias and erf-GELU after fc1           65 % of a copy; LayerScale and residual 85 %
  encode 32x1025x1024                   47 to 52 ms
TEXT
}

pack() {
  local archive=$1
  folder=$(mktemp -d) || exit 1
  trap 'rm -rf "$folder"' EXIT
  mkdir -p "$folder/uniflow-gpu"/{build,scripts,bench/peers,test/fixtures}
  cp "$check" "$folder/uniflow-gpu/build/uniflow_gpu_check" && strip "$folder/uniflow-gpu/build/uniflow_gpu_check" || exit 1
  cp "$0" "$folder/uniflow-gpu/scripts/"
  cp "$root/bench/peers/pytorch.py" "$folder/uniflow-gpu/bench/peers/"
  cp -r "$root/test/fixtures/golden" "$folder/uniflow-gpu/test/fixtures/"
  tar -C "$folder" -czf "$archive" uniflow-gpu || exit 1
  ls -l "$archive"
}

# The rest of the arguments is what differs between a GPU and the emulator.
session() {
  cd "$root" || exit 1
  mkdir -p "$out"
  predictions | tee "$out/predictions.txt"
  optional clocks nvidia-smi && step clocks 10 nvidia-smi -q -d CLOCK,POWER,TEMPERATURE
  step check "$check_limit" "$check" --check --filter "$check_filter" --json "$out/check.json"
  step encoder 60 "$check" --bench --filter "$encoder_filter" --json "$out/encoder.json"
  step bench "$bench_limit" "$check" --bench --filter "$bench_filter" --json "$out/bench.json"
  step probe 30 "$check" --bench --filter '^probe' --json "$out/probe.json"
  if [ "$mode" = run ]; then
    if "$python" -c 'import torch' 2>/dev/null; then
      step pytorch 110 "$python" bench/peers/pytorch.py --variants eager compile --filter '^(tokenizer|flow|training (dist|Adam))' \
        --ours "$out/bench.json" --json "$out/pytorch.json"
    else
      echo "pytorch: left out, $python has no torch"
    fi
    for tool in memcheck racecheck synccheck; do
      optional "$tool" compute-sanitizer &&
        step "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 "$check" --check --filter '^(attention|norm|elementwise|residual|distillation)$'
    done
    optional clocks-after nvidia-smi && step clocks-after 10 nvidia-smi -q -d CLOCK,POWER,TEMPERATURE
  fi
  echo "results in $out"
}

[ $# -eq 2 ] || usage
mode=$1
case $mode in
  pack) pack "$2"; exit ;;
  run)
    patience=1 check_limit=90 check_filter='' encoder_filter='^encoder' bench_limit=100 bench_filter='^(?!encoder|probe)' ;;
  dry-run) # the emulator takes minutes for all checks, which ctest runs; here, one family shows that the steps fit together
    check=${UNIFLOW_GPU_CHECK:-$root/build/native/test/emulator/cuda_emulated_test}
    patience=5 check_limit=60 check_filter='^(quality|statistics)$' encoder_filter='^encoder' bench_limit=60 bench_filter='^(?!encoder|probe)' ;;
  *) usage ;;
esac
[ -x "$check" ] || { echo "gpu-session.sh: no program $check; build it with -DUNIFLOW_TESTS=ON, or name it in UNIFLOW_GPU_CHECK" >&2; exit 2; }
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 1
session
exit $failed
