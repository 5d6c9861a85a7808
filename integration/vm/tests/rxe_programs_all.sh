# shellcheck shell=bash
# What rxe_programs.sh leaves out, and the rest again, by hand. Sourced by tests.sh.

# shellcheck disable=SC2034 # For rxe_programs.sh.
programs_all=1
# shellcheck disable=SC2154 source-path=SCRIPTDIR source=rxe_programs.sh # tests.sh has it.
. "$here/tests/rxe_programs.sh"
unset programs_all
