//! What cannot be is refused with exit code 2 and one line that names the thing and the cure; nothing is started, and
//! nothing is written to standard output. No guest runs, so any `/dev/kvm` will do.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::elf::{Elf, Segment};
use support::process::Vmm;
use support::pty::Pty;
use support::{asset, vmm};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// `hlt`
const HALT: &[u8] = &[0xf4; 16];

/// Runs a machine that must be refused, in words that contain all of `parts`.
#[track_caller]
fn assert_refused(vmm: Vmm, parts: &[&str]) {
    vmm.run().assert_refused(parts);
}

/// Files that do not live longer than the test.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is room for files"))
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).expect("there is room for files");
        path
    }
}

/// Asserts that a file of this content is refused as a kernel, by its name and in these words.
#[track_caller]
fn assert_kernel_refused(content: impl AsRef<[u8]>, parts: &[&str]) {
    let files = Files::new();
    let path = files.file("the-kernel", content);
    assert_refused(Vmm::of_kernel(&path, &["--no-kernel-cache"]), &[&["the-kernel"], parts].concat());
}

/// A kernel of `hlt` instructions with these segments.
fn elf(segments: &[(u64, u64)]) -> Vec<u8> {
    let segments: Vec<Segment> =
        segments.iter().map(|&(address, in_memory)| Segment { address, in_file: 16, in_memory }).collect();
    Elf { class: 2, entry: MIB, segments: &segments, content: HALT, behind: &[] }.bytes()
}

/// A kernel that nothing is wrong with, for what is wrong besides.
fn good_kernel(files: &Files) -> PathBuf {
    files.file("good", elf(&[(MIB, 4096)]))
}

#[track_caller]
fn assert_arguments_refused(arguments: &[&str], parts: &[&str]) {
    let files = Files::new();
    assert_refused(Vmm::of_kernel(&good_kernel(&files), arguments), parts);
}

/// A stock bzImage, and what its setup header says: where the payload starts, and how long it is (boot protocol 2.08).
fn bzimage() -> (Vec<u8>, usize, usize) {
    let image = fs::read(asset("debian-6.1-vmlinuz")).expect("it can be read");
    let field = |at: usize| {
        let bytes = image[at..at + 4].try_into().expect("four bytes");
        usize::try_from(u32::from_le_bytes(bytes)).expect("32 bits fit")
    };
    let payload = (usize::from(image[0x1f1]) + 1) * 512 + field(0x248);
    let length = field(0x24c);
    (image, payload, length)
}

#[test]
fn no_kernel_at_all_is_refused() {
    assert_refused(Vmm::new(["--mem", "64M"]), &["no kernel", "--kernel"]);
}

#[test]
fn a_kernel_that_does_not_exist_is_refused() {
    assert_refused(Vmm::new(["--kernel", "/nonexistent/bzImage"]), &["/nonexistent/bzImage", "No such file", "check"]);
}

#[test]
fn a_directory_for_a_kernel_is_refused() {
    let files = Files::new();
    let folder = files.0.path().to_str().unwrap();
    assert_refused(Vmm::of_kernel(files.0.path(), &[]), &[folder, "directory", "name the kernel file"]);
}

#[test]
fn an_empty_kernel_is_refused() {
    assert_kernel_refused("", &["empty", "name a bzImage or vmlinux"]);
}

#[test]
fn a_text_for_a_kernel_is_refused() {
    assert_kernel_refused("#!/bin/sh\necho a kernel\n".repeat(100), &["neither a bzImage nor an ELF", "name"]);
}

#[test]
fn a_truncated_bzimage_is_refused() {
    let (image, ..) = bzimage();
    assert_kernel_refused(&image[..image.len() / 2], &["truncated", "copy it again"]);
    assert_kernel_refused(&image[..0x210], &["truncated", "copy it again"]);
}

#[test]
fn a_damaged_payload_is_refused() {
    let (mut image, payload, length) = bzimage();
    image[payload + length / 4..][..length / 2].fill(0xff);
    assert_kernel_refused(&image, &["payload is damaged", "again"]);
}

#[test]
fn a_payload_that_unpacks_to_more_than_it_says_is_refused() {
    let (mut image, payload, length) = bzimage();
    // The size stands in the payload's last four bytes.
    image[payload + length - 4..][..4].copy_from_slice(&(1u32 << 20).to_le_bytes());
    assert_kernel_refused(&image, &["more than the 1048576 bytes", "again"]);
}

#[test]
fn a_kernel_for_arm64_is_refused() {
    let mut image = vec![0; 4096];
    image[56..60].copy_from_slice(b"ARM\x64");
    assert_kernel_refused(image, &["arm64", "x86-64"]);
}

#[test]
fn an_elf_file_of_32_bits_is_refused() {
    let segment = Segment { address: MIB, in_file: 16, in_memory: 16 };
    let elf = Elf { class: 1, entry: MIB, segments: &[segment], content: HALT, behind: &[] };
    assert_kernel_refused(elf.bytes(), &["32 bits", "x86-64"]);
}

#[test]
fn an_elf_file_whose_segments_overlap_is_refused() {
    assert_kernel_refused(elf(&[(MIB, 8192), (MIB + 4096, 4096)]), &["overlap", "0x101000", "build it again"]);
}

#[test]
fn an_elf_file_whose_segments_wrap_is_refused() {
    assert_kernel_refused(elf(&[(MIB, 4096), (u64::MAX - 100, 4096)]), &["wraps", "build it again"]);
    assert_kernel_refused(elf(&[(MIB, u64::MAX)]), &["wraps", "build it again"]);
}

#[test]
fn an_elf_file_whose_segments_lie_beyond_memory_is_refused() {
    let kernel = elf(&[(MIB, 4096), (256 * MIB, 4096)]);
    let files = Files::new();
    let path = files.file("the-kernel", &kernel);
    assert_refused(Vmm::of_kernel(&path, &["--mem", "64M"]), &["the-kernel", "has 64M", "--mem 3"]);
    assert_kernel_refused(elf(&[(MIB, 4096), (2048 * MIB, 4096)]), &["0x80000000", "outside", "build it again"]);
    assert_kernel_refused(elf(&[(0, 4096), (MIB, 4096)]), &["0x0", "outside", "build it again"]);
}

#[test]
fn relocations_that_point_outside_of_the_kernel_are_refused() {
    let behind: Vec<u8> = [0u32, 0x9000_0000, 0].iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let segment = Segment { address: MIB, in_file: 16, in_memory: 4096 };
    let elf = Elf { class: 2, entry: MIB, segments: &[segment], content: HALT, behind: &behind };
    assert_kernel_refused(elf.bytes(), &["relocation", "0xffffffff90000000", "nokaslr"]);
}

#[test]
fn relocations_that_are_none_are_refused() {
    let segment = Segment { address: MIB, in_file: 16, in_memory: 4096 };
    let elf = Elf { class: 2, entry: MIB, segments: &[segment], content: HALT, behind: b"something else" };
    assert_kernel_refused(elf.bytes(), &["relocations", "nokaslr"]);
}

#[test]
fn an_initrd_that_is_missing_is_refused() {
    assert_arguments_refused(&["--initrd", "/nonexistent/initrd"], &["/nonexistent/initrd", "--initrd"]);
    assert_arguments_refused(&["--initrd", "/"], &["initrd /", "regular file", "--initrd"]);
}

#[test]
fn an_initrd_that_is_empty_is_refused() {
    let files = Files::new();
    let initrd = files.file("the-initrd", "");
    let vmm = Vmm::of_kernel(&good_kernel(&files), &[]).arg("--initrd").arg(&initrd);
    assert_refused(vmm, &["the-initrd", "empty", "--initrd"]);
}

#[test]
fn an_initrd_that_is_too_large_for_the_memory_is_refused() {
    let files = Files::new();
    let initrd = files.0.path().join("the-initrd");
    fs::File::create(&initrd).unwrap().set_len(1024 * MIB).unwrap();
    let vmm = Vmm::of_kernel(&good_kernel(&files), &["--mem", "64M"]).arg("--initrd").arg(&initrd);
    assert_refused(vmm, &["initrd", "has 64M", "--mem 2"]);
}

#[test]
fn a_stock_kernel_in_too_little_memory_is_told_the_minimum() {
    let vmm = Vmm::of_kernel(&asset("debian-6.1-vmlinuz"), &["--mem", "64M"]);
    assert_refused(vmm, &["debian-6.1-vmlinuz", "has 64M", "--mem "]);
}

#[test]
fn memory_of_no_possible_size_is_refused() {
    for (size, parts) in [
        ("0", ["--mem 0", "32M"]),
        ("1M", ["--mem 1M", "32M"]),
        ("12Q", ["12Q", "--mem"]),
        ("16E", ["16E", "--mem"]),
        ("-1M", ["-1M", "--mem"]),
    ] {
        let argument = format!("--mem={size}");
        assert_arguments_refused(&[&argument], &parts);
    }
}

#[test]
fn memory_beyond_the_processors_addresses_is_refused() {
    // No processor has more than 52 bits of physical address.
    assert_arguments_refused(&["--mem", "8P"], &["--mem 8P", "this processor addresses"]);
}

#[test]
fn a_number_of_processors_that_no_machine_has_is_refused() {
    for count in ["0", "300", "4294967296", "two"] {
        assert_arguments_refused(&["--cpus", count], &[count, "--cpus"]);
    }
    assert_arguments_refused(&["--cpus", "256"], &["--cpus 256", "1 to 255"]);
}

#[test]
fn pinning_to_a_processor_that_is_not_there_is_refused() {
    assert_arguments_refused(&["--cpus", "1,pin=4095"], &["4095", "pin="]);
}

#[test]
fn an_unknown_feature_is_refused() {
    assert_arguments_refused(&["--cpus", "1,features=-avx22"], &["avx22", "avx2", "/proc/cpuinfo"]);
    assert_arguments_refused(&["--cpus", "1,features=+3dnowext"], &["3dnowext", "leave it out"]);
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let words = "x".repeat(5000);
    assert_arguments_refused(&["--cmdline", &words], &["command line", "2047", "--cmdline"]);
    assert_arguments_refused(&["--cmdline", "a\nb"], &["line feed", "--cmdline"]);
}

#[test]
fn flags_and_keys_that_do_not_exist_are_refused() {
    assert_arguments_refused(&["--memory", "1G"], &["--memory", "--mem"]);
    assert_arguments_refused(&["--mem", "1G,prefalt"], &["prefalt", "prefault"]);
    assert_arguments_refused(&["--cpus", "1,entry=pvh"], &["entry", "--cpus"]);
    assert_arguments_refused(&["--serial", "tty"], &["tty", "--serial"]);
    assert_arguments_refused(&["--on-reboot", "wait"], &["wait", "restart", "exit"]);
    assert_arguments_refused(&["rnu"], &["rnu"]);
}

#[test]
fn an_unknown_key_in_the_file_is_named_with_its_line_and_the_nearest_known_name() {
    let files = Files::new();
    let file = files.file("vm.toml", "name = 'a'\n\n[mem]\nsiez = '1G'\n");
    let vmm = || Vmm::of_kernel(&good_kernel(&files), &[]).arg("--config").arg(&file);
    assert_refused(vmm(), &["vm.toml", "line 4", "siez", "`size`"]);
    files.file("vm.toml", "[mem]\nsize = '12Q'\n");
    assert_refused(vmm(), &["vm.toml", "line 2", "12Q"]);
    files.file("vm.toml", "name 'a'\n");
    assert_refused(vmm(), &["vm.toml", "line 1"]);
    fs::remove_file(&file).unwrap();
    assert_refused(vmm(), &["vm.toml", "--config"]);
}

#[test]
fn a_console_that_cannot_be_had_is_refused() {
    assert_arguments_refused(&["--serial", "file,path=/nonexistent/log"], &["/nonexistent/log", "create"]);
    assert_arguments_refused(&["--serial", "file,path=/dev/null"], &["/dev/null", "regular file"]);
    assert_arguments_refused(&["--serial", "file"], &["path", "--serial"]);
    assert_arguments_refused(&["--log-file", "/nonexistent/log"], &["/nonexistent/log", "--log-file"]);
}

/// Runs a machine in a mount namespace of its own, after `script` has changed what it sees. `$@` is the machine.
fn in_namespace(files: &Files, script: &str) -> Vmm {
    let script = format!("set -e; {script}; exec \"$@\"");
    let unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", &script, "sh"];
    Vmm::of_kernel(&good_kernel(files), &[]).by(&unshare)
}

#[test]
fn kvm_that_is_missing_is_refused() {
    let files = Files::new();
    let vmm = in_namespace(&files, "mount -t tmpfs none /dev");
    assert_refused(vmm, &["/dev/kvm does not exist", "kvm_intel or kvm_amd"]);
}

#[test]
fn kvm_that_may_not_be_opened_is_refused() {
    // A device does not open on a mount without devices, not even for root.
    let files = Files::new();
    let vmm = in_namespace(&files, "mount --bind /dev/kvm /dev/kvm; mount -o remount,bind,nodev /dev/kvm");
    assert_refused(vmm, &["/dev/kvm may not be opened", "usermod"]);
}

#[test]
fn kvm_that_is_another_device_is_refused() {
    let files = Files::new();
    let vmm = in_namespace(&files, "mount --bind /dev/null /dev/kvm");
    assert_refused(vmm, &["/dev/kvm", "not KVM's device"]);
}

#[test]
fn kvm_without_a_needed_capability_is_refused() {
    // KVM_CAP_IRQFD (linux/kvm.h).
    let files = Files::new();
    let vmm = Vmm::of_kernel(&good_kernel(&files), &[]).without_capability(32);
    assert_refused(vmm, &["KVM on this host lacks KVM_CAP_IRQFD", "run Linux"]);
}

#[test]
fn a_terminal_is_left_as_it_was() {
    let files = Files::new();
    let pty = Pty::open();
    pty.set_unusual_mode();
    let before = pty.modes();
    let ended = Vmm::of_kernel(&files.file("text", "text\n".repeat(1000)), &[]).spawn_at(&pty).wait();
    assert_eq!((ended.code, ended.stderr.lines().count()), (Some(2), 1), "{ended:#?}");
    assert_eq!(pty.modes(), before);
    assert_eq!(pty.screen.text(0), "");
}

#[test]
fn nothing_is_left_behind() {
    let files = Files::new();
    let path = |name: &str| files.0.path().join(name).to_str().unwrap().to_owned();
    let text = files.file("text", "text\n".repeat(1000));
    let (socket, link) = (path("socket"), path("link"));
    for serial in [format!("socket,path={socket}"), format!("pty,link={link}")] {
        let ended = Vmm::of_kernel(&text, &["--serial", &serial]).run();
        assert_eq!(ended.code, Some(2), "{ended:#?}");
    }
    assert!(!Path::new(&socket).exists() && fs::symlink_metadata(&link).is_err());
    let status = Command::new(vmm()).arg("--help").output().unwrap();
    assert!(status.status.success() && status.stderr.is_empty());
}
