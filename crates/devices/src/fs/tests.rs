//! The device from the driver's side, with the virtiofsd of this machine behind it.

use super::*;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use virtio::testing::{self, DEADLINE, Driver, Registers};

/// The queue for what must not wait, and the other.
const FIRST: u16 = 0;
const REQUESTS: u16 = 1;
/// Operations (`linux/fuse.h`).
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const MKDIR: u32 = 9;
const INIT: u32 = 26;

/// A folder with another in it that is shared, and the program that serves it.
struct Share {
    folder: TempDir,
    spec: ShareSpec,
    program: PathBuf,
}

impl Share {
    /// `script` is run first, with the folder as `$F`.
    fn new(more: &str, script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shared = folder.path().join("a,b\\c d");
        fs::create_dir(&shared).unwrap();
        let spec = kv::from_str::<ShareSpec>(&format!("tag=data,path=/{more}")).unwrap();
        let spec = ShareSpec { path: shared, ..spec };
        let virtiofsd = helper::find(PROGRAM, &ELSEWHERE).expect("`cargo xtask setup` brings virtiofsd");
        let program = folder.path().join("program");
        let (place, virtiofsd) = (folder.path().display(), virtiofsd.display());
        fs::write(&program, format!("#!/bin/sh\nF={place}\n{script}\nexec {virtiofsd} \"$@\"\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder, spec, program }
    }

    fn open(&self) -> Fs {
        Fs::open_with(&self.spec, Fs::helper(&self.spec, Some(self.program.clone()))).unwrap()
    }

    fn refusal(&self) -> String {
        format!(
            "{:#}",
            Fs::open_with(&self.spec, Fs::helper(&self.spec, Some(self.program.clone()))).err().expect("it is refused")
        )
    }

    fn shared(&self, name: &str) -> PathBuf {
        self.spec.path.join(name)
    }

    /// The number of the process that a script with [`SAYS_PID`] became.
    fn pid(&self) -> String {
        fs::read_to_string(self.folder.path().join("pid")).unwrap().trim().to_owned()
    }
}

const SAYS_PID: &str = "echo $$ >$F/pid";

fn signal(pid: &str, signal: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().unwrap().success());
}

/// Stops a process, with all its threads: each stops when it comes to hear of it.
fn stop(pid: &str) {
    signal(pid, "-STOP");
    until("every thread has stopped", || {
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|thread| {
            // A thread that is just gone does nothing any more either.
            let Ok(stat) = fs::read_to_string(thread.unwrap().path().join("stat")) else { return true };
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        })
    });
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A request of this operation on the shared folder itself.
fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).unwrap();
    let mut request = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    request.extend([unique.to_le_bytes(), 1u64.to_le_bytes()].concat());
    request.extend([0; 16]);
    request.extend(body);
    request
}

fn init() -> Vec<u8> {
    let body: Vec<u8> = [7u32, 31, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    request(INIT, 1, &body)
}

fn send<R: Registers>(guest: &mut Driver<R>, request: &[u8]) -> u16 {
    guest.send(REQUESTS, &[request], &[256])
}

/// The error and the number of the request that is answered next.
fn answer<R: Registers>(guest: &mut Driver<R>) -> (i32, u64) {
    let used = guest.collect(REQUESTS);
    let error = i32::from_le_bytes(used.data[4..8].try_into().unwrap());
    (error, u64::from_le_bytes(used.data[8..16].try_into().unwrap()))
}

fn ask<R: Registers>(guest: &mut Driver<R>, request: &[u8]) -> i32 {
    send(guest, request);
    answer(guest).0
}

fn mkdir(name: &str) -> Vec<u8> {
    let mode = [0o755u32.to_le_bytes(), [0; 4]].concat();
    request(MKDIR, 9, &[&mode, name.as_bytes(), b"\0"].concat())
}

fn getattr(unique: u64) -> Vec<u8> {
    request(GETATTR, unique, &[0; 16])
}

fn sessions<R: Registers>(share: &Share, mut guest: Driver<R>) {
    guest.boot(u64::MAX);
    let mut config = [0; 40];
    guest.registers.read_config(0, &mut config);
    assert_eq!((&config[..5], &config[36..]), (&b"data\0"[..], &[1, 0, 0, 0][..]));
    assert_eq!(ask(&mut guest, &mkdir("early")), -libc::EIO, "there is no session");
    assert_eq!(ask(&mut guest, &init()), 0);
    assert_eq!(ask(&mut guest, &mkdir("made")), 0);
    assert!(share.shared("made").is_dir() && !share.shared("early").exists());
    // The next driver has the rings at their beginning, and a virtiofsd that knows nothing of the last one.
    guest.boot(u64::MAX);
    assert_eq!(ask(&mut guest, &getattr(7)), -libc::EIO);
    assert_eq!(ask(&mut guest, &init()), 0);
    assert_eq!(ask(&mut guest, &getattr(7)), 0);
}

#[test]
fn requests_reach_the_folder_from_the_sessions_beginning_on() {
    let share = Share::new("", "");
    sessions(&share, testing::pci(share.open()));
    fs::remove_dir(share.shared("made")).unwrap();
    sessions(&share, testing::mmio(share.open()));
}

#[test]
fn what_virtiofsd_owes_at_its_end_is_an_error_and_the_next_session_works() {
    let share = Share::new("", SAYS_PID);
    let mut guest = testing::mmio(share.open());
    guest.boot(u64::MAX);
    assert_eq!(ask(&mut guest, &init()), 0);
    let pid = share.pid();
    for unique in 10..300 {
        send(&mut guest, &getattr(unique));
        assert_eq!(answer(&mut guest), (0, unique));
    }
    stop(&pid);
    for unique in 1000..1100 {
        send(&mut guest, &getattr(unique));
    }
    guest.send(FIRST, &[&request(FORGET, 1, &[0; 8])], &[]);
    signal(&pid, "-KILL");
    for unique in 1000..1100 {
        assert_eq!(answer(&mut guest), (-libc::EIO, unique));
    }
    assert_eq!(guest.collect(FIRST).written, 0, "what has no room for an answer comes back without one");
    assert_eq!(ask(&mut guest, &getattr(7)), -libc::EIO, "the session has ended");
    // It waits for the new virtiofsd.
    assert_eq!(ask(&mut guest, &init()), 0);
    assert_ne!(share.pid(), pid);
    assert_eq!(ask(&mut guest, &getattr(7)), 0);
    let head = guest.send(FIRST, &[&request(FORGET, 1, &[0; 8])], &[]);
    assert_eq!(guest.collect(FIRST).head, head);
}

#[test]
fn a_mount_does_not_wait_for_a_virtiofsd_that_cannot_be_started() {
    let share = Share::new("", SAYS_PID);
    let mut guest = testing::pci(share.open());
    guest.boot(u64::MAX);
    fs::rename(&share.program, share.folder.path().join("gone")).unwrap();
    signal(&share.pid(), "-KILL");
    assert_eq!(ask(&mut guest, &init()), -libc::EIO);
    fs::rename(share.folder.path().join("gone"), &share.program).unwrap();
    until("a session begins", || ask(&mut guest, &init()) == 0);
}

#[test]
fn readonly_is_kept_by_the_host() {
    let share = Share::new(",readonly", "");
    fs::create_dir(share.shared("there")).unwrap();
    let mut guest = testing::pci(share.open());
    guest.boot(u64::MAX);
    assert_eq!(ask(&mut guest, &init()), 0);
    assert_eq!(ask(&mut guest, &mkdir("new")), -libc::EROFS);
    assert_eq!(ask(&mut guest, &mkdir("there")), -libc::EEXIST, "it can be read");
    assert!(!share.shared("new").exists());
    fs::create_dir(share.shared("of-the-host")).unwrap();
    assert_eq!(ask(&mut guest, &mkdir("of-the-host")), -libc::EEXIST);
}

#[test]
fn virtiofsd_makes_no_sockets() {
    let share = Share::new("", "bash -c ': </dev/tcp/127.0.0.1/9' 2>$F/said");
    drop(share.open());
    let said = fs::read_to_string(share.folder.path().join("said")).unwrap();
    assert!(said.contains("Permission denied"), "{said}");
}

#[test]
fn virtiofsd_ends_with_its_device() {
    let share = Share::new("", SAYS_PID);
    let mut guest = testing::mmio(share.open());
    guest.boot(u64::MAX);
    assert_eq!(ask(&mut guest, &init()), 0);
    let process = PathBuf::from(format!("/proc/{}", share.pid()));
    assert!(process.exists());
    drop(guest);
    assert!(!process.exists());
}

#[test]
fn a_program_that_does_not_serve_is_refused_with_what_it_said() {
    let fault = Share::new("", "echo I am broken >&2; exit 3").refusal();
    assert!(fault.contains("data") && fault.contains("I am broken"), "{fault}");
    let share = Share::new("", "");
    fs::write(&share.program, "no program").unwrap();
    let fault = share.refusal();
    assert!(fault.contains("cannot start"), "{fault}");
}

#[test]
fn without_virtiofsd_the_cure_is_named() {
    let share = Share::new("", "");
    let fault = Fs::open_with(&share.spec, Fs::helper(&share.spec, None)).err().unwrap().to_string();
    assert!(fault.contains("apt install qemu-system-common") && fault.contains("/usr/lib/qemu/virtiofsd"), "{fault}");
}

#[test]
fn a_session_with_rings_that_virtiofsd_refuses_ends_in_an_error_and_not_us() {
    let share = Share::new("", "");
    let mut guest = testing::pci(share.open());
    guest.boot(u64::MAX);
    assert_eq!(ask(&mut guest, &init()), 0);
    // More requests than the ring has room for: virtiofsd dies of that, and our queue finds it broken, too.
    let ring = usize::from(REQUESTS);
    let memory = guest.memory.clone();
    let beyond = guest.rings[ring].next_available.wrapping_add(5000);
    guest.rings[ring].publish(&memory, beyond);
    guest.kick(REQUESTS);
    guest.wait_for_needs_reset();
    guest.boot(u64::MAX);
    until("a session begins", || ask(&mut guest, &init()) == 0);
}
