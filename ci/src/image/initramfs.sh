#!/bin/sh
# A hook of initramfs-tools: the initramfs holds what any virtio disk, network card and console needs, over PCI and over
# MMIO; udev loads what the machine has. A kernel has some of it built in.
set -e
case ${1:-} in
prereqs) exit 0 ;;
esac
. /usr/share/initramfs-tools/hook-functions
manual_add_modules virtio_pci virtio_mmio virtio_blk virtio_net virtio_console virtio_rng virtio_scsi sd_mod
manual_add_modules virtio_pmem nd_pmem virtiofs ext4
