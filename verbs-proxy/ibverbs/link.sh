#!/bin/sh
# Builds ringfence-proxy-ibverbs, the proxy with a real card.
#
#   link.sh [out-dir] [profile]
#
# The workspace's programs are static; this one loads libibverbs, which loads the card's provider, and so must not be. Compiled in a
# directory of its own, as the library for containers is: with other flags everything below it is another thing to cargo.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/target/ibverbs}
profile=${2:-release}
triple=$(rustc -vV | sed -n 's/^host: //p')
target_dir=${CARGO_TARGET_DIR:-$root/target}

cd "$root"
# In place of the workspace's flags, which make static executables.
RUSTFLAGS='-C target-feature=-crt-static' \
	cargo build --quiet --locked --package ringfence-proxy-ibverbs --profile "$profile" \
	--target "$triple" --target-dir "$target_dir/ibverbs-build"

case $profile in dev) directory=debug ;; *) directory=$profile ;; esac
mkdir -p "$out"
cp "$target_dir/ibverbs-build/$triple/$directory/ringfence-proxy-ibverbs" "$out/ringfence-proxy-ibverbs"
echo "$out/ringfence-proxy-ibverbs"
