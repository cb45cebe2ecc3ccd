//! The card over a stand-in for a switch that speaks vhost-user.

use super::*;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::vhost_user::testing::Switch;
use virtio::testing::Registers;

fn card_at(path: &Path) -> Net {
    open(&format!("vhost-user={}", path.display()))
}

fn link_is<R: Registers>(guest: &mut Driver<R>, up: bool) {
    guest.wait(None, "change the link", |guest| {
        let mut status = [0; 2];
        guest.registers.read_config(6, &mut status);
        (status == [u8::from(up), 0]).then_some(())
    });
}

/// Sends a frame of this length, and waits for it to come back.
fn echo<R: Registers>(guest: &mut Driver<R>, seed: u8, length: usize) {
    let frame = frame(PEER, GUEST, seed, length);
    guest.send(RX, &[], &[4096]);
    guest.send(TX, &[&[0; HEADER], &frame], &[]);
    assert!(guest.collect(RX).data[HEADER..] == frame, "{seed}");
    guest.collect(TX);
}

fn place(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("switch")
}

fn frames_go_both_ways<R: Registers>(mut guest: Driver<R>) {
    for _ in 0..2 {
        // A reset takes the queues back, and the next driver's begin at 0.
        guest.boot(u64::MAX);
        link_is(&mut guest, true);
        for seed in 0..100 {
            echo(&mut guest, seed, 60 + 10 * usize::from(seed));
        }
    }
}

#[test]
fn frames_go_both_ways_over_shared_rings() {
    let folder = tempfile::tempdir().unwrap();
    let path = place(&folder);
    let (_listener, switch) = Switch::listen(&path);
    let net = card_at(&path);
    let _switch = switch.join().unwrap();
    let mut guest = testing::pci(net);
    assert_eq!(guest.offered() & (feature::OFFLOADS | feature::MRG_RXBUF), feature::MRG_RXBUF, "what the switch can");
    frames_go_both_ways(guest);
    std::fs::remove_file(&path).unwrap();
    let (_listener, switch) = Switch::listen(&path);
    let net = card_at(&path);
    let _switch = switch.join().unwrap();
    frames_go_both_ways(testing::mmio(net));
}

#[test]
fn the_link_is_down_while_nobody_is_there_and_what_waits_goes_to_who_comes() {
    let folder = tempfile::tempdir().unwrap();
    let path = place(&folder);
    let mut guest = testing::mmio(card_at(&path));
    assert_eq!(guest.offered() & (feature::OFFLOADS | feature::MRG_RXBUF), 0, "what anybody can");
    guest.boot(u64::MAX);
    link_is(&mut guest, false);
    let early = frame(PEER, GUEST, 1, 60);
    guest.send(RX, &[], &[4096]);
    guest.send(TX, &[&[0; HEADER], &early], &[]);
    let (listener, switch) = Switch::listen(&path);
    link_is(&mut guest, true);
    assert!(guest.collect(RX).data[HEADER..] == early);
    guest.collect(TX);
    for seed in 0..10 {
        echo(&mut guest, seed, 60);
    }
    drop(switch.join().unwrap());
    link_is(&mut guest, false);
    let second = Switch::accept(&listener);
    link_is(&mut guest, true);
    for seed in 0..10 {
        echo(&mut guest, seed, 60);
    }
    drop((second, listener));
}

#[test]
fn one_who_does_not_speak_may_do_so_later_and_one_who_speaks_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = place(&folder);
    let listener = UnixListener::bind(&path).unwrap();
    open(&format!("vhost-user={}", path.display()));
    // The one who was not answered has gone; the next is answered by what is no answer.
    listener.accept().unwrap();
    let speaker = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        io::Write::write_all(&mut stream, &[b'?'; 64]).unwrap();
        stream
    });
    let error = refusal(&format!("vhost-user={}", path.display()));
    speaker.join().unwrap();
    assert!(error.contains("switch") && error.contains("name the one"), "{error}");
    let error = refusal(&format!("vhost-user={}", "x".repeat(200)));
    assert!(error.contains("name the one"), "{error}");
}
