//! The console between a guest and pipes, files and sockets, on a real event loop.

use super::*;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::thread;

use bus::BusDevice as _;
use event_manager::{EventManager, SubscriberOps as _};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Longer than any of these tests takes on the slowest machine; only a failure waits so long.
const LONG: Duration = Duration::from_secs(60);

const DATA_READY: u8 = 1;

/// A console on an event loop, and a guest at its port.
pub(in crate::console) struct Rig {
    pub(in crate::console) console: Rc<RefCell<Console>>,
    pub(in crate::console) guest: Guest,
    events: EventManager<Rc<RefCell<Console>>>,
}

impl Rig {
    pub(in crate::console) fn new(console: Console) -> Self {
        let guest = Guest::new(&console);
        let console = Rc::new(RefCell::new(console));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(console.clone());
        Self { console, guest, events }
    }

    pub(in crate::console) fn open(spec: &SerialSpec) -> Self {
        Self::new(Console::open(spec, no_quit()).unwrap())
    }

    pub(in crate::console) fn stdio(input: &impl AsFd, output: &impl AsFd) -> Self {
        Self::new(Console::stdio(input.as_fd(), output.as_fd(), no_quit()).unwrap())
    }

    /// Runs the event loop until `done`.
    pub(in crate::console) fn run_until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let start = Instant::now();
        while !done(&mut self.guest) {
            assert!(start.elapsed() < LONG, "in vain: {what}");
            self.events.run_with_timeout(1).unwrap();
        }
    }

    /// Runs the event loop until nothing is left to do, now or when the port's timer runs out. Endless wake-ups are a
    /// failure.
    pub(in crate::console) fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.events.run_with_timeout(3).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    /// Runs until `reader` has received `length` bytes.
    pub(in crate::console) fn receive(&mut self, reader: &mut (impl io::Read + AsFd), length: usize) -> Vec<u8> {
        let mut received = vec![0; length];
        let mut at = 0;
        let start = Instant::now();
        while at < length {
            assert!(start.elapsed() < LONG, "only {at} of {length} bytes came");
            self.events.run_with_timeout(0).unwrap();
            if sys::poll(reader.as_fd(), libc::POLLIN, Duration::from_millis(10)) {
                let n = reader.read(&mut received[at..]).unwrap();
                assert_ne!(n, 0, "the end came after {at} of {length} bytes");
                at += n;
            }
        }
        received
    }
}

/// A driver that has opened the port as Linux does.
pub(in crate::console) struct Guest {
    serial: Serial,
    interrupt: EventFd,
}

impl Guest {
    fn new(console: &Console) -> Self {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut serial = console.attach(Irq::new(interrupt.try_clone().unwrap()));
        serial.write(4, &[3]);
        serial.write(1, &[1]);
        Self { serial, interrupt }
    }

    pub(in crate::console) fn say(&mut self, text: &[u8]) {
        for byte in text {
            self.serial.write(0, &[*byte]);
        }
    }

    /// One byte, if the port has one.
    fn hear_byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.serial.read(5, &mut byte);
        if byte[0] & DATA_READY == 0 {
            return None;
        }
        self.serial.read(0, &mut byte);
        Some(byte[0])
    }

    /// Everything that the port has.
    pub(in crate::console) fn hear(&mut self, heard: &mut Vec<u8>) {
        heard.extend(std::iter::from_fn(|| self.hear_byte()));
    }
}

pub(in crate::console) fn no_quit() -> Box<dyn Fn() + Send> {
    Box::new(|| panic!("nobody typed Ctrl-A x"))
}

pub(in crate::console) fn pattern(length: usize) -> Vec<u8> {
    (0u8..=250).cycle().take(length).collect()
}

pub(in crate::console) fn pipe() -> (File, File) {
    let (reader, writer) = io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
}

pub(in crate::console) fn null() -> File {
    File::options().read(true).write(true).open("/dev/null").unwrap()
}

/// A file that holds `bytes`, at its start.
fn file_with(bytes: &[u8]) -> File {
    use std::io::Seek as _;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// Whether the description behind `fd` has O_NONBLOCK, as /proc tells it.
fn is_nonblocking(fd: &impl AsRawFd) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_NONBLOCK != 0
}

fn spec(text: &str) -> SerialSpec {
    kv::from_str(text).unwrap()
}

#[test]
fn each_kind_of_console_is_asked_for_by_a_short_text() {
    assert_eq!(spec("off"), SerialSpec::Off);
    assert_eq!(spec("stdio"), SerialSpec::default());
    assert_eq!(spec("pty"), SerialSpec::Pty(PtySpec { link: None }));
    assert_eq!(spec("pty,link=/run/x"), SerialSpec::Pty(PtySpec { link: Some("/run/x".into()) }));
    assert_eq!(spec("socket,path=/tmp/x"), SerialSpec::Socket(SocketSpec { path: "/tmp/x".into() }));
    let file = FileSpec { path: "log.txt".into(), max: kv::Size(16 << 20), keep: 3 };
    assert_eq!(spec("file,path=log.txt"), SerialSpec::File(file.clone()));
    assert_eq!(
        spec("file,path=log.txt,max=1M,keep=0"),
        SerialSpec::File(FileSpec { max: kv::Size(1 << 20), keep: 0, ..file })
    );
    assert!(kv::from_str::<SerialSpec>("file").is_err());
    assert!(kv::from_str::<SerialSpec>("file,path=x,size=1M").is_err());
    assert!(kv::from_str::<SerialSpec>("serial").is_err());
}

#[test]
fn what_the_guest_says_is_written_at_once() {
    let (mut reader, writer) = pipe();
    let mut rig = Rig::stdio(&null(), &writer);
    rig.guest.say(b"first\n");
    assert_eq!(rig.receive(&mut reader, 6), b"first\n");
    rig.guest.say(b"second\n");
    assert_eq!(rig.receive(&mut reader, 7), b"second\n");
}

#[test]
fn a_megabyte_typed_at_once_reaches_a_guest_that_reads_byte_by_byte() {
    let sent = pattern(1 << 20);
    let (reader, mut writer) = pipe();
    let mut rig = Rig::stdio(&reader, &null());
    let typed = sent.clone();
    let typing = thread::spawn(move || writer.write_all(&typed).unwrap());
    let mut heard = Vec::new();
    rig.run_until("the input is complete", |guest| {
        // Slower than the console, which may read 64 KiB in each turn of the loop.
        heard.extend((0..5000).map_while(|_| guest.hear_byte()));
        heard.len() >= sent.len()
    });
    typing.join().unwrap();
    assert!(heard == sent);
}

#[test]
fn a_guest_on_another_thread_gets_input_whole_by_interrupts_alone() {
    let sent = pattern(256 << 10);
    let (reader, mut writer) = pipe();
    let mut rig = Rig::stdio(&reader, &null());
    let length = sent.len();
    let mut guest = Guest::new(&rig.console.borrow());
    let hearing = thread::spawn(move || {
        let epoll = Epoll::new().unwrap();
        let interrupt = guest.interrupt.as_raw_fd();
        epoll.ctl(ControlOperation::Add, interrupt, EpollEvent::new(EventSet::IN, 0)).unwrap();
        let mut heard = Vec::new();
        while heard.len() < length {
            assert_eq!(epoll.wait(60_000, &mut [EpollEvent::default()]).unwrap(), 1, "{} bytes came", heard.len());
            guest.interrupt.read().unwrap();
            guest.hear(&mut heard);
        }
        heard
    });
    let typed = sent.clone();
    let typing = thread::spawn(move || writer.write_all(&typed).unwrap());
    rig.run_until("the input is complete", |_| hearing.is_finished());
    typing.join().unwrap();
    assert!(hearing.join().unwrap() == sent);
}

#[test]
fn a_reader_who_stops_never_blocks_the_guest_and_sees_what_was_said_last() {
    let (mut reader, writer) = pipe();
    let mut rig = Rig::stdio(&null(), &writer);
    let said = pattern(4 << 20);
    for piece in said.chunks(64 << 10) {
        rig.guest.say(piece);
        rig.settle();
    }
    let held = rig.console.borrow().unsent.len() + (64 << 10);
    assert!(held <= 128 << 10, "{held} bytes are held");
    rig.guest.say(b"the end");
    let mut seen = Vec::new();
    while !seen.ends_with(b"the end") {
        let byte = rig.receive(&mut reader, 1);
        seen.extend(byte);
    }
    assert!(said.starts_with(&seen[..64 << 10]), "what came first was written before the reader stopped");
    assert!(seen.len() < 300 << 10, "{} bytes were kept", seen.len());
}

#[test]
fn a_reader_who_leaves_does_not_end_the_vm() {
    let (reader, writer) = pipe();
    let mut rig = Rig::stdio(&null(), &writer);
    drop(reader);
    for _ in 0..3 {
        rig.guest.say(b"anybody?");
        rig.settle();
    }
    assert!(matches!(rig.console.borrow().output, Output::Nowhere));
    assert!(!rig.console.borrow().port.has_output());
}

#[test]
fn standard_input_at_its_end_does_not_spin() {
    let (closed, writer) = pipe();
    drop(writer);
    let (left, right) = UnixStream::pair().unwrap();
    drop(right);
    let inputs: [OwnedFd; 4] = [closed.into(), left.into(), null().into(), file_with(b"").into()];
    for input in inputs {
        let mut rig = Rig::stdio(&input, &null());
        // One event at most tells of the end; `settle` fails when events go on.
        rig.settle();
        assert_eq!(rig.events.run_with_timeout(50).unwrap(), 0);
        assert!(rig.console.borrow().input.is_none());
        rig.guest.say(b"still here");
        rig.settle();
    }
}

#[test]
fn a_file_as_standard_input_is_read_as_the_guest_has_room() {
    let sent = pattern(300_000);
    let mut rig = Rig::stdio(&file_with(&sent), &null());
    let mut heard = Vec::new();
    rig.run_until("the file is read", |guest| {
        guest.hear(&mut heard);
        heard.len() >= sent.len()
    });
    assert!(heard == sent);
    rig.settle();
}

#[test]
fn a_guest_that_never_reads_stops_the_writer_and_not_the_event_loop() {
    let (reader, mut writer) = pipe();
    let mut rig = Rig::stdio(&reader, &null());
    let typing = thread::spawn(move || writer.write_all(&pattern(1 << 20)));
    let console = rig.console.clone();
    rig.run_until("the queue is full", |_| console.borrow().port.input_room() == 0);
    rig.settle();
    assert!(!typing.is_finished());
    drop((rig, console, reader));
    assert!(typing.join().unwrap().is_err(), "the pipe was never read to its end");
}

#[test]
fn inherited_descriptors_keep_their_flags() {
    let (reader, mut writer) = pipe();
    let (mut far, near) = UnixStream::pair().unwrap();
    for (input, output) in [(reader.as_fd(), near.as_fd()), (near.as_fd(), writer.as_fd())] {
        let mut rig = Rig::stdio(&input, &output);
        rig.guest.say(b"x");
        rig.settle();
    }
    let mut rig = Rig::stdio(&reader, &near);
    writer.write_all(b"typed").unwrap();
    let mut heard = Vec::new();
    rig.run_until("input comes", |guest| {
        guest.hear(&mut heard);
        heard.ends_with(b"typed")
    });
    rig.guest.say(b"said");
    assert_eq!(rig.receive(&mut far, 5), b"xsaid");
    assert!(![reader.as_raw_fd(), writer.as_raw_fd(), near.as_raw_fd()].iter().any(is_nonblocking));
    drop(rig);
    assert!(![reader.as_raw_fd(), writer.as_raw_fd(), near.as_raw_fd()].iter().any(is_nonblocking));
}

#[test]
fn at_the_end_everything_said_reaches_a_slow_reader() {
    let (mut reader, writer) = pipe();
    let mut rig = Rig::stdio(&null(), &writer);
    let said = pattern(150_000);
    // The pipe takes 64 KiB, our queues the rest.
    for piece in said.chunks(50_000) {
        rig.guest.say(piece);
        rig.settle();
    }
    let reading = thread::spawn(move || {
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        seen
    });
    rig.console.borrow_mut().drain(LONG);
    drop((rig, writer));
    assert!(reading.join().unwrap() == said);
}

#[test]
fn at_the_end_a_stopped_reader_is_waited_for_no_longer_than_the_limit() {
    let (_reader, writer) = pipe();
    let mut rig = Rig::stdio(&null(), &writer);
    rig.guest.say(&pattern(60_000));
    rig.settle();
    rig.guest.say(&pattern(60_000));
    let start = Instant::now();
    rig.console.borrow_mut().drain(Duration::from_millis(50));
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert!(start.elapsed() < LONG / 2);
}

#[test]
fn output_into_a_file_or_a_full_device_goes_on() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut rig = Rig::stdio(&null(), file.as_file());
    rig.guest.say(b"said");
    rig.settle();
    assert_eq!(fs::read(file.path()).unwrap(), b"said");

    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut rig = Rig::stdio(&null(), &full);
    for _ in 0..3 {
        rig.guest.say(b"lost");
        rig.settle();
    }
    // The first loss was told at once; the others wait for their turn in the log.
    assert_eq!(rig.console.borrow().losses.bytes, 8);
    assert!(matches!(rig.console.borrow().output, Output::Channel(_)));
}

#[test]
fn a_console_that_is_off_takes_output_and_wakes_nobody() {
    let mut rig = Rig::open(&SerialSpec::Off);
    assert!(rig.console.borrow().is_off());
    rig.settle();
    rig.guest.say(b"nothing");
    assert_eq!(rig.events.run_with_timeout(0).unwrap(), 0);
}

#[test]
fn a_rebooted_guest_talks_to_the_same_console() {
    let (reader, mut writer) = pipe();
    let (mut seen, output) = pipe();
    let mut rig = Rig::stdio(&reader, &output);
    rig.guest.say(b"first ");
    writer.write_all(b"typed in between").unwrap();
    rig.settle();
    rig.guest = Guest::new(&rig.console.borrow());
    let mut heard = Vec::new();
    rig.guest.hear(&mut heard);
    assert_eq!(heard, b"typed in between");
    rig.guest.say(b"second");
    assert_eq!(rig.receive(&mut seen, 12), b"first second");
}
