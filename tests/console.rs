//! The serial console in every place that it can go to, and what becomes of a terminal.

mod support;

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use sha2::{Digest, Sha256};
use support::guest::Guest;
use support::process::Running;
use support::pty::{Pty, read_until};
use support::stream::Stream;
use support::tiny::{Code, Kernel, puppet};
use support::until;

/// A kernel that echoes, powers off for a `Q`, and ends in other ways for other capitals.
fn echo() -> Kernel {
    puppet(&[
        (b'Q', Code::default().power_off()),
        (b'P', Code::default().pvpanic()),
        (b'R', Code::default().reset()),
        (b'T', Code::default().fault()),
        (b'I', Code::default().cannot_be_emulated()),
    ])
}

/// Starts it at a terminal, and waits until it says that it runs.
fn echo_at(pty: &Pty, arguments: &[&str]) -> Running {
    let vmm = echo().vmm(arguments).spawn_at(pty);
    pty.screen.wait_for(">", 0);
    vmm
}

#[test]
fn sixty_four_kib_of_input_at_once_arrive_whole() {
    let mut guest = Guest::boot("small-bzImage", &["--mem", "64M"], "");
    guest.tell("stty raw;echo NOW;head -c 65536|sha256sum;stty -raw -echo");
    guest.wait_for("NOW\n");
    // Every byte value, and no short period: a piece that is lost or comes twice changes the sum.
    let input: Vec<u8> = (0..65536u32).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    guest.vmm.send(&input);
    let sum: String = Sha256::digest(&input).iter().map(|byte| format!("{byte:02x}")).collect();
    guest.wait_for(&sum);
    guest.wait_for("=0=");
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn a_guests_shell_answers_at_a_terminal_which_is_left_as_it_was() {
    let mut pty = Pty::open();
    pty.set_unusual_mode();
    let before = pty.modes();
    let shell = support::guest::shell("small-bzImage", &["--mem", "64M"]);
    let vmm = shell.spawn_at(&pty);
    let seen = pty.screen.wait_for("guest# ", 0);
    assert!(pty.is_raw());
    // Ctrl-C is the guest's; the word in quotes is told from its echo.
    pty.send("\x03");
    let seen = pty.screen.wait_for("guest# ", seen);
    pty.send("echo an''swer\r");
    let seen = pty.screen.wait_for("answer\r", seen);
    pty.send("\x01?");
    pty.screen.wait_for("Ctrl-A x ends the VM", seen);
    pty.send("\x01x");
    vmm.wait().assert(0, "ended at the console");
    assert_eq!(pty.modes(), before);
}

#[test]
fn a_virtio_console_takes_keys_and_follows_the_terminals_size_through_a_reboot() {
    let mut pty = Pty::open();
    pty.resize(40, 100);
    let before = pty.modes();
    let vmm = support::guest::shell("small-bzImage", &["--mem", "64M", "--console", "stdio"]).spawn_at(&pty);
    let mut seen = 0;
    // What the guest's shell says of itself: none of it is in what is typed.
    let mut ask = |pty: &mut Pty, question: &str, answer: &str| {
        seen = pty.screen.wait_for("guest# ", seen);
        pty.send(format!("{question}\r"));
        seen = pty.screen.wait_for(answer, seen);
    };
    ask(&mut pty, "cat /sys/class/tty/console/active", "\nhvc0\r");
    ask(&mut pty, "stty size", "\n40 100\r");
    pty.resize(50, 132);
    ask(&mut pty, "until stty size | grep '^50 132$'; do :; done", "\n50 132\r");
    ask(&mut pty, "reboot -f", "guest");
    ask(&mut pty, "stty size", "\n50 132\r");
    pty.send("\x01x");
    vmm.wait().assert(0, "ended at the console");
    assert_eq!(pty.modes(), before);
}

#[test]
fn two_consoles_are_in_two_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let console = format!("file,path={}", path.display());
    // The guest's init listens at the last console that the kernel is told of.
    let mut guest = Guest::boot("small-bzImage", &["--mem", "64M", "--console", &console], "console=ttyS0");
    guest.ask("echo on-$((6*7)) > /dev/hvc0");
    until("the virtio console is written", || fs::read_to_string(&path).unwrap().contains("on-42"));
    assert!(!guest.vmm.stdout().text(0).contains("on-42"));
}

#[test]
fn consoles_that_cannot_be_had_are_refused_by_name() {
    let run = |arguments: &[&str]| Code::default().power_off().halt().kernel(&[]).run(arguments, "");
    run(&["--serial", "stdio", "--console", "stdio"]).assert_refused(&["--serial", "--console", "stdio"]);
    run(&["--serial", "file,path=/nowhere/log"]).assert_refused(&["serial console", "/nowhere/log"]);
    run(&["--console", "file,path=/nowhere/log"]).assert_refused(&["virtio console", "/nowhere/log"]);
}

#[test]
fn the_terminal_is_restored_however_the_guest_ends() {
    for (key, code) in [("Q", 0), ("R", 3), ("P", 4), ("T", 5), ("I", 6), ("\x01x", 0)] {
        let mut pty = Pty::open();
        pty.set_unusual_mode();
        let before = pty.modes();
        let vmm = echo_at(&pty, &["--on-reboot", "exit"]);
        assert!(pty.is_raw());
        pty.send(key);
        assert_eq!(vmm.wait().code, Some(code));
        assert_eq!(pty.modes(), before, "after {key:?}");
    }
}

#[test]
fn the_terminal_is_restored_after_signals() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let pty = Pty::open();
        pty.set_unusual_mode();
        let before = pty.modes();
        let vmm = echo_at(&pty, &["--log-level", "info"]);
        vmm.signal(signal);
        vmm.stderr.wait_for("power button", 0);
        vmm.signal(signal);
        assert_eq!(vmm.wait().code, Some(code));
        assert_eq!(pty.modes(), before, "after {signal:?}");
    }
}

#[test]
fn a_suspended_vmm_gives_the_terminal_back_and_takes_it_again() {
    let mut pty = Pty::open();
    pty.set_unusual_mode();
    let before = pty.modes();
    let vmm = echo_at(&pty, &[]);
    for round in 0..2 {
        assert!(pty.is_raw());
        vmm.signal(Signal::TSTP);
        until("vmm is stopped", || vmm.state() == 'T');
        assert_eq!(pty.modes(), before, "while it is stopped");
        vmm.signal(Signal::CONT);
        until("the terminal is raw again", || pty.is_raw());
        let text = format!("back{round}");
        pty.send(&text);
        pty.screen.wait_for(&text, 0);
    }
    pty.send("Q");
    vmm.wait().assert(0, "the guest powered off");
    assert_eq!(pty.modes(), before);
}

#[test]
fn an_input_at_its_end_ends_nothing() {
    let mut vmm = echo().start(&["--on-panic", "restart", "--log-level", "info"], "abcP");
    vmm.close_input();
    // The next machine starts, and its power button can be pressed.
    vmm.stdout().wait_for(">abc>", 0);
    vmm.signal(Signal::TERM);
    vmm.stderr.wait_for("power button", 0);
    assert!(vmm.is_running());
}

/// A pipe into which nothing more fits, and what is in it.
fn full_pipe() -> (PipeReader, PipeWriter, usize) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe can be had");
    fcntl_setfl(&writer, OFlags::NONBLOCK).expect("a pipe can be set not to block");
    let mut length = 0;
    while let Ok(count) = writer.write(&[b'.'; 4096]) {
        length += count;
    }
    fcntl_setfl(&writer, OFlags::empty()).expect("a pipe can be set to block");
    (reader, writer, length)
}

#[test]
fn a_reader_that_has_stopped_does_not_stop_the_guest() {
    let (mut reader, writer, length) = full_pipe();
    let text = "0123456789abcde\n".repeat(1024);
    let kernel = Code::default().print(text.len()).power_off().halt().kernel(text.as_bytes());
    kernel.vmm(&[]).spawn_to(writer).wait().assert(0, "the guest powered off");
    let mut arrived = Vec::new();
    reader.read_to_end(&mut arrived).unwrap();
    assert_eq!(arrived.len(), length);
}

#[test]
fn a_reader_that_has_gone_does_not_stop_the_guest() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut vmm = echo().vmm(&["--log-level", "off"]).spawn_to(writer);
    drop(reader);
    vmm.send("abcabcabcQ");
    vmm.wait().assert(0, "the guest powered off");
}

#[test]
fn a_file_is_appended_to_and_rotated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    fs::write(&path, "before\n").unwrap();
    let text: String = (0..5000).map(|number| format!("line {number:06}\n")).collect();
    let serial = format!("file,path={},max=16K,keep=2", path.display());
    let run = |text: &str| {
        let kernel = Code::default().print(text.len()).power_off().halt().kernel(text.as_bytes());
        let ended = kernel.run(&["--serial", &serial], "");
        ended.assert(0, "the guest powered off");
        assert_eq!(ended.stdout, "");
    };
    run(&text[..30_000]);
    let file = |number: &str| fs::read_to_string(folder.path().join(format!("log{number}"))).unwrap();
    assert_eq!([file(".1"), file("")].concat(), format!("before\n{}", &text[..30_000]));
    assert_eq!(file(".1").len(), 16 << 10);
    run(&text[30_000..]);
    // The first file has gone, and those that are left hold the end of everything.
    let kept = [file(".2"), file(".1"), file("")].concat();
    assert!(kept.len() > 32 << 10 && kept.len() <= 48 << 10 && text.ends_with(&kept), "{} bytes are kept", kept.len());
    assert!(!folder.path().join("log.3").exists());
}

#[test]
fn a_new_file_is_its_users_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let kernel = Code::default().power_off().halt().kernel(&[]);
    let ended = kernel.run(&["--serial", &format!("file,path={}", path.display())], "");
    ended.assert(0, "the guest powered off");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_pseudo_terminal_can_be_left_and_taken_up_again() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("console");
    let vmm = echo().start(&["--serial", &format!("pty,link={}", link.display())], "");
    vmm.stderr.wait_for(&format!(", {}\n", link.display()), 0);
    let open = || fs::File::options().read(true).write(true).open(&link).unwrap();
    for text in ["one", "two"] {
        let mut line = open();
        write!(line, "{text}").unwrap();
        read_until(&line, text);
    }
    write!(open(), "Q").unwrap();
    let ended = vmm.wait();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{ended:?}");
    assert!(!link.exists(), "the link is removed at the end");
}

#[test]
fn a_socket_takes_one_client_after_another_and_one_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let vmm = echo().start(&["--serial", &format!("socket,path={}", path.display())], "");
    vmm.stderr.wait_for("the serial console is", 0);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let connect = || {
        let client = UnixStream::connect(&path).unwrap();
        let screen = Stream::read(client.try_clone().unwrap());
        (client, screen)
    };
    let (mut first, screen) = connect();
    // What the guest said before anybody listened is not lost.
    screen.wait_for(">", 0);
    let (_second, refusal) = connect();
    assert!(String::from_utf8(refusal.whole()).unwrap().contains("busy"));
    write!(first, "one").unwrap();
    screen.wait_for("one", 0);
    first.shutdown(Shutdown::Both).unwrap();
    // The next one may come before it is known that the first has gone, and is refused too.
    until("another client is served", || {
        let (mut next, screen) = connect();
        // A refused client may not even be able to write.
        let served = write!(next, "two").is_ok() && screen.comes("two");
        served && write!(next, "Q").is_ok()
    });
    assert_eq!(vmm.wait().code, Some(0));
    assert!(!path.exists(), "the socket is removed at the end");
}

#[test]
fn a_console_that_is_off_has_neither_output_nor_input() {
    let kernel = Code::default().print(5).power_off().halt().kernel(b"text\n");
    let ended = kernel.run(&["--serial", "off"], "");
    ended.assert(0, "the guest powered off");
    assert_eq!(ended.stdout, "");
}
