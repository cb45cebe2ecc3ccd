//! The port as a guest's driver uses it.

use super::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ENABLE_SENT: u8 = 2;
const LOOP_BACK: u8 = 0x10;
const DATA_READY: u8 = 1;
const DATA: u8 = 0;

/// A port whose guest has done nothing, and its interrupt line.
fn fresh() -> (Arc<Port>, Serial, EventFd) {
    let port = Port::new().unwrap();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let serial = port.attach(Irq::new(line.try_clone().unwrap()));
    (port, serial, line)
}

/// The same, with a driver that has opened the port as Linux does.
fn listening() -> (Arc<Port>, Serial, EventFd) {
    let (port, mut serial, line) = fresh();
    write(&mut serial, MODEM_CONTROL, TERMINAL_READY | REQUEST_TO_SEND);
    write(&mut serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    (port, serial, line)
}

fn read(serial: &mut Serial, register: u8) -> u8 {
    let mut data = [0];
    serial.read(register.into(), &mut data);
    data[0]
}

fn write(serial: &mut Serial, register: u8, value: u8) {
    serial.write(register.into(), &[value]);
}

/// What an interrupt handler does: reads while data is ready, at most `most` bytes.
fn receive(serial: &mut Serial, most: usize) -> Vec<u8> {
    let mut received = Vec::new();
    while received.len() < most && read(serial, LINE_STATUS) & DATA_READY != 0 {
        received.push(read(serial, DATA));
    }
    received
}

fn output(port: &Port) -> (Vec<u8>, u64) {
    let mut bytes = VecDeque::new();
    let dropped = port.take_output(&mut bytes);
    (bytes.into(), dropped)
}

/// Whether the console is woken within `limit` milliseconds, or has been.
fn woken(port: &Port, limit: i32) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, port.woken(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    epoll.wait(limit, &mut [EpollEvent::default()]).unwrap() == 1
}

fn pattern(length: usize) -> Vec<u8> {
    (0u8..=250).cycle().take(length).collect()
}

#[test]
fn output_comes_in_order_and_only_its_first_byte_wakes_the_console() {
    let (port, mut serial, _line) = fresh();
    write(&mut serial, DATA, b'h');
    assert!(woken(&port, 60_000));
    for byte in b"ello" {
        write(&mut serial, DATA, *byte);
        assert!(woken(&port, 0), "setting the timer again would undo that it has run out");
    }
    assert!(port.has_output());
    assert_eq!(output(&port), (b"hello".to_vec(), 0));
    assert!(!port.has_output());
    write(&mut serial, DATA, b'!');
    assert!(woken(&port, 60_000));
    assert_eq!(output(&port), (b"!".to_vec(), 0));
}

#[test]
fn output_that_nobody_takes_is_bounded_and_the_oldest_gives_way() {
    let (port, mut serial, _line) = fresh();
    let said = pattern(OUTPUT + 1000);
    for byte in &said {
        write(&mut serial, DATA, *byte);
    }
    assert_eq!(output(&port), (said[1000..].to_vec(), 1000));
    assert_eq!(output(&port), (vec![], 0));
}

#[test]
fn discarded_output_wakes_nobody() {
    let (port, mut serial, _line) = fresh();
    port.discard_output();
    write(&mut serial, DATA, b'x');
    assert!(!woken(&port, 20));
    assert_eq!(output(&port), (vec![], 0));
}

#[test]
fn input_beyond_the_fifo_reaches_a_slow_guest_whole_and_in_order() {
    let (port, mut serial, line) = listening();
    let sent = pattern(INPUT);
    assert_eq!(port.input_room(), INPUT);
    port.push_input(&sent);
    let mut received = Vec::new();
    while received.len() < sent.len() {
        assert!(line.read().is_ok(), "an interrupt for the {}th byte", received.len());
        // As Linux's handler does: as long as the port says that an interrupt is pending, up to 256 bytes a turn.
        while read(&mut serial, INTERRUPT_ID) & ID_NONE == 0 {
            received.extend(receive(&mut serial, 256));
        }
    }
    assert!(received == sent);
    assert!(receive(&mut serial, 1).is_empty());
}

#[test]
fn a_handler_that_leaves_bytes_in_the_fifo_is_told_of_them() {
    let (port, mut serial, _line) = listening();
    port.push_input(b"abc");
    assert_eq!(read(&mut serial, INTERRUPT_ID) & ID_MASK, ID_RECEIVED);
    assert_eq!(receive(&mut serial, 1), b"a");
    assert_eq!(read(&mut serial, INTERRUPT_ID) & ID_MASK, ID_RECEIVED);
    assert_eq!(receive(&mut serial, 9), b"bc");
    assert_eq!(read(&mut serial, INTERRUPT_ID) & ID_MASK, ID_NONE);
}

#[test]
fn input_that_waits_survives_a_driver_that_clears_the_port_before_it_listens() {
    let (port, mut serial, line) = fresh();
    port.push_input(b"typed early");
    // What Linux does at start-up: the registers are read "for luck", the transmit interrupt is tried, and only then
    // is the receive interrupt turned on.
    for register in [LINE_STATUS, DATA, INTERRUPT_ID, LINE_STATUS, DATA] {
        read(&mut serial, register);
    }
    write(&mut serial, INTERRUPT_ENABLE, ENABLE_SENT);
    write(&mut serial, INTERRUPT_ENABLE, 0);
    read(&mut serial, DATA);
    write(&mut serial, MODEM_CONTROL, TERMINAL_READY | REQUEST_TO_SEND);
    write(&mut serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    assert!(line.read().is_ok());
    assert_eq!(receive(&mut serial, 99), b"typed early");
}

#[test]
fn a_guest_that_polls_without_interrupts_gets_its_input() {
    let (port, mut serial, _line) = fresh();
    let sent = pattern(200);
    port.push_input(&sent);
    let mut received = Vec::new();
    for _ in 0..200 + 4 * POLLS {
        received.extend(receive(&mut serial, 1));
    }
    assert_eq!(received, sent);
}

#[test]
fn a_guest_that_withdraws_rts_gets_nothing_until_it_asks_again() {
    let (port, mut serial, line) = listening();
    write(&mut serial, MODEM_CONTROL, TERMINAL_READY);
    port.push_input(b"later");
    assert_eq!(receive(&mut serial, 9), b"");
    assert!(line.read().is_err());
    write(&mut serial, MODEM_CONTROL, TERMINAL_READY | REQUEST_TO_SEND);
    assert!(line.read().is_ok());
    assert_eq!(receive(&mut serial, 9), b"later");
}

#[test]
fn loop_back_mode_takes_no_input_and_gives_none_away() {
    let (port, mut serial, _line) = listening();
    write(&mut serial, MODEM_CONTROL, LOOP_BACK | TERMINAL_READY | REQUEST_TO_SEND);
    port.push_input(b"outside");
    write(&mut serial, DATA, b'L');
    assert_eq!(receive(&mut serial, 9), b"L");
    assert!(!port.has_output());
    write(&mut serial, MODEM_CONTROL, TERMINAL_READY | REQUEST_TO_SEND);
    assert_eq!(receive(&mut serial, 9), b"outside");
}

#[test]
fn the_console_is_woken_when_a_full_input_queue_has_room_again() {
    let (port, mut serial, _line) = listening();
    port.push_input(&pattern(INPUT));
    assert_eq!(port.input_room(), FIFO, "so many are in the FIFO");
    port.push_input(&pattern(FIFO));
    assert_eq!(port.input_room(), 0);
    assert_eq!(receive(&mut serial, INPUT / 2 - 1).len(), INPUT / 2 - 1);
    assert!(!woken(&port, 20));
    assert_eq!(receive(&mut serial, 2 * FIFO).len(), 2 * FIFO);
    assert!(woken(&port, 60_000));
    assert!(port.input_room() >= INPUT / 2);
}

#[test]
fn a_rebooted_guest_finds_the_input_that_its_predecessor_did_not_read() {
    let (port, mut serial, _line) = listening();
    let sent = pattern(300);
    port.push_input(&sent);
    assert_eq!(receive(&mut serial, 10), sent[..10]);
    write(&mut serial, DATA, b'z');
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut serial = port.attach(Irq::new(line.try_clone().unwrap()));
    assert_eq!(read(&mut serial, INTERRUPT_ENABLE), 0, "its registers are fresh");
    write(&mut serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    assert!(line.read().is_ok());
    assert_eq!(receive(&mut serial, 999), sent[10..]);
    assert_eq!(output(&port).0, b"z");
}

#[test]
fn a_wide_or_stray_access_is_one_to_each_register() {
    let (port, mut serial, _line) = fresh();
    serial.write(6, &[0, 0x5a, 1, 2]);
    let mut data = [0; 4];
    serial.read(7, &mut data);
    assert_eq!(data, [0x5a, 0xff, 0xff, 0xff]);
    serial.read(u64::MAX, &mut data);
    serial.write(u64::MAX, &[1, 2]);
    assert!(!port.has_output());
}

#[test]
fn acpi_is_told_the_ports_and_the_interrupt() {
    let (_port, serial, _line) = fresh();
    let mut aml = Vec::new();
    serial.to_aml_bytes(&mut aml);
    // I/O port descriptor (ACPI 6.5, section 6.4.2.5): 16-bit decoding, 0x3f8 to 0x3f8, alignment 1, 8 ports.
    assert!(aml.windows(8).any(|bytes| bytes == [0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]));
    // Extended interrupt descriptor (section 6.4.3.6): consumer, edge, active high, exclusive, number 4.
    assert!(aml.windows(9).any(|bytes| bytes == [0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]));
    // PNP0501 as a compressed EISA id.
    assert!(aml.windows(4).any(|bytes| bytes == [0x41, 0xd0, 0x05, 0x01]));
}
