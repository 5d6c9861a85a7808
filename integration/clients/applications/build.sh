#!/bin/sh
# Builds the programs of this directory and its parent in the Debian that they are to run in.
#
#   build.sh TARGET
#
# Run with integration/clients as the working directory. GOCACHE: where Go keeps what it has built.
set -eu
target=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

c() {
    gcc -std=gnu11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -pthread "$@"
}

for topic in allocator attributes burn bystanders changes descriptors forks resources; do
    c -o "$target/$topic" applications/$topic.c applications/topic.c loop.c check.c -libverbs
done
c -o "$target/process" process.c loop.c check.c -libverbs
c -o "$target/semantics" semantics.c sides.c pairs.c check.c cases_data.c cases_errors.c cases_states.c cases_events.c -libverbs
c -o "$target/loading" applications/loading.c check.c -ldl

# The other programs that say what cases they have.
mkdir "$target/clients"
for source in *.c; do
    if [ "$source" != semantics.c ] && grep -q '^int main' "$source" && grep -q '"list"' "$source"; then
        name=${source%.c}
        # With the files of its cases, if it has any.
        set -- "$name"_*.c
        [ -e "$1" ] || set --
        c -o "$target/clients/$name" "$source" "$@" loop.c check.c -libverbs
    fi
done

for sanitizer in address leak thread undefined; do
    c -fsanitize=$sanitizer -o "$target/hello-$sanitizer" applications/hello.c
done
c -fsanitize=address -o "$target/process-address" process.c loop.c check.c -libverbs
c -o "$target/hello" applications/hello.c
c -static -o "$target/hello-static" applications/hello.c
c -m32 -nostdlib -fno-pie -no-pie -fno-stack-protector -Wl,--dynamic-linker=/lib/ld-linux.so.2 \
    -o "$target/hello-32" applications/hello32.c /lib32/libc.so.6

# A wheel's copy has a name and a SONAME of its own.
mkdir "$target/vendored"
sed 's/libibverbs\.so\.1/libibverbz.so.1/g' /usr/lib/x86_64-linux-gnu/libibverbs.so.1 >"$target/vendored/libibverbz.so.1"
# shellcheck disable=SC2016 # The dynamic linker replaces it.
c -o "$target/vendored/program" applications/vendored.c applications/topic.c loop.c check.c \
    "$target/vendored/libibverbz.so.1" -Wl,-rpath,'$ORIGIN'

musl-gcc -O2 -Wall -Wextra -Werror -o "$target/musl-load" applications/musl.c
for name in get_device_list open_device alloc_pd reg_mr dereg_mr; do echo "void ibv_$name(void) {}"; done >"$scratch/stub.c"
musl-gcc -shared -Wl,-soname,libibverbs.so.1 -o "$scratch/libibverbs.so.1" "$scratch/stub.c"
musl-gcc -O2 -Wall -Wextra -Werror -DLINKED -o "$target/musl-linked" applications/musl.c "$scratch/libibverbs.so.1"
musl-gcc -O2 -Wall -Wextra -Werror -o "$target/musl-hello" applications/hello.c

# Names that are the same in all releases.
libraries=/usr/lib/x86_64-linux-gnu
for path in "$libraries"/libjemalloc.so.2 "$libraries"/libtcmalloc_minimal.so.4 "$libraries"/libmimalloc.so.[0-9]; do
    name=${path##*/lib}
    name=${name%%.so*}
    [ -e "$path" ]
    ln -s "$path" "$target/${name%_minimal}.so"
done

mkdir "$scratch/go"
cp applications/go/verbs.go applications/go/go.mod loop.c loop.h check.c check.h "$scratch/go"
(cd "$scratch/go" && GOFLAGS=-buildvcs=false GOPROXY=off GOTOOLCHAIN=local go build -o "$target/verbs-go" .)

# The wrapper `ecj` of Debian 13 looks for the compiler in the wrong archive.
java -cp '/usr/share/java/*' org.eclipse.jdt.internal.compiler.batch.Main -proc:none -nowarn -source 11 -target 11 -d "$target" applications/java/Verbs.java
c -shared -fPIC -o "$target/libverbs-java.so" applications/java/verbs.c loop.c check.c -libverbs

cp applications/multiprocess.py applications/pyverbs_reads.py "$target"
# The last: who finds it finds all.
cp applications/run-cases.sh "$target"
