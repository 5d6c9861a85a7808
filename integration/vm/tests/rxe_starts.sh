# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# A hundred containers with a card, one after the other: nothing of them stays in the kernel. By hand. Sourced by tests.sh.

# Containers that use the card and end, without having destroyed anything.
starts() {
    local before run
    card_configuration ''
    with_card c1 /test/c1 '.process.args = ["/tmp/reach"]'
    cp "$here/../../target/vm-reach" "$rootfs/tmp/reach"
    before=$(rdma resource show)
    for ((run = 0; run < 100; run++)); do
        (cd /srv/c1 && crun run c1 </dev/null >/srv/c1/output 2>&1) || { cat /srv/c1/output; return 1; }
        grep -q "^rxe3: used" /srv/c1/output
    done
    eventually same "$(rdma resource show)" "$before" "the kernel's resources" || { rdma resource show; return 1; }
    rm "$rootfs/tmp/reach"
    eventually rmdir "$cgroups/test"
    rm /etc/ringfence/conf.d/test.toml
}

rxe_checks() {
    # shellcheck disable=SC2034 # For check.
    limit=1200
    check "rxe: a hundred starts" starts
    unset limit
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
