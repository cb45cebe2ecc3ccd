//! Files and folders of the host's that a guest uses as such: persistent memory and shared folders; and a disk of a guest
//! without ACPI.

mod support;

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use support::devices::{Folder, KIB, assert_transport, boot, pattern, pattern_in, read_at, run, sum, try_devices};
use support::guest::Guest;
use support::machine::MIB;
use support::until;

#[test]
fn persistent_memory_is_its_file_until_somebody_takes_it_away() {
    let folder = Folder::new();
    let (data, fixed) = (folder.image("data.img", 16 * MIB), folder.text("fixed.img"));
    run("mke2fs", &["-q", "-t", "ext4", "-b", "4096", &data]);
    fs::write(&fixed, pattern(7)).expect("there is room for files");
    let mut guest = boot(&["--pmem", &data, "--pmem", &format!("{fixed},readonly")]);
    try_devices(&["--pmem", &data]).assert_refused(&[&data, "locked"]);
    assert_eq!(guest.number("cat /sys/block/pmem0/size"), 16 * MIB / 512);

    let fixed_sum = format!("head -c {} /dev/pmem1 | sha256sum", pattern(7).len());
    assert_eq!(guest.ask(&fixed_sum), format!("{}  -", sum(&pattern(7))));
    guest.ask("dd if=/dev/zero of=/dev/pmem1 bs=4k count=4 conv=fsync 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(guest.ask(&fixed_sum), format!("{}  -", sum(&pattern(7))), "what it writes there is nowhere");

    let mount = "mkdir /p && mount -t ext4 -o dax /dev/pmem0 /p";
    pattern_in(&mut guest, 1);
    guest.ask(mount);
    assert!(guest.ask("grep ' /p ' /proc/mounts").contains("dax=always"));
    guest.ask("cp /tmp/1 /p/ && sync");
    let (image, start) = (fs::read(&data).expect("it is there"), &pattern(1)[..KIB]);
    assert!(image.chunks(KIB).any(|block| block == start), "what is synced is in the file");
    guest.tell("reboot -f");
    guest.wait_until_it_listens();
    guest.ask(mount);
    assert_eq!(guest.ask("sha256sum < /p/1"), format!("{}  -", sum(&pattern(1))));
    guest.ask("umount /p");

    assert_outlives_its_file(&mut guest, &data);
    assert_eq!(guest.end("poweroff -f").code, Some(0));
    assert_eq!(fs::read(&fixed).expect("it is there"), pattern(7));
}

/// Takes most of the file from under a guest.
fn assert_outlives_its_file(guest: &mut Guest, file: &str) {
    let sum_there = |guest: &mut Guest| {
        guest.ask("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/pmem0 bs=1M skip=5 count=1 2>/dev/null | sha256sum")
    };
    pattern_in(guest, 1);
    guest.ask("dd if=/tmp/1 of=/dev/pmem0 bs=1M seek=5 conv=fsync 2>/dev/null");
    assert_eq!(sum_there(guest), format!("{}  -", sum(&pattern(1)[..1 << 20])));
    fs::File::options().write(true).open(file).and_then(|file| file.set_len(2 * MIB)).expect("it is there");
    assert_eq!(sum_there(guest), format!("{}  -", sum(&vec![0; 1 << 20])));
    guest.vmm.stderr.wait_for("has become shorter while a guest uses it", 0);
    guest.ask("! dd if=/dev/zero of=/dev/pmem0 bs=4k seek=1000 count=1 conv=fsync 2>/dev/null");
    guest.vmm.stderr.wait_for("Cannot flush", 0);
    assert_eq!(guest.ask("dmesg | grep -E 'BUG:|Oops' || true"), "");
}

#[test]
fn a_guest_without_acpi_finds_its_disk_on_the_command_line() {
    let folder = Folder::new();
    let image = folder.image("disk.img", 8 * MIB);
    let disk = format!("{image},transport=mmio-cmdline");
    let arguments = ["--mem", "256M", "--on-reboot", "exit", "--disk", &disk];
    let mut guest = Guest::boot("small-bzImage", &arguments, "acpi=off");
    guest.ask("! grep -rq . /sys/firmware/acpi");
    assert_transport(&mut guest, "mmio", 1);
    pattern_in(&mut guest, 1);
    guest.ask("dd if=/tmp/1 of=/dev/vda bs=64k conv=notrunc,fsync 2>/dev/null && echo 3 > /proc/sys/vm/drop_caches");
    let read = format!("head -c {} /dev/vda | sha256sum", pattern(1).len());
    assert_eq!(guest.ask(&read), format!("{}  -", sum(&pattern(1))));
    assert!(guest.ask("grep virtio0 /proc/interrupts").contains("IO-APIC"));
    guest.end("reboot -f").assert(3, "the guest rebooted");
    assert_eq!(read_at(&image, 0, pattern(1).len()), pattern(1));
}

/// The processes that a machine's starter has started.
fn helpers(guest: &Guest) -> Vec<Pid> {
    children(guest.vmm.pid()).into_iter().flat_map(children).collect()
}

fn children(process: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).expect("it runs");
    let children = tasks.flat_map(|task| {
        let children = fs::read_to_string(task.expect("it runs").path().join("children")).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().expect("a number")).collect::<Vec<i32>>()
    });
    children.map(|pid| Pid::from_raw(pid).expect("no process is 0")).collect()
}

fn shared_folders(transport: &str) {
    let folder = Folder::new();
    let (open, fixed) = (folder.path("open, to all"), folder.path("fixed"));
    for folder in [&open, &fixed] {
        fs::create_dir(folder).expect("there is room for files");
    }
    fs::write(fixed.join("there"), pattern(7)).expect("there is room for files");
    let shares = [format!(r#"path="{}",tag=open"#, open.display()), format!("{},tag=fixed,readonly", fixed.display())];
    let mut guest = boot(&["--transport", transport, "--share", &shares[0], "--share", &shares[1]]);
    assert_transport(&mut guest, transport, 2);
    guest.ask("mkdir /open /fixed && mount -t virtiofs open /open && mount -t virtiofs fixed /fixed");

    pattern_in(&mut guest, 1);
    guest.ask("cp /tmp/1 /open/of-the-guest && mkdir /open/folder && ln -s of-the-guest /open/link");
    assert_eq!(sum(&fs::read(open.join("link")).expect("the guest has made it")), sum(&pattern(1)));
    fs::write(open.join("folder/of-the-host"), pattern(2)).expect("there is room for files");
    let sum_in = |guest: &mut Guest, file: &str| guest.ask(&format!("sha256sum < {file}"));
    assert_eq!(sum_in(&mut guest, "/open/folder/of-the-host"), format!("{}  -", sum(&pattern(2))));
    assert_eq!(sum_in(&mut guest, "/fixed/there"), format!("{}  -", sum(&pattern(7))));
    for change in ["touch /fixed/new", "rm /fixed/there", "dd if=/tmp/1 of=/fixed/there", "chmod 0 /fixed/there"] {
        guest.ask(&format!("! {change} 2>/dev/null && mount -o remount,rw /fixed && ! {change} 2>/dev/null"));
    }
    assert_eq!(fs::read_dir(&fixed).expect("it is there").count(), 1);
    assert_eq!(sum(&fs::read(fixed.join("there")).expect("it is there")), sum(&pattern(7)));

    // What a guest has asked of one that stands still ends in an error when that dies.
    let servers = helpers(&guest);
    assert_eq!(servers.len(), 2);
    for server in &servers {
        kill_process(*server, Signal::STOP).expect("it runs");
    }
    guest.ask("{ ! cat /open/of-the-guest 2>/tmp/error >/dev/null; echo $? >/tmp/code; } &");
    guest.ask("! test -e /tmp/code");
    for server in &servers {
        kill_process(*server, Signal::KILL).expect("it runs");
    }
    guest.vmm.stderr.wait_for("Shared folder open: virtiofsd has ended", 0);
    guest.vmm.stderr.wait_for("Shared folder fixed: virtiofsd has ended", 0);
    guest.ask("wait; grep -q 'Input/output error' /tmp/error && test $(cat /tmp/code) = 0");
    guest.ask("! ls /open/folder 2>/dev/null");
    guest.ask("umount /open && umount /fixed && mount -t virtiofs open /open && mount -t virtiofs fixed /fixed");
    assert_eq!(sum_in(&mut guest, "/open/link"), format!("{}  -", sum(&pattern(1))));
    assert_eq!(sum_in(&mut guest, "/fixed/there"), format!("{}  -", sum(&pattern(7))));
    guest.ask("echo again > /open/again && ! touch /fixed/new 2>/dev/null");
    assert_eq!(fs::read_to_string(open.join("again")).expect("the guest has made it"), "again\n");

    let servers = helpers(&guest);
    assert_eq!(servers.len(), 2);
    guest.vmm.signal(Signal::KILL);
    guest.vmm.wait();
    until("virtiofsd has gone with its machine", || {
        servers.iter().all(|server| !Path::new(&format!("/proc/{}", server.as_raw_nonzero())).exists())
    });
}

#[test]
fn shared_folders_on_pci_are_the_same_on_both_sides_and_outlive_virtiofsd() {
    shared_folders("pci");
}

#[test]
fn shared_folders_on_mmio_are_the_same_on_both_sides_and_outlive_virtiofsd() {
    shared_folders("mmio");
}
