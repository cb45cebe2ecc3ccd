//! Terminals that get back what they were, whatever happens to the process that made them raw.
//!
//! Each test starts this very test binary again, as the VM at a terminal of the test's making.

use super::*;
use crate::console::tests::Rig;
use crate::console::{Console, SerialSpec};
use std::env;
use std::io::{PipeReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
/// Set for the process that plays a part in a test.
const ROLE: &str = "VMM_TEST_ROLE";

/// The VM: it repeats what is typed, and takes capital letters as orders.
fn vm() -> ! {
    // Other tests of this process ignore the first, nohup(1) the second, a shell's `&` the rest, and what is ignored
    // stays so across exec.
    for signal in [libc::SIGXFSZ, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: no handler is installed.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let (quit, asked) = std::sync::mpsc::channel();
    let quit = Box::new(move || quit.send(()).unwrap());
    let mut rig = Rig::new(Console::open(&SerialSpec::Stdio, quit).unwrap());
    rig.guest.say(b"<ready>");
    loop {
        let mut heard = Vec::new();
        let mut left = false;
        rig.run_until("orders", |guest| {
            guest.hear(&mut heard);
            left = asked.try_recv().is_ok();
            left || !heard.is_empty()
        });
        rig.guest.say(&heard);
        if left {
            rig.guest.say(b"<quit>");
        }
        for order in heard {
            match order {
                b'A' => std::process::abort(),
                b'E' => std::process::exit(7),
                b'P' => panic!("as ordered"),
                b'F' => fault(),
                b'O' => drop(overflow(1)),
                b'D' => {
                    drop(rig);
                    println!("<dropped>");
                    loop {
                        std::thread::park();
                    }
                }
                b'S' => {
                    rig.console.borrow_mut().release();
                    sys::stop_this_process();
                    rig.console.borrow_mut().resume();
                    rig.guest.say(b"<resumed>");
                }
                _ => {}
            }
        }
    }
}

fn fault() {
    // SAFETY: none: the fault is the purpose.
    unsafe { std::ptr::null_mut::<u8>().write_volatile(1) };
}

#[allow(unconditional_recursion, reason = "the overflow is the purpose")]
fn overflow(depth: u64) -> Vec<u64> {
    let mut more = std::hint::black_box(overflow(std::hint::black_box(depth + 1)));
    more.push(depth);
    more
}

/// A shell: it runs a VM in the background, and gives it the terminal after it was told so.
fn shell() -> ! {
    let mut job = this_test_as("vm").process_group(0).spawn().unwrap();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(line, "fg\n");
    let group = i32::try_from(job.id()).unwrap();
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::tcsetpgrp(0, group) }, 0);
    println!("<given>");
    job.wait().unwrap();
    std::process::exit(0);
}

/// Plays the part that the environment names, if it names one. Every test begins with this.
fn play_a_part() {
    match env::var(ROLE).as_deref() {
        Ok("vm") => vm(),
        Ok("shell") => shell(),
        _ => {}
    }
}

/// The command that runs the current test again in a part.
fn this_test_as(role: &str) -> Command {
    let this = env::current_exe().unwrap();
    let test = std::thread::current().name().unwrap().to_owned();
    let mut command = if role == "shell" {
        // A session of its own, with its terminal.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(this);
        command
    } else {
        Command::new(this)
    };
    command.args(["--exact", &test, "--nocapture"]).env(ROLE, role);
    command
}

/// A terminal as a user has it.
struct Tty {
    master: File,
    peer: OwnedFd,
    before: libc::termios,
}

impl Tty {
    fn new() -> Self {
        let (master, _) = sys::open_pty().unwrap();
        let peer = sys::open_peer(master.as_fd()).unwrap();
        let before = sys::modes(peer.as_fd()).unwrap();
        Self { master: File::from(master), peer, before }
    }

    fn keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn is_as_before(&self) -> bool {
        let now = sys::modes(self.peer.as_fd()).unwrap();
        let all = |modes: &libc::termios| (modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag, modes.c_cc);
        all(&now) == all(&self.before)
    }

    fn is_raw(&self) -> bool {
        let now = sys::modes(self.peer.as_fd()).unwrap();
        now.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    fn start(&self, mut command: Command) -> Process {
        let (output, writer) = std::io::pipe().unwrap();
        command.stdin(Stdio::from(self.peer.try_clone().unwrap())).stdout(writer).stderr(Stdio::null());
        Process { child: command.spawn().unwrap(), output, seen: Vec::new() }
    }
}

/// A process that plays a part; it is killed at the end of the test.
struct Process {
    child: Child,
    output: PipeReader,
    seen: Vec<u8>,
}

impl Process {
    /// Waits until the process has said `text`.
    fn says(&mut self, text: &str) {
        let start = Instant::now();
        loop {
            if let Some(at) = self.seen.windows(text.len()).position(|seen| seen == text.as_bytes()) {
                self.seen.drain(..at + text.len());
                return;
            }
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            assert!(start.elapsed() < LONG, "waited for {text}, saw {seen}");
            if sys::poll(self.output.as_fd(), libc::POLLIN, Duration::from_secs(1)) {
                let mut more = [0; 4096];
                let n = self.output.read(&mut more).unwrap();
                assert_ne!(n, 0, "it ended before it said {text}, and had said {seen}");
                self.seen.extend(&more[..n]);
            }
        }
    }

    fn id(&self) -> libc::pid_t {
        self.child.id().try_into().unwrap()
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: no memory is passed, and the process is our child.
        assert_eq!(unsafe { libc::kill(self.id(), signal) }, 0);
    }

    fn ends(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn raw_vm() -> (Tty, Process) {
    let tty = Tty::new();
    let mut vm = tty.start(this_test_as("vm"));
    vm.says("<ready>");
    assert!(tty.is_raw());
    (tty, vm)
}

#[test]
fn a_process_that_ends_by_itself_leaves_the_terminal_as_it_was() {
    play_a_part();
    let ends =
        [("A", Some(libc::SIGABRT)), ("E", None), ("P", None), ("F", Some(libc::SIGSEGV)), ("O", Some(libc::SIGABRT))];
    for (order, signal) in ends {
        let (mut tty, mut vm) = raw_vm();
        tty.keys(order.as_bytes());
        let status = vm.ends();
        assert_eq!(status.signal(), signal, "after {order}");
        assert!(order != "E" || status.code() == Some(7));
        assert!(tty.is_as_before(), "after {order}");
    }
}

#[test]
fn a_signal_that_ends_the_process_leaves_the_terminal_as_it_was() {
    play_a_part();
    for signal in FATAL {
        let (tty, mut vm) = raw_vm();
        vm.signal(signal);
        assert_eq!(vm.ends().signal(), Some(signal));
        assert!(tty.is_as_before(), "after signal {signal}");
    }
}

#[test]
fn a_console_that_is_closed_leaves_the_terminal_as_it_was() {
    play_a_part();
    let (mut tty, mut vm) = raw_vm();
    tty.keys(b"D");
    vm.says("<dropped>");
    assert!(tty.is_as_before());
}

#[test]
fn a_vm_that_is_suspended_gives_the_terminal_back_until_it_goes_on() {
    play_a_part();
    let (mut tty, mut vm) = raw_vm();
    for _ in 0..2 {
        tty.keys(b"S");
        let mut status = 0;
        // SAFETY: the status lives across the call.
        assert_eq!(unsafe { libc::waitpid(vm.id(), &raw mut status, libc::WUNTRACED) }, vm.id());
        assert!(libc::WIFSTOPPED(status));
        assert!(tty.is_as_before());
        vm.signal(libc::SIGCONT);
        vm.says("<resumed>");
        assert!(tty.is_raw());
    }
}

#[test]
fn ctrl_a_x_leaves_and_ctrl_a_question_mark_helps_however_slowly_they_are_typed() {
    play_a_part();
    let (mut tty, mut vm) = raw_vm();
    tty.keys(b"Hi\x01?");
    vm.says("Ctrl-A x ends the VM");
    tty.keys(b"\x01");
    tty.keys(b"\x01");
    vm.says("\x01");
    // Its echo tells that the Ctrl-A was read by itself.
    tty.keys(b"1\x01");
    vm.says("1");
    tty.keys(b"x");
    vm.says("<quit>");
    // Control keys and line ends are the guest's.
    tty.keys(b"\x03\x1a\x11\x13\r");
    vm.says("\x03\x1a\x11\x13\r");
}

#[test]
fn a_vm_in_the_background_leaves_the_terminal_alone_until_it_is_given_to_it() {
    play_a_part();
    let mut tty = Tty::new();
    let mut shell = tty.start(this_test_as("shell"));
    shell.says("<ready>");
    assert!(tty.is_as_before());
    tty.keys(b"fg\n");
    shell.says("<given>");
    assert!(tty.is_as_before());
    tty.keys(b"hello\n");
    shell.says("hello");
    assert!(tty.is_raw());
    tty.keys(b"E");
    shell.ends();
    assert!(tty.is_as_before());
}

#[test]
fn two_vms_at_one_terminal_get_the_keys_one_after_the_other() {
    play_a_part();
    let (mut tty, mut first) = raw_vm();
    let mut second = tty.start(this_test_as("vm"));
    second.says("<ready>");
    tty.keys(b"one");
    first.says("one");
    tty.keys(b"E");
    first.ends();
    assert!(tty.is_as_before());
    tty.keys(b"two\n");
    second.says("two");
    assert!(tty.is_raw());
    assert!(!String::from_utf8_lossy(&second.seen).contains("one"));
}

#[test]
fn a_terminal_that_is_resized_says_so_to_a_guest_with_a_virtio_console() {
    use virtio::VirtioDevice as _;
    let (master, _) = sys::open_pty().unwrap();
    let terminal = sys::open_peer(master.as_fd()).unwrap();
    let set_size = |columns, rows| {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads one winsize.
        assert_eq!(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
    };
    let console: Console<crate::hvc::Port> =
        Console::stdio(terminal.as_fd(), terminal.as_fd(), Box::new(|| ())).unwrap();
    console.resize();
    let device = console.attach_hvc();
    assert_eq!((device.features(), device.config()), (0, vec![0; 4]), "a new terminal has no size");
    set_size(100, 40);
    console.resize();
    let device = console.attach_hvc();
    assert_eq!((device.features(), device.config()), (1, vec![100, 0, 40, 0]));
    set_size(90, 30);
    console.resize();
    assert_eq!(device.config(), [90, 0, 30, 0]);
}
