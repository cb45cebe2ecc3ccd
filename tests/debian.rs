//! Stock Debian from a disk: its own kernel, initramfs and systemd, as `cargo xtask image` makes it.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;

use support::asset;
use support::guest::Guest;
use support::machine::MIB;
use support::names::{ANSWER, with_name_server};
use support::process::Vmm;
use tempfile::TempDir;

/// What is typed at root's shell, so that it listens as [`Guest`] expects.
const LISTEN: &str = r#"stty -echo;echo R''EADY 0 0;while read -r l;do eval "$l";echo =$?=;done"#;
const NAME: &str = "service.example";

/// Boots Debian from an overlay over its image, by `wrapper`, and logs in.
fn boot(folder: &TempDir, wrapper: &[&str], arguments: &[&str]) -> Guest {
    let image = |name: &str| asset("debian").join(name).into_os_string().into_string().expect("a path of text");
    let root = format!("{},overlay={}", image("debian.img"), text(folder.path().join("root.qcow2")));
    let (kernel, initrd) = (image("vmlinuz"), image("initrd.img"));
    let machine = ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", "root=/dev/vda rw quiet", "--disk", &root];
    let mut vmm = Vmm::new([&machine[..], arguments].concat());
    if !wrapper.is_empty() {
        vmm = vmm.by(wrapper);
    }
    let mut vmm = vmm.spawn();
    let seen = vmm.stdout().wait_for("login: ", 0);
    vmm.send("root\n");
    vmm.stdout().wait_for("# ", seen);
    vmm.send(format!("{LISTEN}\n"));
    Guest::listen(vmm)
}

fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().expect("temporary files have names of ASCII letters")
}

#[test]
fn debian_comes_up_whole_with_a_network_and_serves_a_published_port() {
    let folder = tempfile::tempdir().expect("there is room for files");
    let wrapper = with_name_server(folder.path());
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()).expect("a port");
    let net = format!("user,publish={}:80", free.port());
    let mut guest = boot(&folder, &wrapper, &["--net", &net]);

    assert_eq!(guest.ask("systemctl is-system-running --wait"), "running");
    assert_eq!(guest.ask("systemctl --failed --no-legend"), "");
    // Linux misses PCI's ports before it reads in ACPI's tables that there is something better.
    let errors =
        guest.ask("dmesg --level emerg,alert,crit,err | grep -v 'No config space access function found' || true");
    assert_eq!(errors, "");
    guest.ask("ip -4 route show default | grep -q dhcp");
    assert!(guest.ask(&format!("getent ahostsv4 {NAME}")).starts_with(&ANSWER.to_string()));

    for _ in 0..10 {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, free.port())).expect("the port is published");
        write!(stream, "GET / HTTP/1.0\r\nHost: {NAME}\r\n\r\n").expect("the guest reads");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("the guest answers and closes");
        assert!(page.starts_with("HTTP/1.1 200 OK") && page.contains("Welcome to nginx!"), "{page}");
    }
    guest.end("systemctl poweroff").assert(0, "the guest powered off");
}

#[test]
#[ignore = "long: makes 10,000 connections"]
fn ten_thousand_short_connections_all_get_their_page() {
    let folder = tempfile::tempdir().expect("there is room for files");
    let mut guest = boot(&folder, &[], &["--net", "vmm-own,vhost=off"]);
    let up = "ip address add 198.51.100.1/24 dev vmm-own && ip link set vmm-own up";
    assert!(Command::new("sh").args(["-c", up]).status().expect("there is a shell").success());
    guest.ask("ip address add 198.51.100.2/24 dev $(ls /sys/class/net | grep ^e)");
    guest.ask("ping -c 1 -w 60 198.51.100.1 >/dev/null");
    for number in 0..10_000 {
        let mut stream = TcpStream::connect((Ipv4Addr::new(198, 51, 100, 2), 80)).expect("nginx listens");
        write!(stream, "GET / HTTP/1.0\r\n\r\n").expect("the guest reads");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("the guest answers and closes");
        assert!(page.starts_with("HTTP/1.1 200 OK") && page.contains("</html>"), "{number}: {page}");
    }
    guest.end("systemctl poweroff").assert(0, "the guest powered off");
}

fn verified_by_fio(transport: &str) {
    let folder = tempfile::tempdir().expect("there is room for files");
    let file = |name: &str| text(folder.path().join(name));
    let names = ["uring.img", "threads.img", "inline.img", "base.img"];
    for name in names {
        fs::File::create(file(name)).and_then(|file| file.set_len(64 * MIB)).expect("there is room for files");
    }
    let qcow2 = file("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &qcow2, "64M"]).status();
    assert!(made.expect("it is installed").success());
    let disks = [
        format!("{},engine=io-uring", file("uring.img")),
        format!("{},engine=threads", file("threads.img")),
        format!("{},engine=inline", file("inline.img")),
        format!("{qcow2},format=qcow2"),
        format!("{},overlay={}", file("base.img"), file("over.qcow2")),
    ];
    let mut arguments = vec!["--transport", transport];
    arguments.extend(disks.iter().flat_map(|disk| ["--disk", disk.as_str()]));
    let mut guest = boot(&folder, &[], &arguments);
    for disk in ["vdb", "vdc", "vdd", "vde", "vdf"] {
        let job = format!("--filename=/dev/{disk} --size=8M --rw=randrw --bsrange=4k-64k --iodepth=32 --direct=1");
        let check = "--verify=crc32c --verify_fatal=1 --ioengine=libaio --fsync=16 --minimal";
        guest.ask(&format!("fio --name={disk} {job} {check} >/tmp/{disk}"));
    }
    guest.end("sync; poweroff -f").assert(0, "the guest powered off");
    assert!(fs::read(file("base.img")).expect("it is there").iter().all(|byte| *byte == 0), "a base does not change");
}

#[test]
#[ignore = "long: boots Debian once more"]
fn fio_reads_what_it_wrote_on_every_kind_of_disk_on_pci() {
    verified_by_fio("pci");
}

#[test]
#[ignore = "long: boots Debian once more"]
fn fio_reads_what_it_wrote_on_every_kind_of_disk_on_mmio() {
    verified_by_fio("mmio");
}

#[test]
#[ignore = "long: boots Debian once more"]
fn each_flush_of_the_guest_s_is_one_of_the_host_s() {
    let folder = tempfile::tempdir().expect("there is room for files");
    let data = text(folder.path().join("data.img"));
    fs::File::create(&data).and_then(|file| file.set_len(16 * MIB)).expect("there is room for files");
    let trace = text(folder.path().join("trace"));
    let disk = format!("{data},engine=threads");
    let wrapper = ["strace", "--follow-forks", "--quiet=all", "--decode-fds=path", "--trace=fdatasync,fsync"];
    let wrapper = [&wrapper[..], &["--output", &trace]].concat();
    let mut guest = boot(&folder, &wrapper, &["--disk", &disk]);
    guest.ask("for i in $(seq 25); do dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync status=none; done");
    let flushes = guest.number("awk '{ print $16 }' /sys/block/vdb/stat");
    assert!(flushes >= 25, "{flushes}");
    guest.end("poweroff -f").assert(0, "the guest powered off");
    let trace = fs::read_to_string(trace).expect("strace has written it");
    let ours = trace.lines().filter(|line| line.contains("data.img") && line.contains("sync(")).count() as u64;
    // The end of the device may be one more.
    assert!((flushes..=flushes + 1).contains(&ours), "{flushes} flushes of the guest's, {ours} of the host's");
}
