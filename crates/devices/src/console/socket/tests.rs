//! The socket and its clients.

use super::*;
use crate::console::SerialSpec;
use crate::console::tests::{Rig, pattern};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt as _;
use tempfile::TempDir;

fn spec(dir: &TempDir) -> SocketSpec {
    SocketSpec { path: dir.path().join("console") }
}

fn rig(spec: &SocketSpec) -> Rig {
    Rig::open(&SerialSpec::Socket(spec.clone()))
}

/// What opening says.
fn refusal(spec: &SocketSpec) -> String {
    Listener::open(spec).err().map(|error| format!("{error:#}")).unwrap_or_default()
}

#[test]
fn clients_come_and_go_and_each_finds_what_was_said_before() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let mut rig = rig(&spec);
    rig.guest.say(b"early ");
    rig.settle();
    for round in 0..3 {
        let mut client = UnixStream::connect(&spec.path).unwrap();
        rig.guest.say(b"now");
        assert_eq!(rig.receive(&mut client, 9), b"early now", "round {round}");
        client.write_all(b"typed").unwrap();
        let mut heard = Vec::new();
        rig.run_until("input", |guest| {
            guest.hear(&mut heard);
            heard == b"typed"
        });
        drop(client);
        rig.settle();
        rig.guest.say(b"early ");
        rig.settle();
    }
}

#[test]
fn what_is_said_without_a_client_is_kept_up_to_64_kib() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let mut rig = rig(&spec);
    let said = pattern(200_000);
    for piece in said.chunks(1000) {
        rig.guest.say(piece);
        rig.settle();
    }
    let mut client = UnixStream::connect(&spec.path).unwrap();
    assert!(rig.receive(&mut client, 64 << 10) == said[said.len() - (64 << 10)..]);
}

#[test]
fn a_second_client_is_told_that_the_console_is_busy() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let mut rig = rig(&spec);
    let mut first = UnixStream::connect(&spec.path).unwrap();
    rig.settle();
    let mut second = UnixStream::connect(&spec.path).unwrap();
    rig.settle();
    let mut told = String::new();
    second.read_to_string(&mut told).unwrap();
    assert!(told.contains("busy"));
    rig.guest.say(b"for the first");
    assert_eq!(rig.receive(&mut first, 13), b"for the first");
}

#[test]
fn a_client_that_stops_reading_blocks_nobody_and_can_be_replaced() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let mut rig = rig(&spec);
    let client = UnixStream::connect(&spec.path).unwrap();
    for _ in 0..40 {
        rig.guest.say(&pattern(60_000));
        rig.settle();
    }
    drop(client);
    rig.settle();
    let mut next = UnixStream::connect(&spec.path).unwrap();
    rig.receive(&mut next, 64 << 10);
}

#[test]
fn a_client_that_has_sent_everything_still_reads_until_it_leaves() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let mut rig = rig(&spec);
    let mut client = UnixStream::connect(&spec.path).unwrap();
    client.write_all(b"command").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    rig.run_until("input", |guest| {
        guest.hear(&mut heard);
        heard == b"command"
    });
    rig.settle();
    rig.guest.say(b"answer");
    assert_eq!(rig.receive(&mut client, 6), b"answer");
    drop(client);
    rig.settle();
    let mut next = UnixStream::connect(&spec.path).unwrap();
    rig.guest.say(b"next");
    assert_eq!(rig.receive(&mut next, 4), b"next");
}

#[test]
fn input_of_a_client_that_has_left_is_not_lost() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let mut rig = rig(&spec);
    let sent = pattern(100_000);
    let mut client = UnixStream::connect(&spec.path).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut at = 0;
    while at < sent.len() {
        at += client.write(&sent[at..]).unwrap_or(0);
        rig.settle();
    }
    drop(client);
    rig.guest.say(b"which finds that nobody reads");
    let mut heard = Vec::new();
    rig.run_until("all of the input", |guest| {
        guest.hear(&mut heard);
        heard.len() >= sent.len()
    });
    assert!(heard == sent);
    rig.settle();
    let mut next = UnixStream::connect(&spec.path).unwrap();
    assert_eq!(rig.receive(&mut next, 5), b"which");
}

#[test]
fn the_socket_is_private_and_is_removed_at_the_end() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    let listener = Listener::open(&spec).unwrap();
    assert_eq!(fs::metadata(&spec.path).unwrap().mode() & 0o777, 0o600);
    drop(listener);
    assert!(!spec.path.exists());
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_refused() {
    let dir = TempDir::new().unwrap();
    let spec = spec(&dir);
    drop(UnixListener::bind(&spec.path).unwrap());
    let live = Listener::open(&spec).unwrap();
    assert!(refusal(&spec).contains("in use"));
    // Nobody accepts: the queue of those who wait fills up, which is a sign of life too.
    let waiting: Vec<_> = (0..64).map_while(|_| unix::connect(&spec.path).ok()).collect();
    assert!(waiting.len() < 64);
    assert!(refusal(&spec).contains("in use"));
    drop(live);
    Listener::open(&spec).unwrap();
}

#[test]
fn what_cannot_be_a_socket_is_refused_with_its_name_and_a_cure() {
    let dir = TempDir::new().unwrap();
    let at = |path: &str| SocketSpec { path: dir.path().join(path) };
    fs::write(dir.path().join("file"), "precious").unwrap();
    for (path, cure) in [("file", "is no socket"), ("none/x", "choose"), (&*"long".repeat(40), "short path")] {
        let refusal = refusal(&at(path));
        assert!(refusal.contains(cure) && refusal.contains(path), "{refusal}");
    }
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"precious");
}
