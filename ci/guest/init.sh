#!/bin/busybox sh
# The init of the busybox guest. The kernel's command line may say run="COMMANDS", which then are run and the machine is
# powered off; the kernel hands the word over as an environment variable. Without it there is a shell, and at its end
# the machine is powered off.
export PATH=/bin HOME=/ PS1='guest# '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
cd /
if [ -n "$run" ]; then
    eval "$run"
else
    facts
    setsid cttyhack sh
fi
sync
poweroff -f
