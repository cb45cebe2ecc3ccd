# Makes FOLDER's root.tar into debian.img, vmlinuz and initrd.img: `sh -c "$(cat fill.sh)" fill FOLDER KIBIBYTES UUID`.
# Runs as root, be it of the machine or of a user namespace, since the files keep their owners.
set -eu
PATH=$PATH:/usr/sbin:/sbin
cd "$1"
mkdir tree
# Whoever boots the image mounts a devtmpfs over /dev, and a namespace's root may not make device nodes.
tar --extract --file root.tar --directory tree --numeric-owner --xattrs --xattrs-include='*' --exclude='./dev/*'
rm root.tar
# What only the making needed, and this machine's name servers.
rm -f tree/etc/apt/apt.conf.d/99mmdebstrap tree/etc/.resolv.conf.systemd-resolved.bak
# Every copy gives itself an identity when it boots.
: > tree/etc/machine-id
ln -sf ../run/systemd/resolve/stub-resolv.conf tree/etc/resolv.conf
# Without these, systemd takes the first boot for one after an update, and makes its caches anew.
touch --reference tree/usr tree/etc/.updated tree/var/.updated
cp tree/vmlinuz vmlinuz
cp tree/initrd.img initrd.img
# All of the tables are written here, so that no guest's kernel thread does it in the background.
mke2fs -q -F -t ext4 -L debian -m 0 -U "$3" -d tree \
    -E "hash_seed=$3,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0" debian.img "$2k"
rm -rf tree
