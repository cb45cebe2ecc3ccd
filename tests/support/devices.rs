//! Guests with devices: their images, and bytes that are the same here and there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::guest::Guest;
use super::process::Ended;
use super::tiny::Code;

pub(crate) const KIB: usize = 1 << 10;
/// The largest number in a pattern of more than 1 MiB.
pub(crate) const LAST: u32 = 180_000;

/// A folder for images and sockets.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("there is room for files"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().expect("temporary files have names of ASCII letters")
    }

    /// A file without content, of so many bytes.
    pub(crate) fn image(&self, name: &str, bytes: u64) -> String {
        fs::File::create(self.path(name)).and_then(|file| file.set_len(bytes)).expect("there is room for files");
        self.text(name)
    }
}

/// The same bytes here and, by [`pattern_in`], in a guest: the numbers from `first` to [`LAST`], one a line.
pub(crate) fn pattern(first: u32) -> Vec<u8> {
    (first..=LAST).flat_map(|number| format!("{number}\n").into_bytes()).collect()
}

/// Makes a [`pattern`] in the guest's file /tmp/FIRST.
pub(crate) fn pattern_in(guest: &mut Guest, first: u32) {
    guest.ask(&format!("seq {first} {LAST} > /tmp/{first}"));
}

pub(crate) fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

pub(crate) fn boot(arguments: &[&str]) -> Guest {
    // A kernel reports no free memory while it has less than 64 MiB of it.
    Guest::boot("small-bzImage", &[&["--mem", "256M"], arguments].concat(), "")
}

/// A machine with these devices whose guest ends at once.
pub(crate) fn try_devices(arguments: &[&str]) -> Ended {
    Code::default().power_off().halt().kernel(&[]).run(arguments, "")
}

/// Checks that the guest's drivers have found nothing wrong, and that each has the bus that was asked for.
pub(crate) fn assert_transport(guest: &mut Guest, transport: &str, devices: u64) {
    assert_eq!(guest.number("ls /sys/bus/virtio/devices | wc -l"), devices);
    assert_eq!(guest.number("find /sys/bus/virtio/drivers/ -type l -name 'virtio[0-9]*' | wc -l"), devices);
    let on_pci = guest.number("ls -l /sys/bus/virtio/devices | grep -c /pci || true");
    assert_eq!(on_pci, if transport == "pci" { devices } else { 0 });
    assert_eq!(guest.ask("dmesg | grep -iE 'virtio.*(fail|error|warn)|ACPI.*error|BUG:' || true"), "");
}
pub(crate) fn read_at(path: impl AsRef<Path>, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let file = fs::File::open(path).expect("it is there");
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, offset).expect("it is so long");
    bytes
}
