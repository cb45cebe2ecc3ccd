//! The host's side of the serial port, or of the virtio console: where the guest's output goes and its input comes from.
//!
//! ```text
//! vCPU thread ── Serial ─────▶ Port: output queue ──▶ Console ──▶ reader      (the main thread, by its event loop)
//! I/O thread  ── HvcHandler ─▶ Port: input queue  ◀── Console ◀── writer
//! ```
//!
//! The guest's side only ever takes the port's lock for a moment, and wakes the main thread when a queue stops being
//! empty; the serial port a millisecond later, so that a line is one write and not one a byte.
//! So a reader who stops never stops the guest: output waits in a queue of bounded size, then the oldest is dropped and
//! counted. Input is never dropped: when the queue is full we stop reading, and the writer waits.
//!
//! A [`Console`] lives as long as the process. Each machine that is built, at start and at every reboot of the guest,
//! takes a fresh [`Serial`] from [`Console::attach`], or a fresh [`Hvc`] from [`Console::attach_hvc`].

mod channel;
mod escape;
mod file;
pub(crate) mod output;
mod pty;
mod socket;
mod sys;
mod terminal;

#[cfg(test)]
mod tests;

pub use file::FileSpec;
pub use pty::PtySpec;
pub use socket::SocketSpec;
pub use sys::stop_this_process;
pub use terminal::restore as restore_terminal;

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bus::Irq;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};

use crate::hvc::{self, Hvc};
use crate::legacy::serial::{self, Serial};
use channel::{Channel, Direction};
use escape::{Command, Escape};
use file::LogFile;
use pty::Pty;
use socket::Listener;
use terminal::Terminal;

/// Where a console of the guest's goes: its first serial port, or its virtio console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Subcommand)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum SerialSpec {
    /// Nowhere: output is dropped, and there is no input
    Off,
    /// Standard input and output; at a terminal, Ctrl-A x ends the VM and Ctrl-A ? helps
    #[default]
    Stdio,
    /// Into a file that is rotated; no input
    File(FileSpec),
    /// A pseudo-terminal for screen, picocom or minicom
    Pty(PtySpec),
    /// A Unix socket, for one client at a time
    Socket(SocketSpec),
}

impl SerialSpec {
    /// The path of the file that is made for it.
    pub fn path(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::Off | Self::Stdio => None,
            Self::File(file) => Some(&mut file.path),
            Self::Pty(pty) => pty.link.as_mut(),
            Self::Socket(socket) => Some(&mut socket.path),
        }
    }
}

/// What the event loop tells us about.
const WAKE: u32 = 0;
const INPUT: u32 = 1;
const OUTPUT: u32 = 2;
const CLIENT: u32 = 3;

/// After so many queues full of output the event loop gets a turn.
const ROUNDS: usize = 4;
/// Between two lines in the log about output that was lost.
const LOG_PAUSE: Duration = Duration::from_secs(60);

/// What is between a console and the device that the guest sees: two queues, and a descriptor that wakes the console.
pub trait GuestSide: Sized {
    /// Empty queues.
    ///
    /// # Errors
    ///
    /// The host has no room for a descriptor.
    fn new() -> io::Result<Arc<Self>>;

    /// A descriptor that becomes readable when the console has something to do. It need not be read: watch for edges.
    fn woken(&self) -> RawFd;

    /// Has the console look at this port once more.
    fn wake(&self);

    /// Moves all output into `empty`, which becomes the queue, and returns how many bytes were lost since the last time.
    fn take_output(&self, empty: &mut VecDeque<u8>) -> u64;

    /// Whether output waits.
    fn has_output(&self) -> bool;

    /// Adds a message of ours to the output.
    fn print(&self, text: &str);

    /// From now on output goes nowhere, and wakes nobody.
    fn discard_output(&self);

    /// How many bytes of input there is room for. After a 0 the console is woken once there is room.
    fn input_room(&self) -> usize;

    /// Adds input, at most what [`Self::input_room`] said and a byte for a key that was held back.
    fn push_input(&self, bytes: &[u8]);
}

/// The host's side of the guest's console; the main thread's event loop runs it.
pub struct Console<P = serial::Port> {
    port: Arc<P>,
    end: End,
    input: Option<Channel>,
    output: Output,
    /// Output that has left the port and has not been written.
    unsent: VecDeque<u8>,
    /// The reader has no room.
    blocked: bool,
    /// The client will send nothing more, and may still read.
    half_closed: bool,
    /// Out of use, to be taken out of the event loop before they are closed.
    retired: Vec<Channel>,
    losses: Losses,
    /// Runs when the user types Ctrl-A x.
    quit: Box<dyn Fn() + Send>,
}

/// The host's side of the virtio console.
pub type VirtioConsole = Console<hvc::Port>;

/// What is behind the channels.
enum End {
    /// Nothing at all.
    Off,
    /// Nothing that could come back once it has gone.
    Plain,
    Terminal(Terminal, Escape),
    Pty(Pty),
    Socket(Listener),
}

enum Output {
    /// There is no reader, and never will be.
    Nowhere,
    /// There is no reader yet.
    Later,
    Channel(Channel),
    File(LogFile),
}

impl Console {
    /// Opens what `spec` names, for the serial port. A terminal becomes raw only when the console is given to an event
    /// loop. `quit` runs on the event loop's thread when the user types Ctrl-A x.
    ///
    /// # Errors
    ///
    /// The file, pseudo-terminal or socket cannot be had; the message says which and what to do.
    pub fn open(spec: &SerialSpec, quit: Box<dyn Fn() + Send>) -> anyhow::Result<Self> {
        Self::build(spec, quit)
    }

    /// A serial port for a machine that is being built. The machine before it must be gone: input that it has not read
    /// goes to the new one.
    pub fn attach(&self, irq: Irq) -> Serial {
        self.port.attach(irq)
    }
}

impl VirtioConsole {
    /// As [`Console::open`], for the virtio console.
    ///
    /// # Errors
    ///
    /// See there.
    pub fn open_hvc(spec: &SerialSpec, quit: Box<dyn Fn() + Send>) -> anyhow::Result<Self> {
        let console = Self::build(spec, quit)?;
        console.resize();
        Ok(console)
    }

    /// A virtio console for a machine that is being built. The machine before it must be gone: input that it has not
    /// read goes to the new one.
    pub fn attach_hvc(&self) -> Hvc {
        Hvc::new(self.port.clone())
    }

    /// Tells the guest the terminal's size: for SIGWINCH, and for SIGCONT.
    pub fn resize(&self) {
        if let End::Terminal(terminal, _) = &self.end
            && let Some(size) = terminal.size()
        {
            self.port.resize(size);
        }
    }
}

impl<P: GuestSide> Console<P> {
    fn build(spec: &SerialSpec, quit: Box<dyn Fn() + Send>) -> anyhow::Result<Self> {
        match spec {
            SerialSpec::Off => Self::new(End::Off, None, Output::Nowhere, quit),
            SerialSpec::Stdio => Self::stdio(io::stdin().as_fd(), io::stdout().as_fd(), quit),
            SerialSpec::File(spec) => Self::new(End::Plain, None, Output::File(LogFile::open(spec)?), quit),
            SerialSpec::Pty(spec) => {
                let (pty, master) = Pty::open(spec)?;
                let again = master.try_clone().context("Cannot duplicate the pseudo-terminal's descriptor")?;
                let (input, output) = (Channel::own(master), Channel::own(again));
                Self::new(End::Pty(pty), Some(input), Output::Channel(output), quit)
            }
            SerialSpec::Socket(spec) => Self::new(End::Socket(Listener::open(spec)?), None, Output::Later, quit),
        }
    }

    pub(crate) fn stdio(
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        quit: Box<dyn Fn() + Send>,
    ) -> anyhow::Result<Self> {
        let at_terminal = io::IsTerminal::is_terminal(&input);
        let input = Channel::inherited(input, Direction::Input)?;
        let output = Channel::inherited(output, Direction::Output)?;
        let end = if at_terminal { End::Terminal(Terminal::new(&input)?, Escape::default()) } else { End::Plain };
        Self::new(end, Some(input), Output::Channel(output), quit)
    }

    fn new(end: End, input: Option<Channel>, output: Output, quit: Box<dyn Fn() + Send>) -> anyhow::Result<Self> {
        let port = P::new().context("Cannot make a timer for the console")?;
        if matches!(output, Output::Nowhere) {
            port.discard_output();
        }
        Ok(Self {
            port,
            end,
            input,
            output,
            unsent: VecDeque::new(),
            blocked: false,
            half_closed: false,
            retired: Vec::new(),
            losses: Losses::default(),
            quit,
        })
    }

    /// Whether the machine is to have no such console at all.
    pub fn is_off(&self) -> bool {
        matches!(self.end, End::Off)
    }

    /// Where to connect to, for a console that one has to connect to: `pty /dev/pts/3`.
    pub fn describe(&self) -> Option<String> {
        match &self.end {
            End::Pty(pty) => Some(pty.describe()),
            End::Socket(listener) => Some(listener.describe()),
            End::Off | End::Plain | End::Terminal(..) => None,
        }
    }

    /// Writes everything that the guest has said, for its end. Waits for a reader no longer than `limit`.
    pub fn drain(&mut self, limit: Duration) {
        let start = Instant::now();
        while self.write_output() || self.blocked {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return;
            }
            if self.blocked
                && let Output::Channel(channel) = &self.output
            {
                channel.wait_for_room(left);
            }
        }
        if let End::Pty(pty) = &self.end {
            pty.wait_for_reader(limit.saturating_sub(start.elapsed()));
        }
    }

    /// Gives the terminal back, as Ctrl-Z would: for SIGTSTP, before [`stop_this_process`].
    pub fn release(&mut self) {
        if let End::Terminal(terminal, _) = &mut self.end {
            terminal.release();
        }
    }

    /// Takes the terminal again, if this process is in the foreground: for SIGCONT, whatever stopped the process.
    pub fn resume(&mut self) {
        if let End::Terminal(terminal, _) = &mut self.end {
            terminal.claim();
        }
        self.port.wake();
    }

    /// Writes output until there is none, or the reader has no room. Returns whether there is more to write now.
    fn write_output(&mut self) -> bool {
        self.blocked = false;
        for _ in 0..ROUNDS {
            if matches!(self.output, Output::Nowhere | Output::Later) {
                return false;
            }
            if self.unsent.is_empty() {
                let lost = self.port.take_output(&mut self.unsent);
                self.losses.add(lost);
            }
            while !self.unsent.is_empty() {
                let (bytes, _) = self.unsent.as_slices();
                let result = match &mut self.output {
                    Output::Channel(channel) => channel.write(bytes),
                    Output::File(file) => file.write(bytes),
                    Output::Nowhere | Output::Later => return false,
                };
                match result {
                    Ok(written) if written > 0 => drop(self.unsent.drain(..written)),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return self.output_failed(&error),
                    _ => {
                        self.blocked = true;
                        return false;
                    }
                }
                // Only now, as the log may well go to the reader who had stopped.
                self.losses.report();
            }
            if !self.port.has_output() {
                return false;
            }
        }
        true
    }

    /// Decides what becomes of output that cannot be written. Returns whether writing may go on.
    fn output_failed(&mut self, error: &io::Error) -> bool {
        if self.reopen_pty() {
            return true;
        }
        match (&self.end, &self.output) {
            // The client has gone. What it sent before is read first.
            (End::Socket(_), _) if self.half_closed || self.input.is_none() => self.disconnect(),
            (End::Socket(_), _) => self.retire_output(Output::Later),
            (_, Output::File(_)) => self.skip_output(error),
            (_, Output::Channel(channel)) if channel.is_always_ready() => self.skip_output(error),
            _ => {
                log::warn!("Nobody reads the console any more, its output is dropped: {error}");
                self.unsent.clear();
                self.port.discard_output();
                self.retire_output(Output::Nowhere);
            }
        }
        false
    }

    /// Drops what cannot be written now, as on a full disk. What comes next is tried again.
    fn skip_output(&mut self, error: &io::Error) {
        self.losses.add(self.unsent.len() as u64);
        self.unsent.clear();
        self.losses.report_failure(error);
    }

    /// Reads input while there is some, and room for it.
    fn read_input(&mut self) {
        let mut buffer = [0; 4096];
        if let End::Terminal(terminal, _) = &mut self.end
            && !terminal.is_raw()
            && !terminal.claim()
        {
            return;
        }
        for _ in 0..ROUNDS * 4 {
            let room = self.port.input_room().min(buffer.len());
            let Some(input) = self.input.as_mut().filter(|_| room > 0 && !self.half_closed) else { return };
            match input.read(&mut buffer[..room]) {
                Ok(0) => return self.input_ended(None),
                Ok(read) => self.deliver(&buffer[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.input_ended(Some(&error)),
            }
        }
        // There may be more; the event loop gets a turn first.
        self.port.wake();
    }

    /// Passes input on, less the keys that are meant for us.
    fn deliver(&mut self, input: &[u8]) {
        let End::Terminal(_, escape) = &mut self.end else {
            return self.port.push_input(input);
        };
        let mut keys = Vec::with_capacity(input.len() + 1);
        let mut rest = input;
        while let Some((command, left)) = escape.filter(rest, &mut keys) {
            match command {
                Command::Quit => (self.quit)(),
                Command::Help => self.port.print(escape::HELP),
            }
            rest = left;
        }
        self.port.push_input(&keys);
    }

    /// The input is at its end, or cannot be read. The VM goes on without.
    fn input_ended(&mut self, error: Option<&io::Error>) {
        if self.reopen_pty() {
            return;
        }
        match (&mut self.end, error) {
            // The client may still want to read; its departure ends the connection.
            (End::Socket(_), None) if matches!(self.output, Output::Channel(_)) => self.half_closed = true,
            (End::Socket(_), _) => self.disconnect(),
            // Another process has been given the terminal, and may give it back.
            (End::Terminal(terminal, _), Some(_)) if terminal.lost_foreground() => terminal.forget(),
            _ => {
                if let Some(error) = error {
                    log::warn!("Cannot read the console's input, the guest gets no more of it: {error}");
                }
                self.retired.extend(self.input.take());
            }
        }
    }

    /// Takes a pseudo-terminal up again after a hang-up, which is the one way in which it fails.
    fn reopen_pty(&mut self) -> bool {
        match (&mut self.end, &self.input) {
            (End::Pty(pty), Some(master)) => pty.reopen(master.file()).is_ok(),
            _ => false,
        }
    }

    fn accept_clients(&mut self) {
        let End::Socket(listener) = &self.end else { return };
        while let Some(client) = listener.accept() {
            match (client.try_clone(), &self.output) {
                (Ok(again), Output::Later) if self.input.is_none() => {
                    self.input = Some(Channel::socket(client));
                    self.output = Output::Channel(Channel::socket(again));
                }
                _ => Listener::refuse(client),
            }
        }
    }

    /// The socket's client has gone; the next one is welcome.
    fn disconnect(&mut self) {
        self.half_closed = false;
        self.retired.extend(self.input.take());
        self.retire_output(Output::Later);
    }

    fn retire_output(&mut self, next: Output) {
        if let Output::Channel(channel) = std::mem::replace(&mut self.output, next) {
            self.retired.push(channel);
        }
    }

    /// Tells the event loop what to wait for from now on.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        for mut channel in self.retired.drain(..) {
            channel.watch(None, INPUT, ops);
        }
        let raw = !matches!(&self.end, End::Terminal(terminal, _) if !terminal.is_raw());
        if let Some(input) = &mut self.input {
            let wanted = if self.half_closed {
                Some(EventSet::empty())
            } else if !raw {
                // Keys are another process's business, until it turns out that the terminal is ours: one look a key.
                Some(EventSet::IN | EventSet::EDGE_TRIGGERED)
            } else {
                (self.port.input_room() > 0).then_some(EventSet::IN)
            };
            input.watch(wanted, INPUT, ops);
        }
        if let Output::Channel(output) = &mut self.output {
            output.watch(self.blocked.then_some(EventSet::OUT), OUTPUT, ops);
        }
    }
}

impl<P: GuestSide> MutEventSubscriber for Console<P> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // A new edge comes whenever the port's timer runs out, so that it need not be read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let mut watched = ops.add(Events::with_data_raw(self.port.woken(), WAKE, edge));
        if let End::Socket(listener) = &self.end {
            watched = watched.and(ops.add(Events::with_data(listener, CLIENT, edge)));
        }
        if let Err(error) = watched {
            log::error!("Cannot watch the console: {error}");
        }
        self.accept_clients();
        self.read_input();
        if self.write_output() {
            self.port.wake();
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CLIENT => self.accept_clients(),
            INPUT if self.half_closed => self.disconnect(),
            INPUT => self.read_input(),
            WAKE if self.input.as_ref().is_some_and(Channel::is_always_ready) => self.read_input(),
            _ => {}
        }
        if self.write_output() {
            self.port.wake();
        }
        self.watch(ops);
    }
}

/// Output that nobody got, told to the log now and then.
#[derive(Default)]
struct Losses {
    bytes: u64,
    told: Option<Instant>,
}

impl Losses {
    fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    fn report(&mut self) {
        if self.bytes > 0 && self.may_tell() {
            log::warn!("The console's reader was too slow: {} bytes of output were dropped", self.bytes);
            self.bytes = 0;
        }
    }

    fn report_failure(&mut self, error: &io::Error) {
        if self.may_tell() {
            log::warn!("Cannot write the console's output: {error}: {} bytes of output were dropped", self.bytes);
            self.bytes = 0;
        }
    }

    fn may_tell(&mut self) -> bool {
        let now = Instant::now();
        let may = self.told.is_none_or(|told| now.duration_since(told) >= LOG_PAUSE);
        if may {
            self.told = Some(now);
        }
        may
    }
}
