# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# The proxy with a real card, on the kernel's own software device. Sourced by tests.sh. test.sh compiles what it runs: into
# target/vm-clients the verbs programs, and into target/vm-programs the path of the test program.

# Programs know their files by the paths that they were built with.
host=$(cat /repository/target/vm-repository 2>/dev/null || echo /repository)
path=$(sed -n 's|^integration ibverbs ||p' /repository/target/vm-programs 2>/dev/null)
if [ -z "$path" ] || ! [ -x /repository/target/ibverbs/ringfence-proxy-ibverbs ]; then
    echo "test integration: ibverbs ... ignored"
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
    echo "SKIPPED: ibverbs: no test program or no proxy: integration/vm/test.sh builds them where cargo is"
else
    if [ "$host" != /repository ]; then
        mkdir -p "$host"
        mount --bind /repository "$host"
    fi
    modprobe -a dummy rdma_rxe
    ip link add rdma1 address 02:00:00:00:0d:01 type dummy
    ip address add 10.9.1.1/24 dev rdma1
    ip link set rdma1 up
    rdma link add rxe1 type rxe netdev rdma1
    eventually grep -q 'ffff:0a09:0101' -r /sys/class/infiniband/rxe1/ports/1/gids
    idle=$(resources rxe1)
    echo "     Running integration/tests/ibverbs in the virtual machine"
    (cd "$host/integration" && ulimit -l unlimited &&
        RINGFENCE_CARD=rxe1 RINGFENCE_CLIENTS=$host/target/vm-clients timeout 1800 "$host/$path") || failed_programs+=" integration/tests/ibverbs"
    # What a proxy had of the card has gone with it.
    check "ibverbs: nothing is left in the kernel" nothing_left_of rxe1 "$idle"
    rdma link delete rxe1
    ip link delete rdma1
    [ "$host" = /repository ] || umount "$host"
fi
