# shellcheck shell=bash disable=SC2154 # Whoever sources this has a directory $work.
# For tests that are scripts: `check` runs one, `summary` tells how they went. To be sourced.

passed=0
failed=0
skipped=0

# Runs a command, which is to succeed; its output is shown if it does not.
check() {
    local what=$1
    shift
    if "$@" >"$work/output" 2>&1; then
        passed=$((passed + 1))
        echo "ok: $what"
    else
        failed=$((failed + 1))
        echo "FAILED: $what"
        sed 's/^/    /' "$work/output"
    fi
}

not() { ! "$@"; }

# Succeeds if no check failed.
summary() {
    echo "test result: $passed passed; $failed failed; $skipped ignored"
    [ "$failed" -eq 0 ]
}
