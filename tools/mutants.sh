#!/usr/bin/env bash
# Changes vmm/mm in a thousand small ways and says which of them its unit tests do not notice.
#
#   tools/mutants.sh                 all of mm; half an hour on two cores, more if they have other work
#   tools/mutants.sh -f fault.rs     one file; further arguments are those of cargo-mutants
#   tools/mutants.sh --list          which changes there are
#
# A test that takes 10 s hangs. On a machine that is busy with other things that is too little, and what was not noticed passes for a
# hang: MUTANTS_TIMEOUT=60 tools/mutants.sh
#
# MUTANTS_QUICK=1 leaves out the random operations (model, and those of the allocator): a few seconds a mutant. What that
# misses is to be tried again without.
#
# Needs: cargo install cargo-mutants. It works on a copy outside of the workspace, with no more than mm needs. The package is target/mutants, and
# the report target/mutants/mutants.out.
# docs/mutants.md: the last run, and why some survive.
set -euo pipefail
cd "$(dirname "$0")/.."
package=${MUTANTS_DIR:-target/mutants}
rm -rf "$package/src"
mkdir -p "$package"

tests=()
if [[ ${MUTANTS_QUICK:-0} == 1 ]]; then
    tests=(-- --lib -- --skip model:: --skip every_frame_has_one_owner)
fi

# The versions are the workspace's, and the lock file too.
version_of() {
    grep "^$1 = " Cargo.toml
}
cp -r vmm/mm/src "$package"
cp Cargo.lock "$package"
cat >"$package/Cargo.toml" <<END
[package]
name = "mm"
version = "0.0.0"
edition = "2024"

[lib]
doctest = false

[workspace]

[dependencies]
$(version_of crossbeam-utils)
$(version_of thiserror)
$(version_of zerocopy)

[dev-dependencies]
$(version_of proptest)

[lints.rust]
unexpected_cfgs = { level = "warn", check-cfg = ["cfg(loom)", "cfg(shuttle)"] }

# Optimised, which the tests win back, but no module across another: a mutant of one rebuilds that one alone.
[profile.dev]
opt-level = 1
lto = "off"
debug = false
END

# The same operations for every mutant, and no time spent on making a failure short.
export PROPTEST_RNG_SEED=1 PROPTEST_MAX_SHRINK_ITERS=0 RUST_BACKTRACE=0
unset CARGO_TARGET_DIR

# Left out: tests; and what is there for model checkers alone, which tests/loom tries (`Safeguard::leave_out`).
cargo mutants --no-config --dir "$package" --in-place --timeout "${MUTANTS_TIMEOUT:-10}" \
    --exclude 'src/tests/**' --exclude 'src/model/**' \
    --exclude-re 'is_left_out|move_writer_in_wrong_order|goes_wrong|unmap_unordered|FrameTable::stale' \
    "$@" "${tests[@]}"
