#!/bin/sh
# Builds libibverbs.so.1 as the container sees it.
#
#   link.sh [out-dir] [profile]
#
# Cargo makes a static library of everything, and the C compiler's linker makes the shared library of that: rustc gives
# the exports of a cdylib no versions. Nothing of the C compiler's start files goes in, so that loading the library runs
# no code; and of the C library only what glibc 2.17 has, which check-needs.sh verifies. The library stays once loaded:
# its handlers of faults and forks outlive a `dlclose`.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/target/preload}
profile=${2:-release}
triple=$(rustc -vV | sed -n 's/^host: //p')
target_dir=${CARGO_TARGET_DIR:-$root/target}

cd "$root"
# In place of the workspace's flags, which make static executables. One unit: src/versions.rs needs it.
RUSTFLAGS='-C relocation-model=pic -C codegen-units=1' \
	cargo build --quiet --locked --package ringfence-preload --profile "$profile" --features freestanding \
	--target "$triple" --target-dir "$target_dir/preload-build"

case $profile in dev) directory=debug ;; *) directory=$profile ;; esac
mkdir -p "$out"
${CC:-cc} -shared -nostartfiles -nodefaultlibs -o "$out/libibverbs.so.1" \
	-Wl,-soname,libibverbs.so.1 \
	-Wl,--version-script="$here/libibverbs.map" \
	-Wl,--whole-archive "$target_dir/preload-build/$triple/$directory/libringfence_preload.a" -Wl,--no-whole-archive \
	-Wl,-z,now -Wl,-z,nodelete -Wl,-z,relro -Wl,-z,noexecstack -Wl,--hash-style=gnu -Wl,--gc-sections -Wl,--no-undefined \
	-Wl,--build-id=sha1 -lc
sh "$here/check-needs.sh" "$out/libibverbs.so.1"
echo "$out/libibverbs.so.1"
