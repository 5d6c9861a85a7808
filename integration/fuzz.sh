#!/usr/bin/env bash
# Runs fuzzers over everything that hostile bytes reach: rings, control messages, messages of neighbours, annotations, config.json.
#
#   integration/fuzz.sh [--seconds N] [--grow] [--list] [TARGET...]
#
# Each target runs for N seconds, 60 by default, as many at a time as there are processors. For a search of its own, an hour each:
# --seconds 3600. What is found stays in target/fuzz/found.
#
# The inputs of fuzz/corpus/TARGET come first, and are never changed by a run, unless --grow says that those which reach something
# new are to be added to them. They are tests of the crates as well, which need no C++ compiler.
#
# libFuzzer is built from its sources by a C++ compiler; coverage is recorded by LLVM's pass, which every rustc has.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=60
grow=false
targets=()
mapfile -t known < <(find integration/fuzz/corpus -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort)
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=${2-}; shift ;;
        --grow) grow=true ;;
        --list) printf '%s\n' "${known[@]}"; exit ;;
        --help | -h) usage; exit ;;
        -*) usage >&2; exit 2 ;;
        *) targets+=("$1") ;;
    esac
    shift
done
if ! [[ $seconds =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "fuzz.sh: --seconds ${seconds@Q} is no number of seconds" >&2
    exit 2
fi
[ "${#targets[@]}" -gt 0 ] || targets=("${known[@]}")
for target in "${targets[@]}"; do
    if [ ! -d "integration/fuzz/corpus/$target" ]; then
        echo "fuzz.sh: there is no target ${target@Q}; there are ${known[*]}" >&2
        exit 2
    fi
done

if ! command -v "${CXX:-c++}" >/dev/null; then
    echo "SKIPPED: fuzzers: there is no C++ compiler ${CXX:-c++} to build libFuzzer with (package g++)"
    echo "test result: 0 passed; 0 failed; ${#targets[@]} ignored"
    exit
fi

work=$PWD/target/fuzz
found=$work/found
mkdir -p "$found"
triple=$(rustc -vV | sed -n 's/^host: //p')
pass='-sanitizer-coverage'
flags="-C passes=sancov-module -C llvm-args=$pass-level=4 -C llvm-args=$pass-inline-8bit-counters -C llvm-args=$pass-pc-table"
flags+=" -C llvm-args=$pass-trace-compares"
echo "==> building the fuzzers"
# In place of the workspace's flags, which make static executables. Overflows and assertions count as faults.
RUSTFLAGS=$flags cargo build --quiet --locked --package ringfence-fuzz --features run --profile fuzz \
    --target "$triple" --target-dir "$work"
fuzzer=$work/$triple/fuzz/ringfence-fuzz

# Runs one target, and says what came of it.
fuzz() {
    local target=$1 corpus=integration/fuzz/corpus/$1 fresh=$work/corpus/$1 log=$work/$1.log began=$SECONDS inputs
    local options=("-max_total_time=$seconds" -timeout=30 -rss_limit_mb=1024 -max_len=4096 -use_value_profile=1 -print_final_stats=1
        -verbosity=0 "-artifact_prefix=$found/$target-")
    rm -rf "$fresh"
    mkdir -p "$fresh"
    if [ -f "integration/fuzz/dictionaries/$target" ]; then
        options+=("-dict=integration/fuzz/dictionaries/$target")
    fi
    if RINGFENCE_FUZZ=$target "$fuzzer" "${options[@]}" "$fresh" "$corpus" >"$log" 2>&1; then
        inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        echo "ok: $target: ${inputs:-0} inputs in $((SECONDS - began)) s"
    else
        echo "FAILED: $target; to see it again: RINGFENCE_FUZZ=$target $fuzzer FILE, with a FILE of $found"
        grep -av '^INFO: ' "$log" | tail -n 60 | sed 's/^/    /'
        return 1
    fi
    if $grow; then
        # Few: those that reach a branch which none of the others does.
        RINGFENCE_FUZZ=$target "$fuzzer" -set_cover_merge=1 -use_counters=0 -max_len=4096 -verbosity=0 "$corpus" "$fresh" >>"$log" 2>&1 ||
            echo "fuzz.sh: the corpus of $target has not grown; see $log" >&2
    fi
}

passed=0
failed=0
running=0
one_ended() {
    if wait -n; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    running=$((running - 1))
}
for target in "${targets[@]}"; do
    [ "$running" -lt "$(nproc)" ] || one_ended
    fuzz "$target" &
    running=$((running + 1))
done
while [ "$running" -gt 0 ]; do one_ended; done
echo "test result: $passed passed; $failed failed; 0 ignored"
[ "$failed" -eq 0 ]
