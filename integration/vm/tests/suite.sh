# shellcheck shell=bash
# The project's own test programs, which the host has built, under version 2 of control groups with systemd. Sourced by tests.sh.

# Runs the test program $2 of the package in directory $1.
program() {
    local package=$1 name=$2 path
    shift 2
    echo "     Running $package/tests/$name in the virtual machine"
    path=$(sed -n "s|^$package $name ||p" /repository/target/vm-programs 2>/dev/null)
    if [ -z "$path" ]; then
        echo "test $package: $name ... ignored"
        echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
        echo "SKIPPED: $name: it is not in target/vm-programs, which integration/vm/test.sh writes where cargo is"
        return
    fi
    # The container's image is this machine's own root.
    (cd "$host/$package" && RINGFENCE_TEST_IMAGE=/ timeout 900 "$host/$path" "$@") || failed_programs+=" $package/tests/$name"
    eventually nothing_left || { leftovers; failed_programs+=" $package/tests/$name:leftovers"; clean; }
}

# Programs know their files by the paths that they were built with.
host=$(cat /repository/target/vm-repository 2>/dev/null || echo /repository)
if [ "$host" != /repository ]; then
    mkdir -p "$host"
    mount --bind /repository "$host"
fi
program hook collect
program hook join
program hook lifecycle
program hook placement
program hook refuse
program hook rootless
program shim-wrapper containers
# Without perftest's programs one by one, which take minutes here: what the layout has a say in.
program integration containers --skip ib_
[ "$host" = /repository ] || umount "$host"
