#!/usr/bin/env bash
# Runs what goes wrong until it has gone wrong in every way: random operations at memory limits and under refusals, and whole runs under both.
#
#   tools/stress.sh                 10^6 random runs of operations at memory limits, and 10^6 under refusals; an hour or so on two cores
#   tools/stress.sh CASES           as many of each
#   tools/stress.sh --runs MINUTES  the main job, for that long: runs of a few seconds under random refusals and with little memory
#
# The first two are the tests of mm/model, built for speed and with every assertion. Each line is a part of it with a seed of its own; a part
# that fails prints the operations that do it, made as few as possible, and is repeated by
#   PROPTEST_RNG_SEED=<seed> PALIMPSEST_CASES=<cases> cargo test -p vmm --lib mm::model
#
# --runs needs /dev/kvm. Each run must end well (0), or with a reason (1). A violation (3), a panic, a hang or anything else is a failure, and is
# repeated, as far as threads let it, by the command that is printed. What refuses system calls is in builds with debug assertions only
# (PALIMPSEST_REFUSE, vmm/src/host/refusals.rs).
set -euo pipefail
cd "$(dirname "$0")/.."

# Optimised, with the assertions of a debug build.
export CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true
export CARGO_TARGET_DIR=${STRESS_TARGET_DIR:-target/stress}

random_operations() {
    local all=$1 each=$((($1 + 99) / 100)) done=0 seed
    cargo test --release -p vmm --lib --no-run
    while ((done < all)); do
        seed=$((RANDOM << 30 | RANDOM << 15 | RANDOM))
        if ! PROPTEST_RNG_SEED=$seed PALIMPSEST_CASES=$each \
            cargo test --release --quiet -p vmm --lib mm::model >"$CARGO_TARGET_DIR/part.log" 2>&1; then
            cat "$CARGO_TARGET_DIR/part.log"
            echo "failed: PROPTEST_RNG_SEED=$seed PALIMPSEST_CASES=$each"
            return 1
        fi
        done=$((done + each))
        echo "$(date +%T) $done of $all of each kind, seed $seed"
    done
}

# The least that a guest of 64 MiB and one snapshot can do with, and a fifth more, in KiB: its memory, the copies of one snapshot and what is ahead.
little_memory_kib=$(((64 + 64 + 64) * 1024 * 12 / 10))

# Runs the main job once; $1 is how many calls are refused, one in so many.
one_run() {
    local one_in=$1 seed=$2 status=0
    local run=("$CARGO_TARGET_DIR/release/vmm" --memory 64M --keep 2 --snapshot-every 20ms --restore-every 3 --duration 5s --track-dirty 100ms)
    local log=$CARGO_TARGET_DIR/run.log
    # A file in the place of /proc/meminfo, for this program alone.
    printf 'MemTotal: %d kB\nMemAvailable: %d kB\n' "$little_memory_kib" "$little_memory_kib" >"$CARGO_TARGET_DIR/meminfo"
    unshare -m sh -c 'mount --bind "$1" /proc/meminfo 2>/dev/null; shift; exec timeout -k 5 120 "$@"' sh "$CARGO_TARGET_DIR/meminfo" \
        env PALIMPSEST_REFUSE="$one_in:$seed" "${run[@]}" >"$log" 2>&1 || status=$?
    case $status in
        0) ended_well=$((ended_well + 1)) ;;
        1)
            ended_with_reason=$((ended_with_reason + 1))
            grep -h '^error' "$log" | tail -1 >>"$CARGO_TARGET_DIR/reasons" || true
            if grep -q panicked "$log"; then status=101; fi
            ;;
    esac
    if ((status > 1)); then
        cat "$log"
        echo "failed with status $status: PALIMPSEST_REFUSE=$one_in:$seed ${run[*]}"
        return 1
    fi
}

whole_runs() {
    local end=$((SECONDS + $1 * 60)) rates=(30 300 1000 3000 10000) n=0
    ended_well=0 ended_with_reason=0
    cargo build --release -p vmm
    : >"$CARGO_TARGET_DIR/reasons"
    while ((SECONDS < end)); do
        one_run "${rates[n % ${#rates[@]}]}" "$((RANDOM << 15 | RANDOM))"
        n=$((n + 1))
        echo "$(date +%T) $n runs: $ended_well ended well, $ended_with_reason with a reason"
    done
    echo 'the reasons:'
    sort "$CARGO_TARGET_DIR/reasons" | uniq -c | sort -rn
}

mkdir -p "$CARGO_TARGET_DIR"
case ${1:-1000000} in
    --runs) whole_runs "${2:-30}" ;;
    *[!0-9]*)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
    *) random_operations "${1:-1000000}" ;;
esac
