# shellcheck shell=bash
# The package's units and files under systemd. Sourced by tests.sh, which has installed the package.

units() {
    systemctl is-active ringfence-gc.timer ringfence-cdi-refresh.path
    systemctl is-enabled ringfence-gc.timer ringfence-cdi-refresh.path
    systemd-analyze verify ringfence-gc.timer ringfence-gc.service ringfence-cdi-refresh.path ringfence-cdi-refresh.service
}

run_directory() {
    same "$(stat -c %U:%a /run/ringfence)" root:700 /run/ringfence
    rm -rf /run/ringfence
    systemd-tmpfiles --create
    same "$(stat -c %U:%a /run/ringfence)" root:700 "/run/ringfence as systemd-tmpfiles makes it"
}

# Everything that knew of the container is killed; what it leaves goes with the service that the timer starts.
collected() {
    local id
    id=$(podman run --detach --name one --annotation ringfence.dev/enable=true --network host $image)
    systemctl start ringfence-gc.service
    podman exec one ibv_devinfo
    pkill -KILL conmon
    podman kill one || kill -KILL "$(jq .init.pid "/run/ringfence/state/$id.json")"
    eventually sh -c '! pgrep ringfence-proxy'
    test -e "/run/ringfence/state/$id.json"
    systemctl start ringfence-gc.service
    test ! -e "/run/ringfence/state/$id.json"
    same "$(systemctl show -P Result ringfence-gc.service)" success "the service's result"
    podman rm --force --time 0 one
}

refreshed() {
    has_profile() { ringfence cdi list 2>&1 | tee /tmp/list; jq -e --arg name "$1" '.devices[] | select(.name == $name)' /etc/cdi/ringfence.json; }
    # Who never asked for CDI devices gets none.
    echo >>/etc/ringfence/config.toml
    sleep 2
    test ! -e /etc/cdi/ringfence.json
    ringfence cdi generate
    echo '[policy.profiles.gold]' >>/etc/ringfence/config.toml
    eventually has_profile gold
    configuration <<<'[policy.profiles.silver]'
    eventually has_profile silver
    podman run --rm --device ringfence.dev/rdma=silver $image ibv_devinfo | grep PORT_ACTIVE
    rm /etc/cdi/ringfence.json /etc/ringfence/conf.d/test.toml
    sed -i '/policy.profiles.gold/d' /etc/ringfence/config.toml
}

doctor() {
    ringfence configure --engine all
    ringfence doctor
    same "$(ringfence doctor | grep -c '^WARNING\|^PROBLEM')" 0 "warnings of doctor"
}

# Its last test: the engines work without it.
removed() {
    dpkg --remove ringfence
    systemctl daemon-reload
    same "$(systemctl list-units --all --plain --no-legend 'ringfence*')" "" "units"
    podman run --rm $image true
    dpkg --purge ringfence
    test ! -e /etc/ringfence
    test ! -e /run/ringfence
    same "$(systemctl --failed --plain --no-legend)" "" "units that failed"
}
