//! Programs of this machine, run over a pair of sockets.

use std::io::Write as _;
use std::net::Shutdown;

use guest::request::{Request, Trouble};

use super::*;
use crate::agent::testing::{Host, Said, program, shell};

fn exited(code: u8) -> Option<Answer> {
    Some(Answer::Exited { code })
}

fn with_stdin(line: &str) -> Exec {
    Exec { stdin: true, ..shell(line) }
}

fn in_terminal(line: &str) -> Exec {
    Exec { terminal: Some(Size { rows: 24, columns: 80 }), stdin: true, ..shell(line) }
}

fn not_started(exec: Exec) -> (Trouble, String) {
    match Host::exec(exec).answer() {
        Answer::NotStarted { kind, message } => (kind, message),
        answer => panic!("{answer:?}"),
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    String::from_utf8_lossy(bytes).contains(text)
}

#[test]
fn output_and_errors_come_apart_and_the_code_at_the_end() {
    let said = Host::exec(shell("echo out; echo err >&2; exit 7")).listen();
    assert_eq!((said.out.as_slice(), said.err.as_slice(), said.end), (&b"out\n"[..], &b"err\n"[..], exited(7)));
}

#[test]
fn every_byte_goes_through_unchanged_in_both_directions() {
    let bytes: Vec<u8> = (0..1_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let host = Host::exec(with_stdin("cat"));
    let (mut said, mut sent) = (Said::default(), 0);
    while sent < bytes.len() {
        let room = WINDOW - (sent - said.window);
        let piece = &bytes[sent..(sent + room).min(bytes.len())];
        host.stdin(piece);
        sent += piece.len();
        host.listen_until(&mut said, |said| sent - said.window < WINDOW);
    }
    host.stdin(&[]);
    host.listen_until(&mut said, |_| false);
    assert!(said.out == bytes, "{} bytes of {}", said.out.len(), bytes.len());
    assert_eq!((said.end, said.window), (exited(0), bytes.len()));
}

#[test]
fn a_program_without_input_finds_it_empty() {
    let said = Host::exec(shell("cat; echo $?")).listen();
    assert_eq!(said.out, b"0\n");
}

#[test]
fn a_signal_comes_through_behind_a_full_window_and_unread_output() {
    // It reads nothing, and prints more than all buffers hold while nobody listens.
    let host = Host::exec(with_stdin("trap 'echo got it >&2; exit 3' TERM; echo ready >&2; yes & wait"));
    let mut said = Said::default();
    host.listen_until(&mut said, |said| contains(&said.err, "ready"));
    host.stdin(&vec![b'x'; WINDOW]);
    host.control(Control::Signal(libc::SIGTERM));
    host.listen_until(&mut said, |_| false);
    assert!(contains(&said.err, "got it"));
    assert_eq!(said.end, exited(3));
}

#[test]
fn more_input_than_the_window_is_the_end_of_the_connection_and_of_the_program() {
    let host = Host::exec(with_stdin("echo $$; exec sleep 1000"));
    let mut said = Said::default();
    host.listen_until(&mut said, |said| said.out.ends_with(b"\n"));
    // A pipe holds as much again as the window.
    host.stdin(&vec![b'x'; WINDOW]);
    host.stdin(&vec![b'x'; WINDOW]);
    host.stdin(&vec![b'x'; WINDOW]);
    while host.frame().is_some() {}
    assert_gone(&said.out);
}

#[test]
fn a_signal_that_kills_is_reported_as_such() {
    let host = Host::exec(shell("echo ready; exec sleep 1000"));
    let mut said = Said::default();
    host.listen_until(&mut said, |said| !said.out.is_empty());
    host.control(Control::Signal(libc::SIGUSR1));
    host.listen_until(&mut said, |_| false);
    assert_eq!(said.end, Some(Answer::Killed { signal: libc::SIGUSR1 }));
}

#[test]
fn when_the_host_goes_the_program_is_hung_up_even_if_it_does_not_want_to() {
    for line in ["echo $$; exec sleep 1000", "trap '' HUP; echo $$; while :; do sleep 1; done"] {
        let host = Host::exec(shell(line));
        let mut said = Said::default();
        host.listen_until(&mut said, |said| said.out.ends_with(b"\n"));
        host.stream.shutdown(Shutdown::Write).unwrap();
        while host.frame().is_some() {}
        assert_gone(&said.out);
    }
}

/// Waits until there is no process with the number that a program has printed.
fn assert_gone(pid: &[u8]) {
    let pid = String::from_utf8_lossy(pid);
    let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let start = Instant::now();
    while rustix::process::test_kill_process(pid).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "{pid:?} lives on");
        std::thread::yield_now();
    }
}

#[test]
fn a_daemon_that_keeps_the_output_does_not_hold_up_the_end() {
    let said = Host::exec(shell("sleep 1000 & echo $! ; exit 4")).listen();
    assert_eq!(said.end, exited(4));
    kill(&said.out);
    // One that never stops talking does not either.
    let said = Host::exec(shell("while :; do echo; sleep 0.02; done & echo $! >&2; exit 5")).listen();
    assert_eq!(said.end, exited(5));
    kill(&said.err);
}

fn kill(pid: &[u8]) {
    let pid = String::from_utf8_lossy(pid).trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn output_that_was_there_at_the_end_is_not_lost() {
    // As much as a pipe holds, and a daemon that keeps it open.
    let said = Host::exec(shell("head -c 65536 /dev/zero; sleep 1000 & echo $! >&2")).listen();
    assert_eq!((said.out.len(), said.end), (65536, exited(0)));
    kill(&said.err);
}

#[test]
fn what_is_missing_or_cannot_be_run_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("text"), "nothing to run").unwrap();
    std::fs::write(path("empty"), "#!/no/such/interpreter\n").unwrap();
    for (name, mode) in [("text", 0o644), ("empty", 0o755)] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(path(name), mode).unwrap();
    }
    let run = |name: &str| not_started(Exec { program: program(&[name]), ..Exec::default() });
    let (kind, message) = run("no-such-program");
    assert_eq!(kind, Trouble::NotFound);
    assert!(message.contains("no-such-program") && message.contains("/usr/bin"), "{message}");
    assert_eq!(run("/no/such/program").0, Trouble::NotFound);
    assert_eq!(run(&path("empty")).0, Trouble::NotFound);
    assert_eq!(run(&path("text")).0, Trouble::NotExecutable);
    assert_eq!(run(folder.path().to_str().unwrap()).0, Trouble::NotExecutable);
    let mut in_path = Exec { program: program(&["text"]), ..Exec::default() };
    in_path.program.env.push(("PATH".into(), format!("/no:{}", folder.path().display())));
    assert_eq!(not_started(in_path).0, Trouble::NotExecutable);
    assert_eq!(not_started(Exec::default()).0, Trouble::Other);
}

#[test]
fn a_missing_working_directory_and_an_unknown_user_are_named() {
    let mut exec = shell("true");
    exec.program.cwd = Some("/no/such/folder".into());
    let (kind, message) = not_started(exec);
    assert!(kind == Trouble::Other && message.contains("/no/such/folder"), "{message}");
    let mut exec = shell("true");
    exec.program.user = Some("nobody-of-that-name".into());
    let (kind, message) = not_started(exec);
    assert!(kind == Trouble::Other && message.contains("nobody-of-that-name"), "{message}");
}

#[test]
fn a_program_has_its_directory_and_environment_and_what_it_cannot_do_without() {
    let mut exec = shell("echo $PWD $A $HOME $PATH; env | grep CARGO || echo clean");
    exec.program.cwd = Some("/usr".into());
    exec.program.env = vec![("A".into(), "b c".into()), ("HOME".into(), "/nowhere".into())];
    let said = Host::exec(exec).listen();
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(String::from_utf8_lossy(&said.out), format!("/usr b c /nowhere {path}\nclean\n"));
}

#[test]
fn another_user_is_another_user_in_all_respects() {
    let mut exec = shell("id -u; id -g; id -G; echo $HOME");
    exec.program.user = Some("4711:4712".into());
    let said = Host::exec(exec).listen();
    if rustix::process::geteuid().is_root() {
        assert_eq!(String::from_utf8_lossy(&said.out), "4711\n4712\n4712\n/\n");
    } else {
        let refused = Answer::NotStarted { kind: Trouble::Other, message: String::new() };
        assert_eq!(std::mem::discriminant(&said.end.unwrap()), std::mem::discriminant(&refused));
    }
}

#[test]
fn a_terminal_is_one_has_its_size_and_can_be_resized() {
    let line = "stty size; trap 'stty size; exit 6' WINCH; echo ready; while :; do sleep 0.01; done";
    let host = Host::exec(in_terminal(line));
    let mut said = Said::default();
    host.listen_until(&mut said, |said| contains(&said.out, "ready"));
    assert!(contains(&said.out, "24 80\r\n"));
    host.control(Control::Resize(Size { rows: 50, columns: 132 }));
    host.listen_until(&mut said, |_| false);
    assert!(contains(&said.out, "50 132\r\n"), "{}", String::from_utf8_lossy(&said.out));
    assert_eq!(said.end, exited(6));
}

#[test]
fn a_terminal_echoes_interrupts_and_tells_the_end_of_input() {
    let host = Host::exec(in_terminal("cat; echo over"));
    host.stdin(b"typed\n");
    host.stdin(&[]);
    let said = host.listen();
    assert_eq!(String::from_utf8_lossy(&said.out), "typed\r\ntyped\r\nover\r\n");
    // A shell can lose a signal while it starts a program, so it goes on after the next one.
    let line = "trap 'echo interrupted; exit 8' INT; echo ready; while :; do sleep 0.01; done";
    let host = Host::exec(in_terminal(line));
    let mut said = Said::default();
    host.listen_until(&mut said, |said| contains(&said.out, "ready"));
    host.stdin(b"\x03");
    host.listen_until(&mut said, |_| false);
    assert!(contains(&said.out, "interrupted"));
    assert_eq!(said.end, exited(8));
}

#[test]
fn rubbish_in_the_middle_of_a_session_ends_it() {
    let host = Host::exec(with_stdin("echo $$; exec sleep 1000"));
    let mut said = Said::default();
    host.listen_until(&mut said, |said| said.out.ends_with(b"\n"));
    (&host.stream).write_all(&[99, 0, 0, 0, 0]).unwrap();
    while host.frame().is_some() {}
    assert_gone(&said.out);
}

#[test]
fn many_commands_run_at_once() {
    let hosts: Vec<(u8, Host)> =
        (0..40).map(|code| (code, Host::ask(&Request::Exec(shell(&format!("echo {code}; exit {code}")))))).collect();
    for (code, host) in hosts {
        let said = host.listen();
        assert_eq!((said.out, said.end), (format!("{code}\n").into_bytes(), exited(code)));
    }
}
