//! The card over a stand-in for passt.

use super::*;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// A guest behind a program in passt's place: `script`, whose standard input is the stream.
fn user(folder: &tempfile::TempDir, script: &str) -> (Guest, Arc<Traffic>) {
    let program = folder.path().join("program");
    std::fs::write(&program, format!("#!/bin/sh\ncd {}\n{script}\n", folder.path().display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let net = open(&spec("user,mac=02:00:00:00:00:01"), program.to_str().unwrap()).unwrap();
    let traffic = net.traffic();
    let mut guest = testing::mmio(net);
    guest.boot(u64::MAX);
    (guest, traffic)
}

fn open(spec: &NetSpec, program: &str) -> anyhow::Result<Net> {
    Net::open_with(spec, None, Net::helper(spec, program))
}

fn link_is(guest: &mut Guest, up: bool) {
    guest.wait(None, "change the link", |guest| {
        let mut status = [0; 2];
        guest.registers.device.core().read_config(6, &mut status);
        (status == [u8::from(up), 0]).then_some(())
    });
}

#[test]
fn frames_go_through_passts_stream_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, _) = user(&folder, "exec cat <&0 >&0");
    assert_eq!(guest.offered() & (feature::OFFLOADS | feature::MTU), 0);
    for length in [14, 60, 1514, 60_000] {
        for _ in 0..20 {
            guest.add(RX, &[], &[4096]);
        }
        guest.kick(RX);
        let frame = frame(PEER, GUEST, 5, length);
        transmit(&mut guest, &frame);
        let first = guest.collect(RX);
        assert_eq!(first.data[..10], [0; 10]);
        let mut got = first.data[HEADER..].to_vec();
        for _ in 1..num_buffers(&first) {
            got.extend(guest.collect(RX).data);
        }
        assert!(got == frame, "{length}");
        guest.boot(u64::MAX);
    }
}

#[test]
fn a_full_stream_holds_frames_back_and_loses_none() {
    let folder = tempfile::tempdir().unwrap();
    // It does not read before the gate has been opened.
    let gate = folder.path().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let (mut guest, traffic) = user(&folder, "read line <gate; exec cat <&0 >&0");
    for seed in 0..100 {
        guest.add(RX, &[], &[60_100]);
        guest.add(TX, &[&[0; HEADER], &frame(PEER, GUEST, seed, 60_000)], &[]);
    }
    guest.kick(RX);
    guest.kick(TX);
    wait_for(&traffic, |traffic| traffic.tx.frames() > 1);
    assert!(traffic.tx.frames() < 100, "a socket holds less than 6 MB");
    std::fs::write(&gate, "\n").unwrap();
    for seed in 0..100 {
        assert!(guest.collect(RX).data[HEADER..] == frame(PEER, GUEST, seed, 60_000), "{seed}");
    }
    assert_eq!((traffic.tx.frames(), traffic.tx.dropped()), (100, 0));
}

#[test]
fn passt_is_started_again_when_it_dies_and_the_link_is_down_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    // It dies of its first frame; then it cannot be started until its folder has the file again.
    let (mut guest, traffic) =
        user(&folder, "test -e lived && exec cat <&0 >&0; >lived; head -c 64 >/dev/null; mv program gone");
    transmit(&mut guest, &frame(PEER, GUEST, 1, 60));
    link_is(&mut guest, false);
    transmit(&mut guest, &frame(PEER, GUEST, 2, 60));
    wait_for(&traffic, |traffic| traffic.tx.dropped() > 0);
    std::fs::rename(folder.path().join("gone"), folder.path().join("program")).unwrap();
    link_is(&mut guest, true);
    guest.send(RX, &[], &[1526]);
    transmit(&mut guest, &frame(PEER, GUEST, 3, 60));
    assert_eq!(guest.collect(RX).data[HEADER..], frame(PEER, GUEST, 3, 60));
}

#[test]
fn frames_that_waited_when_passt_died_come_back_after_its_return() {
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    // The first reads nothing and dies when the gate opens.
    let (mut guest, traffic) =
        user(&folder, "test -e lived && exec cat <&0 >/dev/null; >lived; read line <gate; mv program gone");
    for seed in 0..100 {
        guest.add(TX, &[&[0; HEADER], &frame(PEER, GUEST, seed, 60_000)], &[]);
    }
    guest.kick(TX);
    wait_for(&traffic, |traffic| traffic.tx.frames() > 1);
    std::fs::write(&gate, "\n").unwrap();
    link_is(&mut guest, false);
    std::fs::rename(folder.path().join("gone"), folder.path().join("program")).unwrap();
    link_is(&mut guest, true);
    for _ in 0..100 {
        guest.collect(TX);
    }
}

#[test]
fn a_length_that_cannot_be_ends_passt_and_not_us() {
    let folder = tempfile::tempdir().unwrap();
    let script = r"test -e lived && exec cat <&0 >&0; >lived; printf '\377\377\377\377' >&0; exec cat <&0 >/dev/null";
    let (mut guest, _) = user(&folder, script);
    guest.send(RX, &[], &[1526]);
    link_is(&mut guest, false);
    link_is(&mut guest, true);
    transmit(&mut guest, &frame(PEER, GUEST, 3, 60));
    assert_eq!(guest.collect(RX).data[HEADER..], frame(PEER, GUEST, 3, 60));
}

#[test]
fn passt_ends_with_its_card() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, _) = user(&folder, "echo $$ >pid; exec cat <&0 >&0");
    guest.send(RX, &[], &[1526]);
    transmit(&mut guest, &frame(PEER, GUEST, 3, 60));
    guest.collect(RX);
    let pid = std::fs::read_to_string(folder.path().join("pid")).unwrap();
    let process = format!("/proc/{}", pid.trim());
    assert!(Path::new(&process).exists());
    drop(guest);
    assert!(!Path::new(&process).exists());
}

#[test]
fn without_passt_the_cure_is_named() {
    let error = open(&spec("user"), "no-such-passt").err().unwrap().to_string();
    assert!(error.contains("apt install passt") && error.contains("no-such-passt"), "{error}");
}

#[test]
fn a_guest_without_the_first_pair_is_a_fault_and_the_next_start_works() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, _) = user(&folder, "exec cat <&0 >&0");
    guest.reset();
    assert!(guest.negotiate(u64::MAX));
    guest.start();
    guest.wait_for_needs_reset();
    guest.boot(u64::MAX);
    guest.send(RX, &[], &[1526]);
    transmit(&mut guest, &frame(PEER, GUEST, 3, 60));
    assert_eq!(guest.collect(RX).data[HEADER..], frame(PEER, GUEST, 3, 60));
}
