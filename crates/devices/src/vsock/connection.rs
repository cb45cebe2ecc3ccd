//! One stream between a Unix socket of the host and a port of the guest, with its credit (VIRTIO 1.2, section 5.10.6.3).
//!
//! Towards the guest nothing is buffered: the socket is read when the guest has given a buffer and credit. Towards the
//! host, what the socket has no room for waits in [`Connection::unsent`], which the credit that we give bounds.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use virtio::{Chain, EventSet, GuestFault};

use super::packet::{HEADER, HOST, Header, NO_RECEIVE, NO_SEND, NOTHING, Ports, STREAM, op};
use super::sys;

/// How many bytes the guest may send before they have left for the host.
pub(super) const BUFFER: u32 = 128 << 10;
/// The most bytes of one packet to the guest.
const MOST_DATA: u32 = 64 << 10;
/// The longest line `CONNECT <port>\n`, and some room for spaces.
const LONGEST_COMMAND: usize = 32;

/// A connection of either side's making.
pub(super) struct Connection {
    socket: UnixStream,
    pub(super) state: State,
    pub(super) ports: Ports,
    /// Whether the guest has a connection of this name.
    pub(super) known: bool,
    /// What the guest sent and the socket had no room for.
    unsent: VecDeque<u8>,
    /// Bytes from the guest, those of them that have left for the host, and how many of these the guest knows of.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes to the guest, those of them that it has read, and how many it has room for.
    sent: Wrapping<u32>,
    peer_forwarded: Wrapping<u32>,
    peer_buffer: u32,
    /// What the host, and what the guest will not do any more: `NO_SEND`, `NO_RECEIVE`.
    ended: u32,
    peer_ended: u32,
    /// There is something to read in the socket.
    readable: bool,
    /// The host's end has been closed.
    hung_up: bool,
    /// Packets that the guest is to get.
    owed: Owed,
    /// The guest was asked for credit, and has given none since.
    asked: bool,
    /// For the handler: it stands in the list of those who have something for the guest.
    pub(super) queued: bool,
    /// For the handler: what the socket is watched for; `None` is not at all.
    pub(super) watched: Option<EventSet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A client of the host's has yet to say where it wants to go.
    Command([u8; LONGEST_COMMAND], usize),
    /// The guest has yet to answer.
    Requested,
    Open,
    /// The host has done with it, and the guest has yet to say that it has.
    Closing,
    /// The guest has done with it, and the host has yet to take the rest.
    Draining,
    /// Nobody needs it any more.
    Over,
}

#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit: bool,
    ask: bool,
}

/// What a client of the host's has said so far.
pub(super) enum Command {
    Incomplete,
    Connect(u32),
    Wrong,
}

impl Connection {
    /// A client of the host's, which has not said anything.
    pub(super) fn from_host(socket: UnixStream) -> Self {
        Self::new(socket, State::Command([0; LONGEST_COMMAND], 0), Ports { host: 0, guest: 0 })
    }

    /// The guest's request, for which the host has a socket.
    pub(super) fn from_guest(socket: UnixStream, ports: Ports) -> Self {
        let mut connection = Self::new(socket, State::Open, ports);
        (connection.known, connection.owed.response) = (true, true);
        connection
    }

    fn new(socket: UnixStream, state: State, ports: Ports) -> Self {
        Self {
            socket,
            state,
            ports,
            known: false,
            unsent: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            peer_forwarded: Wrapping(0),
            peer_buffer: 0,
            ended: 0,
            peer_ended: 0,
            readable: false,
            hung_up: false,
            owed: Owed::default(),
            asked: false,
            queued: false,
            watched: None,
        }
    }

    /// Reads the client's first line, `CONNECT <port>\n`, and nothing behind it.
    pub(super) fn read_command(&mut self) -> Command {
        let State::Command(line, length) = &mut self.state else { return Command::Wrong };
        let free = &mut line[*length..];
        let seen = match sys::peek(&self.socket, free) {
            Ok(seen) if seen > 0 => seen,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Command::Incomplete;
            }
            _ => return Command::Wrong,
        };
        let end = free[..seen].iter().position(|byte| *byte == b'\n');
        let take = end.map_or(seen, |end| end + 1);
        match io::Read::read(&mut &self.socket, &mut free[..take]) {
            Ok(taken) if taken == take => *length += taken,
            _ => return Command::Wrong,
        }
        match end {
            Some(_) => parse_command(&line[..*length]).map_or(Command::Wrong, Command::Connect),
            None if *length == line.len() => Command::Wrong,
            None => Command::Incomplete,
        }
    }

    /// The client has said where it wants to go: the guest is asked.
    pub(super) fn request(&mut self, ports: Ports) {
        (self.state, self.ports, self.owed.request) = (State::Requested, ports, true);
    }

    /// The guest lets the client in, who is told the host's port.
    pub(super) fn respond(&mut self) {
        self.state = State::Open;
        let line = format!("OK {}\n", self.ports.host);
        // A socket that nothing has been written to has room for it, unless its other end has gone.
        if !matches!(sys::send_bytes(&self.socket, line.as_bytes()), Ok(sent) if sent == line.len()) {
            self.end(NO_RECEIVE);
        }
    }

    /// Takes over what every packet of the guest says about its room.
    pub(super) fn take_credit(&mut self, header: &Header) {
        (self.peer_buffer, self.peer_forwarded) = (header.buf_alloc, Wrapping(header.fwd_cnt));
        let none = self.credit() == 0;
        self.asked &= none;
        self.owed.ask &= none;
    }

    /// The guest wants to know our room.
    pub(super) fn owe_credit(&mut self) {
        self.owed.credit = true;
    }

    /// Passes a packet's data on. Whether the guest was allowed to send it.
    pub(super) fn deliver(&mut self, chain: &mut Chain, length: u32) -> Result<bool, GuestFault> {
        let allowed = self.peer_ended & NO_SEND == 0 && length <= BUFFER - (self.received - self.forwarded).0;
        if !allowed {
            return Ok(false);
        }
        self.received += length;
        if self.ended & NO_RECEIVE != 0 {
            self.forwarded = self.received;
            return Ok(true);
        }
        let (mut at, end) = (HEADER, HEADER + length as usize);
        if self.unsent.is_empty() && length > 0 {
            match sys::send(&self.socket, chain.readable_range(at..end)?) {
                Ok(sent) => {
                    self.forward(sent);
                    at += sent;
                }
                Err(error) if is_temporary(&error) => {}
                Err(_) => {
                    self.end(NO_RECEIVE);
                    return Ok(true);
                }
            }
        }
        let mut piece = [0; 4096];
        while at < end {
            let piece = &mut piece[..(end - at).min(4096)];
            chain.read_at(at, piece)?;
            if self.unsent.capacity() == 0 {
                self.unsent.reserve_exact(BUFFER as usize);
            }
            self.unsent.extend(&*piece);
            at += piece.len();
        }
        Ok(true)
    }

    /// The guest says what it will not do any more. Whether that is everything.
    pub(super) fn end_of_guest(&mut self, flags: u32) -> bool {
        self.peer_ended |= flags & NOTHING;
        self.pass_ends_on();
        self.peer_ended == NOTHING
    }

    /// The guest has done with the connection; the host still gets what the guest sent before.
    pub(super) fn drain(&mut self) {
        (self.peer_ended, self.known) = (NOTHING, false);
        self.state = if self.unsent.is_empty() || self.ended & NO_RECEIVE != 0 { State::Over } else { State::Draining };
    }

    /// The socket is ready for something that it is watched for, or its other end has gone.
    pub(super) fn ready(&mut self) {
        let watched = self.watched.unwrap_or(EventSet::empty());
        self.readable |= watched.contains(EventSet::IN);
        if watched.contains(EventSet::OUT) {
            self.flush();
        }
        if watched.is_empty() {
            self.hung_up = true;
            match self.state {
                State::Requested => self.end(NOTHING),
                State::Open if !self.may_read() => self.end(NOTHING),
                _ => {}
            }
        }
    }

    /// What the socket is to be watched for; `None` is not at all. The empty set is the far end's departure.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let mut set = EventSet::empty();
        match self.state {
            State::Command(..) => set = EventSet::IN,
            State::Open if self.may_read() && !self.readable => set = EventSet::IN,
            State::Requested | State::Open | State::Draining => {}
            State::Closing | State::Over => return None,
        }
        if !self.unsent.is_empty() {
            set |= EventSet::OUT;
        }
        (!set.is_empty() || !self.hung_up).then_some(set)
    }

    /// Whether the guest is to get something, and could.
    pub(super) fn wants_to_send(&self) -> bool {
        self.next().is_some()
    }

    /// Makes the next packet for the guest. Returns its length, or `None` if there is nothing after all.
    pub(super) fn fill(&mut self, chain: &mut Chain, guest: u64) -> Result<Option<u32>, GuestFault> {
        while let Some((op, flags)) = self.next() {
            let mut len = 0;
            if op == op::RW {
                match self.read(chain)? {
                    Some(read) => len = read,
                    None => continue,
                }
            }
            match op {
                op::REQUEST => (self.owed.request, self.known) = (false, true),
                op::RESPONSE => self.owed.response = false,
                op::SHUTDOWN => self.owed.shutdown = false,
                op::CREDIT_REQUEST => (self.owed.ask, self.asked) = (false, true),
                _ => {}
            }
            self.owed.credit = false;
            self.told = self.forwarded;
            let header = Header {
                src_cid: HOST,
                dst_cid: guest,
                src_port: self.ports.host,
                dst_port: self.ports.guest,
                len,
                kind: STREAM,
                op,
                flags,
                buf_alloc: BUFFER,
                fwd_cnt: self.forwarded.0,
            };
            chain.write_at(0, &header.encode())?;
            return Ok(Some(len + u32::try_from(HEADER).expect("a header is small")));
        }
        Ok(None)
    }

    fn next(&self) -> Option<(u16, u32)> {
        let plain = |op: u16| Some((op, 0));
        match self.state {
            State::Requested if self.owed.request => return plain(op::REQUEST),
            State::Open | State::Closing => {}
            _ => return None,
        }
        if self.owed.response {
            return plain(op::RESPONSE);
        }
        if self.owed.shutdown {
            return Some((op::SHUTDOWN, self.ended));
        }
        if self.state == State::Open && self.readable && self.may_read() && self.credit() > 0 {
            return plain(op::RW);
        }
        if self.owed.credit || (self.forwarded - self.told).0 >= BUFFER / 2 {
            return plain(op::CREDIT_UPDATE);
        }
        self.owed.ask.then_some((op::CREDIT_REQUEST, 0))
    }

    /// Reads the socket into the guest's buffer. `None` if nothing came.
    fn read(&mut self, chain: &mut Chain) -> Result<Option<u32>, GuestFault> {
        let room = u32::try_from(chain.writable_len() - HEADER).unwrap_or(u32::MAX);
        let room = room.min(self.credit()).min(MOST_DATA);
        if room == 0 {
            return Err(GuestFault::new("a buffer for packets has no room for data"));
        }
        let pieces = chain.writable_range(HEADER..HEADER + room as usize)?;
        match sys::receive(&self.socket, pieces) {
            Ok(read) if read > 0 => {
                let read = u32::try_from(read).expect("no more is read than there is room");
                self.sent += read;
                self.readable = read == room;
                self.owed.ask = self.credit() == 0 && !self.asked;
                return Ok(Some(read));
            }
            Ok(_) => {
                // The end of what the host sends. It may still want to receive, unless it has gone for good.
                self.hung_up |= sys::has_hung_up(&self.socket);
                self.end(if self.hung_up { NOTHING } else { NO_SEND });
            }
            Err(error) if is_temporary(&error) => {}
            Err(_) => self.end(NOTHING),
        }
        self.readable = false;
        Ok(None)
    }

    /// Writes what waits, as far as there is room.
    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match sys::send_bytes(&self.socket, self.unsent.as_slices().0) {
                Ok(sent) => {
                    drop(self.unsent.drain(..sent));
                    self.forward(sent);
                }
                Err(error) if is_temporary(&error) => return,
                Err(_) => return self.end(NO_RECEIVE),
            }
        }
        self.pass_ends_on();
        if self.state == State::Draining {
            self.state = State::Over;
        }
    }

    fn forward(&mut self, bytes: usize) {
        self.forwarded += u32::try_from(bytes).expect("no more is written than the guest may send");
    }

    /// The host will do less from now on.
    fn end(&mut self, flags: u32) {
        self.ended |= flags;
        if self.ended & NO_RECEIVE != 0 {
            self.unsent = VecDeque::new();
            self.forwarded = self.received;
        }
        match self.state {
            State::Open => {
                self.owed.shutdown = true;
                if self.ended == NOTHING {
                    self.state = State::Closing;
                }
            }
            State::Closing => {}
            _ if self.ended & NO_RECEIVE != 0 => self.state = State::Over,
            _ => {}
        }
    }

    /// Tells the host's end what the guest will not do any more. An error means that there is nobody to tell.
    fn pass_ends_on(&mut self) {
        if self.peer_ended & NO_RECEIVE != 0 {
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        if self.peer_ended & NO_SEND != 0 && self.unsent.is_empty() {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Whether what the host sends still has a reader.
    fn may_read(&self) -> bool {
        self.ended & NO_SEND == 0 && self.peer_ended & NO_RECEIVE == 0
    }

    /// How many bytes the guest has room for. A guest that claims to have read more than it got has room for none.
    fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub((self.sent - self.peer_forwarded).0)
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// The port of `CONNECT <port>\n`.
fn parse_command(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (command.eq_ignore_ascii_case("CONNECT") && digits && words.next().is_none()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_a_word_and_a_port() {
        for (line, port) in [
            ("CONNECT 52\n", Some(52)),
            ("connect  4294967295\r\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT\n", None),
            ("CONNECT +5\n", None),
            ("CONNECT 5 6\n", None),
            ("OPEN 5\n", None),
            ("\n", None),
        ] {
            assert_eq!(parse_command(line.as_bytes()), port, "{line:?}");
        }
    }
}
