# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# Programs of rdma-core, perftest, UCX and hwloc: which work between two ends without proxies, and which between two containers with a
# proxy each, on the same device. A table that says so is printed, and compared with what is expected. Some of them, unless $programs_all
# is set. Sourced by tests.sh.

# A row for each program, of fields with | between them: "+" if it is among the some; native and proxied, each "works", "fails" or "not offered";
# what its output is to have if it works, and behind a ; if it does not; server, if there is one; client.
# @I is the index of the card's GID, @P a port, @A the address.
programs() {
    cat <<'ROWS'
+|works|works|rxe3||ibv_devices
+|works|works|PORT_ACTIVE||ibv_devinfo -d rxe3
 |works|works||ibv_rc_pingpong -d rxe3 -g @I -p @P -n 100|ibv_rc_pingpong -d rxe3 -g @I -p @P -n 100 127.0.0.1
 |works|not offered|;Couldn't create QP|ibv_uc_pingpong -d rxe3 -g @I -p @P -n 100|ibv_uc_pingpong -d rxe3 -g @I -p @P -n 100 127.0.0.1
+|works|not offered|;Couldn't create QP|ibv_ud_pingpong -d rxe3 -g @I -p @P -s 1024 -n 100|ibv_ud_pingpong -d rxe3 -g @I -p @P -s 1024 -n 100 127.0.0.1
+|works|not offered|;Couldn't create SRQ|ibv_srq_pingpong -d rxe3 -g @I -p @P -n 100|ibv_srq_pingpong -d rxe3 -g @I -p @P -n 100 127.0.0.1
 |fails|not offered|;Couldn't Open the XRC Domain 95|ibv_xsrq_pingpong -d rxe3 -g @I -p @P -n 100|ibv_xsrq_pingpong -d rxe3 -g @I -p @P -n 100 127.0.0.1
ROWS
    local plus tool options
    for tool in write_bw write_lat read_bw read_lat send_bw send_lat atomic_bw atomic_lat; do
        options="-F -n 100 -p @P"
        case $tool in atomic*) ;; *_bw) options+=" -s 4096" ;; *) options+=" -s 8" ;; esac
        plus=' '
        [ $tool != atomic_lat ] || plus=+
        echo "$plus|works|works||ib_$tool $options -d rxe3 -x @I|ib_$tool $options -d rxe3 -x @I 127.0.0.1"
        plus=' '
        [ $tool != send_bw ] || plus=+
        echo "$plus|works|works||ib_$tool -R $options|ib_$tool -R $options @A"
    done
    cat <<'ROWS'
 |works|not offered|;Unable to create QP|ib_send_bw -c UD -F -n 100 -s 1024 -p @P -d rxe3 -x @I|ib_send_bw -c UD -F -n 100 -s 1024 -p @P -d rxe3 -x @I 127.0.0.1
 |works|not offered|;Couldn't create SRQ|ib_send_bw --use-srq -F -n 100 -s 1024 -p @P -d rxe3 -x @I|ib_send_bw --use-srq -F -n 100 -s 1024 -p @P -d rxe3 -x @I 127.0.0.1
+|works|works||rping -s -C 20 -V|rping -c -a @A -C 20 -V
 |works|works||ucmatose -c 3|ucmatose -c 3 -s @A
+|works|not offered|;unable to create QP: Operation not supported|udaddy -c 2|udaddy -c 2 -s @A
 |fails|fails||udpong -b @A -p 7500|udpong -s @A -p 7500 -I 20
 |works|works||rdma_server|rdma_client -s @A
 |works|works||rdma_xserver -c r|rdma_xclient -s @A -c r
 |fails|not offered|;rdma_create_ep: Operation not supported|rdma_xserver -c x|rdma_xclient -s @A -c x
 |works|works||rstream -S 4096 -I 100 -C 1|rstream -s @A -S 4096 -I 100 -C 1
+|works|works||riostream -S 4096 -I 100 -C 1|riostream -s @A -S 4096 -I 100 -C 1
 |fails|fails|;RDMA_CM_EVENT_REJECTED|cmtime -c 10|cmtime -s @A -c 10
+|works|not offered|Transport: rc_verbs;failed to create UD QP||ucx_info -d
+|fails|works|OpenFabrics.*"rxe3"||lstopo-no-graphics
ROWS
}

# Puts a program into the containers' root, with the libraries that it needs there.
bring() {
    local file library
    for file in "$@"; do
        mkdir -p "$rootfs${file%/*}"
        cp --dereference "$file" "$rootfs$file"
        for library in $(ldd "$file" | grep -o '/[^ ]*'); do
            mkdir -p "$rootfs${library%/*}"
            [ -e "$rootfs$library" ] || cp --dereference "$library" "$rootfs$library"
        done
    done
}

# Whether a server listens, on a port of TCP's or by rdma_cm, or has ended.
serves() { ss -ltnH | grep -q ":$port " || rdma resource show cm_id | grep -q LISTEN || ! kill -0 "$1" 2>/dev/null; }

# Runs a row's server and client, behind the words $1 and $2, and says "works" or "fails"; what they said is in /tmp/said.
outcome() {
    local in_server=$1 in_client=$2 expression=$3 server=$4 client=$5 pid='' status=0 tries
    : >/tmp/server
    if [ -n "$server" ]; then
        # shellcheck disable=SC2086 # A command's words.
        timeout -k 1 90 $in_server $server >/tmp/server 2>&1 &
        pid=$!
        for ((tries = 0; tries < 50; tries++)); do
            if serves $pid; then break; fi
            sleep 0.1
        done
    fi
    # A server that has failed says why, and its client would only miss it.
    if [ -z "$pid" ] || kill -0 $pid 2>/dev/null; then
        # shellcheck disable=SC2086
        timeout -k 1 60 $in_client $client >/tmp/client 2>&1 || status=$?
    else
        : >/tmp/client
    fi
    if [ -n "$pid" ]; then
        # Of one that has failed the other end is left.
        if [ $status -ne 0 ]; then
            sleep 1
            kill $pid 2>/dev/null
            sleep 0.2
            pkill -KILL -x "$(cut -c -15 <<<"${server%% *}")"
        fi
        wait $pid || status=1
    fi
    cat /tmp/server /tmp/client >/tmp/said
    if [ $status -eq 0 ] && { [ -z "$expression" ] || grep -qE "$expression" /tmp/said; }; then echo works; else echo fails; fi
}

# A row of the table of the row $1, which is added to $table, and fails if it is not what is expected.
row() {
    local plus native proxied texts refusal server client name how words expected found index port cell line='' wrong=0
    IFS='|' read -r plus native proxied texts server client <<<"$1"
    refusal=$(cut -s -d';' -f2 <<<"$texts")
    rm -f /tmp/said.*
    name=${client%% -*}
    case $client in *" -R"*) name+=" -R" ;; *" -c UD"*) name+=" -c UD" ;; *"--use-srq"*) name+=" --use-srq" ;; *"-c r"|*"-c x") name+=" -c ${client##* }" ;; esac
    name=${name% @A}
    for how in native proxied; do
        port=$(a_port)
        index=$native_index words=('' '') expected=$native
        [ $how = native ] || index=$container_index words=("crun exec c1" "crun exec c2") expected=$proxied
        found=$(outcome "${words[0]}" "${words[1]}" "${texts%%;*}" "$(filled "$server")" "$(filled "$client")")
        cell=$found
        if [ "$found" != works ]; then
            cp /tmp/said "/tmp/said.$how"
            [ "$expected" = works ] || cell=$expected
            [ -z "$refusal" ] || cell+=": \`$(grep -m 1 -o -e "$refusal" /tmp/said)\`"
            [ -z "$refusal" ] || grep -q -e "$refusal" /tmp/said || wrong=1
        fi
        line+=" $cell |"
        case $expected in works) [ "$found" = works ] ;; *) [ "$found" = fails ] ;; esac || wrong=1
    done
    echo "| \`$name\` |$line" >>"$table"
    [ $wrong = 0 ] || { echo "$name: $line"; cat /tmp/said.native /tmp/said.proxied 2>/dev/null; }
    return $wrong
}

filled() { sed "s/@I/$index/g; s/@P/$port/g; s/@A/$address/g" <<<"$1"; }

programs_run() {
    local id row wrong=0
    card_configuration 'rdma-cm = true'
    for id in c1 c2; do
        with_card $id
        up "crun --systemd-cgroup" $id
    done
    native_index=$(index env)
    container_index=$(index crun exec c1)
    printf '| | native | proxied |\n|---|---|---|\n' >>"$table"
    while IFS= read -r row <&3; do
        row "$row" || wrong=1
    done 3< <(programs | if [ -n "${programs_all-}" ]; then cat; else grep ^+; fi)
    for id in c1 c2; do down crun $id; done
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
    return $wrong
}

# The events of the card's port, as ibv_asyncwatch tells of them.
watched() {
    local pid
    # It buffers its lines unless there is a terminal.
    script -qefc "$*" /tmp/watched >/dev/null </dev/null &
    pid=$!
    eventually grep -q "async event FD" /tmp/watched
    ip link set rdma3 down
    eventually grep -qi "port.err" /tmp/watched || { cat /tmp/watched; return 1; }
    ip link set rdma3 up
    eventually grep -qi "port.active" /tmp/watched || { cat /tmp/watched; return 1; }
    eventually grep -q "$gid" -r /sys/class/infiniband/rxe3/ports/1/gids
    pkill -x ibv_asyncwatch
    wait $pid || true
}

events() {
    card_configuration ''
    with_card c1
    up "crun --systemd-cgroup" c1
    watched ibv_asyncwatch -d rxe3
    watched crun exec --tty c1 ibv_asyncwatch -d rxe3
    echo "| \`ibv_asyncwatch\` | works | works |" >>"$table"
    down crun c1
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

rxe_checks() {
    local follower
    table=/tmp/programs
    : >$table
    # Row by row: it takes its time.
    tail -f $table &
    follower=$!
    modprobe rdma_ucm
    eventually test -c /dev/infiniband/rdma_cm
    bring /usr/bin/{ib_*,ibv_*,rdma_*,rping,ucmatose,ud*,r*stream,cmtime,ucx_info,lstopo-no-graphics} /usr/lib/x86_64-linux-gnu/libgcc_s.so.1 \
        /usr/lib/x86_64-linux-gnu/ucx/*.so*
    # shellcheck disable=SC2034 # For check.
    limit=1800
    check "rxe: programs, natively and proxied" programs_run
    check "rxe: ibv_asyncwatch, natively and proxied" events
    unset limit
    # The rest of it comes out, too.
    sleep 1
    kill $follower
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
