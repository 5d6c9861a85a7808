#!/usr/bin/env bash
# Installs what it needs, builds and lints everything, and runs every test: unit, property, loom, end to end with runc, and
# under every engine.
#
#   integration/test.sh [--no-install]
#
# Works as root on Debian 12 and 13 with a Rust toolchain. The last line says how many tests passed, failed and were
# skipped; the status is not zero if any failed.
set -euo pipefail
cd "$(dirname "$0")/.."
. integration/packages.sh

case ${1-} in
    '') install_packages "${test_packages[@]}" ;;
    --no-install) ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log
touch "$log"
failed_commands=()
declare -A last_lines=()

step() { printf '\n==> %s\n' "$*"; }

# Of a command's output, what says why it failed: what its tests that failed said, and its last words, in case it broke down.
why() {
    grep -av '^$' | awk '
        /^---- / { left = 8 }
        /\.\.\. FAILED/ || /^FAILED: / { indented = 40; left = 1 }
        left-- > 0 || (/^ / && indented-- > 0) { if (shown++ < 80) print; next }
        { indented = 0; last[NR % 8] = $0 }
        END { for (i = NR - 7; i <= NR; i++) if (i % 8 in last) print last[i % 8] }'
}

# Runs a test command, shows its output, and keeps it for the sum. Without a terminal's colours, so that it can be read.
tests() {
    step "$*"
    local began=$SECONDS output status=0
    output=$(mktemp -p "$work")
    "$@" 2>&1 | tee "$output" || status=$?
    keep "$status" "$output" "$*"
    echo "took $((SECONDS - began)) s"
}

# Keeps the output of a test command for the sum.
keep() {
    cat "$2" >>"$log"
    if [ "$1" -ne 0 ]; then
        failed_commands+=("$3")
        last_lines["$3"]=$(why <"$2" | cut -c 1-300 | sed 's/^/    /')
    fi
    rm "$2"
}

# Begins test commands, one after the other, that take what the following ones leave of the processors; `finish_beside` shows what
# came of them. Each is a word: a program or a function.
begin_beside() {
    local index
    besides=("$@")
    for index in "${!besides[@]}"; do
        : >"$work/beside.$index"
        echo 1 >"$work/status.$index"
    done
    step "$* (begins)"
    (
        for index in "${!besides[@]}"; do
            status=0 began=$SECONDS
            "${besides[index]}" >"$work/beside.$index" 2>&1 || status=$?
            echo "took $((SECONDS - began)) s" >>"$work/beside.$index"
            echo $status >"$work/status.$index"
        done
    ) &
    beside_pid=$!
}

finish_beside() {
    local index
    wait "$beside_pid" || true
    for index in "${!besides[@]}"; do
        step "${besides[index]}"
        cat "$work/beside.$index"
        keep "$(cat "$work/status.$index")" "$work/beside.$index" "${besides[index]}"
    done
}

skipped_steps=()

# Runs a check that has no tests to count.
checked() {
    step "$*"
    "$@" || failed_commands+=("$*")
}

# Says that a step cannot be run, and has it counted.
skip_step() {
    step "$1"
    echo "SKIPPED: $1: $2" | tee -a "$log"
    skipped_steps+=("$1")
}

# Those that git tracks, or, without git, that are here: by their names or their first lines.
shell_scripts() {
    { git ls-files 2>/dev/null || find . -path ./target -prune -o -path ./integration/.cache -prune -o -type f -print; } |
        while read -r file; do
            if [[ $file == *.sh ]] || { read -r line <"$file" && [[ $line =~ ^#!.*/(env\ )?(ba|da)?sh( |$) ]]; } 2>/dev/null; then
                echo "$file"
            fi
        done
}

checked cargo fmt --all --check
if cargo clippy --version >/dev/null 2>&1; then
    checked cargo clippy --workspace --all-targets --locked -- -D warnings
else
    skip_step "cargo clippy" "it is not installed; rustup component add clippy"
fi
if command -v shellcheck >/dev/null; then
    mapfile -t scripts < <(shell_scripts)
    checked shellcheck "${scripts[@]}"
else
    skip_step shellcheck "it is not installed"
fi

# Those that build_package needs as well: together they take both processors, of which each program's linking takes one.
more_programs=(--package ringfence --package ringfence-shim-wrapper)
build_release
build_ibverbs
build_obedient
build_package

export CARGO_TERM_COLOR=never
# The same cases of properties each time: to look for others is for whoever has the time, with PROPTEST_CASES as well.
export PROPTEST_RNG_SEED="${PROPTEST_RNG_SEED-1}"
# `--no-fail-fast`: the sum at the end is of all tests. Those of `applications` that measure nothing come below.
tests cargo test --locked --workspace --no-fail-fast -- --skip ': podman: ' --skip ': podman without root: ' --skip ': docker: '
tests cargo test --locked --package ringfence-integration --test applications -- ': burn: '
deb=$(find target/deb -name 'ringfence_*.deb' | head -n 1)
cards_deb=$(find target/deb -name 'ringfence-ibverbs_*.deb' | head -n 1)
# What computes gives way to the machine.
applications() { nice -n 10 cargo test --locked --package ringfence-integration --test applications -- --skip ': burn: '; }
fuzzers() { nice -n 10 integration/fuzz.sh; }
# Apart from the rest: these flags, which replace those of .cargo/config.toml, would rebuild everything.
loom_models() {
    RUSTFLAGS='--cfg loom' nice -n 10 cargo test --locked --package ringfence-protocol --lib --tests --release --no-fail-fast \
        --target-dir target/loom
}
# Each runs in a Debian or a directory of its own.
debian_package() { hook/package/test-deb.sh "$deb"; }
kubernetes_manifests() { examples/kubernetes/test.sh "$deb" "$cards_deb"; }
# Some minutes, besides the build; integration/fuzz.sh says how to run them longer. The machine below leaves a processor idle most of
# the time.
begin_beside applications fuzzers loom_models debian_package kubernetes_manifests
# What this machine's control groups and init cannot show.
tests integration/vm/test.sh
# And what only a newer kernel than Debian's own can: a card in a container's own network, and one that is moved there. .ci/run allows for 5400 s in all.
if [ "$SECONDS" -lt 3900 ]; then
    tests integration/vm/test.sh --kernel backports rxe_own exclusive_life
else
    skip_step "integration/vm/test.sh --kernel backports rxe_own exclusive_life" "$SECONDS s have passed; run it by hand"
fi
finish_beside

# "test result: ok. 12 passed; 0 failed; 1 ignored; …", one line of each test program. What says "SKIPPED: " is among its ignored.
read -r passed failed skipped < <(awk '
    /^test result:/ { for (i = 2; i <= NF; i++) {
        if ($i ~ /^passed/) passed += $(i - 1)
        if ($i ~ /^failed/) failed += $(i - 1)
        if ($i ~ /^ignored/) skipped += $(i - 1) } }
    END { print passed + 0, failed + 0, skipped + 0 }' "$log")

step "summary"
# "Running tests/engine_cri.rs (…)", and later its sum with "finished in 93.21s".
awk '/^ *Running / { name = $2 } /finished in / { seconds = $NF + 0; if (seconds >= 10) printf "%4d s %s\n", seconds, name }' "$log"
grep -a '^SKIPPED: ' "$log" || true
skipped=$((skipped + ${#skipped_steps[@]}))
for command in "${failed_commands[@]}"; do
    echo "FAILED: $command${last_lines[$command]:+, which ended with:}"
    [ -z "${last_lines[$command]-}" ] || printf '%s\n' "${last_lines[$command]}"
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "${#failed_commands[@]}" -eq 0 ] && [ "$passed" -gt 0 ]
