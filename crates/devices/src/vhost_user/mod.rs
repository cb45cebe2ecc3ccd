//! The front end of vhost-user: another process serves a device's queues (the protocol is the one of QEMU's document
//! "Vhost-user Protocol").
//!
//! The other maps all of guest RAM, so it is trusted with the guest; it is not trusted with us. Each request waits for
//! a bounded time, each answer is eight bytes and checked, and features are masked by what we know. Requests are
//! answered one by one where the other can (REPLY_ACK).
//!
//! The crate vhost has a front end, too, but takes the end of a socket's patience for a reason to try again, without
//! end. Left out on purpose: requests of the other (it is not given a channel for any), dirty pages, the other's
//! configuration space, and several queues of a kind.

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use memory::Ram;
use virtio::VirtQueue;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use crate::served::Served;

/// Requests, by number.
mod request {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_OWNER: u32 = 3;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
}

/// What stands in the flags of a message: the protocol's version, that it is an answer, that one is wanted.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Request, flags, and the length of what follows.
const HEADER: usize = 12;
/// The most pieces of memory in one table.
const MOST_REGIONS: usize = 8;

/// VHOST_USER_F_PROTOCOL_FEATURES, in the place of a device's feature.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
const REPLY_ACK: u64 = 1 << 3;

/// How long all answers to one call of [`Connection::start`] or [`Connection::stop`] may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection to a process that can serve queues.
pub(crate) struct Connection {
    socket: UnixStream,
    /// What the other can do, the protocol's bit included.
    features: u64,
    /// The protocol features that both have.
    protocol: u64,
    deadline: Instant,
}

impl Connection {
    /// Asks the process behind `socket` what it can do, and waits for its answers for as long as `patience`.
    ///
    /// # Errors
    ///
    /// It does not answer, or not as a process does that serves queues.
    pub(crate) fn open(socket: UnixStream, patience: Duration) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let mut other = Self { socket, features: 0, protocol: 0, deadline: Instant::now() + patience };
        other.features = other.ask(request::GET_FEATURES, &[])?;
        if other.features & virtio::features::VERSION_1 == 0 {
            return Err(broken("it serves only devices from before VIRTIO 1"));
        }
        if other.features & PROTOCOL_FEATURES != 0 {
            let protocol = other.ask(request::GET_PROTOCOL_FEATURES, &[])? & REPLY_ACK;
            other.tell(request::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
            other.protocol = protocol;
        }
        other.tell(request::SET_OWNER, &[], &[])?;
        Ok(other)
    }

    /// The device's features and the queues' that the other can do.
    pub(crate) fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// Hands the queues over, from where each is. `features` are those of the accepted ones that concern the other.
    ///
    /// # Errors
    ///
    /// The other refuses or does not answer, or cannot do what the driver has been promised.
    pub(crate) fn start(&mut self, queues: &[Served], memory: &Ram, features: u64) -> io::Result<()> {
        self.deadline = Instant::now() + PATIENCE;
        if features & !self.features != 0 {
            let missing = features & !self.features;
            return Err(broken(&format!("it cannot do what the guest was promised (features {missing:#x})")));
        }
        let features = features | self.features & PROTOCOL_FEATURES;
        self.tell(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        let (table, files) = table(memory)?;
        self.tell(request::SET_MEM_TABLE, &table, &files)?;
        for Served { queue, call, .. } in queues {
            let (index, state) = (u32::from(queue.index()), queue.state());
            self.tell(request::SET_VRING_NUM, &pair(index, state.size.into()), &[])?;
            self.tell(request::SET_VRING_BASE, &pair(index, state.next_avail.into()), &[])?;
            let mut addresses = pair(index, 0).to_vec();
            for address in [state.desc_table, state.used_ring, state.avail_ring, 0] {
                addresses.extend(address.to_le_bytes());
            }
            self.tell(request::SET_VRING_ADDR, &addresses, &[])?;
            self.tell(request::SET_VRING_CALL, &u64::from(index).to_le_bytes(), &[call.as_raw_fd()])?;
            self.tell(request::SET_VRING_KICK, &u64::from(index).to_le_bytes(), &[queue.kick().as_raw_fd()])?;
            if self.features & PROTOCOL_FEATURES != 0 {
                self.tell(request::SET_VRING_ENABLE, &pair(index, 1), &[])?;
            }
            // What the driver made available before has no kick that the other would see.
            let _ = queue.kick().write(1);
        }
        Ok(())
    }

    /// Takes a queue back. The other has stopped serving it when this returns without an error.
    ///
    /// # Errors
    ///
    /// The other does not answer. The queue goes on behind what has been given back.
    pub(crate) fn stop(&mut self, queue: &mut VirtQueue) -> io::Result<()> {
        self.deadline = Instant::now() + PATIENCE;
        let index = u32::from(queue.index());
        let answer = self.ask(request::GET_VRING_BASE, &pair(index, 0)).and_then(|answer| {
            let asked = answer & u64::from(u32::MAX) == u64::from(index);
            let position = u16::try_from(answer >> 32).ok().filter(|_| asked);
            position.ok_or_else(|| broken("it names another queue or no position where it was asked for one's"))
        });
        queue.take_back(answer.as_ref().ok().copied());
        answer.map(drop)
    }

    /// Sends a request, and where the other can, waits until it says that it has obeyed.
    fn tell(&mut self, request: u32, body: &[u8], files: &[RawFd]) -> io::Result<()> {
        if self.protocol & REPLY_ACK == 0 {
            return self.send(request, VERSION, body, files);
        }
        self.send(request, VERSION | NEED_REPLY, body, files)?;
        match self.answer(request)? {
            0 => Ok(()),
            error => Err(broken(&format!("it refuses request {request} ({error})"))),
        }
    }

    /// Sends a request that has an answer.
    fn ask(&mut self, request: u32, body: &[u8]) -> io::Result<u64> {
        self.send(request, VERSION, body, &[])?;
        self.answer(request)
    }

    fn send(&mut self, request: u32, flags: u32, body: &[u8], files: &[RawFd]) -> io::Result<()> {
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        for field in [request, flags, length] {
            message.extend(field.to_le_bytes());
        }
        message.extend(body);
        loop {
            self.socket.set_write_timeout(Some(self.left()?))?;
            match self.socket.send_with_fds(&[&message[..]], files) {
                Ok(sent) if sent == message.len() => return Ok(()),
                // A socket that does not take a few hundred bytes at once has a reader who does not read.
                Ok(_) => return Err(ErrorKind::TimedOut.into()),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) if error.errno() == libc::EAGAIN => return Err(ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Every answer that is asked for here has eight bytes.
    fn answer(&mut self, request: u32) -> io::Result<u64> {
        let mut message = [0; HEADER + 8];
        let mut filled = 0;
        while filled < message.len() {
            self.socket.set_read_timeout(Some(self.left()?))?;
            match self.socket.read(&mut message[filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                Err(error) => return Err(error),
            }
        }
        let field = |at: usize| u32::from_le_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]]);
        if (field(0), field(4) & (VERSION_MASK | REPLY), field(8)) != (request, VERSION | REPLY, 8) {
            return Err(broken(&format!("it answers something else than request {request}")));
        }
        Ok(u64::from(field(12)) | u64::from(field(16)) << 32)
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl AsRawFd for Connection {
    /// Ready when the other has gone, or speaks unasked, which it must not.
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The memory table: all of RAM, at the addresses that the guest has for it, so that ours stay with us.
fn table(memory: &Ram) -> io::Result<(Vec<u8>, Vec<RawFd>)> {
    let count = memory.num_regions();
    if count > MOST_REGIONS {
        return Err(io::Error::other("guest memory has more pieces than vhost-user has room for"));
    }
    let mut table = pair(u32::try_from(count).map_err(io::Error::other)?, 0).to_vec();
    let mut files = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or_else(|| {
            io::Error::other("guest memory cannot be shared with another process: say --mem …,shared")
        })?;
        let start = region.start_addr().0;
        for field in [start, region.len(), start, file.start()] {
            table.extend(field.to_le_bytes());
        }
        files.push(file.file().as_raw_fd());
    }
    Ok((table, files))
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    (u64::from(first) | u64::from(second) << 32).to_le_bytes()
}

fn broken(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}
