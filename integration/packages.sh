# shellcheck shell=bash
# Debian packages and the release build, for test.sh and examples/demo.sh. To be sourced in the repository's root.

# What builds the project and what containers need: a linker, the runtime, a way to make root file systems.
# shellcheck disable=SC2034 # Both are for the scripts that source this.
demo_packages=(gcc libc6-dev runc mmdebstrap iproute2 ca-certificates)
# And for the tests: headers, a C++ compiler for libFuzzer, a second runtime, stock verbs programs to load the library into, dynamic
# linkers of other kinds, what enters a node, podman for a user without root, containerd to ask what it makes of its configuration.
# All engines are installed on the nodes, not here.
# shellcheck disable=SC2034
test_packages=("${demo_packages[@]}" binutils busybox-static containerd crun fuse-overlayfs g++ ibverbs-utils kmod libc6-i386
    libibverbs-dev musl-tools perftest podman procps python3 qemu-system-x86 rdmacm-utils shellcheck slirp4netns strace uidmap util-linux)

# Installs those of the packages that are missing.
install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        echo "${0##*/}: missing packages: ${missing[*]}; install them or run as root" >&2
        return 1
    fi
    echo "==> apt-get install ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# Further programs that build_release is to build, as arguments of cargo's.
more_programs=()
# The programs that the hook starts and injects, as they would be installed.
build_release() {
    if ! command -v cargo >/dev/null; then
        echo "${0##*/}: no cargo in PATH; a Rust toolchain can be had from https://rustup.rs" >&2
        return 1
    fi
    echo "==> cargo build --release, verbs-proxy/preload/link.sh"
    cargo build --quiet --locked --release --package ringfence-proxy --package ringfence-hook --package ringfence-integration \
        "${more_programs[@]}"
    verbs-proxy/preload/link.sh >/dev/null
}

# The Debian package, for the tests on nodes with engines.
build_package() {
    echo "==> hook/package/build-deb.sh"
    hook/package/build-deb.sh
}

# The proxy with a real card, which is not static and so compiled apart.
build_ibverbs() {
    echo "==> verbs-proxy/ibverbs/link.sh"
    verbs-proxy/ibverbs/link.sh >/dev/null
}

# The proxy's test build that obeys its container, for the tests of what one that was taken over reaches, and that stops where the
# tests of grants say. In a directory of its own: nothing that is installed is ever built with that feature.
build_obedient() {
    echo "==> cargo build --package ringfence-proxy --features obedient --target-dir target/obedient"
    cargo build --quiet --locked --package ringfence-proxy --features obedient --target-dir target/obedient
}
