# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# rdma-core's own tests by pyverbs, with the card itself and with a proxy before it: what ends well there ends well here, or is skipped for
# want of what a proxy does not offer. By hand. Sourced by tests.sh.

suite=/srv/suite/tests
runner=/srv/suite/run.py
outcomes=/tmp/outcomes

# Runs the tests of module $1 of the suite by a command that runs a program somewhere; a line for each: its name and what became of it.
module() {
    local name=$1
    shift
    timeout 240 "$@" python3 -B $runner $suite rxe3 "$(index "$@")" "$name" 2>/tmp/pyverbs || {
        echo "$name.(all) broke"
        tail -n 5 /tmp/pyverbs >&2
    }
}

beside_each_other() {
    local name
    mkdir -p $suite
    cp /usr/share/doc/rdma-core/tests/* $suite
    # As Debian packages documents.
    gunzip --force $suite/*.gz
    cat >$runner <<'PYTHON'
import importlib, os, sys, unittest
directory, device, gid, module = sys.argv[1:]
sys.argv[1:] = ["--dev", device, "--gid", gid]
sys.path[:0] = [directory, os.path.dirname(directory)]
from args_parser import parser

class Lines(unittest.TestResult):
    def say(self, test, outcome, why=""):
        print(test.id().removeprefix("tests."), outcome, flush=True)
        if why:
            print(test.id(), why, file=sys.stderr)
    def addSuccess(self, test):
        self.say(test, "ok")
    def addSkip(self, test, why):
        self.say(test, "skipped")
    def addFailure(self, test, error):
        self.say(test, "failed", error[1])
    addError = addFailure

parser.parse_args()
unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module("tests." + module)).run(Lines())
PYTHON
    mkdir -p /srv/native /run/empty
    mount -t overlay -o lowerdir=/run/empty:/ overlay /srv/native
    card_configuration ''
    rootfs=/srv/native with_card c1 test.slice:rf:c1 '.process.args = ["sleep", "infinity"] | .root.readonly = true'
    up "runc --systemd-cgroup" c1
    : >$outcomes
    # Those of one driver's, and of the connection manager, are not of the card's verbs.
    for name in "$suite"/test_*.py; do
        name=$(basename "$name" .py)
        [[ ! $name =~ mlx5|efa|mana|hns|cuda|rdmacm ]] || continue
        module "$name" env | sed 's/$/ native/' >>$outcomes
        # Its root is not to be written to.
        module "$name" runc exec --env TMPDIR=/dev/shm c1 | sed 's/$/ proxied/' >>$outcomes
    done
    down runc c1
    umount /srv/native
    nothing_in_kernel
    rm /etc/ringfence/conf.d/test.toml
    # Not nothing at all, and nothing worse than without a proxy.
    grep -q 'ok proxied' $outcomes
    worse=$(awk '$3 == "native" { native[$1] = $2 } $3 == "proxied" && $2 ~ /failed|broke/ && native[$1] !~ /failed|broke/' $outcomes)
    same "$worse" "" "with a proxy only"
}

# How many of a module's tests ended how.
table() {
    echo "| | native: ok, failed, skipped | proxied: ok, failed, skipped | ok natively, skipped behind a proxy |"
    echo "|---|---|---|---|"
    awk '{ module = $1; sub(/\..*/, "", module); count[module, $3, $2 == "broke" ? "failed" : $2]++; what[$1, $3] = $2; modules[module]; tests[$1] = module }
        END {
            for (test in tests) if (what[test, "native"] == "ok" && what[test, "proxied"] == "skipped") without[tests[test]]++
            for (module in modules) {
                line = "| " module
                for (i = 1; i <= 2; i++) {
                    how = i == 1 ? "native" : "proxied"
                    line = line sprintf(" | %d, %d, %d", count[module, how, "ok"], count[module, how, "failed"], count[module, how, "skipped"])
                }
                print line " | " without[module] + 0 " |"
            }
        }' $outcomes | sort
    grep -v 'ok \|skipped ' $outcomes | sort || true
}

rxe_checks() {
    # shellcheck disable=SC2034 # For check.
    limit=3000
    check "rxe: pyverbs' tests, natively and behind a proxy" beside_each_other
    table
    unset limit
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
