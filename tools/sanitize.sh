#!/usr/bin/env bash
# Runs the unit tests of the library under AddressSanitizer with LeakSanitizer, and under valgrind's memcheck.
#
#   tools/sanitize.sh                     both, all that can be run under them
#   tools/sanitize.sh asan                one of them
#   tools/sanitize.sh memcheck device::   some tests; further arguments are those of the test binary
#
# Needs: rustup toolchain install nightly, for asan; valgrind, for memcheck. Tests that need /dev/kvm say so when they skip.
# What each cannot run, and why there is no ThreadSanitizer: docs/architecture.md, "Tests".
set -euo pipefail
cd "$(dirname "$0")/.."
export RUST_BACKTRACE=0
sanitize=$PWD/target/sanitize
mkdir -p "$sanitize"

asan() {
    # The test leaks a pin, to see that the accounts show it.
    printf 'leak:a_leaked_pin_shows_in_the_accounts\n' >"$sanitize/leaks"
    # With a target named, build scripts are not instrumented; and the guests never are (guest/build.rs).
    LSAN_OPTIONS="suppressions=$sanitize/leaks:print_suppressions=0" \
        RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$sanitize \
        cargo +nightly test --package palimpsest-mm --package palimpsest --package vmm --lib --target x86_64-unknown-linux-gnu -- "$@"
}

memcheck() {
    # The compiler has it look at a field of an enum before the variant, and does not go by what it saw: unoptimised
    # there is no such report.
    cat >"$sanitize/memcheck" <<'END'
{
   field-before-variant
   Memcheck:Cond
   fun:*7request*7Request6answer*
}
END
    # Left out: what takes minutes, since valgrind runs one thread at a time; the leak on purpose; and processes of
    # their own, which have valgrind's files open.
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --fair-sched=yes --error-exitcode=9
        --leak-check=full --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect
        --suppressions=$sanitize/memcheck" \
        cargo test --package palimpsest-mm --package palimpsest --package vmm --lib -- --test-threads=1 \
        --skip random_operations --skip a_leaked_pin_shows_in_the_accounts --skip scenario::living "$@"
}

case ${1:-} in
    asan | memcheck)
        "$@"
        ;;
    '')
        asan
        memcheck
        ;;
    *)
        sed -n '4,6s/^# *//p' "$0" >&2
        exit 2
        ;;
esac
