#!/usr/bin/env bash
# Measures what Ringfence costs, each figure beside its floor. `--help` shows the options.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=integration/packages.sh
. integration/packages.sh
install_packages "${test_packages[@]}" >&2
build_release >&2
build_ibverbs >&2
build_package >&2
exec target/x86_64-unknown-linux-gnu/release/ringfence-bench "$@"
