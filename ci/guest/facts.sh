#!/bin/busybox sh
# Prints what the guest sees of its machine.
while read -r name value unit; do
    case $name in MemTotal:) memory="$value $unit" ;; esac
done < /proc/meminfo
read -r up _ < /proc/uptime
echo "This is a guest of vmm, $up s after its kernel started."
echo "kernel        $(uname -s) $(uname -r)"
echo "processors    $(nproc)"
echo "memory        $memory"
echo "command line  $(cat /proc/cmdline)"
