#!/bin/busybox sh
# Has the machine powered off when its power button is pressed. Stock kernels have the drivers as modules; in others
# they are built in.
for module in button evdev; do
    if [ -e "/modules/$(uname -r)/$module.ko" ]; then insmod "/modules/$(uname -r)/$module.ko"; fi
done
mkdir -p /etc/acpi/PWRF
printf '#!/bin/busybox sh\npoweroff -f\n' > /etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
# acpid wants its log, and goes into the background before it listens.
mkdir -p /var/log /var/run
acpid
until ls -l "/proc/$(pidof acpid)/fd" 2>/dev/null | grep -q /dev/input; do usleep 50000; done
