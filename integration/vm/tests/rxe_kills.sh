# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# A hook that is killed, and what rxe_fence.sh has killed with runc. By hand. Sourced by tests.sh.

# The hook is killed at twelve moments of its way: what it has begun goes with the container that does not come to be.
hook_killed() {
    local moment takes after kills=0
    card_configuration ''
    # How long it takes if nobody kills it.
    # shellcheck disable=SC2016 # The hook's shell expands it.
    with_card c3 test.slice:rf:c3 '.hooks.createRuntime[0] |= . + {path: "/bin/sh", args: ["sh", "-c",
        "began=$(date +%s%N); /usr/bin/ringfence-hook createRuntime; status=$?; echo $(( ($(date +%s%N) - began) / 1000000 )) >>/tmp/takes; exit $status"]}'
    rm -f /tmp/takes
    for moment in {1..3}; do
        up "runc --systemd-cgroup" c3
        down runc c3
        nothing_in_kernel
    done
    takes=$(sort -n /tmp/takes | head -n 1)
    for moment in {0..11}; do
        after=$((takes * moment / 11 + 1))
        with_card c3 test.slice:rf:c3 '.hooks.createRuntime[0] |= . + {path: "/usr/bin/timeout",
            args: ["timeout", "--signal=KILL", "'"$((after / 1000)).$(printf %03d $((after % 1000)))"'", "/usr/bin/ringfence-hook", "createRuntime"]}'
        if up "runc --systemd-cgroup" c3 >/tmp/said; then
            # It was done before.
            down runc c3
        else
            cat /tmp/said
            grep -qE 'exit status 137|signal: killed' /tmp/said
            kills=$((kills + 1))
            runc delete --force c3 2>/dev/null || true
        fi
        eventually sh -c '! pgrep ringfence-proxy' || { pgrep -a ringfence-proxy; return 1; }
        nothing_in_kernel
        ringfence gc
        eventually nothing_left || { leftovers; return 1; }
    done
    echo "of $takes ms; killed at $kills of 12 moments"
    [ "$kills" -ge 8 ]
    rm /etc/ringfence/conf.d/test.toml
}

rxe_checks() {
    check "rxe: two containers of runc" pair runc
    check "rxe: programs, proxies and containers of crun that are killed" killed crun
    limit=1200 check "rxe: a hook that is killed half-way" hook_killed
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
