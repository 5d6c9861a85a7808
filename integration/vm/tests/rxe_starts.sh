# shellcheck shell=bash disable=SC2154 # The variables are those of lib.sh and rxe.sh.
# A hundred containers with a card, one after the other. By hand. Sourced by tests.sh.

rxe_checks() {
    # shellcheck disable=SC2034 # For check.
    limit=1200
    check "rxe: a hundred starts" starts 100
    unset limit
}
# shellcheck source-path=SCRIPTDIR source=rxe.sh # tests.sh has it.
. "$here/tests/rxe.sh"
unset -f rxe_checks
