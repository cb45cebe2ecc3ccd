//! The device between a driver and a console.

use super::*;
use crate::console::{Console, GuestSide as _, SerialSpec};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Instant;

use event_manager::{EventManager, SubscriberOps as _};
use virtio::testing::{self, BUFFER, DEADLINE, Driver, MmioRegisters, Registers as _};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const RINGS: u64 = virtio::features::EVENT_IDX | virtio::features::INDIRECT_DESC;

type Guest = Driver<MmioRegisters<Hvc>>;

fn boot(port: &Arc<Port>) -> Guest {
    let mut guest = testing::mmio(Hvc::new(port.clone()));
    guest.boot(SIZE | RINGS);
    guest
}

/// A console on an event loop, between two pipes, and a guest at it.
struct Rig {
    guest: Guest,
    events: EventManager<Rc<RefCell<Console<Port>>>>,
    console: Rc<RefCell<Console<Port>>>,
    typed: std::io::PipeWriter,
    seen: std::io::PipeReader,
}

impl Rig {
    fn new() -> Self {
        let (input, typed) = std::io::pipe().unwrap();
        let (seen, output) = std::io::pipe().unwrap();
        let console: Console<Port> =
            Console::stdio(input.as_fd(), output.as_fd(), Box::new(|| panic!("nobody typed Ctrl-A x"))).unwrap();
        let mut guest = testing::mmio(console.attach_hvc());
        guest.boot(SIZE | RINGS);
        let console = Rc::new(RefCell::new(console));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(console.clone());
        Self { guest, events, console, typed, seen }
    }

    fn run_until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let start = Instant::now();
        while !done(&mut self.guest) {
            assert!(start.elapsed() < DEADLINE, "in vain: {what}");
            self.events.run_with_timeout(1).unwrap();
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0u8..=250).cycle().take(length).collect()
}

fn output(port: &Port) -> Vec<u8> {
    let mut bytes = VecDeque::new();
    port.take_output(&mut bytes);
    bytes.into()
}

#[test]
fn what_the_guest_says_and_what_is_typed_pass_through_the_console() {
    let mut rig = Rig::new();
    rig.guest.send(TRANSMIT, &[b"hello ", b"host"], &[]);
    rig.guest.collect(TRANSMIT);
    rig.guest.send(TRANSMIT, &[b"!"], &[]);
    rig.guest.collect(TRANSMIT);
    let mut seen = [0; 11];
    rig.events.run_with_timeout(1000).unwrap();
    rig.seen.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello host!");
    rig.guest.send(RECEIVE, &[], &[3]);
    rig.guest.send(RECEIVE, &[], &[64]);
    rig.typed.write_all(b"hello guest").unwrap();
    let mut heard = Vec::new();
    rig.run_until("the guest hears", |guest| {
        heard.extend(guest.try_collect(RECEIVE).into_iter().flat_map(|used| used.data));
        heard.len() == 11
    });
    assert_eq!(heard, b"hello guest");
}

#[test]
fn a_megabyte_typed_reaches_a_guest_with_a_few_small_buffers_whole() {
    let mut rig = Rig::new();
    let sent = pattern(1 << 20);
    let (mut typed, all) = (rig.typed.try_clone().unwrap(), sent.clone());
    let typing = std::thread::spawn(move || typed.write_all(&all).unwrap());
    for _ in 0..4 {
        rig.guest.send(RECEIVE, &[], &[1000]);
    }
    let mut heard = Vec::new();
    rig.run_until("the guest hears all", |guest| {
        while let Some(used) = guest.try_collect(RECEIVE) {
            heard.extend(used.data);
            guest.send(RECEIVE, &[], &[1000]);
        }
        heard.len() >= sent.len()
    });
    typing.join().unwrap();
    assert!(heard == sent);
}

#[test]
fn a_reader_who_stops_never_blocks_the_guest_and_sees_what_was_said_last() {
    let mut rig = Rig::new();
    for _ in 0..40 {
        rig.guest.send(TRANSMIT, &[&pattern(BUFFER)], &[]);
        rig.guest.collect(TRANSMIT);
        rig.events.run_with_timeout(0).unwrap();
    }
    rig.guest.send(TRANSMIT, &[b"the end"], &[]);
    rig.guest.collect(TRANSMIT);
    let reading = std::thread::spawn({
        let mut seen = rig.seen.try_clone().unwrap();
        move || {
            let mut all = Vec::new();
            let mut piece = [0; 4096];
            while !all.ends_with(b"the end") {
                let count = seen.read(&mut piece).unwrap();
                all.extend(&piece[..count]);
            }
            all.len()
        }
    });
    rig.run_until("the reader sees the end", |_| reading.is_finished());
    assert!(reading.join().unwrap() < 300 << 10);
    assert!(rig.console.borrow().describe().is_none());
}

#[test]
fn one_huge_buffer_leaves_its_end() {
    let port = Port::new().unwrap();
    let mut guest = boot(&port);
    let piece = vec![b'x'; BUFFER];
    guest.send(TRANSMIT, &[&piece, &piece, &piece, b"the end"], &[]);
    guest.collect(TRANSMIT);
    let mut bytes = VecDeque::new();
    let lost = port.take_output(&mut bytes);
    assert_eq!(bytes.len() as u64 + lost, 3 * BUFFER as u64 + 7);
    assert!(Vec::from(bytes).ends_with(b"xthe end"));
}

#[test]
fn input_that_comes_before_the_driver_waits_and_survives_its_reset() {
    let port = Port::new().unwrap();
    port.push_input(b"early");
    let mut guest = boot(&port);
    guest.send(RECEIVE, &[], &[2]);
    assert_eq!(guest.collect(RECEIVE).data, b"ea");
    guest.reset();
    port.push_input(b" bird");
    drop(guest);
    let mut guest = boot(&port);
    guest.send(RECEIVE, &[], &[64]);
    assert_eq!(guest.collect(RECEIVE).data, b"rly bird");
    guest.send(TRANSMIT, &[b"heard"], &[]);
    guest.collect(TRANSMIT);
    assert_eq!(output(&port), b"heard");
}

#[test]
fn the_terminals_size_is_in_the_configuration_and_its_changes_interrupt() {
    let port = Port::new().unwrap();
    assert_eq!(testing::mmio(Hvc::new(port.clone())).offered() & SIZE, 0, "there is no terminal");
    port.resize((80, 25));
    let mut guest = boot(&port);
    let size = |guest: &mut Guest| {
        let mut config = [0; 4];
        guest.registers.read_config(0, &mut config);
        let [columns_low, columns_high, rows_low, rows_high] = config;
        (u16::from_le_bytes([columns_low, columns_high]), u16::from_le_bytes([rows_low, rows_high]))
    };
    assert_eq!(size(&mut guest), (80, 25));
    while guest.interrupted(None) {}
    port.resize((80, 25));
    assert!(!guest.interrupted(None), "nothing has changed");
    port.resize((132, 50));
    guest.wait_for_interrupt(None);
    assert_eq!(size(&mut guest), (132, 50));
    guest.reset();
    while guest.interrupted(None) {}
    port.resize((1, 1));
    assert!(!guest.interrupted(None), "there is no driver");
}

#[test]
fn a_buffer_for_input_without_room_is_a_fault_and_a_message_of_nothing_is_none() {
    let port = Port::new().unwrap();
    let mut guest = boot(&port);
    guest.send(TRANSMIT, &[], &[4]);
    assert_eq!(guest.collect(TRANSMIT).written, 0);
    assert!(!port.has_output());
    port.push_input(b"x");
    guest.send(RECEIVE, &[b"no room"], &[]);
    guest.wait_for_needs_reset();
    guest.boot(0);
    guest.send(RECEIVE, &[], &[4]);
    assert_eq!(guest.collect(RECEIVE).data, b"x");
}

#[test]
fn a_console_that_is_off_drops_what_the_guest_says() {
    let console: Console<Port> = Console::open_hvc(&SerialSpec::Off, Box::new(|| ())).unwrap();
    assert!(console.is_off());
    let mut guest = testing::mmio(console.attach_hvc());
    guest.boot(RINGS);
    guest.send(TRANSMIT, &[b"nothing"], &[]);
    guest.collect(TRANSMIT);
}
