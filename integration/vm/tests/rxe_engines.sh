# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh, rxe.sh and cri.sh.
# Containers of the engines that run as services, with a card behind their proxies: docker, containerd, pods. By hand.
# Sourced by tests.sh.

# Runs a program in a container of containerd's, as one command.
task=/usr/local/bin/in-task

# Puts the program that is not in the image into a running container of containerd's, of which $1 is the namespace.
bring_pingpong() { cp /usr/bin/ibv_rc_pingpong "/run/containerd/io.containerd.runtime.v2.task/$1/$2/rootfs/usr/bin/"; }

pair_of_docker() {
    local name
    card_configuration ''
    for name in one two; do
        docker run --detach --name $name --runtime ringfence --network host --annotation ringfence.dev/device=rxe3 \
            --volume /usr/bin/ibv_rc_pingpong:/usr/bin/ibv_rc_pingpong:ro "$image"
    done
    both_ways "docker exec one" "docker exec two"
    docker rm --force one two
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# With the shim, or the options that $@ has instead.
pair_of_containerd() {
    local id
    card_configuration ''
    for id in c1 c2; do
        ctr run --detach --net-host --annotation ringfence.dev/enable=true --annotation ringfence.dev/device=rxe3 "$@" "$image" $id
        no_warnings $id
        bring_pingpong default $id
    done
    both_ways "$task default c1" "$task default c2"
    for id in c1 c2; do
        ctr task kill --signal KILL $id
        eventually ctr task delete $id
        ctr container delete $id
    done
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

# In the host's network, as ringfence-cri runs them.
pair_of_pods() {
    local cri=$here/../../target/x86_64-unknown-linux-gnu/release/ringfence-cri said id ids
    card_configuration ''
    said=$("$cri" run --annotation ringfence.dev/enable=true --annotation ringfence.dev/device=rxe3 ringfence /kubepods.slice one other)
    mapfile -t ids <<<"$said"
    for id in "${ids[@]:1:2}"; do bring_pingpong k8s.io "$id"; done
    both_ways "$task k8s.io ${ids[1]}" "$task k8s.io ${ids[2]}"
    "$cri" remove "${ids[0]}"
    systemctl stop kubepods.slice
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
}

rxe_checks() {
    bring_perftest
    # shellcheck disable=SC2016 # The program's own variables.
    printf '#!/bin/sh\nnamespace=$1 id=$2\nshift 2\nexec ctr --namespace "$namespace" task exec --exec-id "exec-$$" "$id" "$@"\n' >$task
    chmod 755 $task
    mkdir -p /etc/docker
    echo '{"bridge": "none", "iptables": false, "ip6tables": false}' >/etc/docker/daemon.json
    ringfence configure --engine docker >/dev/null
    systemctl restart docker.service
    docker load --quiet --input /var/lib/ringfence-verbs.tar >/dev/null
    check "rxe: two containers of docker" pair_of_docker
    systemctl stop docker.service docker.socket containerd.service
    start_containerd
    ctr images import /var/lib/ringfence-verbs.tar >/dev/null
    ctr --namespace k8s.io images import /var/lib/ringfence-verbs.tar >/dev/null
    check "rxe: two containers of containerd, by the shim" pair_of_containerd --runtime io.containerd.ringfence.v2
    check "rxe: two containers of containerd, by ringfence-runtime" pair_of_containerd --runc-binary /usr/bin/ringfence-runtime
    check "rxe: two containers of a pod" pair_of_pods
    systemctl stop containerd.service
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
