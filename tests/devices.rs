//! Disks, network cards, random numbers, sockets and the balloon, as guests with the small kernel use them, on PCI and
//! behind memory-mapped registers.
//!
//! A guest costs seconds, so there are few, each asked much. What is refused without a guest is in `bad_devices`,
//! persistent memory and shared folders are in `files`.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::process::Signal;
use support::devices::{Folder, KIB, assert_transport, boot, pattern, pattern_in, read_at, run, sum, try_devices};
use support::guest::Guest;
use support::machine::MIB;
use support::packet::{HEADER, Packets};
use support::process::Vmm;
use support::until;

fn raw_disks(transport: &str) {
    let folder = Folder::new();
    let (data, fixed) = (folder.image("data.img", 64 * MIB), folder.text("fixed.img"));
    let unchanged = [pattern(7), vec![0; 512 - pattern(7).len() % 512]].concat();
    fs::write(&fixed, &unchanged).expect("there is room for files");
    let last = folder.image("last.img", 8 * MIB);
    let disks = [format!("{data},serial=the-first"), format!("{fixed},readonly"), format!("{last},cache=unsafe")];
    let [data_disk, fixed_disk, last_disk] = disks.each_ref().map(String::as_str);
    let arguments =
        ["--transport", transport, "--disk", data_disk, "--disk", fixed_disk, "--disk", last_disk, "--log-level=info"];
    let mut guest = boot(&arguments);
    assert_transport(&mut guest, transport, 3);

    let sectors = ["vda", "vdb", "vdc"].map(|disk| guest.number(&format!("cat /sys/block/{disk}/size")));
    assert_eq!(sectors, [64 * MIB, unchanged.len() as u64, 8 * MIB].map(|bytes| bytes / 512));
    assert_eq!(guest.ask("cat /sys/block/vda/serial"), "the-first");
    assert_eq!(guest.ask("cat /sys/block/vdb/ro"), "1");
    assert_eq!(guest.ask("sha256sum < /dev/vdb"), format!("{}  -", sum(&unchanged)));
    guest.ask("! dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>/dev/null");

    pattern_in(&mut guest, 1);
    let (first, length) = (pattern(1), pattern(1).len());
    guest.ask("dd if=/tmp/1 of=/dev/vda bs=64k seek=16 conv=notrunc 2>/dev/null && sync");
    guest.ask("echo 3 > /proc/sys/vm/drop_caches");
    let read = format!("dd if=/dev/vda bs=64k skip=16 2>/dev/null | head -c {length} | sha256sum");
    assert_eq!(guest.ask(&read), format!("{}  -", sum(&first)));
    assert_eq!(sum(&read_at(&data, MIB, length)), sum(&first));

    assert_discarded(&mut guest, &last);
    let others = try_devices(&["--disk", &data]);
    others.assert_refused(&[&data, "locked", "overlay="]);

    // The second machine is made of the same disks.
    guest.tell("reboot -f");
    guest.wait_until_it_listens();
    assert_eq!(guest.ask(&read), format!("{}  -", sum(&first)));
    pattern_in(&mut guest, 2);
    guest.ask("dd if=/tmp/2 of=/dev/vda bs=64k seek=512 conv=notrunc 2>/dev/null && sync");
    guest.vmm.signal(Signal::KILL);
    assert_eq!(guest.vmm.wait().code, None);
    assert_eq!(sum(&read_at(&data, 32 * MIB, pattern(2).len())), sum(&pattern(2)));
    assert_eq!(fs::read(&fixed).expect("it is there"), unchanged);
    try_devices(&["--disk", &data]).assert(0, "the guest powered off");
}

/// Checks that what the guest discards of its third disk takes no room on the host.
fn assert_discarded(guest: &mut Guest, image: &str) {
    let blocks = || fs::metadata(image).expect("it is there").blocks();
    guest.ask("tr '\\0' x < /dev/zero | dd of=/dev/vdc bs=64k count=128 iflag=fullblock conv=fsync 2>/dev/null");
    assert!(blocks() * 512 >= 8 * MIB, "{} blocks", blocks());
    guest.ask("blkdiscard -o 1048576 -l 4194304 /dev/vdc");
    assert!(blocks() * 512 <= 5 * MIB, "{} blocks", blocks());
    let expected = [vec![b'x'; 512 * KIB], vec![0; 512 * KIB]].concat();
    assert_eq!(read_at(image, MIB / 2, 1024 * KIB), expected);
    let answer = guest.ask("dd if=/dev/vdc bs=512k skip=1 count=2 2>/dev/null | sha256sum");
    assert_eq!(answer, format!("{}  -", sum(&expected)));
}

#[test]
fn raw_disks_on_pci_are_their_files_through_a_reboot_and_a_kill() {
    raw_disks("pci");
}

#[test]
#[ignore = "long: boots three guests more"]
fn raw_disks_on_mmio_are_their_files_through_a_reboot_and_a_kill() {
    raw_disks("mmio");
}

#[test]
fn disks_of_one_machine_are_on_pci_and_behind_registers() {
    let folder = Folder::new();
    let disks = [format!("{},transport=mmio", folder.image("a.img", 8 * MIB)), folder.image("b.img", 4 * MIB)];
    let mut guest = boot(&["--disk", &disks[0], "--disk", &disks[1]]);
    let mut sectors = |bus: &str| {
        let sizes = guest.ask(&format!("set +f; cat /sys/devices/{bus}*/virtio*/block/*/size"));
        sizes.parse::<u64>().expect("one disk") * 512
    };
    assert_eq!(sectors("platform/LNRO"), 8 * MIB);
    assert_eq!(sectors("pci0000:00/0000:00:"), 4 * MIB);
    guest.ask("for d in vda vdb; do dd if=/dev/zero of=/dev/$d bs=1M count=4 conv=fsync 2>/dev/null; done");
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn qcow2_images_and_overlays_hold_file_systems() {
    let folder = Folder::new();
    let (image, base, overlay) = (folder.text("disk.qcow2"), folder.image("base.img", 16 * MIB), folder.text("over"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "32M"]);
    let disks = [format!("{image},format=qcow2"), format!("{base},overlay={overlay}")];
    let mut guest = boot(&["--disk", &disks[0], "--disk", &disks[1]]);
    assert_eq!(guest.number("cat /sys/block/vda/size"), 32 * MIB / 512);
    assert_eq!(guest.number("cat /sys/block/vdb/size"), 16 * MIB / 512);
    pattern_in(&mut guest, 1);
    guest.ask("mkdir /a /b");
    for (disk, folder) in [("vda", "a"), ("vdb", "b")] {
        guest.ask(&format!("mke2fs /dev/{disk} >/dev/null && mount -t ext2 /dev/{disk} /{folder}"));
        guest.ask(&format!("cp /tmp/1 /{folder}/ && umount /{folder} && mount -t ext2 /dev/{disk} /{folder}"));
        assert_eq!(guest.ask(&format!("sha256sum < /{folder}/1")), format!("{}  -", sum(&pattern(1))));
    }
    try_devices(&["--disk", &disks[0]]).assert_refused(&[&image, "locked"]);
    try_devices(&["--disk", &disks[1]]).assert_refused(&["over", "locked"]);
    // One more reader of what is under an overlay is welcome.
    try_devices(&["--disk", &format!("{base},readonly")]).assert(0, "the guest powered off");
    guest.ask("umount /a && umount /b");
    guest.end("poweroff -f").assert(0, "the guest powered off");

    assert_eq!(fs::read(&base).unwrap(), vec![0; 16 << 20], "what is under an overlay does not change");
    for image in [&image, &overlay] {
        run("qemu-img", &["check", "-q", image]);
        let raw = folder.text("raw");
        run("qemu-img", &["convert", "-O", "raw", image, &raw]);
        let raw = fs::read(raw).unwrap();
        let start = &pattern(1)[..KIB];
        assert!(raw.chunks(KIB).any(|block| block == start), "QEMU finds the guest's file in {image}");
    }
    try_devices(&["--disk", &disks[0], "--disk", &disks[1]]).assert(0, "the guest powered off");
}

/// A host's tap device that is the guest's card `eth0`, `eth1`, ….
struct Link {
    tap: &'static str,
    card: &'static str,
    host: Ipv4Addr,
    guest: Ipv4Addr,
}

impl Link {
    fn new(tap: &'static str, card: &'static str, network: u8) -> Self {
        let address = |last| Ipv4Addr::new(198, 51, network, last);
        Self { tap, card, host: address(1), guest: address(2) }
    }

    fn set_up(&self, guest: &mut Guest) {
        run("ip", &["address", "add", &format!("{}/24", self.host), "dev", self.tap]);
        guest.ask(&format!("ip address add {}/24 dev {}", self.guest, self.card));
        guest.ask(&format!("ip link set {} up", self.card));
        guest.ask(&format!("ping -c 2 -w 20 {} >/dev/null", self.host));
    }
}

/// Takes what the guest sends: the file /tmp/FIRST, to `host` as the guest knows it.
fn receive_from(guest: &mut Guest, listener: &TcpListener, host: Ipv4Addr, first: u32) {
    let port = listener.local_addr().expect("it is bound").port();
    guest.tell(&format!("nc {host} {port} < /tmp/{first}"));
    let (mut stream, _) = listener.accept().expect("the guest connects");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("the guest sends");
    assert_eq!(sum(&bytes), sum(&pattern(first)));
    drop(stream);
    guest.wait_for("=0=\r\n");
}

/// Sends a pattern to the guest.
fn send_to(guest: &mut Guest, address: Ipv4Addr, first: u32) {
    const PORT: u16 = 1000;
    guest.tell(&format!("nc -l -p {PORT} < /dev/null | sha256sum"));
    let mut stream = None;
    until("the guest listens", || {
        stream = TcpStream::connect(SocketAddrV4::new(address, PORT)).ok();
        stream.is_some()
    });
    let mut stream = stream.expect("it has just connected");
    stream.write_all(&pattern(first)).expect("the guest receives");
    stream.shutdown(Shutdown::Write).expect("the guest receives");
    guest.wait_for(&sum(&pattern(first)));
    guest.wait_for("=0=\r\n");
}

fn every_device(transport: &str) {
    let folder = Folder::new();
    let (disk, socket) = (folder.image("disk.img", MIB), folder.text("vsock"));
    let links = [Link::new("vmm-kernel", "eth0", 101), Link::new("vmm-own", "eth1", 102)];
    let cards = ["vmm-kernel,mac=02:00:00:00:00:07,mtu=1400,vhost=on", "vmm-own,antispoof,vhost=off"];
    let rest = ["--net", cards[0], "--net", cards[1], "--vsock", &socket, "--transport", transport];
    let arguments = ["--disk", &disk, "--rng", "--balloon", "64M,free-page-reporting"];
    let mut guest = boot(&[&arguments[..], &rest].concat());
    assert_transport(&mut guest, transport, 6);

    assert_eq!(guest.ask("cat /sys/class/net/eth0/address"), "02:00:00:00:00:07");
    assert_eq!(guest.number("cat /sys/class/net/eth0/mtu"), 1400);
    pattern_in(&mut guest, 1);
    for link in &links {
        link.set_up(&mut guest);
        let listener = TcpListener::bind((link.host, 0)).expect("the tap has its address");
        receive_from(&mut guest, &listener, link.host, 1);
        send_to(&mut guest, link.guest, 2);
    }
    try_devices(&["--net", "vmm-own"]).assert_refused(&["vmm-own", "taken", "name another"]);

    assert_random(&mut guest);
    assert_sockets(&mut guest, &socket);
    assert_balloon(&mut guest);
    guest.end("poweroff -f").assert(0, "the guest powered off");
    assert!(!Path::new(&socket).exists(), "the socket is removed at the end");
    assert!(!Path::new("/sys/class/net/vmm-own").exists(), "a tap that was made goes with its machine");
    try_devices(&["--disk", &disk]).assert(0, "the guest powered off");
}

fn assert_random(guest: &mut Guest) {
    assert!(guest.ask("cat /sys/class/misc/hw_random/rng_current").starts_with("virtio_rng"));
    let mut draw = || guest.ask("head -c 20000 /dev/hwrng | tee /tmp/random | sha256sum");
    assert_ne!(draw(), draw());
    assert_eq!(guest.number("wc -c < /tmp/random"), 20_000);
}

fn assert_sockets(guest: &mut Guest, path: &str) {
    let metadata = fs::metadata(path).expect("it listens");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let mut client = connect(path, 52);
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("it answers or closes");
    assert_eq!(answer, "", "nobody listens at the guest's port");
    echo_both_ways(guest, path, MIB);
}

/// Asks for a connection to the guest's port.
fn connect(path: &str, port: u32) -> UnixStream {
    let mut client = UnixStream::connect(path).expect("it listens");
    writeln!(client, "CONNECT {port}").expect("it reads");
    client
}

/// Has the guest send `bytes` back, through a connection of the host's and through one of its own.
fn echo_both_ways(guest: &mut Guest, path: &str, bytes: u64) {
    guest.tell("vsock-echo listen 1000");
    guest.wait_for("listening");
    let client = connect(path, 1000);
    let mut answer = BufReader::new(client.try_clone().expect("there is room for a descriptor"));
    let mut line = String::new();
    answer.read_line(&mut line).expect("it answers");
    assert!(line.starts_with("OK "), "{line}");
    echo(&client, &mut answer, bytes);
    guest.wait_for("=0=\r\n");

    let listener = UnixListener::bind(format!("{path}_2000")).expect("the folder is ours");
    guest.tell("vsock-echo connect 2000");
    let (client, _) = listener.accept().expect("the guest connects");
    echo(&client, &mut &client, bytes);
    guest.wait_for("=0=\r\n");
}

/// Sends numbers, and checks that the same come back, and then the end.
fn echo(mut to: &UnixStream, from: &mut impl Read, bytes: u64) {
    let block = |number: u64| [number.to_le_bytes(); 8 << 10];
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..bytes / (64 << 10) {
                to.write_all(block(number).as_flattened()).expect("the guest reads");
            }
            to.shutdown(Shutdown::Write).expect("it is connected");
        });
        let mut got = vec![0; 64 << 10];
        for number in 0..bytes / (64 << 10) {
            from.read_exact(&mut got).expect("the guest sends all of it back");
            assert!(got == block(number).as_flattened(), "block {number} is another");
        }
        assert_eq!(from.read(&mut got).expect("the guest closes"), 0);
    });
}

/// 64 MiB are gone from the guest, and what it frees is soon gone from the host.
fn assert_balloon(guest: &mut Guest) {
    until("the guest has filled its balloon", || {
        guest.number("sed -n 's/MemTotal: *//;s/ kB//p;q' /proc/meminfo") < (256 - 64) << 10
    });
    let resident = |guest: &Guest| -> u64 {
        let status = guest.vmm.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    guest.ask("dd if=/dev/zero of=/tmp/much bs=1M count=30 2>/dev/null");
    let with = resident(guest);
    guest.ask("rm /tmp/much");
    until("the guest's memory is back", || resident(guest) + (20 << 10) < with);
}

#[test]
fn every_device_serves_one_guest_on_pci() {
    every_device("pci");
}

#[test]
#[ignore = "long: boots a guest"]
fn every_device_serves_one_guest_on_mmio() {
    every_device("mmio");
}

#[test]
#[ignore = "long: sends 2 GiB"]
fn a_gibibyte_goes_each_way_through_a_vsock() {
    let folder = Folder::new();
    let socket = folder.text("vsock");
    let mut guest = boot(&["--vsock", &socket]);
    echo_both_ways(&mut guest, &socket, 1 << 30);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn a_peer_that_sends_rubbish_disturbs_neither_the_guest_nor_its_card() {
    const FRAMES: usize = 2000;
    let link = Link::new("vmm-own", "eth0", 102);
    let mut guest = boot(&["--net", "vmm-own,vhost=off"]);
    link.set_up(&mut guest);
    let wire = Packets::on(link.tap).expect("there is a packet socket");
    let address = guest.ask("cat /sys/class/net/eth0/address");
    let address: Vec<u8> = address.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a number")).collect();
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        state.to_le_bytes()
    };
    guest.ask("dmesg -c >/dev/null");
    let mut sent = 0;
    for _ in 0..FRAMES {
        let [kind, shape, _, _, _, _, long, short] = next();
        let length = if short & 3 == 0 { 14 + usize::from(long) * 5 } else { 14 + usize::from(long) % 64 };
        let mut frame: Vec<u8> = std::iter::repeat_with(&mut next).flatten().take(HEADER + length).collect();
        // Half have headers that the kernel cannot find fault with, some any header; most are for the guest.
        match kind & 3 {
            0 => {}
            1 => frame[..2].copy_from_slice(&[0, shape & 7]),
            _ => frame[..HEADER].fill(0),
        }
        if shape & 0xf0 != 0 {
            frame[HEADER..HEADER + 6].copy_from_slice(&address);
            frame[HEADER + 12..HEADER + 14]
                .copy_from_slice(&[[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0]][usize::from(shape & 3)]);
        }
        sent += usize::from(wire.send(&frame));
    }
    assert!(sent > FRAMES / 3, "the kernel lets {sent} frames out");
    guest.ask(&format!("ping -c 2 -w 60 {} >/dev/null", link.host));
    assert!(guest.number("cat /sys/class/net/eth0/statistics/rx_packets") > 100);
    assert_eq!(guest.ask("dmesg | grep -E 'BUG:|WARNING:|Call Trace' || true"), "");
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn a_card_without_rights_has_an_address_by_dhcp_and_reaches_the_host() {
    let mut guest = boot(&["--net", "user"]);
    guest.ask(concat!(
        r"printf '#!/bin/sh\n[ $1 != bound ] || { ip address add $ip/$mask dev $interface;",
        r"ip route add default via $router; echo $router > /tmp/router; }\n' > /tmp/dhcp"
    ));
    guest.ask("chmod +x /tmp/dhcp && ip link set eth0 up && udhcpc -nq -i eth0 -s /tmp/dhcp >/dev/null 2>&1");
    let router = guest.ask("cat /tmp/router").parse().expect("an address");
    pattern_in(&mut guest, 1);
    // The router's address is this host, as the guest sees it.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    receive_from(&mut guest, &listener, router, 1);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

/// A machine, controlled through its socket.
struct Ctl(String);

impl Ctl {
    /// What `vmm ctl` prints where all is well.
    #[track_caller]
    fn ask(&self, words: &[&str]) -> String {
        let ended = Vmm::new(["ctl", &self.0]).args(words).run();
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{words:?}: {ended:#?}");
        ended.stdout
    }

    /// One of the numbers that the guest's balloon tells.
    fn statistic(&self, name: &str) -> Option<u64> {
        let statistics = self.ask(&["balloon", "stats"]);
        let mut lines = statistics.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(other, _)| *other == name).map(|(_, number)| number.parse().expect("a number"))
    }
}

#[test]
fn a_guest_sees_what_is_done_to_its_machine_through_the_control_socket() {
    let folder = Folder::new();
    let (disk, old, new) = (folder.image("disk.img", 8 * MIB), folder.image("old.img", MIB), folder.text("new.img"));
    let ctl = Ctl(folder.text("socket"));
    let (drive, balloon) = (format!("{old},id=tray,readonly"), "stats-interval=1");
    let mut guest = boot(&["--api-socket", &ctl.0, "--disk", &disk, "--disk", &drive, "--balloon", balloon]);

    let sectors = |guest: &mut Guest, disk| guest.number(&format!("cat /sys/block/{disk}/size"));
    fs::File::options().write(true).open(&disk).and_then(|file| file.set_len(16 * MIB)).expect("it is there");
    ctl.ask(&["drive", "disk", "--resize"]);
    until("the disk has grown", || sectors(&mut guest, "vda") == 16 * MIB / 512);
    pattern_in(&mut guest, 1);
    guest.ask("head -c 65536 /tmp/1 | dd of=/dev/vda bs=64k seek=255 conv=fsync 2>/dev/null");
    assert_eq!(read_at(&disk, 16 * MIB - 65536, 65536), pattern(1)[..65536]);

    let content = [pattern(7), vec![0; 512 - pattern(7).len() % 512]].concat();
    fs::write(&new, &content).expect("there is room for files");
    ctl.ask(&["drive", "tray", "--path", &new]);
    until("the medium has another size", || sectors(&mut guest, "vdb") == content.len() as u64 / 512);
    guest.ask("echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(guest.ask("sha256sum < /dev/vdb"), format!("{}  -", sum(&content)));
    try_devices(&["--disk", &old]).assert(0, "the guest powered off");

    assert_balloon_follows(&mut guest, &ctl);
    assert_stands_still(&mut guest, &ctl);
    guest.ask("power-button");
    ctl.ask(&["power-button"]);
    guest.vmm.wait().assert(0, "the guest powered off");
    assert!(!Path::new(&ctl.0).exists(), "the socket is removed at the end");
}

fn assert_balloon_follows(guest: &mut Guest, ctl: &Ctl) {
    let total = |guest: &mut Guest| guest.number("sed -n 's/MemTotal: *//;s/ kB//p;q' /proc/meminfo") >> 10;
    let before = total(guest);
    ctl.ask(&["balloon", "64M"]);
    until("the balloon is full", || ctl.statistic("actual_mib") == Some(64));
    assert_eq!(total(guest), before - 64);
    until("the guest tells of its memory", || {
        ctl.statistic("total_memory").is_some_and(|bytes| bytes >> 20 == before - 64)
    });
    assert!(ctl.statistic("free_memory").is_some_and(|bytes| (MIB..256 * MIB).contains(&bytes)));
    ctl.ask(&["balloon", "0"]);
    until("the balloon is empty", || ctl.statistic("actual_mib") == Some(0));
    assert_eq!(total(guest), before);
}

/// A paused guest does nothing, and when it goes on it has missed nothing.
fn assert_stands_still(guest: &mut Guest, ctl: &Ctl) {
    ctl.ask(&["pause"]);
    assert!(guest.vmm.thread_names().iter().all(|name| !name.starts_with("vcpu-")));
    guest.tell("echo A''LIVE");
    for _ in 0..20 {
        assert!(ctl.ask(&["status"]).contains("state Paused\n"));
    }
    assert!(!guest.vmm.stdout().text(0).contains("ALIVE"));
    ctl.ask(&["resume"]);
    guest.wait_for("ALIVE");
    guest.wait_for("=0=\r\n");
    assert_eq!(guest.ask("dmesg | grep -iE 'lockup|stall|BUG:' || true"), "");
    guest.ask("dd if=/dev/vda of=/dev/null bs=64k count=16 2>/dev/null");
}
