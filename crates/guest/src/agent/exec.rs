//! Runs a program for the host: its input and output, signals, its terminal, its end.
//!
//! One thread does it all with poll(2), and never waits for the program or for the host alone: a signal comes through
//! while the program reads no input and while the host takes no output. What is kept meanwhile is bounded by the window
//! in one direction and by one read in the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::frame::{self, Decoder, Frame, Kind, MOST_PAYLOAD};
use guest::request::{Answer, Control, Exec, Size, WINDOW};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::ioctl_fionread;
use rustix::process::WaitStatus;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::program::{NotStarted, prepare};
use super::reaper::{Child, Reaper};
use super::stream;

/// How long a program whose host has gone may take to end after SIGHUP.
const HANGUP: Duration = Duration::from_secs(2);
/// How long whoever has inherited the program's output may say nothing before it is taken for a daemon.
const SILENCE: Duration = Duration::from_millis(100);
/// How long such a one may go on without silence.
const REST: Duration = Duration::from_secs(1);
/// End of input, typed at a terminal.
const EOT: u8 = 4;

/// Runs a program to its end, or to the connection's end. `before_report` is called when the program has ended.
///
/// # Errors
///
/// The connection has ended, or was at fault. The program does not run any more.
pub(crate) fn run(reaper: &Reaper, stream: &File, exec: &Exec, before_report: fn()) -> io::Result<()> {
    let mut session = match Session::start(reaper, stream, exec) {
        Ok(session) => session,
        Err(not_started) => {
            before_report();
            return frame::write_message(&mut &*stream, &Answer::from(not_started));
        }
    };
    let status = session.run().inspect_err(|_| session.hang_up())?;
    before_report();
    session.report(status)
}

struct Session<'a> {
    reaper: &'a Reaper,
    stream: &'a File,
    child: Arc<Child>,
    decoder: Decoder,
    /// Frames for the host, and how many of their bytes have been sent.
    unsent: Vec<u8>,
    sent: usize,
    /// The program's standard input, or its terminal, if it may still be written to.
    stdin: Option<OwnedFd>,
    /// Bytes for it.
    input: Vec<u8>,
    /// The host has nothing more to say to it.
    input_ended: bool,
    /// Bytes that were taken from `input` and not yet given back to the host's window.
    taken: usize,
    outputs: Vec<Output>,
    /// The program's end of its terminal. While we have it, the program can close the terminal and open it again.
    terminal: Option<OwnedFd>,
    is_terminal: bool,
    end: Option<End>,
    buffer: Box<[u8]>,
}

struct Output {
    kind: Kind,
    fd: Option<OwnedFd>,
    /// Bytes that were there when the program ended, and have not been read.
    owed: usize,
}

/// The program's end.
struct End {
    status: WaitStatus,
    since: Instant,
    /// When there was last any output.
    spoke: Instant,
}

/// What poll has found.
#[derive(Default)]
struct Ready {
    incoming: bool,
    outgoing: bool,
    stdin: bool,
    outputs: [bool; 2],
    child: bool,
}

impl<'a> Session<'a> {
    fn start(reaper: &'a Reaper, stream: &'a File, exec: &Exec) -> Result<Self, NotStarted> {
        let mut prepared = prepare(&exec.program, exec.terminal.is_some())?;
        let no_room = |error: io::Error| NotStarted::other(format!("Cannot make a terminal or pipe: {error}"));
        let command = &mut prepared.command;
        let (mut stdin, mut terminal) = (None, None);
        let outputs = if let Some(size) = exec.terminal {
            let (ours, theirs) = open_terminal(size, prepared.uid).map_err(no_room)?;
            let copy = || theirs.try_clone().map_err(no_room);
            command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
            terminal = Some(theirs);
            stdin = Some(ours.try_clone().map_err(no_room)?);
            vec![Output { kind: Kind::Stdout, fd: Some(ours), owed: 0 }]
        } else {
            let pipe = || io::pipe().map_err(no_room);
            command.stdin(Stdio::null());
            if exec.stdin {
                let (theirs, ours) = pipe()?;
                command.stdin(theirs);
                stdin = Some(never_wait(ours.into()).map_err(no_room)?);
            }
            let ((out, their_out), (err, their_err)) = (pipe()?, pipe()?);
            command.stdout(their_out).stderr(their_err);
            let output = |kind, fd: io::PipeReader| {
                Ok(Output { kind, fd: Some(never_wait(fd.into()).map_err(no_room)?), owed: 0 })
            };
            vec![output(Kind::Stdout, out)?, output(Kind::Stderr, err)?]
        };
        let child = prepared.start(reaper)?;
        let mut session = Self {
            reaper,
            stream,
            child,
            decoder: Decoder::default(),
            unsent: Vec::new(),
            sent: 0,
            stdin,
            input: Vec::new(),
            input_ended: false,
            taken: 0,
            outputs,
            terminal,
            is_terminal: exec.terminal.is_some(),
            end: None,
            buffer: vec![0; MOST_PAYLOAD].into(),
        };
        session.say(&Answer::Started);
        Ok(session)
    }

    /// Goes on until the program has ended and all its output has been sent.
    fn run(&mut self) -> io::Result<WaitStatus> {
        loop {
            if let Some(status) = self.over() {
                return Ok(status);
            }
            let ready = self.wait()?;
            if ready.incoming {
                self.receive()?;
            }
            if ready.outgoing {
                self.send()?;
            }
            if ready.stdin {
                self.feed();
            }
            for at in (0..self.outputs.len()).filter(|at| ready.outputs[*at]) {
                self.read(at)?;
            }
            if ready.child {
                self.note_end();
            }
        }
    }

    /// How the program has ended, if nothing more is to be waited for.
    fn over(&self) -> Option<WaitStatus> {
        let end = self.end.as_ref().filter(|_| self.unsent.is_empty())?;
        let closed = self.outputs.iter().all(|output| output.fd.is_none());
        let paid = self.outputs.iter().all(|output| output.owed == 0);
        let over = closed || end.spoke.elapsed() >= SILENCE || (paid && end.since.elapsed() >= REST);
        over.then_some(end.status)
    }

    fn wait(&self) -> io::Result<Ready> {
        let idle = self.unsent.is_empty();
        let wanted = if idle { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let stdin = self.stdin.as_ref().filter(|_| !self.input.is_empty() || self.input_ended);
        let outputs = self.outputs.iter().filter(|_| idle).filter_map(|output| output.fd.as_ref());
        let child = self.end.is_none().then(|| self.child.as_fd());

        let mut list = vec![PollFd::new(self.stream, wanted)];
        list.extend(stdin.map(|fd| PollFd::new(fd, PollFlags::OUT)));
        list.extend(child.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        list.extend(outputs.map(|fd| PollFd::new(fd, PollFlags::IN)));
        let limit = self.end.as_ref().filter(|_| idle).map(|_| stream::timespec(SILENCE));
        match poll(&mut list, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(error.into()),
        }

        let mut found = list.iter().map(PollFd::revents);
        let mut next = || found.next().unwrap_or(PollFlags::empty());
        let stream = next();
        let mut ready = Ready { outgoing: stream.contains(PollFlags::OUT), ..Ready::default() };
        ready.incoming = stream.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        ready.stdin = stdin.is_some() && !next().is_empty();
        ready.child = child.is_some() && !next().is_empty();
        for (at, output) in self.outputs.iter().enumerate() {
            ready.outputs[at] = idle && output.fd.is_some() && !next().is_empty();
        }
        Ok(ready)
    }

    /// Takes what the host has to say.
    fn receive(&mut self) -> io::Result<()> {
        match stream::receive(self.stream, &mut self.buffer)? {
            None => return Ok(()),
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => self.decoder.feed(&self.buffer[..count]),
        }
        while let Some(frame) = self.decoder.next()? {
            self.obey(&frame)?;
        }
        Ok(())
    }

    fn obey(&mut self, frame: &Frame) -> io::Result<()> {
        match frame.kind {
            Kind::Stdin if frame.payload.is_empty() => self.input_ended = true,
            Kind::Stdin => {
                if self.input.len() + self.taken + frame.payload.len() > WINDOW {
                    return Err(io::Error::other("The host sent more input than the window allows"));
                }
                self.input.extend_from_slice(&frame.payload);
                if self.stdin.is_none() {
                    self.close_stdin();
                }
            }
            _ => match frame.message()? {
                Control::Signal(signal) => self.reaper.signal(&self.child, signal),
                Control::Resize(size) => {
                    if let Some(terminal) = &self.terminal {
                        // At worst it keeps its size.
                        let _ = rustix::termios::tcsetwinsize(terminal, winsize(size));
                    }
                }
            },
        }
        Ok(())
    }

    /// Gives the program its input.
    fn feed(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        if !self.input.is_empty() {
            match stream::not_yet(rustix::io::write(stdin, &self.input)) {
                Ok(count) => {
                    self.taken += self.input.drain(..count.unwrap_or(0)).len();
                }
                // The program reads no more.
                Err(_) => return self.close_stdin(),
            }
        } else if self.is_terminal {
            // A terminal has no end: what reads it is told so by a character, and can read on.
            self.input_ended = !matches!(stream::not_yet(rustix::io::write(stdin, &[EOT])), Ok(Some(1)) | Err(_));
        }
        if self.input.is_empty() && self.input_ended && !self.is_terminal {
            self.close_stdin();
        }
        self.open_window();
    }

    fn close_stdin(&mut self) {
        self.stdin = None;
        self.taken += self.input.drain(..).len();
        self.open_window();
    }

    fn open_window(&mut self) {
        if self.taken >= WINDOW / 4 || (self.taken > 0 && self.input.is_empty()) {
            // It is at most the window.
            let bytes = u32::try_from(std::mem::take(&mut self.taken)).unwrap_or(u32::MAX);
            self.say(&Answer::Window { bytes });
        }
    }

    /// Takes output of the program.
    fn read(&mut self, at: usize) -> io::Result<()> {
        let output = &mut self.outputs[at];
        let Some(fd) = &output.fd else { return Ok(()) };
        match stream::not_yet(rustix::io::read(fd, &mut *self.buffer)) {
            Ok(None) => {}
            // A terminal that nobody has open any more answers with an error.
            Ok(Some(0)) | Err(_) => (output.fd, output.owed) = (None, 0),
            Ok(Some(count)) => {
                output.owed = output.owed.saturating_sub(count);
                frame::encode(output.kind, &self.buffer[..count], &mut self.unsent)?;
                if let Some(end) = &mut self.end {
                    end.spoke = Instant::now();
                }
            }
        }
        Ok(())
    }

    fn note_end(&mut self) {
        let Some(status) = self.child.status() else { return };
        for output in &mut self.outputs {
            let owed = output.fd.as_ref().and_then(|fd| ioctl_fionread(fd).ok()).unwrap_or(0);
            output.owed = usize::try_from(owed).unwrap_or(usize::MAX);
        }
        let now = Instant::now();
        (self.end, self.terminal) = (Some(End { status, since: now, spoke: now }), None);
        self.close_stdin();
    }

    fn say(&mut self, answer: &Answer) {
        frame::encode_message(answer, &mut self.unsent).expect("these answers are a few bytes");
    }

    fn send(&mut self) -> io::Result<()> {
        self.sent += stream::send(self.stream, &self.unsent[self.sent..])?.unwrap_or(0);
        if self.sent == self.unsent.len() {
            self.unsent.clear();
            self.sent = 0;
            if let Some(end) = &mut self.end {
                // While the host took nothing, nothing was read.
                end.spoke = Instant::now();
            }
        }
        Ok(())
    }

    fn report(&mut self, status: WaitStatus) -> io::Result<()> {
        let answer = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Answer::Exited { code: u8::try_from(code).unwrap_or(u8::MAX) },
            (None, signal) => Answer::Killed { signal: signal.unwrap_or(0) },
        };
        frame::write_message(&mut &*self.stream, &answer)
    }

    /// The host has gone: so does the program. Its output stays open meanwhile, lest that be what kills it.
    fn hang_up(&mut self) {
        for signal in [libc::SIGHUP, libc::SIGCONT] {
            self.reaper.signal(&self.child, signal);
        }
        if !stream::wait_for(&*self.child, PollFlags::IN, HANGUP) {
            self.reaper.signal(&self.child, libc::SIGKILL);
        }
    }
}

/// A new terminal: our end, and the program's, which is its user's.
fn open_terminal(size: Size, uid: Option<u32>) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    rustix::termios::tcsetwinsize(&theirs, winsize(size))?;
    if let Some(uid) = uid {
        rustix::fs::fchown(&theirs, Some(rustix::fs::Uid::from_raw(uid)), None)?;
    }
    Ok((never_wait(ours)?, theirs))
}

fn winsize(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn never_wait(fd: OwnedFd) -> io::Result<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}

#[cfg(test)]
mod tests;
