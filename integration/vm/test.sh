#!/usr/bin/env bash
# Runs the tests of tests.sh in the virtual machine, whose image it makes if there is none.
#
#   integration/vm/test.sh [--kernel backports] [FILE…]
#
# FILE of integration/vm/tests/, without .sh; by default all that are not by hand: suite, ibverbs, passthrough_more, rxe_programs_all,
# rxe_kills, rxe_cost, rxe_pyverbs, rxe_starts, rxe_tenants, rxe_engines, rxe_own, exclusive, exclusive_life. The machine has Debian's kernel unless that of its
# backports is asked for. Variables of the environment that begin with RINGFENCE_COST_ are handed on to it.
#
# Where there is no machine to be had, or RINGFENCE_SKIP_VM=1, they are skipped: counted as one that is ignored.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
    echo "SKIPPED: ringfence-vm: $1"
    echo "test ringfence-vm (all: $1) ... ignored"
    echo
    echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
    exit 0
}

kernel=()
if [ "${1-}" = --kernel ]; then
    kernel=("$2")
    shift 2
fi
[ "${RINGFENCE_SKIP_VM-}" != 1 ] || skip "RINGFENCE_SKIP_VM=1"
[ "$(id -u)" -eq 0 ] || skip "needs root"
command -v qemu-system-x86_64 >/dev/null || skip "qemu-system-x86_64 is missing; install qemu-system-x86"
ls target/deb/ringfence_*.deb >/dev/null 2>&1 || skip "no package in target/deb: run hook/package/build-deb.sh first"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! integration/vm/build.sh "${kernel[@]}" >"$log" 2>&1; then
    cat "$log"
    skip "no image: $(grep -v '^$' "$log" | tail -n 1)"
fi

# What legal.sh runs.
cc -std=gnu11 -D_GNU_SOURCE -O2 -o target/vm-legal integration/clients/legal{,_objects,_states,_posting}.c integration/clients/check.c -libverbs

# What rxe_fence.sh, rxe_more.sh and rxe_starts.sh run. Linked statically, libibverbs has to be told of a driver; the linker has words of getaddrinfo then.
if [ $# -eq 0 ] || [[ " $* " =~ " rxe_fence "|" rxe_more "|" rxe_starts " ]]; then
    cc -std=gnu11 -O2 -o target/vm-reach integration/clients/reach.c -libverbs
    cc -std=gnu11 -D_GNU_SOURCE -O2 -o target/vm-sysfs integration/clients/{sysfs,check}.c -libverbs
    # Its name has the version of the interface between rdma-core and its drivers.
    driver=$(basename /usr/lib/x86_64-linux-gnu/librxe-rdmav*.a .a)
    cc -std=gnu11 -O2 -static -DRDMA_STATIC_PROVIDERS=rxe -o target/vm-reach-static integration/clients/reach.c \
        -libverbs "-l${driver#lib}" -libverbs -lnl-route-3 -lnl-3 -lpthread 2>"$log" || { cat "$log"; exit 1; }
fi

# What ibverbs.sh runs, besides: there is no compiler in the machine.
if [[ " $* " == *" ibverbs "* ]]; then
    mkdir -p target/vm-clients
    cc -std=gnu11 -D_GNU_SOURCE -O2 -pthread -o target/vm-clients/semantics \
        integration/clients/{semantics,sides,pairs,check,cases_data,cases_errors,cases_states,cases_events}.c -libverbs
    for client in orders absence; do
        cc -std=gnu11 -D_GNU_SOURCE -O2 -pthread -o "target/vm-clients/$client" \
            integration/clients/{"$client",sides,pairs,check}.c -libverbs
    done
    for client in memory shared dmabuf; do
        cc -std=gnu11 -D_GNU_SOURCE -O2 -pthread -o "target/vm-clients/$client" \
            integration/clients/{"$client",loop,check}.c -libverbs
    done
    cc -std=gnu11 -D_GNU_SOURCE -O2 -o target/vm-clients/peers integration/clients/{peers,check}.c -libverbs
fi

# What suite.sh and ibverbs.sh run: a line for each test program, of its package's directory, its name, and its path.
if [[ " $* " =~ " suite "|" ibverbs " ]] && command -v cargo >/dev/null; then
    programs=(--workspace)
    [[ " $* " =~ " suite " ]] || programs=(--package ringfence-integration --test ibverbs)
    cargo test --locked "${programs[@]}" --no-run --message-format=json 2>"$log" >target/vm-messages || { cat "$log"; exit 1; }
    python3 - target/vm-messages >target/vm-programs <<'PYTHON'
import json, os, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] == ["test"]:
        directory = os.path.relpath(os.path.dirname(message["manifest_path"]))
        print(directory, message["target"]["name"], os.path.relpath(message["executable"]))
PYTHON
    pwd >target/vm-repository
    rm target/vm-messages
fi

# The machine's command, with the environment that files by hand are told by.
variables=
for name in "${!RINGFENCE_COST_@}"; do variables+="$name=${!name@Q} "; done
command="${variables}integration/vm/tests.sh $*"

echo "     Running integration/vm/tests.sh"
# The suite alone takes three quarters of an hour where the processor is emulated and busy with other things.
status=0
integration/vm/run.sh ${kernel:+--kernel "${kernel[@]}"} --timeout 7200 "$command" || status=$?
# Emulated processors have broken the kernel that ran on them before; what breaks it twice is something else.
if [ "$status" -eq 125 ]; then
    echo "${0##*/}: the machine broke down; once more"
    echo "     Running integration/vm/tests.sh"
    status=0
    integration/vm/run.sh ${kernel:+--kernel "${kernel[@]}"} --timeout 7200 "$command" || status=$?
fi
exit "$status"
