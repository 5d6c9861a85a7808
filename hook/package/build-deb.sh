#!/usr/bin/env bash
# Builds ringfence_<version>_<architecture>.deb of this repository, and beside it ringfence-ibverbs_…: the proxy for RDMA cards, apart,
# because it needs libibverbs and the card's provider, which hosts without a card are not to get.
#
#   hook/package/build-deb.sh [--output DIR] [--no-build]
#
# Needs a Rust toolchain, gcc, objdump and dpkg-deb; the packages go to DIR, by default target/deb. --no-build takes the programs that
# the last release build left in target/.
set -euo pipefail
cd "$(dirname "$0")/../.."

output=target/deb
build=yes
while [ $# -gt 0 ]; do
    case $1 in
        --output) output=${2:?--output needs a directory}; shift 2 ;;
        --no-build) build=no; shift ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

for tool in cargo cc strip objdump dpkg-deb gzip; do
    command -v "$tool" >/dev/null || { echo "${0##*/}: $tool is missing; install it" >&2; exit 1; }
done

package=hook/package
target=${CARGO_TARGET_DIR:-target}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
architecture=$(dpkg --print-architecture)
# As .cargo/config.toml has it.
release=$target/x86_64-unknown-linux-gnu/release
changed=$(sed -n '1s/^ringfence (\(.*\)) .*/\1/p' "$package/debian/changelog")
if [ "$architecture" != amd64 ]; then
    echo "${0##*/}: built for amd64 only, not $architecture" >&2; exit 1
fi
if [ "$changed" != "$version" ]; then
    echo "${0##*/}: Cargo.toml has version $version, but $package/debian/changelog begins with $changed" >&2; exit 1
fi

if [ "$build" = yes ]; then
    cargo build --locked --release --package ringfence --package ringfence-hook --package ringfence-proxy \
        --package ringfence-shim-wrapper
    verbs-proxy/preload/link.sh "$target/preload" >/dev/null
    verbs-proxy/ibverbs/link.sh "$target/ibverbs" >/dev/null
fi

if grep -q 'THIS TEST BUILD OBEYS ITS CONTAINER' "$release/ringfence-proxy"; then
    echo "${0##*/}: $release/ringfence-proxy is a test build that obeys its container; build it without features" >&2; exit 1
fi

# The same commit gives the same package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date -d "$(sed -n 's/^ -- .*>  //p' "$package/debian/changelog" | head -1)" +%s)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
tree=$work/tree
pages=$work/pages
mkdir "$tree" "$pages"

program() { install -D -m 755 -s "$release/$1" "$tree/$2"; }
file() { install -D -m 644 "$1" "$tree/$2"; }
packed() { mkdir -p "$tree/$(dirname "$2")" && gzip -9n <"$1" >"$tree/$2"; }

for name in ringfence ringfence-hook ringfence-runtime containerd-shim-ringfence-v2; do
    program "$name" "usr/bin/$name"
done
# The runtime with the profile `default`, by its name: docker calls it without a shell in between.
ln -s ringfence-runtime "$tree/usr/bin/ringfence-runtime-default"
program ringfence-proxy usr/libexec/ringfence/ringfence-proxy
mkdir -p "$tree/usr/libexec/ringfence/bin"
for name in runc crun; do
    ln -s ../../../bin/ringfence-runtime "$tree/usr/libexec/ringfence/bin/$name"
done
file "$target/preload/libibverbs.so.1" usr/lib/ringfence/libibverbs.so.1
strip --strip-unneeded --remove-section=.comment --remove-section=.note "$tree/usr/lib/ringfence/libibverbs.so.1"

file hook/config.example.toml etc/ringfence/config.toml
file "$package/tmpfiles.conf" usr/lib/tmpfiles.d/ringfence.conf
for unit in "$package"/systemd/*; do
    file "$unit" "usr/lib/systemd/system/${unit##*/}"
done

ringfence=$release/ringfence
"$ringfence" man "$pages"
for page in "$pages"/*; do
    name=${page##*/}
    packed "$page" "usr/share/man/man${name##*.}/$name.gz"
done
for shell in bash zsh fish; do "$ringfence" completion "$shell" >"$work/$shell"; done
file "$work/bash" usr/share/bash-completion/completions/ringfence
file "$work/zsh" usr/share/zsh/vendor-completions/_ringfence
file "$work/fish" usr/share/fish/vendor_completions.d/ringfence.fish

doc=usr/share/doc/ringfence
file "$package/debian/copyright" "$doc/copyright"
packed "$package/debian/changelog" "$doc/changelog.gz"
file README.md "$doc/README.md"
file hook/README.md "$doc/hook.md"
file "$package/debian/lintian-overrides" usr/share/lintian/overrides/ringfence
for name in Containerfile Containerfile.tools install.sh install.yaml uninstall.yaml bandwidth.yaml containers.yaml; do
    file "examples/kubernetes/$name" "$doc/examples/kubernetes/$name"
done

# Makes the package $1 of what is in the tree, with the control file $2.
pack() {
    local size deb=$output/$1_${version}_$architecture.deb
    mkdir -p "$tree/DEBIAN"
    size=$(du -k -s --apparent-size --exclude DEBIAN "$tree" | cut -f1)
    sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@SIZE@/$size/" -e "s/@GLIBC@/${glibc-}/" \
        "$package/debian/$2" >"$tree/DEBIAN/control"
    (cd "$tree" && find . -path ./DEBIAN -prune -o -path ./etc -prune -o -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum) \
        >"$tree/DEBIAN/md5sums"
    dpkg-deb --root-owner-group -Zxz --build "$tree" "$deb" >/dev/null
    echo "$deb"
}

mkdir -p "$output" "$tree/DEBIAN"
install -m 644 "$package/debian/conffiles" "$tree/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 755 "$package/debian/$script" "$tree/DEBIAN/$script"
done
pack ringfence control

# The second package, for hosts with a card. It runs where there is as new a C library as it was linked with.
tree=$work/ibverbs
mkdir "$tree"
release=$target/ibverbs
program ringfence-proxy-ibverbs usr/libexec/ringfence/ringfence-proxy-ibverbs
glibc=$(objdump -T "$tree/usr/libexec/ringfence/ringfence-proxy-ibverbs" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | sed -n '$s/GLIBC_//p')
doc=usr/share/doc/ringfence-ibverbs
file "$package/debian/copyright" "$doc/copyright"
packed "$package/debian/changelog" "$doc/changelog.gz"
file hook/cards.md "$doc/cards.md"
pack ringfence-ibverbs control.ibverbs
