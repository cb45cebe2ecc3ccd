//! `cargo xtask host` as its users see it: each test starts a real emulated host.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

/// In the environment of each host's processes, so that a test knows those that it has started.
const MARK: &str = "VMM_HOST_TEST";

fn host(test: &str, options: &[&str], script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("host").args(options).args(["--", "sh", "-c", script]);
    command.env(MARK, format!("{test}-{}", std::process::id()));
    command
}

/// How many processes of a test's host are left.
fn processes(test: &str) -> usize {
    let mark = format!("{MARK}={test}-{}", std::process::id());
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let environments = processes.filter_map(|process| fs::read(process.path().join("environ")).ok());
    environments.filter(|environment| environment.split(|byte| *byte == 0).any(|word| word == mark.as_bytes())).count()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what} has not come true");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads until `what` has come.
fn expect(from: &mut impl Read, what: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(what.as_bytes()) {
        let count = from.read(&mut byte).unwrap_or(0);
        assert_eq!(count, 1, "{what} does not come after {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

#[test]
fn a_command_sees_files_directory_environment_and_streams_and_its_exit_code_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "content").unwrap();
    let script = "pwd; cat file; printf made > made; echo \"$ODD\"; test -c /dev/kvm && echo kvm >&2; \
        test \"$(dirname \"$(mktemp)\")\" = /run/tmp && echo tmp >&2; cat; exit 42";
    let mut child = host("sees", &[], script)
        .current_dir(&directory)
        .env("ODD", "a\n=\u{e4} ")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|index: u32| index.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let mut stdin = child.stdin.take().unwrap();
    let input = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let before = format!("{}\ncontenta\n=\u{e4} \n", directory.path().display());
    assert_eq!(output.stdout.len(), before.len() + bytes.len());
    assert!(output.stdout == [before.as_bytes(), &bytes].concat(), "every byte comes back");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "kvm\ntmp\n");
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(fs::read_to_string(directory.path().join("made")).unwrap(), "made");
    assert_eq!(processes("sees"), 0);
}

#[test]
fn a_command_that_dies_of_a_signal_has_its_exit_code_although_a_child_of_it_lives_on() {
    let output = host("signal", &[], "sleep 1000 & echo out; kill -9 $$").output().unwrap();
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.status.code(), Some(137));
}

#[test]
fn a_command_that_is_not_there_has_exit_code_127() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let output = command.args(["host", "--", "/no/such/command"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("Cannot run /no/such/command"), "{message}");
}

#[test]
fn the_time_limit_ends_everything() {
    let output = host("limit", &["--timeout", "5"], "sleep 1000").output().unwrap();
    assert_eq!(output.status.code(), Some(124));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("time limit of 5 s"), "{message}");
    assert_eq!(processes("limit"), 0);
}

#[test]
fn a_signal_ends_everything_and_so_does_a_sudden_death() {
    for (signal, code) in [(libc::SIGTERM, Some(143)), (libc::SIGKILL, None)] {
        let mut child = host("ended", &[], "echo runs; sleep 1000").stdout(Stdio::piped()).spawn().unwrap();
        expect(child.stdout.as_mut().unwrap(), "runs\n");
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), code);
        wait_until("the end of all processes", || processes("ended") == 0);
    }
}

fn kill(child: &Child, signal: i32) {
    let status = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_terminal_is_passed_through_and_restored() {
    let (mut terminal, slave) = open_terminal();
    resize(&terminal, 33, 101);
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let script = "trap 'echo interrupted; stty size; exit 9' INT; stty size; test -t 1 && test -t 2 && echo terminal; \
        trap 'stty size' WINCH; read -r line; echo \"<$line>\"; while :; do sleep 0.1; done";
    // The command becomes the leader of a session with this terminal, as a login shell is.
    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait"]).arg(env!("CARGO_BIN_EXE_xtask")).args(["host", "--", "sh", "-c", script]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave.try_clone().unwrap());
    let mut child = command.process_group(0).spawn().unwrap();
    drop(command);

    expect(&mut terminal, "33 101\r\n");
    expect(&mut terminal, "terminal\r\n");
    terminal.write_all(b"typed\r").unwrap();
    expect(&mut terminal, "<typed>\r\n");
    resize(&terminal, 40, 120);
    expect(&mut terminal, "40 120\r\n");
    terminal.write_all(b"\x03").unwrap();
    expect(&mut terminal, "interrupted\r\n40 120\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);
}

fn open_terminal() -> (File, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(ptsname(&master, Vec::new()).unwrap(), flags, Mode::empty()).unwrap();
    (File::from(master), slave)
}

fn resize(terminal: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}
