//! The pseudo-terminal and its readers.

use super::*;
use crate::console::SerialSpec;
use crate::console::tests::{Rig, pattern};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;
use tempfile::TempDir;

fn rig() -> (Rig, PathBuf) {
    let rig = Rig::open(&SerialSpec::Pty(PtySpec::default()));
    let name = rig.console.borrow().describe().unwrap();
    let path = name.strip_prefix("pty ").unwrap().into();
    (rig, path)
}

fn connect(path: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
}

#[test]
fn readers_come_and_go_and_every_byte_passes_unchanged() {
    let (mut rig, path) = rig();
    let every = pattern(251);
    rig.guest.say(b"early\n");
    rig.settle();
    for round in 0..3 {
        let mut reader = connect(&path);
        rig.guest.say(&every);
        assert_eq!(rig.receive(&mut reader, 6), b"early\n", "round {round}");
        assert_eq!(rig.receive(&mut reader, 251), every);
        reader.write_all(&every).unwrap();
        let mut heard = Vec::new();
        rig.run_until("input", |guest| {
            guest.hear(&mut heard);
            heard.len() >= every.len()
        });
        assert_eq!(heard, every, "without an echo of what was said");
        drop(reader);
        rig.settle();
        rig.guest.say(b"early\n");
        rig.settle();
    }
}

#[test]
fn a_reader_who_stops_or_never_comes_blocks_nobody() {
    let (mut rig, path) = rig();
    for _ in 0..20 {
        rig.guest.say(&pattern(60_000));
        rig.settle();
    }
    let mut reader = connect(&path);
    rig.receive(&mut reader, 64 << 10);
    for _ in 0..20 {
        rig.guest.say(&pattern(60_000));
        rig.settle();
    }
}

#[test]
fn much_input_at_once_arrives_whole() {
    let (mut rig, path) = rig();
    let sent = pattern(300_000);
    let mut writer = connect(&path);
    let typed = sent.clone();
    let typing = thread::spawn(move || writer.write_all(&typed).unwrap());
    let mut heard = Vec::new();
    rig.run_until("all of the input", |guest| {
        guest.hear(&mut heard);
        heard.len() >= sent.len()
    });
    typing.join().unwrap();
    assert!(heard == sent);
}

#[test]
fn the_link_leads_to_the_pty_and_is_removed_at_the_end() {
    let dir = TempDir::new().unwrap();
    let link = dir.path().join("console");
    let spec = PtySpec { link: Some(link.clone()) };
    std::os::unix::fs::symlink("/dev/pts/4000000", &link).unwrap();
    let (first, _master) = Pty::open(&spec).unwrap();
    assert_eq!(fs::read_link(&link).unwrap(), first.name);
    assert!(first.describe().contains(link.to_str().unwrap()));
    let (second, _master) = Pty::open(&spec).unwrap();
    drop(first);
    assert_eq!(fs::read_link(&link).unwrap(), second.name, "it leads to another VM's by now");
    drop(second);
    assert!(fs::symlink_metadata(&link).is_err());
}

#[test]
fn what_is_no_link_to_a_pty_is_never_replaced() {
    let dir = TempDir::new().unwrap();
    let link = dir.path().join("console");
    fs::write(&link, "precious").unwrap();
    let spec = PtySpec { link: Some(link.clone()) };
    let refusal = format!("{:#}", Pty::open(&spec).err().unwrap());
    assert!(refusal.contains("remove it") && refusal.contains("console"), "{refusal}");
    assert_eq!(fs::read(&link).unwrap(), b"precious");
    let nowhere = PtySpec { link: Some(dir.path().join("none/x")) };
    assert!(Pty::open(&nowhere).is_err());
}

#[test]
fn at_the_end_a_slow_reader_gets_everything_and_an_absent_one_is_not_waited_for() {
    let (mut rig, path) = rig();
    let said = pattern(50_000);
    let mut reader = connect(&path);
    let length = said.len();
    rig.guest.say(&said);
    let reading = thread::spawn(move || {
        let mut seen = vec![0; length];
        for piece in seen.chunks_mut(1000) {
            reader.read_exact(piece).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
        seen
    });
    rig.console.borrow_mut().drain(Duration::from_secs(60));
    drop(rig);
    assert!(reading.join().unwrap() == said);

    let (mut rig, _path) = self::rig();
    rig.guest.say(b"nobody reads this");
    let start = Instant::now();
    rig.console.borrow_mut().drain(Duration::from_secs(60));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_hang_up_by_a_login_session_is_survived() {
    let (mut rig, path) = rig();
    for round in 0..3 {
        // A session whose terminal this is, and which ends: the kernel hangs the line up.
        let session = Command::new("setsid").args(["--ctty", "true"]).stdin(connect(&path)).status().unwrap();
        assert!(session.success());
        rig.settle();
        let mut reader = connect(&path);
        rig.guest.say(b"said");
        assert_eq!(rig.receive(&mut reader, 4), b"said", "round {round}");
        reader.write_all(b"typed").unwrap();
        let mut heard = Vec::new();
        rig.run_until("input", |guest| {
            guest.hear(&mut heard);
            heard == b"typed"
        });
    }
}
