# shellcheck shell=bash
# For the tests in the machine: `check` runs one, the rest is what they are written with. To be sourced by tests.sh.

# shellcheck disable=SC2034 # The tests use it.
image=localhost/ringfence-verbs:1
rootfs=/srv/rootfs
cgroups=/sys/fs/cgroup
passed=0 failed=0
# Test programs of their own, which say themselves how many of their tests failed.
failed_programs=

# Runs a test: a function that stops at its first command that fails, and after $limit seconds, five minutes without it. Afterwards
# nothing of ours may be left.
check() {
    local name=$1 log status=0 test watchdog began=$SECONDS
    shift
    log=$(mktemp)
    # Each with a process group of its own.
    set -m
    (
        set -eE
        trap 'echo "status $? of line $LINENO: $BASH_COMMAND" >&2' ERR
        "$@"
        eventually nothing_left || { echo "left behind:"; leftovers; false; }
    ) >"$log" 2>&1 </dev/null &
    test=$!
    (sleep "${limit-300}"; echo "not within ${limit-300} s" >>"$log"; kill -KILL -- -$test) &
    watchdog=$!
    set +m
    wait $test || status=$?
    { kill -- -$watchdog && wait $watchdog; } 2>/dev/null
    if [ "$status" -eq 0 ]; then
        echo "test $name ... ok <$((SECONDS - began))s>"
        passed=$((passed + 1))
    else
        echo "test $name ... FAILED <$((SECONDS - began))s>"
        sed 's/^/    /' "$log"
        failed=$((failed + 1))
        clean
    fi
    rm -f "$log"
}

# Waits until a command succeeds, a minute at most: the processor may be an emulated one.
eventually() {
    local deadline=$((SECONDS + 60))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || { echo "not within 60 s: $*"; return 1; }
        sleep 0.1
    done
}

# Fails, saying so, unless both are the same.
same() {
    [ "$1" = "$2" ] || { echo "$3: \"$1\" instead of \"$2\""; return 1; }
}

leftovers() {
    pgrep -a ringfence-proxy || true
    find "$cgroups" -name 'ringfence-*' -type d -path '*.slice/*' -not -name 'ringfence-*.service'
    find "$cgroups" -maxdepth 3 -name 'ringfence-*' -type d -not -path '*.slice/*'
    systemctl list-units --all --plain --no-legend 'ringfence-*.scope'
    find /run/ringfence/containers /run/ringfence/state -mindepth 1 -maxdepth 1 2>/dev/null
}

nothing_left() { [ -z "$(leftovers)" ]; }

# After a test that failed, for the next.
clean() {
    local runtime id
    podman rm --all --force --time 0
    podman pod rm --all --force
    for runtime in runc crun; do
        for id in $($runtime list -q); do $runtime delete --force "$id"; done
    done
    for id in $(ctr task list -q); do ctr task delete --force "$id"; done
    for id in $(ctr container list -q 2>/dev/null); do ctr container delete "$id"; done
    for id in $(ctr --namespace k8s.io task list -q); do ctr --namespace k8s.io task delete --force "$id"; done
    for id in $(docker ps --all --quiet); do docker rm --force "$id"; done
    umount /srv/native
    for id in rf c1 c2; do ip netns delete $id; done
    for id in card1 card2; do rdma link delete $id; done
    rmdir "$cgroups/test"
    rm -f /etc/ringfence/conf.d/test.toml
    # Programs and libraries that a test put away.
    find /usr/libexec/ringfence /usr/lib/x86_64-linux-gnu -maxdepth 1 -name '*.away' |
        while read -r away; do mv -f "$away" "${away%.away}"; done
    ringfence gc
} >/dev/null 2>&1

# Adds to the administrator's configuration, from standard input.
configuration() { mkdir -p /etc/ringfence/conf.d && cat >/etc/ringfence/conf.d/test.toml; }

# The pid of the proxy of container $1.
proxy() { jq -e '.proxy.pid' "/run/ringfence/state/$1.json"; }

# The directory of process $1's cgroup.
cgroup() { echo "$cgroups$(cut -d: -f3 "/proc/$1/cgroup")"; }

no_warnings() { same "$(jq -c .warnings "/run/ringfence/state/$1.json")" '[]' "warnings of $1"; }

# Runs ib_write_bw between two containers, given as commands that run a program in each.
exchange() {
    local server=$1 client=$2
    $server ib_write_bw -F -n 100 >/tmp/server 2>&1 &
    eventually sh -c 'ss -ltnH | grep -q :18515'
    $client ib_write_bw -F -n 100 127.0.0.1
    wait $! || { cat /tmp/server; return 1; }
}

# What the kernel has of card $1: protection domains, queues, regions, contexts and whatever else it counts.
resources() { rdma resource show "$1" | sed 's/^[0-9]*: //'; }

# That is $2 again, what it was before anybody used the card.
only_has() { [ -n "$2" ] && [ "$(resources "$1")" = "$2" ]; }
nothing_left_of() { eventually only_has "$1" "$2" || { echo "the kernel has $(resources "$1"), and had $2"; return 1; }; }

# Runs a program that connects by rdma_cm, with its server in container c1, of the runtime $1, and its client in c2, of runc: words up to
# -- are the server's.
managed() {
    local runtime=$1 server=()
    shift
    while [ "$1" != -- ]; do
        server+=("$1")
        shift
    done
    shift
    $runtime exec c1 "${server[@]}" >/tmp/server 2>&1 &
    eventually sh -c "rdma resource show cm_id | grep -q LISTEN || ! kill -0 $!" || { cat /tmp/server; return 1; }
    # Before `check` ends it all, and what it says is lost.
    timeout $((${limit-300} / 3)) runc exec c2 "$@" || { echo "client: $?"; cat /tmp/server; return 1; }
    wait $! || { echo "server: $?"; cat /tmp/server; return 1; }
}

# Makes bundle /srv/$1 of a container that idles in the cgroup $2, with further edits to config.json as jq has them.
bundle() {
    local id=$1 cgroup=$2 edits=${3:-.} hook='{"path": "/usr/bin/ringfence-hook", "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}'
    rm -rf "/srv/$id" && mkdir -p "/srv/$id"
    (cd "/srv/$id" && runc spec)
    # The host's network namespace, for programs to find each other.
    jq --arg rootfs "$rootfs" --arg cgroup "$cgroup" --argjson hook "$hook" '
        .process.terminal = false | .process.args = ["/bin/idle"] | .linux.cgroupsPath = $cgroup |
        .root = {path: $rootfs, readonly: false} | .linux.namespaces -= [{"type": "network"}] |
        .annotations = {"ringfence.dev/enable": "true"} |
        .hooks.createRuntime = [$hook + {args: ["ringfence-hook", "createRuntime"]}] |
        .hooks.poststop = [$hook + {args: ["ringfence-hook", "poststop"]}]' "/srv/$id/config.json" |
        jq "$edits" >"/srv/$id/new" && mv "/srv/$id/new" "/srv/$id/config.json"
}

# Runs the container of a bundle, by a runtime with its options.
up() { (cd "/srv/$2" && $1 run --detach "$2" </dev/null >"/srv/$2/output" 2>&1) || { cat "/srv/$2/output"; return 1; }; }

# Ends it.
down() {
    $1 kill "$2" KILL || true
    eventually "${1%% *}" delete "$2"
}

# containerd as a service, where pods have systemd's control groups, as kubeadm has it.
start_containerd() {
    mkdir -p /etc/containerd
    cat >/etc/containerd/config.toml <<'TOML'
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/ringfence-verbs:1"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
TOML
    ringfence configure --engine containerd >/dev/null
    systemctl restart containerd.service
}

# Limits of proxies that `is_limited` finds, together with those of a container that may have half of CPU 1; or with $1, lines
# of [proxy] that say the same for all.
limits() { configuration <<<$'[proxy]\nmemory-max = "48MiB"\npids-max = 12\n'"${1-}"; }

# shellcheck disable=SC2034 # For podman and docker.
half=(--cpus 0.5 --cpuset-cpus 1)

# The proxy of container $1 is in the control group $2, with its limits; also after systemd has read its units again.
is_limited() {
    no_warnings "$1"
    has_limits "$1" "$2"
    systemctl daemon-reload
    has_limits "$1" "$2"
}

has_limits() {
    local found
    same "$(cgroup "$(proxy "$1")")" "$2" "the proxy's cgroup"
    found=$(cd "$2" && cat pids.max memory.max cpu.max cpuset.cpus | tr '\n' ' ')
    same "$found" "12 50331648 50000 100000 1 " "limits of $2"
}
