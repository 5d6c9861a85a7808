# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh.
# The package's units and files under systemd. Sourced by tests.sh, which has installed the package.

units() {
    systemctl is-active ringfence-gc.timer ringfence-cdi-refresh.path
    systemctl is-enabled ringfence-gc.timer ringfence-cdi-refresh.path
    systemd-analyze verify --man=no ringfence-gc.timer ringfence-gc.service ringfence-cdi-refresh.path ringfence-cdi-refresh.service
}

run_directory() {
    same "$(stat -c %U:%a /run/ringfence)" root:700 /run/ringfence
    rm -rf /run/ringfence
    systemd-tmpfiles --create
    same "$(stat -c %U:%a /run/ringfence)" root:700 "/run/ringfence as systemd-tmpfiles makes it"
}

# Nobody calls poststop any more; what the container leaves goes with the service that the timer starts.
collected() {
    bundle c1 test.slice:rf:c1
    up "runc --systemd-cgroup" c1
    systemctl start ringfence-gc.service
    runc exec c1 ibv_devinfo
    kill -KILL "$(jq .init.pid /run/ringfence/state/c1.json)"
    rm -r /run/runc/c1
    eventually sh -c '! pgrep ringfence-proxy'
    test -e /run/ringfence/state/c1.json
    systemctl start ringfence-gc.service
    test ! -e /run/ringfence/state/c1.json
    same "$(systemctl show -P Result ringfence-gc.service)" success "the service's result"
}

has_device() { jq -e --arg name "$1" '.devices[] | select(.name == $name)' /etc/cdi/ringfence.json; }

is_idle() { same "$(systemctl show -P ActiveState "$1")" inactive "$1"; }

refreshed() {
    # It may yet be at work, for an earlier change.
    eventually is_idle ringfence-cdi-refresh.service
    rm -f /etc/cdi/ringfence.json
    # Who never asked for CDI devices gets none.
    echo >>/etc/ringfence/config.toml
    sleep 2
    test ! -e /etc/cdi/ringfence.json
    ringfence cdi generate
    echo '[policy.profiles.gold]' >>/etc/ringfence/config.toml
    eventually has_device gold
    configuration <<<'[policy.profiles.silver]'
    eventually has_device silver
    podman run --rm --network none --device ringfence.dev/rdma=silver "$image" ibv_devinfo | grep PORT_ACTIVE
    rm /etc/cdi/ringfence.json /etc/ringfence/conf.d/test.toml
    sed -i '/policy.profiles.gold/d' /etc/ringfence/config.toml
}

doctor() {
    ringfence configure --engine all
    ringfence doctor
    same "$(ringfence doctor | grep '^[A-Z]' || true)" "" "what doctor finds"
}

# Its last test: the engines work without it.
removed() {
    dpkg --remove ringfence
    systemctl daemon-reload
    same "$(systemctl list-units --plain --no-legend 'ringfence-*')" "" "units that are active"
    podman run --rm --network none "$image" true
    dpkg --purge ringfence
    test ! -e /etc/ringfence
    test ! -e /run/ringfence
    same "$(systemctl --failed --plain --no-legend)" "" "units that failed"
}
ringfence configure --engine podman >/dev/null
podman load --quiet --input /var/lib/ringfence-verbs.tar >/dev/null
check "package: units are there and well-formed" units
check "package: its directory in /run" run_directory
check "package: what containers left is collected by the service" collected
check "package: CDI devices follow the configuration" refreshed
check "package: doctor finds nothing after configure" doctor
check "package: removed and purged" removed
