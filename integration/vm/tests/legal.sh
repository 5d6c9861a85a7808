# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# What the kernel's own software device answers to every flag, mask and limit: the table beside which ours is compared says it
# right. Sourced by tests.sh.

answers() {
    local table=$here/../clients/legal.tsv index
    index=$(grep -l 'ffff:0a09:0101' /sys/class/infiniband/rxe1/ports/1/gids/* | sed 's|.*/||')
    GID_INDEX=$index "$here/../../target/vm-legal" >/tmp/answers
    diff <(grep -v '^#' "$table" | cut -f1,2) /tmp/answers
}

modprobe -a dummy rdma_rxe
ip link add rdma1 address 02:00:00:00:0d:01 type dummy
ip address add 10.9.1.1/24 dev rdma1
ip link set rdma1 up
rdma link add rxe1 type rxe netdev rdma1
eventually grep -q 'ffff:0a09:0101' -r /sys/class/infiniband/rxe1/ports/1/gids
check "legal: the kernel's driver answers what the table says" answers

rdma link delete rxe1
ip link delete rdma1
