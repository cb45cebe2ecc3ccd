//! One client's connection: bytes and at most one descriptor come in, responses go out, in the order of the requests.
//!
//! Nothing here blocks. A client that does not read its responses is not read from, so that what is kept for it stays
//! small; one that stalls within a request is dropped (see [`Connection::deadline`]).

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::http::{self, Fault, MOST_BODY, MOST_HEAD, Parsed, Request, Response};

/// How long a request may take to arrive, or its response to be read.
const PATIENCE: Duration = Duration::from_secs(10);

/// A client.
pub(crate) struct Connection {
    stream: UnixStream,
    /// Bytes of requests that have not been dealt with.
    input: Vec<u8>,
    /// Before there are so many of them, they make no request.
    needed: usize,
    /// A descriptor, and the place in `input` of the last byte that came with it.
    descriptor: Option<(usize, OwnedFd)>,
    /// Bytes of responses that the client has not taken.
    output: Vec<u8>,
    state: State,
    /// The client has nothing more to say.
    ended: bool,
    /// The client was told to go on with the body.
    continued: bool,
    /// When the last request was done, or the next one began.
    since: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The next request may come.
    Open,
    /// The machine has one; whether another may follow.
    Asked(bool),
    /// When all is written that there is, it is over.
    Closing,
}

impl Connection {
    /// A connection to a client that has just been let in. `stream` does not block.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            needed: 1,
            descriptor: None,
            output: Vec::new(),
            state: State::Open,
            ended: false,
            continued: false,
            since: Instant::now(),
        }
    }

    /// Takes what the client has sent, as far as there is room for it.
    pub(crate) fn receive(&mut self) -> io::Result<()> {
        while self.wants_input() {
            let mut chunk = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let room = chunk.len().min(MOST_HEAD + MOST_BODY - self.input.len());
            let buffers = &mut [IoSliceMut::new(&mut chunk[..room])];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let message = match recvmsg(&self.stream, buffers, &mut control, flags) {
                Ok(message) => message,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            // Those that are not kept are closed here.
            let mut descriptors = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            });
            let first = descriptors.next().and_then(|mut of_message| Some((of_message.next()?, of_message.next())));
            if message.bytes == 0 {
                self.ended = true;
                return Ok(());
            }
            if self.input.is_empty() {
                self.since = Instant::now();
            }
            self.input.extend_from_slice(&chunk[..message.bytes]);
            let too_many = message.flags.contains(ReturnFlags::CTRUNC)
                || first.as_ref().is_some_and(|(_, second)| second.is_some() || self.descriptor.is_some());
            if too_many {
                self.fail(&Fault { status: 400, message: "A request has one descriptor at most".into() });
            } else if let Some((descriptor, _)) = first {
                self.descriptor = Some((self.input.len() - 1, descriptor));
            }
        }
        Ok(())
    }

    /// The next request, and the file that came with it. There is none while the one before is not answered in full.
    pub(crate) fn next(&mut self) -> Option<(Request, Option<File>)> {
        if self.state != State::Open || !self.output.is_empty() || self.input.len() < self.needed {
            return None;
        }
        match http::parse(&self.input) {
            Ok(Parsed::Incomplete { needed, expects_continue }) => {
                self.needed = needed;
                if expects_continue && !std::mem::replace(&mut self.continued, true) {
                    self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                }
                None
            }
            Ok(Parsed::Complete(request, length)) => {
                self.input.drain(..length);
                (self.needed, self.continued) = (1, false);
                self.state = State::Asked(request.keep_alive);
                // A descriptor is the request's in which the bytes end that it came with.
                let file = match self.descriptor.take() {
                    Some((at, descriptor)) if at < length => Some(descriptor.into()),
                    Some((at, descriptor)) => {
                        self.descriptor = Some((at - length, descriptor));
                        None
                    }
                    None => None,
                };
                Some((request, file))
            }
            Err(fault) => {
                self.fail(&fault);
                None
            }
        }
    }

    /// Answers the request that [`next`](Self::next) gave last.
    pub(crate) fn answer(&mut self, response: &Response) {
        let keep_alive = self.state == State::Asked(true);
        response.write(&mut self.output, keep_alive);
        self.state = if keep_alive { State::Open } else { State::Closing };
        self.since = Instant::now();
    }

    /// Answers what is no request, and hears no more.
    pub(crate) fn fail(&mut self, fault: &Fault) {
        Response::fault(fault.status, &fault.message).write(&mut self.output, false);
        (self.state, self.descriptor, self.since) = (State::Closing, None, Instant::now());
        self.input.clear();
    }

    /// Writes what the client takes.
    pub(crate) fn send(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether nothing more will happen here.
    pub(crate) fn is_over(&self) -> bool {
        let done = self.output.is_empty() && (self.state == State::Closing || self.ended);
        done && !matches!(self.state, State::Asked(_))
    }

    pub(crate) fn wants_input(&self) -> bool {
        let room = self.input.len() < MOST_HEAD + MOST_BODY;
        self.state == State::Open && self.output.is_empty() && !self.ended && room
    }

    pub(crate) fn wants_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether it waits for the client to think of something.
    pub(crate) fn is_idle(&self) -> bool {
        self.state == State::Open && self.input.is_empty() && self.output.is_empty()
    }

    /// Since when it does what it does.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// When the client has stalled for too long; none where the client is not to do anything.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let waits = matches!(self.state, State::Asked(_)) || self.is_idle();
        (!waits).then(|| self.since + PATIENCE)
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
