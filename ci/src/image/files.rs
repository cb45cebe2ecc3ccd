//! The files that the image has beside those of its packages: what makes it boot as a virtual machine, fast and with no
//! unit that fails.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::apt;

/// What the installed system always has: path, permissions, content. Each stands where no package has a configuration
/// file, since dpkg would ask whose to keep.
const FILES: &[(&str, u32, &str)] = &[
    ("etc/fstab", 0o644, "LABEL=debian / ext4 errors=remount-ro 0 1\n"),
    ("etc/default/locale", 0o644, "LANG=C.UTF-8\n"),
    // lz4 is the fastest to unpack. There is no swap to resume from, so nothing waits for one. The type has the
    // initramfs hold e2fsck: while the image is made there is no root device that shows it.
    ("etc/initramfs-tools/conf.d/virtio", 0o644, "MODULES=list\nCOMPRESS=lz4\nRESUME=none\nFSTYPE=ext4\n"),
    ("etc/initramfs-tools/hooks/virtio", 0o755, include_str!("initramfs.sh")),
    ("etc/systemd/network/ethernet.network", 0o644, "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n"),
    // What wants an address at its start gets the time to have one; a machine without a network is no failure.
    (
        "etc/systemd/system/systemd-networkd-wait-online.service.d/image.conf",
        0o644,
        "[Service]\nExecStart=\nExecStart=-/lib/systemd/systemd-networkd-wait-online --any --timeout=10\n",
    ),
    // The image holds no host key; sshd refuses to start without one. A key of this kind takes no time to make.
    (
        "etc/systemd/system/ssh.service.d/image.conf",
        0o644,
        "[Service]\nExecStartPre=\nExecStartPre=/bin/sh -c 'test -e /etc/ssh/ssh_host_ed25519_key || \
         ssh-keygen -q -t ed25519 -N \"\" -f /etc/ssh/ssh_host_ed25519_key'\nExecStartPre=/usr/sbin/sshd -t\n",
    ),
];

/// Units that are masked: upkeep in the background, which nobody wants in the first seconds of a virtual machine, and
/// the login of a screen that it does not have.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "logrotate.timer",
    "man-db.timer",
];

/// Raised when what is made of the same inputs changes in another way than by [`text`], such as by a permission.
const RECIPE: &str = "1";

/// All that is written here, for the cache's key.
pub(super) fn text() -> String {
    let files = FILES.iter().flat_map(|(path, _, content)| [*path, *content]);
    files.chain(MASKED.iter().copied()).chain([RECIPE]).collect::<Vec<_>>().join("\n")
}

/// Makes the archive `tar` of the files, all of them root's, whoever makes it.
pub(super) fn archive(tar: &Path, hostname: &str, ssh_key: Option<&str>) -> Result<()> {
    let tree = tempfile::tempdir()?;
    write(tree.path(), hostname, ssh_key)?;
    let mut command = Command::new("tar");
    command.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--directory"]).arg(tree.path());
    // Not `.`: the temporary folder is no model for the image's root.
    command.arg("--file").arg(tar).arg("etc").args(ssh_key.map(|_| "root"));
    apt::run(&mut command)
}

/// Writes the files into `tree`, which becomes the root of the image; root is let in with `ssh_key` if there is one.
fn write(tree: &Path, hostname: &str, ssh_key: Option<&str>) -> Result<()> {
    for (path, mode, content) in FILES {
        write_file(&tree.join(path), *mode, content)?;
    }
    write_file(&tree.join("etc/hostname"), 0o644, &format!("{hostname}\n"))?;
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {hostname}\n::1 localhost ip6-localhost ip6-loopback\n");
    write_file(&tree.join("etc/hosts"), 0o644, &hosts)?;
    if let Some(key) = ssh_key {
        write_file(&tree.join("root/.ssh/authorized_keys"), 0o600, key)?;
        fs::set_permissions(tree.join("root/.ssh"), Permissions::from_mode(0o700))?;
        fs::set_permissions(tree.join("root"), Permissions::from_mode(0o700))?;
    }
    for unit in MASKED {
        symlink("/dev/null", tree.join("etc/systemd/system").join(unit))?;
    }
    Ok(())
}

/// Writes a file and the directories above it, whatever the umask is.
fn write_file(path: &Path, mode: u32, content: &str) -> Result<()> {
    for directory in
        path.ancestors().skip(1).take_while(|directory| !directory.exists()).collect::<Vec<_>>().iter().rev()
    {
        fs::create_dir(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    }
    fs::write(path, content)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_roots_and_the_key_is_there_for_root_alone_if_it_is_given() {
        let tree = tempfile::tempdir().unwrap();
        write(&tree.path().join("open"), "one", None).unwrap();
        write(&tree.path().join("key"), "two", Some("ssh-ed25519 AAAA me\n")).unwrap();
        assert!(!tree.path().join("open/root").exists());
        let keys = tree.path().join("key/root/.ssh/authorized_keys");
        assert_eq!(fs::read_to_string(&keys).unwrap(), "ssh-ed25519 AAAA me\n");
        assert_eq!(fs::metadata(&keys).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(keys.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        let tar = tree.path().join("files.tar");
        archive(&tar, "two", Some("ssh-ed25519 AAAA me\n")).unwrap();
        let list =
            apt::output(Command::new("tar").args(["--list", "--verbose", "--numeric-owner", "--file"]).arg(&tar));
        let list = list.unwrap();
        assert!(list.lines().all(|line| line.split_whitespace().nth(1) == Some("0/0")), "{list}");
        assert!(list.lines().any(|line| line.starts_with("-rw-------") && line.ends_with("root/.ssh/authorized_keys")));
        let hook = fs::metadata(tree.path().join("open/etc/initramfs-tools/hooks/virtio")).unwrap();
        assert_eq!(hook.permissions().mode() & 0o777, 0o755);
    }
}
