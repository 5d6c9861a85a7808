# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# Two tenants on a link of 50 Mbit/s, with a proxy and a card at each end, on which what does not fit waits in a queue. By hand.
# Sourced by tests.sh.
#
# The link is a pair of interfaces. rxe of kernel 6.12 has its socket in the initial network namespace only, so both are there, and rules
# have what is sent from one's address to the other's cross the link.

rates=/tmp/rates latencies=/tmp/latencies

link_up() {
    local i
    modprobe -a veth sch_tbf
    ip link add va type veth peer name vb
    ip link set va address 02:00:00:00:0a:01 up
    ip link set vb address 02:00:00:00:0a:02 up
    ip address add 10.9.4.1/32 dev va
    ip address add 10.9.4.2/32 dev vb
    for i in all va vb; do sysctl -qw net.ipv4.conf.$i.rp_filter=0 net.ipv4.conf.$i.accept_local=1; done
    ip rule add pref 1 iif va lookup local
    ip rule add pref 1 iif vb lookup local
    ip route add 10.9.4.2/32 dev va src 10.9.4.1 table 101
    ip route add 10.9.4.1/32 dev vb src 10.9.4.2 table 102
    ip rule add pref 2 from 10.9.4.1 to 10.9.4.2 lookup 101
    ip rule add pref 2 from 10.9.4.2 to 10.9.4.1 lookup 102
    ip rule add pref 10 lookup local
    ip rule delete pref 0
    ip neigh replace 10.9.4.2 lladdr 02:00:00:00:0a:02 dev va nud permanent
    ip neigh replace 10.9.4.1 lladdr 02:00:00:00:0a:01 dev vb nud permanent
    rdma link add rxa type rxe netdev va
    rdma link add rxb type rxe netdev vb
    for i in va vb; do tc qdisc add dev $i root tbf rate 50mbit burst 8k latency 400ms; done
    eventually grep -q ffff:0a09:0401 -r /sys/class/infiniband/rxa/ports/1/gids
    eventually grep -q ffff:0a09:0402 -r /sys/class/infiniband/rxb/ports/1/gids
}

link_down() {
    rdma link delete rxa
    rdma link delete rxb
    ip link delete va
    ip rule add pref 0 lookup local
    ip rule delete pref 10
    ip rule delete pref 2
    ip rule delete pref 2
    ip rule delete pref 1
    ip rule delete pref 1
}

tenants_configuration() {
    local card
    for card in rxa rxb; do printf '[[device]]\nname = "%s"\nkind = "ibverbs"\n' $card; done | configuration
}

# A container $1 at the end $2 of the link, with further annotations as jq has them.
tenant() {
    bundle "$1" "test.slice:rf:$1" ".annotations += {\"ringfence.dev/device\": \"$2\"} + ${3-{\}}"
    up "crun --systemd-cgroup" "$1"
    # All with the same card have its address at the same index.
    case $2 in
        rxa) at_rxa=${at_rxa:-$(index_in "$1" rxa 0a09:0401)} ;;
        rxb) at_rxb=${at_rxb:-$(index_in "$1" rxb 0a09:0402)} ;;
    esac
}

# The index that address $3 has in the container $1 with the card $2.
index_in() {
    local file
    file=$(crun exec "$1" grep -l "ffff:$3" -r "/sys/class/infiniband/$2/ports/1/gids")
    echo "${file##*/}"
}

# Runs a program with its server in the container $1 of rxa and its client in $2 of rxb; its line of figures goes to the file $3.
across() {
    local server=$1 client=$2 into=$3 port
    shift 3
    port=$(a_port)
    timeout 250 crun exec "$server" "$@" -d rxa -x "$at_rxa" -F -p "$port" >"$into.server" 2>&1 &
    # One that has ended the client will find out.
    eventually sh -c "ss -ltnH | grep -q ':$port ' || ! kill -0 $!" || { cat "$into.server"; return 1; }
    timeout 250 crun exec "$client" "$@" -d rxb -x "$at_rxb" -F -p "$port" 127.0.0.1 >"$into.client" 2>&1 ||
        { cat "$into.client" "$into.server"; return 1; }
    wait $! || { cat "$into.server"; return 1; }
    figures_of "$into.client" >"$into"
}

# The bandwidth in the file $3 is within 3 % of the Mbit/s that were promised.
within() {
    local promised=$1 what=$2
    awk -v promised="$promised" -v what="$what" '{
        mbits = 1000 * $4
        printf "| %s | %s | %.2f | %+.1f %% |\n", what, promised, mbits, 100 * (mbits / promised - 1)
        exit !(mbits > 0.97 * promised && mbits < 1.03 * promised) }' "$3" >/tmp/row || { tee -a $rates </tmp/row; return 1; }
    cat /tmp/row >>$rates
}

end() {
    local id
    for id in "$@"; do down crun "$id"; done
    rm /etc/ringfence/conf.d/test.toml
}

# What the containers that end here send, one rate after the other.
caps() {
    tenants_configuration
    tenant c1 rxa
    tenant c2 rxb '{"ringfence.dev/bandwidth": "20Mbit", "ringfence.dev/bandwidth-rx": "10Mbit"}'
    across c1 c2 /tmp/figure ib_send_bw -e -s 65536 -n 200 --report_gbits
    within 20 "\`bandwidth\`, SENDs of 64 KiB" /tmp/figure
    across c1 c2 /tmp/figure ib_send_bw -e -s 4096 -n 3000 --report_gbits
    within 20 "\`bandwidth\`, SENDs of 4 KiB" /tmp/figure
    across c1 c2 /tmp/figure ib_read_bw -e -s 65536 -n 100 --report_gbits
    within 10 "\`bandwidth-rx\`, READs of 64 KiB" /tmp/figure
    end c1 c2
}

# Two at once, each at its own rate.
two_caps() {
    local first
    tenants_configuration
    tenant c1 rxa
    tenant c2 rxb '{"ringfence.dev/bandwidth": "10Mbit"}'
    tenant c3 rxa
    tenant c4 rxb '{"ringfence.dev/bandwidth": "25Mbit"}'
    across c1 c2 /tmp/figure1 ib_send_bw -e -s 65536 -n 100 --report_gbits &
    first=$!
    across c3 c4 /tmp/figure2 ib_send_bw -e -s 65536 -n 250 --report_gbits
    wait $first
    within 10 "one of two tenants, SENDs" /tmp/figure1
    within 25 "the other" /tmp/figure2
    end c1 c2 c3 c4
}

# Latency of a tenant beside another's bulk, which has the annotations $2, and alone without $2.
latency() {
    local what=$1 bulk=${2-} run sender
    rm -f /tmp/latency /tmp/bulks
    tenants_configuration
    tenant c1 rxa
    tenant c2 rxb '{"ringfence.dev/bandwidth": "5Mbit", "ringfence.dev/class": "latency"}'
    tenant c3 rxa
    tenant c4 rxb "${bulk:-{\}}"
    for ((run = 0; run < 3; run++)); do
        : >/tmp/bulk
        if [ -n "$bulk" ]; then
            across c3 c4 /tmp/bulk ib_send_bw -e -s 65536 -n 1600 --report_gbits &
            sender=$!
            # It has its queue pairs, and sends.
            eventually busy
        fi
        across c1 c2 /tmp/figure ib_send_lat -e -s 64 -n 300
        if [ -n "$bulk" ]; then
            # What came after the bulk would be something else.
            kill -0 $sender
            wait $sender
        fi
        awk '{ print $5, $8 }' /tmp/figure >>/tmp/latency
        awk '{ print 1000 * $4 }' /tmp/bulk >>/tmp/bulks
    done
    printf '| %s | %s | %s | %s |\n' "$what" "$(cut -d' ' -f1 /tmp/latency | median)" "$(cut -d' ' -f2 /tmp/latency | median)" \
        "$(median </tmp/bulks)" >>$latencies
    # Of the two beside bulk, the one with a policy is to gain by it.
    case $bulk in
        *bandwidth*) awk -v without="$(cat /tmp/without)" -v with="$(cut -d' ' -f1 /tmp/latency | median)" 'BEGIN { exit !(with < without) }' ;;
        ?*) cut -d' ' -f1 /tmp/latency | median >/tmp/without ;;
    esac
    rm /tmp/latency /tmp/bulks
    end c1 c2 c3 c4
}

busy() { rdma resource show qp link rxb/1 | grep -q 'state RTS'; }

rxe_checks() {
    bring_perftest
    link_up
    # shellcheck disable=SC2034 # For check.
    limit=1200
    check "rxe: tenants' rates on a slow link" caps
    check "rxe: two tenants at once" two_caps
    check "rxe: a tenant's latency, alone" latency "alone"
    check "rxe: a tenant's latency beside bulk without a policy" latency "beside bulk" '{"ringfence.dev/max-qp": "16"}'
    check "rxe: a tenant's latency beside bulk with a policy" latency "beside bulk at \`bandwidth\` 40Mbit" '{"ringfence.dev/bandwidth": "40Mbit"}'
    unset limit
    printf '%s\n' "" "| rates | promised, Mbit/s | measured | |" "|---|---|---|---|"
    cat $rates
    printf '%s\n' "" "| ib_send_lat -e | typical, µs | 99 % | bulk, Mbit/s |" "|---|---|---|---|"
    cat $latencies
    link_down
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
