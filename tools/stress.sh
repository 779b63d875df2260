#!/usr/bin/env bash
# Runs what goes wrong until it has gone wrong in every way: random operations at memory limits and under
# refusals, and whole runs under both.
#
#   tools/stress.sh                 10^6 random runs of operations at memory limits, and 10^6 under refusals; a quarter of an hour
#   tools/stress.sh CASES           as many of each
#   tools/stress.sh --runs MINUTES  the main job, for that long: runs of a few seconds under random refusals and with little memory
#
# The first two are the tests of vmm/mm/src/model, built for speed and with every assertion. Each line is a part of it
# with a seed of its own; a part that fails prints the operations that do it, made as few as possible, and is
# repeated by PROPTEST_RNG_SEED=<seed> PALIMPSEST_CASES=<cases> cargo test -p palimpsest-mm --lib model The build is
# release with debug assertions, in target/stress.
#
# --runs needs /dev/kvm and root (a mount namespace), and has 1.2 times the memory that the program says it
# needs at least. Each run must end well (0), or with a reason (1). A violation (3), a panic, a hang or
# anything else is a failure, and is repeated, as far as threads let it, by the command that is printed. What
# refuses system calls is in builds with debug assertions only (PALIMPSEST_REFUSE, vmm/engine/src/host/refusals.rs).
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true
export CARGO_TARGET_DIR=${STRESS_TARGET_DIR:-target/stress}

random_operations() {
    local all=$1 each=$((($1 + 99) / 100)) done=0 seed tests
    # Once for all parts, which are of one state of the sources then.
    tests=$(cargo test --release -p palimpsest-mm --lib --no-run 2>&1 | tee /dev/stderr | sed -n 's/.*Executable.*(\(.*\))$/\1/p')
    while ((done < all)); do
        seed=$((RANDOM << 30 | RANDOM << 15 | RANDOM))
        if ! PROPTEST_RNG_SEED=$seed PALIMPSEST_CASES=$each \
            "$tests" --quiet model:: >"$CARGO_TARGET_DIR/part.log" 2>&1; then
            cat "$CARGO_TARGET_DIR/part.log"
            echo "failed: PROPTEST_RNG_SEED=$seed PALIMPSEST_CASES=$each"
            return 1
        fi
        done=$((done + each))
        echo "$(date +%T) $done of $all of each kind, seed $seed"
    done
}

job=(--guest payload --memory 64M --keep 2 --snapshot-every 20ms --restore-every 3 --duration 5s --track-dirty 100ms)

# Runs the job once, on a host that says it has $1 KiB; $2 is what is refused of it.
on_a_small_host() {
    printf 'MemTotal: %d kB\nMemFree: %d kB\nMemAvailable: %d kB\n' "$1" "$1" "$1" >"$CARGO_TARGET_DIR/meminfo"
    # A file in the place of /proc/meminfo, for this program alone.
    unshare -m sh -c 'mount --bind "$1" /proc/meminfo && shift && exec timeout -k 5 120 "$@"' sh "$CARGO_TARGET_DIR/meminfo" \
        env PALIMPSEST_REFUSE="$2" "$CARGO_TARGET_DIR/release/vmm" "${job[@]}" >"$log" 2>&1
}

# In KiB, by the program's own word, which it gives when it is refused.
least_memory() {
    on_a_small_host 1024 1000000000 && return 1
    sed -n 's/.*this run needs \([0-9]*\) MiB at least.*/\1/p' "$log" | awk '{ print $1 * 1024 }'
}

# $1 is the host's memory, and one call in $2 is refused.
one_run() {
    local memory=$1 refused=$2 status=0
    on_a_small_host "$memory" "$refused" || status=$?
    if grep -q panicked "$log"; then
        status=101
    fi
    case $status in
        0) ended_well=$((ended_well + 1)) ;;
        1)
            ended_with_reason=$((ended_with_reason + 1))
            sed -n 's/^could not finish: //p;s/^error: //p' "$log" | sed 's/0x[0-9a-f]*/N/g;s/[0-9][0-9]*/N/g' >>"$CARGO_TARGET_DIR/reasons"
            ;;
        *)
            cat "$log"
            echo "failed with status $status, at $memory KiB: PALIMPSEST_REFUSE=$refused vmm ${job[*]}"
            return 1
            ;;
    esac
}

whole_runs() {
    local end=$((SECONDS + $1 * 60)) rates=(100 1000 10000 100000) n=0 least memory
    ended_well=0 ended_with_reason=0
    cargo build --release -p vmm
    least=$(least_memory || true)
    # Of what there is it leaves the host a tenth.
    memory=$((${least:-0} * 12 / 9))
    ((memory > 0)) || {
        cat "$log"
        return 1
    }
    : >"$CARGO_TARGET_DIR/reasons"
    while ((SECONDS < end)); do
        one_run "$memory" "${rates[n % ${#rates[@]}]}:$((RANDOM << 15 | RANDOM))"
        n=$((n + 1))
        echo "$(date +%T) $n runs: $ended_well ended well, $ended_with_reason with a reason"
    done
    echo 'the reasons:'
    sort "$CARGO_TARGET_DIR/reasons" | uniq -c | sort -rn
}

mkdir -p "$CARGO_TARGET_DIR"
log=$CARGO_TARGET_DIR/run.log
case ${1:-1000000} in
    --runs) whole_runs "${2:-30}" ;;
    *[!0-9]*)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
    *) random_operations "${1:-1000000}" ;;
esac
