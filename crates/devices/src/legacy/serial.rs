//! The serial port: a 16550A at the PC's first port, and the two queues between it and its console.
//!
//! The registers are vm-superio's, after National Semiconductor's PC16550D data sheet. This file adds what keeps input
//! whole: bytes wait in a queue of ours, and enter the receive FIFO only when it is empty and the guest is there to
//! read it. Left out on purpose: baud rates (a byte is sent at once), breaks, line errors, modem status changes, and
//! the FIFO control register (the FIFOs are always on and are never cleared).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use acpi_tables::{Aml, AmlSink, aml};
use bus::{BusDevice, Irq};
use vm_superio::Trigger;
use vmm_sys_util::timerfd::TimerFd;

use crate::console::GuestSide;
use crate::console::output::{INPUT, OUTPUT, Output};

/// The first of the port's addresses in I/O space: COM1 of every PC.
pub const BASE: u16 = 0x3f8;
/// How many addresses the port takes.
pub const LENGTH: u8 = 8;
/// The interrupt, as ACPI counts them: COM1's IRQ 4.
pub const GSI: u32 = 4;

/// Registers, as offsets from [`BASE`] (PC16550D, table II).
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_ID: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

const ENABLE_RECEIVED: u8 = 1;
const ID_NONE: u8 = 1;
const ID_MASK: u8 = 0x0f;
const ID_RECEIVED: u8 = 4;
const DIVISOR_LATCH: u8 = 0x80;
const TERMINAL_READY: u8 = 1;
const REQUEST_TO_SEND: u8 = 2;

/// Size of vm-superio's receive FIFO, in bytes.
const FIFO: usize = 64;
/// A guest writes byte by byte. The console hears of a first one so much later, and finds most of a line.
const GATHER: Duration = Duration::from_millis(1);
/// The shortest time: zero would stop the timer.
const NOW: Duration = Duration::from_nanos(1);
/// A guest that reads the line status so often, and does nothing else, waits for input without interrupts.
const POLLS: u32 = 64;

/// The guest's side of the port. One exists per machine; [`Port`] outlives it.
pub struct Serial(Arc<Port>);

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The port is eight bits wide: a wider access is one to each register in turn.
        for (byte, register) in data.iter_mut().zip(offset..=u64::MAX) {
            *byte = register_number(register).map_or(0xff, |register| self.0.read(register));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, register) in data.iter().zip(offset..=u64::MAX) {
            if let Some(register) = register_number(register) {
                self.0.write(register, *byte);
            }
        }
    }
}

impl Aml for Serial {
    /// A PNP0501 with its ports and its interrupt: edge, active high, not shared (ACPI 6.5, section 19.2).
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        aml::Device::new(
            aml::Path::new("_SB_.COM1"),
            vec![
                &aml::Name::new(aml::Path::new("_HID"), &aml::EISAName::new("PNP0501")),
                &aml::Name::new(aml::Path::new("_UID"), &aml::ZERO),
                &aml::Name::new(
                    aml::Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![
                        &aml::IO::new(BASE, BASE, 1, LENGTH),
                        &aml::Interrupt::new(true, true, false, false, GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The port itself: the registers and the queues, shared by the vCPU threads, through [`Serial`], and the main thread,
/// through the console. Nobody holds the lock across a system call that could block.
pub struct Port(Mutex<State>);

struct State {
    uart: vm_superio::Serial<Line, vm_superio::serial::NoEvents, Output>,
    /// Input that has not entered the FIFO.
    input: VecDeque<u8>,
    /// Reads of the line status since anything else was done.
    polls: u32,
    /// The console has been told that there is no room.
    full: bool,
    /// Tells the console that output waits, or that there is room for input again.
    wake: TimerFd,
}

impl Port {
    /// Gives a fresh UART to a machine. Output that waits stays, and so does input that the last machine did not read.
    pub(crate) fn attach(self: &Arc<Self>, irq: Irq) -> Serial {
        let mut state = self.lock();
        let state = &mut *state;
        let output = std::mem::take(state.uart.writer_mut());
        let uart = vm_superio::Serial::new(Line(Some(irq)), output);
        let last = std::mem::replace(&mut state.uart, uart);
        for byte in last.state().in_buffer.into_iter().rev() {
            state.input.push_front(byte);
        }
        state.polls = 0;
        Serial(Arc::clone(self))
    }

    fn read(&self, register: u8) -> u8 {
        let mut state = self.lock();
        let value = state.read(register);
        state.refill();
        value
    }

    fn write(&self, register: u8, value: u8) {
        let mut state = self.lock();
        let idle = state.uart.writer().is_empty();
        // Neither our output nor our interrupt can fail.
        let _ = state.uart.write(register, value);
        state.polls = 0;
        if idle && !state.uart.writer().is_empty() {
            state.wake_in(GATHER);
        }
        state.refill();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestSide for Port {
    fn new() -> io::Result<Arc<Self>> {
        let state = State {
            uart: vm_superio::Serial::new(Line(None), Output::with_room()),
            input: VecDeque::new(),
            polls: 0,
            full: false,
            wake: TimerFd::new()?,
        };
        Ok(Arc::new(Self(Mutex::new(state))))
    }

    fn woken(&self) -> RawFd {
        self.lock().wake.as_raw_fd()
    }

    fn wake(&self) {
        self.lock().wake_in(NOW);
    }

    fn take_output(&self, empty: &mut VecDeque<u8>) -> u64 {
        empty.reserve(OUTPUT);
        self.lock().uart.writer_mut().take(empty)
    }

    fn has_output(&self) -> bool {
        !self.lock().uart.writer().is_empty()
    }

    fn print(&self, text: &str) {
        self.lock().uart.writer_mut().push(text.as_bytes());
        self.wake();
    }

    fn discard_output(&self) {
        self.lock().uart.writer_mut().discard();
    }

    fn input_room(&self) -> usize {
        let mut state = self.lock();
        let room = INPUT.saturating_sub(state.input.len());
        state.full = room == 0;
        room
    }

    fn push_input(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.input.extend(bytes);
        state.refill();
    }
}

impl State {
    fn read(&mut self, register: u8) -> u8 {
        self.polls = if register == LINE_STATUS { self.polls.saturating_add(1) } else { 0 };
        let value = self.uart.read(register);
        // vm-superio forgets that data is left once a byte was read, and Linux reads 256 bytes per look at this
        // register: without this a rest below that would lie there for ever.
        let unread = self.uart.fifo_capacity() < FIFO;
        if register == INTERRUPT_ID && value & ID_MASK == ID_NONE && unread && self.receives() {
            return value & !ID_MASK | ID_RECEIVED;
        }
        value
    }

    /// Fills an empty FIFO from the queue, and wakes a console that waits for room.
    fn refill(&mut self) {
        if self.input.is_empty() || self.uart.fifo_capacity() < FIFO || !self.wants_input() {
            return;
        }
        let (bytes, _) = self.input.as_slices();
        let bytes = &bytes[..bytes.len().min(FIFO)];
        // In loop-back mode the UART takes nothing, and the bytes stay where they are.
        let taken = self.uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.input.drain(..taken);
        if self.full && self.input.len() <= INPUT / 2 {
            self.full = false;
            self.wake_in(NOW);
        }
    }

    fn wake_in(&mut self, delay: Duration) {
        // Setting a timer of one's own to a valid time does not fail.
        let _ = self.wake.reset(delay, None);
    }

    /// Whether the guest will read what is put into the FIFO. Linux empties it unread while it sets the port up, with
    /// the interrupt off; and a guest that withdraws RTS, but not DTR, has no room (`stty crtscts`).
    fn wants_input(&mut self) -> bool {
        let modem = self.uart.read(MODEM_CONTROL);
        let held = modem & TERMINAL_READY != 0 && modem & REQUEST_TO_SEND == 0;
        !held && (self.receives() || self.polls >= POLLS)
    }

    /// Whether the interrupt for received data is on. The registers read here change by no read.
    fn receives(&mut self) -> bool {
        self.uart.read(LINE_CONTROL) & DIVISOR_LATCH == 0 && self.uart.read(INTERRUPT_ENABLE) & ENABLE_RECEIVED != 0
    }
}

/// The interrupt line; none before the first machine.
struct Line(Option<Irq>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Some(irq) = &self.0 {
            irq.raise();
        }
        Ok(())
    }
}

fn register_number(offset: u64) -> Option<u8> {
    u8::try_from(offset).ok().filter(|register| *register < LENGTH)
}

#[cfg(test)]
mod tests;
