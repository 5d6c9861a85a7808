# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# What a proxy costs beside the card: programs between two containers, and the same without proxies, by turns on the same device. By
# hand. Sourced by tests.sh, with these from the environment of test.sh:
#
#   RINGFENCE_COST_RUNS    how often each is measured, 3 by default
#   RINGFENCE_COST_TOOLS   which of perftest's programs, all five by default

# What came of it: test, bytes, how, figure.
figures=/tmp/figures
runs=${RINGFENCE_COST_RUNS:-3}
tools=${RINGFENCE_COST_TOOLS:-ib_send_lat ib_write_lat ib_write_bw ib_read_bw ib_send_bw}

# Runs a program with its server $1 and its client $2, each a command that runs a program somewhere; its line of figures.
line_of() {
    local server=$1 client=$2 index port
    shift 2
    # shellcheck disable=SC2086 # A command's words.
    index=$(index ${client:-env})
    port=$(a_port)
    # shellcheck disable=SC2086 # A command's words.
    timeout 250 $server "$@" -d rxe3 -x "$index" -F -p "$port" >/tmp/server 2>&1 &
    # One that has ended the client will find out.
    eventually sh -c "ss -ltnH | grep -q ':$port ' || ! kill -0 $!" || { cat /tmp/server >&2; return 1; }
    # shellcheck disable=SC2086 # A command's words.
    timeout 250 $client "$@" -d rxe3 -x "$index" -F -p "$port" 127.0.0.1 >/tmp/client 2>&1 || { cat /tmp/client /tmp/server >&2; return 1; }
    wait $! || { cat /tmp/server >&2; return 1; }
    figures_of /tmp/client
}

# A row of the table: $1 bytes, and the program $3 with its options; of its line of figures the one at $2.
row() {
    local bytes=$1 column=$2 how server client line run name=$3
    shift 2
    [ "$2" != -e ] || name+=_-e
    for ((run = 0; run < runs; run++)); do
        for how in native proxied; do
            server='' client=''
            [ $how = native ] || server="crun exec c1" client="crun exec c2"
            line=$(line_of "$server" "$client" "$@" -s "$bytes")
            awk -v what="$name $bytes $how" -v column="$column" '{ print what, $column }' <<<"$line" >>$figures
        done
    done
}

# The rows of one program.
cost() {
    local tool=$1 id bytes
    card_configuration ''
    for id in c1 c2; do
        with_card $id
        up "crun --systemd-cgroup" $id
    done
    case $tool in
        *_bw) for bytes in 4096 65536; do
            row $bytes 4 "$tool" -n $((20480000 / bytes)) --report_gbits
            # Event-driven ends, which leave the processors to the proxies; of those of WRITEs there are none.
            [ "$tool" = ib_write_bw ] || row $bytes 4 "$tool" -e -n $((20480000 / bytes)) --report_gbits
        done ;;
        ib_send_lat) row 8 5 "$tool" -e -n 1000 ;;
        *) row 8 5 "$tool" -n 1000 ;;
    esac
    for id in c1 c2; do down crun $id; done
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# Prints a row of the table for each program: medians, and the median of the runs' ratios.
table() {
    local name bytes native proxied ratio
    echo "| | bytes | native | proxied | ratio |"
    echo "|---|---|---|---|---|"
    awk '{ key = $1 " " $2 } !(key in seen) { seen[key]; print key }' $figures | while read -r name bytes; do
        native=$(awk -v key="$name $bytes native" '$1 " " $2 " " $3 == key { print $4 }' $figures)
        proxied=$(awk -v key="$name $bytes proxied" '$1 " " $2 " " $3 == key { print $4 }' $figures)
        ratio=$(paste <(echo "$proxied") <(echo "$native") | awk '{ printf "%.3f\n", $1 / $2 }' | median)
        echo "| ${name//_-/ -} | $bytes | $(median <<<"$native") | $(median <<<"$proxied") | $ratio |"
    done
}

rxe_checks() {
    local tool
    bring_perftest
    # shellcheck disable=SC2034 # For check.
    limit=1200
    for tool in $tools; do
        check "rxe: cost of $tool" cost "$tool"
    done
    table
    unset limit
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
