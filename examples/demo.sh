#!/usr/bin/env bash
# Two containers, two proxies, unmodified verbs programs; then three tenants on one link, without a policy and with one.
#
#   examples/demo.sh [--chart FILE] [--json] [--only tools|contention]
#
# Works as root on Debian 12 and 13 with a Rust toolchain and no RDMA hardware. Installs the packages it lacks and builds
# in release; the rest takes less than five minutes. Leaves nothing behind but the chart (./ringfence-demo.svg) and, under
# integration/.cache, the containers' root file system; not when interrupted either.
set -euo pipefail
for argument in "$@"; do
    case $argument in -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | head -n -1
        exit
        ;;
    esac
done

repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=integration/packages.sh
. "$repository/integration/packages.sh"
{
    cd "$repository"
    install_packages "${demo_packages[@]}"
    build_release
    cd "$OLDPWD"
} >&2
# It ends and removes everything that it started, whatever signal it gets.
exec "$repository/target/x86_64-unknown-linux-gnu/release/ringfence-demo" "$@"
