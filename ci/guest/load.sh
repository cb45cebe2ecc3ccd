#!/bin/busybox sh
# The init of the guest that is a load. The kernel's command line says load="COMMANDS" of the functions below, each of
# which prints `begin NAME` and `NAME = FIGURE`; then the machine is powered off. The host is 10.9.0.1.
export PATH=/bin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
cd /
ip link set lo up
if [ -d /sys/class/net/eth0 ]; then
    ip addr add 10.9.0.2/24 dev eth0
    ip link set eth0 up
fi

# Requests a second: disk NAME read|write|randread|randwrite BLOCK DEPTH AMOUNT
disk() {
    echo "begin $1"
    LD_PRELOAD=libabsent.so fio --name="$1" --filename=/dev/vda --direct=1 --ioengine=libaio --thread --rw="$2" \
        --bs="$3" --iodepth="$4" --io_size="$5" --size="$(blockdev --getsize64 /dev/vda)" \
        --output-format=terse --terse-version=3 2>/dev/null |
        awk -F';' -v name="$1" '{ print name, "=", $8 + $49 }'
}

# Bits a second of one stream: stream NAME AMOUNT [-R]. With -R the host sends.
stream() {
    name=$1
    amount=$2
    shift 2
    echo "begin $name"
    iperf3 -c 10.9.0.1 -n "$amount" -J "$@" |
        awk -v name="$name" '/"sum_received"/ { found = 1 }
            found && /bits_per_second/ { sub(",", "", $2); print name, "=", $2; exit }'
}

# Nanoseconds of a request and its response: respond NAME COUNT
respond() {
    echo "begin $1"
    echo "$1 = $(rr 10.9.0.1:7777 "$2")"
}

eval "$load"
poweroff -f
