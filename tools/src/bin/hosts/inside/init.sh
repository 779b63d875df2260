#!/bin/busybox sh
# What runs first in an emulated host: makes a KVM, runs the tasks, says how they ended, and switches the machine off.
# Kernel and init talk on the first serial port; results have the second one for themselves.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=dumb LC_ALL=C CI=true
# For tests, whose patience is for a machine of their own.
export TEST_SLOWNESS=10
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for folder in /dev/shm /tmp /run; do
    # What came along may be in one: the programs are where they were built.
    mkdir -p $folder /along
    mv $folder /along/this && mkdir $folder
    mount -t tmpfs none $folder
    cp -a /along/this/. $folder
    rm -r /along
done
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
exec </dev/null >/dev/console 2>&1
stty -F /dev/ttyS1 115200 raw -echo
exec 3>/dev/ttyS1

uptime() { cut -d' ' -f1 /proc/uptime; }

# A line of our own. What tasks print has a dot before each line, so that nothing they say looks like one.
frame() { echo "@$*" >&3; }

# For an emulator that writes down what it has of the port by blocks of 4 KiB: fills one, by lines that are nothing.
flush() { [ ! -e /run/padding ] || cat /run/padding >&3; }

# Where the threads of process $1 are: name, state, CPU time in user and in kernel mode, stack in the kernel.
places() {
    echo "killed after $limit s; its threads:"
    for thread in /proc/$1/task/*; do
        echo "  $(cat $thread/comm): $(sed 's/.*) //' $thread/stat | cut -d' ' -f1,12,13) $(sed 's/^[^ ]* //' $thread/stack | tr '\n' ' ')"
    done
}

# run NUMBER LIMIT COMMAND...: one task.
run() {
    number=$1 limit=$2
    shift 2
    frame begin "$number" "$(uptime)"
    flush
    {
        { sleep "$limit" >/dev/null 2>&1; places $(cat /run/task); kill -KILL $(cat /run/task); } &
        clock=$!
        # Not in the background itself: a shell has that ignore SIGINT.
        sh -c 'echo $$ >/run/task; exec "$@"' sh "$@"
        echo $? >/run/code
        kill $clock
    } 2>&1 | awk '{ print "." $0; fflush() }' >&3
    frame end "$number" "$(cat /run/code)" "$(uptime)"
    flush
}

. /settings.sh
if [ "$PADDED" = 1 ]; then
    yes "$(printf '%63s' | tr ' ' '#')" | head -n 64 >/run/padding
    # What a task prints is to be seen while it runs.
    while sleep 10; do flush; done &
fi
for module in $MODULES; do
    [ "$module" = "$LAST" ] && parameter=$PARAMETER || parameter=
    insmod "/modules/$module.ko" $parameter || echo "cannot load $module"
done
frame host "$(uname -r), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(grep -c ^processor /proc/cpuinfo) CPUs"
if [ -e /dev/kvm ]; then
    frame ready "$(uptime)"
    flush
    . /tasks.sh
else
    frame nokvm
    flush
fi
frame done "$(uptime)"
flush
poweroff -f
