//! What a guest has on its disk after the host under its VMM is gone from one moment to the next: all that it had synced.
//!
//! The host is an emulated one with a disk, the disk is the guest's, and QEMU is killed in the middle of the guest's
//! writes. With it goes what neither the guest nor the VMM had flushed: the host's page cache and the VMM's own.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// Files that the guest has synced before the host is killed.
const SYNCED: usize = 20;
const QEMU: &[u8] = b"qemu-system-x86";

/// The guest writes one file after the other, syncs each, and says so, while it writes to another without an end.
const WRITE: &str = concat!(
    "mkdir /m;mount -t ext4 /dev/vda /m;",
    "while :;do dd if=/dev/urandom of=/m/noise bs=64k count=64 2>/dev/null;done& ",
    "i=0;while :;do i=$((i+1));yes $i|head -c 9000 >/m/$i;sync /m/$i&&echo SYNCED $i;done"
);

#[test]
#[ignore = "long: kills emulated hosts"]
fn what_a_guest_has_synced_to_a_raw_disk_outlives_its_host() {
    outlives_its_host("raw");
}

#[test]
#[ignore = "long: kills emulated hosts"]
fn what_a_guest_has_synced_to_a_qcow2_disk_outlives_its_host() {
    outlives_its_host("qcow2");
}

fn outlives_its_host(format: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (disk, raw) = (folder.path().join("disk"), folder.path().join("raw"));
    run("/sbin/mke2fs", &["-q", "-t", "ext4", text(&raw), "64M"]);
    run("qemu-img", &["convert", "-O", format, text(&raw), text(&disk)]);
    if format == "qcow2" {
        // So that the image can grow on a disk, which cannot.
        fs::File::options().write(true).open(&disk).unwrap().set_len(128 << 20).unwrap();
    }
    let synced = write_until_killed(&disk, format);
    if format == "qcow2" {
        // 0 is faultless, 3 has clusters that nothing refers to.
        let code = Command::new("qemu-img").args(["check", "-q", text(&disk)]).status().unwrap().code();
        assert!(matches!(code, Some(0 | 3)), "{code:?}");
    }
    run("qemu-img", &["convert", "-f", format, "-O", "raw", text(&disk), text(&raw)]);
    // 1 means that there was something to mend: the journal, at least.
    let code = Command::new("/sbin/e2fsck").args(["-fy", text(&raw)]).output().unwrap();
    assert!(matches!(code.status.code(), Some(0 | 1)), "{code:?}");
    for number in synced {
        let content = output("/sbin/debugfs", &["-R", &format!("cat /{number}"), text(&raw)]);
        let expected: String = format!("{number}\n").chars().cycle().take(9000).collect();
        assert!(content == expected.as_bytes(), "{number} is {:?}", String::from_utf8_lossy(&content));
    }
}

/// Has a guest write to `disk`, kills its host meanwhile, and returns the names of the files that it had said to be safe.
fn write_until_killed(disk: &Path, format: &str) -> Vec<String> {
    let mut host = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["host", "--timeout", "300", "--disk", text(disk), "--"])
        .arg(variable("VMM_BIN"))
        .arg("--kernel")
        .arg(variable("VMM_ASSETS").join("small-bzImage"))
        .arg("--initrd")
        .arg(variable("VMM_ASSETS").join("initramfs-shell"))
        .args(["--mem", "128M", "--disk", &format!("/dev/vda,format={format}")])
        .args(["--cmdline", &format!("quiet run=\"{WRITE}\"")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut synced = Vec::new();
    let mut said = String::new();
    for line in BufReader::new(host.stdout.take().unwrap()).lines().map_while(Result::ok) {
        said.push_str(&line);
        said.push('\n');
        if let Some(number) = line.trim().strip_prefix("SYNCED ") {
            synced.push(number.to_owned());
            if synced.len() == SYNCED {
                kill_process(child_of(&host, QEMU), Signal::KILL).unwrap();
            }
        }
    }
    let ended = host.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(synced.len() >= SYNCED, "{said}{errors}");
    assert!(errors.contains("The emulated host ended before the command did"), "{errors}");
    synced
}

/// The child of this name.
fn child_of(parent: &Child, name: &[u8]) -> Pid {
    let threads = fs::read_dir(format!("/proc/{}/task", parent.id())).unwrap().map(|thread| thread.unwrap().path());
    let children = threads.flat_map(|thread| {
        let children = fs::read_to_string(thread.join("children")).unwrap();
        children.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    });
    let child = children
        .into_iter()
        .find(|child| fs::read(format!("/proc/{child}/comm")).is_ok_and(|comm| comm.trim_ascii() == name))
        .expect("the host has its QEMU");
    Pid::from_raw(child.parse().unwrap()).unwrap()
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`")).into()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) {
    output(program, arguments);
}

fn output(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output.stdout
}
