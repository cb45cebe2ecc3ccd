# The last step inside the installed tree, which is the first argument: mmdebstrap's customize hook.
set -eu
PATH=$PATH:/usr/sbin:/sbin
chroot "$1" systemctl --quiet enable systemd-networkd.service systemd-resolved.service
# A copy of the image makes host keys of its own when it boots.
rm -f "$1"/etc/ssh/ssh_host_*
if ! test -e "$1/root/.ssh/authorized_keys"; then
    chroot "$1" passwd --delete root
fi
