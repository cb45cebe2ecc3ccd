//! `user`: passt, a program that turns the guest's frames into ordinary sockets of the host, started and watched by us.
//!
//! It is spoken to over a stream in which each frame comes after its length, 4 bytes, big-endian (QEMU's `-netdev
//! stream`). It gets its end as its standard input, so there is no path to a socket and nobody else can connect; and it
//! ends when ours is closed, however we end. (A signal at its parent's death would be lost as it gives up root, and to
//! arrange for one the whole process would have to be copied.)
//!
//! Left out on purpose: offloads, which the stream has no header for.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use virtio::Chain;

use super::port::scatter;
use super::sys::{Pieces, Read};
use super::{HEADER, LARGEST, NetSpec};
use crate::helper::{Backoff, Words};
use crate::starter::{self, Helper, Launched};

/// The program, looked for in `PATH`.
pub(super) const PROGRAM: &str = "passt";

const LENGTH: usize = 4;
/// Room for what one read takes.
const INCOMING: usize = 2 * LARGEST;

/// passt, whether it runs at the moment or not.
pub(super) struct Passt {
    helper: Helper,
    running: Option<Running>,
    /// When it is started again.
    pub(super) backoff: Backoff,
}

struct Running {
    process: starter::Running,
    started: Instant,
    socket: UnixStream,
    incoming: Box<[u8]>,
    /// Which part of `incoming` has not been given to the guest.
    from: usize,
    to: usize,
    /// The rest of a frame that the socket took the first part of.
    outgoing: Vec<u8>,
}

impl Passt {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// It is not there.
    pub(super) fn open(helper: Helper) -> anyhow::Result<Self> {
        let backoff = Backoff::new().context("Cannot make a timer for passt")?;
        let mut passt = Self { helper, running: None, backoff };
        passt.start()?;
        Ok(passt)
    }

    /// Starts it.
    fn start(&mut self) -> anyhow::Result<()> {
        let mut process = self.helper.start()?;
        let socket = process.socket.take().expect("it has just been started");
        let incoming = vec![0; INCOMING].into_boxed_slice();
        let outgoing = Vec::with_capacity(LENGTH + LARGEST);
        let started = Instant::now();
        self.running = Some(Running { process, started, socket, incoming, from: 0, to: 0, outgoing });
        Ok(())
    }

    /// The timer is ready. Returns whether it runs; otherwise the timer will be ready again.
    pub(super) fn restart(&mut self, name: &str) -> bool {
        if !self.backoff.due() || self.running.is_some() {
            return self.running.is_some();
        }
        match self.start() {
            Ok(()) => log::info!("{name}: passt runs again"),
            Err(error) => {
                log::warn!("{name}: passt is not started again: {error:#}");
                self.backoff.schedule(Duration::ZERO);
            }
        }
        self.running.is_some()
    }

    /// It has ended or lost its mind: clears away what is left, and sets the timer.
    pub(super) fn lost(&mut self, name: &str, why: &io::Error) {
        let Some(mut running) = self.running.take() else { return };
        let status = running.process.end();
        let words = running.process.words.last();
        log::warn!("{name}: passt has ended ({why}; {status}), the link is down until it runs again{words}");
        self.backoff.schedule(running.started.elapsed());
    }

    /// The descriptor to wait for, while it runs.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.socket.as_fd())
    }

    /// Whether there is something to send as soon as the socket takes it.
    pub(super) fn has_more(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.outgoing.is_empty())
    }

    /// Whether a frame has been read that [`receive`](Self::receive) has not given out.
    pub(super) fn holds_frame(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.whole().is_some())
    }

    /// Drops the frames that have been read while nobody was there to take them; the socket may hold more.
    pub(super) fn forget(&mut self) {
        if let Some(running) = &mut self.running {
            while let Some(frame) = running.whole() {
                running.from = frame.end;
            }
        }
    }

    /// The next frame, after an empty header, into `chains` and then into `rest`.
    pub(super) fn receive(&mut self, chains: &mut VecDeque<Chain>, rest: &mut [u8]) -> io::Result<Read> {
        let running = self.running.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let frame = running.next_frame()?;
        let room: usize = chains.iter().map(Chain::writable_len).sum();
        let (header, length) = ([0; HEADER], HEADER + frame.len());
        for (offset, bytes) in [(0, &header[..]), (HEADER, frame)] {
            let fits = room.saturating_sub(offset).min(bytes.len());
            scatter(chains, offset, &bytes[..fits]);
            let over = (offset + fits).saturating_sub(room);
            rest[over..over + bytes.len() - fits].copy_from_slice(&bytes[fits..]);
        }
        running.from += LENGTH + length - HEADER;
        Ok(Read { length, room })
    }

    /// Sends the frame in `chain`, of which `start` is the beginning, virtio header and all, where that is not empty.
    pub(super) fn send(&mut self, pieces: &mut Pieces, start: &[u8], chain: &mut Chain) -> io::Result<()> {
        self.flush()?;
        let running = self.running.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let length = chain.readable_len();
        let mut head = [0; LENGTH + super::guard::LOOKED_AT];
        let start = start.get(HEADER..).unwrap_or_default();
        let frame_length = u32::try_from(length - HEADER).map_err(|_| io::ErrorKind::InvalidInput)?;
        head[..LENGTH].copy_from_slice(&frame_length.to_be_bytes());
        head[LENGTH..LENGTH + start.len()].copy_from_slice(start);
        let head = &head[..LENGTH + start.len()];
        let body_at = HEADER + start.len();
        let body = chain.readable_range(body_at..length).map_err(io::Error::other)?;
        let sent = pieces.write(running.socket.as_fd(), head, body)?;
        // What is left has room: the vector was made for the largest frame.
        running.outgoing.extend_from_slice(head.get(sent..).unwrap_or_default());
        let left = body_at + sent.saturating_sub(head.len())..length;
        let at = running.outgoing.len();
        running.outgoing.resize(at + left.len(), 0);
        chain.read_at(left.start, &mut running.outgoing[at..]).map_err(io::Error::other)
    }

    /// Sends what is left of the last frame. `WouldBlock` if that is still too much.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        while !running.outgoing.is_empty() {
            let sent = running.socket.write(&running.outgoing)?;
            running.outgoing.drain(..sent);
        }
        Ok(())
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.process.end();
        }
    }
}

impl Running {
    /// The length of the frame that begins at `from`.
    fn length(&self) -> Option<usize> {
        let length = self.incoming[self.from..self.to].first_chunk::<LENGTH>()?;
        Some(usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX))
    }

    /// Where that frame is, once all of it has come.
    fn whole(&self) -> Option<Range<usize>> {
        let start = self.from + LENGTH;
        let end = start.checked_add(self.length()?)?;
        (end <= self.to).then_some(start..end)
    }

    /// That frame, after reading for it.
    fn next_frame(&mut self) -> io::Result<&[u8]> {
        loop {
            if let Some(frame) = self.whole() {
                return Ok(&self.incoming[frame]);
            }
            if let Some(length) = self.length()
                && length > LARGEST - HEADER
            {
                return Err(io::Error::other(format!("it sent a frame of {length} bytes")));
            }
            // A frame that has begun may not have room for its end.
            if self.from > 0 {
                self.incoming.copy_within(self.from..self.to, 0);
                (self.from, self.to) = (0, self.to - self.from);
            }
            match self.socket.read(&mut self.incoming[self.to..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.to += count,
            }
        }
    }
}

/// Starts `program` in passt's place.
pub(super) fn launch(program: &str, spec: &NetSpec) -> anyhow::Result<Launched> {
    let (socket, theirs) = UnixStream::pair().context(NO_SOCKET)?;
    let (words, their_words) = Words::pair().context(NO_SOCKET)?;
    socket.set_nonblocking(true).context(NO_SOCKET)?;
    let mut command = Command::new(program);
    command.args(arguments(spec)).stdout(Stdio::null());
    command.stdin(OwnedFd::from(theirs)).stderr(their_words);
    let child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow::anyhow!(
            "There is no {program} in PATH: install it (`apt install passt`), or say tap=NAME instead of user (vmm run: \
             --network none)"
        ),
        _ => anyhow::Error::new(error).context(format!("Cannot start {program}")),
    })?;
    Ok(Launched { child, socket, words })
}

const NO_SOCKET: &str = "Cannot make a socket for passt";

fn arguments(spec: &NetSpec) -> Vec<String> {
    let mut arguments: Vec<_> = ["--foreground", "--quiet", "--fd", "0"].map(str::to_owned).to_vec();
    if let Some(mtu) = spec.mtu {
        arguments.extend(["--mtu".to_owned(), mtu.to_string()]);
    }
    if let Some(net) = spec.address {
        arguments.extend(["--ipv4-only", "--no-map-gw"].map(str::to_owned));
        for (option, value) in [
            ("--address", net.address().to_string()),
            ("--netmask", net.prefix().to_string()),
            ("--gateway", net.gateway().to_string()),
            ("--dns-forward", net.dns().to_string()),
        ] {
            arguments.extend([option.to_owned(), value]);
        }
    }
    for publish in &spec.publish {
        let option = if publish.udp { "--udp-ports" } else { "--tcp-ports" };
        let ports = format!("{}/{}:{}", publish.address, publish.host, publish.guest);
        arguments.extend([option.to_owned(), ports]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_an_argument_of_its_own() {
        let spec: NetSpec = kv::from_str("user,mtu=1400,publish=[8080:80,0.0.0.0:22:22,53:5353/udp]").unwrap();
        let arguments = arguments(&spec).join(" ");
        assert_eq!(
            arguments,
            "--foreground --quiet --fd 0 --mtu 1400 --tcp-ports 127.0.0.1/8080:80 --tcp-ports 0.0.0.0/22:22 \
             --udp-ports 127.0.0.1/53:5353"
        );
    }

    #[test]
    fn an_address_comes_with_its_gateway_and_a_name_server_that_passes_questions_on() {
        let spec: NetSpec = kv::from_str("user,address=10.0.2.15/24").unwrap();
        assert_eq!(
            arguments(&spec).join(" "),
            "--foreground --quiet --fd 0 --ipv4-only --no-map-gw --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 \
             --dns-forward 10.0.2.3"
        );
    }
}
