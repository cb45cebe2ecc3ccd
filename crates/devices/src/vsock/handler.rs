//! The half of a vsock device on an I/O thread: who is connected, and whose turn it is.
//!
//! What the guest is to get stands in two lists: resets, which need no connection, and connections that have something.
//! Both are bounded: a guest that sends what must be answered with a reset and takes no packets is not heard until it
//! does (section 5.10.6.4.1), and a connection is in the list once.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use virtio::{Chain, GuestFault, Handler, VirtQueue, Watch};

use super::connection::{Command, Connection, State};
use super::packet::{HEADER, HOST, Header, Ports, STREAM, op};
use crate::unix;

/// Connections of one guest, in whatever state.
pub(super) const MOST_CONNECTIONS: u32 = 1024;
/// So many resets can wait before the guest is not heard any more.
const MOST_RESETS: usize = 256;
/// Clients of the host's that one wake-up lets in.
const MOST_AT_ONCE: usize = 64;
/// The host's ports for its own connections are from here up to twice this; the guest finds services below.
const FIRST_PORT: u32 = 1 << 30;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// What the I/O thread tells us about. From `FIRST` on it is connections.
const RX: u32 = 0;
const TX: u32 = 1;
const LISTENER: u32 = 2;
const FIRST: u32 = 3;

/// The half of a [`Vsock`](super::Vsock) that owns its queues.
pub struct VsockHandler {
    guest: u64,
    path: PathBuf,
    rx: VirtQueue,
    tx: VirtQueue,
    /// For the one event that there is.
    event: VirtQueue,
    listener: Arc<UnixListener>,
    /// The listener is not watched: there is no room for another connection.
    full: bool,
    connections: Vec<Option<Connection>>,
    /// The numbers of `connections` that are free.
    free: Vec<u32>,
    names: HashMap<Ports, u32>,
    next_port: u32,
    /// Who has something for the guest.
    queue: VecDeque<u32>,
    resets: VecDeque<Reset>,
    /// There are packets of the guest's that wait for room for resets.
    stalled: bool,
}

/// A RST that the guest is to get.
struct Reset {
    /// Whom it thought that it spoke to.
    from: u64,
    ports: Ports,
}

impl VsockHandler {
    pub(super) fn new(guest: u64, path: PathBuf, [rx, tx, event]: [VirtQueue; 3], listener: Arc<UnixListener>) -> Self {
        Self {
            guest,
            path,
            rx,
            tx,
            event,
            listener,
            full: false,
            connections: Vec::new(),
            free: (0..MOST_CONNECTIONS).rev().collect(),
            names: HashMap::new(),
            next_port: FIRST_PORT,
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            stalled: false,
        }
    }

    /// Tells the driver that its connections are gone and its address may be another (section 5.10.6.7).
    pub(super) fn report_interruption(&mut self) -> Result<(), GuestFault> {
        let Some(mut chain) = self.event.pop()? else {
            log::warn!("A vsock driver has no room for the event that its connections are gone");
            return Ok(());
        };
        chain.write_at(0, &TRANSPORT_RESET.to_le_bytes())?;
        self.event.push(chain, 4);
        self.event.signal();
        Ok(())
    }

    /// Closes all connections.
    pub(super) fn stop(self) -> Vec<VirtQueue> {
        vec![self.rx, self.tx, self.event]
    }

    /// Takes the guest's packets.
    fn receive(&mut self, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        self.stalled = false;
        loop {
            if self.resets.len() >= MOST_RESETS {
                self.stalled = true;
                break;
            }
            let Some(mut chain) = self.tx.pop()? else { break };
            self.take(&mut chain, watch)?;
            self.tx.push(chain, 0);
        }
        self.tx.signal();
        Ok(())
    }

    fn take(&mut self, chain: &mut Chain, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let header = Header::read(chain)?;
        // Somebody in the guest pretends to be another machine: nobody to answer.
        if header.src_cid != self.guest {
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        if header.dst_cid != HOST || header.kind != STREAM {
            if header.op != op::RST {
                self.resets.push_back(Reset { from: header.dst_cid, ports });
            }
            return Ok(());
        }
        let Some(&slot) = self.names.get(&ports) else {
            match header.op {
                op::REQUEST => self.connect(&header, ports, watch),
                op::RST => {}
                _ => self.resets.push_back(Reset { from: HOST, ports }),
            }
            return Ok(());
        };
        let connection = self.connections[slot as usize].as_mut().expect("a name is a connection's");
        connection.take_credit(&header);
        let fine = match (header.op, connection.state) {
            (op::RESPONSE, State::Requested) if connection.known => {
                connection.respond();
                true
            }
            (op::RST, _) => {
                connection.drain();
                true
            }
            (op::SHUTDOWN, State::Open | State::Closing) => {
                if connection.end_of_guest(header.flags) {
                    // The guest waits for it before it uses the port again. The rest goes to the host without it.
                    self.resets.push_back(Reset { from: HOST, ports });
                    connection.drain();
                }
                true
            }
            (op::RW, State::Open | State::Closing) => connection.deliver(chain, header.len)?,
            (op::CREDIT_UPDATE, State::Open | State::Closing) => true,
            (op::CREDIT_REQUEST, State::Open | State::Closing) => {
                connection.owe_credit();
                true
            }
            _ => false,
        };
        if !fine {
            connection.state = State::Over;
        }
        self.settle(slot, watch);
        Ok(())
    }

    /// The guest wants to reach the socket `<path>_<port>` of the host.
    fn connect(&mut self, header: &Header, ports: Ports, watch: &mut Watch<'_>) {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", ports.host));
        let slot = self.make_room(watch).and_then(|()| {
            let mut connection = Connection::from_guest(unix::connect(path.as_ref()).ok()?, ports);
            connection.take_credit(header);
            self.insert(connection)
        });
        match slot {
            Some(slot) => {
                self.names.insert(ports, slot);
                self.settle(slot, watch);
            }
            None => self.resets.push_back(Reset { from: HOST, ports }),
        }
    }

    /// Lets clients of the host's in, as long as there is room.
    fn accept(&mut self, watch: &mut Watch<'_>) {
        for _ in 0..MOST_AT_ONCE {
            if self.make_room(watch).is_none() {
                return self.pause(watch);
            }
            match self.listener.accept() {
                Ok((client, _)) => {
                    if client.set_nonblocking(true).is_ok()
                        && let Some(slot) = self.insert(Connection::from_host(client))
                    {
                        self.settle(slot, watch);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                // Out of descriptors, most likely: clients wait until one of ours is free.
                Err(_) => return self.pause(watch),
            }
        }
    }

    fn pause(&mut self, watch: &mut Watch<'_>) {
        watch.remove(&*self.listener);
        self.full = true;
    }

    /// Makes sure that there is a free number. If all are taken, one goes with which either side has done already.
    fn make_room(&mut self, watch: &mut Watch<'_>) -> Option<()> {
        if self.free.is_empty() {
            let last = |connection: &Connection| matches!(connection.state, State::Closing | State::Draining);
            let slot = self.connections.iter().position(|slot| slot.as_ref().is_some_and(last))?;
            self.remove(u32::try_from(slot).ok()?, watch);
        }
        Some(())
    }

    fn insert(&mut self, connection: Connection) -> Option<u32> {
        let slot = self.free.pop()?;
        let index = slot as usize;
        if self.connections.len() <= index {
            self.connections.resize_with(index + 1, || None);
        }
        self.connections[index] = Some(connection);
        Some(slot)
    }

    /// A descriptor of a connection's is ready.
    fn ready_connection(&mut self, slot: u32, watch: &mut Watch<'_>) {
        // One that was closed by an event just before this one.
        let Some(Some(connection)) = self.connections.get_mut(slot as usize) else { return };
        if !matches!(connection.state, State::Command(..)) {
            connection.ready();
            return self.settle(slot, watch);
        }
        match connection.read_command() {
            Command::Incomplete => return,
            Command::Connect(port) => {
                let ports = self.free_name(port);
                if let Some(Some(connection)) = self.connections.get_mut(slot as usize) {
                    connection.request(ports);
                }
                self.names.insert(ports, slot);
            }
            Command::Wrong => connection.state = State::Over,
        }
        self.settle(slot, watch);
    }

    /// A port of the host's that is in no connection with this port of the guest's.
    fn free_name(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_port, guest };
            self.next_port = FIRST_PORT | (self.next_port + 1) & (FIRST_PORT - 1);
            // There are far more ports than connections.
            if !self.names.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// To call after anything has happened to a connection: gets it into the queue, has it watched for what it needs,
    /// and lets go of it when it is over.
    fn settle(&mut self, slot: u32, watch: &mut Watch<'_>) {
        let Some(connection) = self.connections[slot as usize].as_mut() else { return };
        if connection.state == State::Over {
            return self.remove(slot, watch);
        }
        if connection.state == State::Draining && self.names.get(&connection.ports) == Some(&slot) {
            self.names.remove(&connection.ports);
        }
        if !connection.queued && connection.wants_to_send() {
            connection.queued = true;
            self.queue.push_back(slot);
        }
        let interest = connection.interest();
        let token = FIRST + slot;
        let done = match (connection.watched, interest) {
            (before, after) if before == after => Ok(()),
            (None, Some(set)) => watch.add_for(connection, set, token),
            (Some(_), Some(set)) => watch.modify(connection, set, token),
            (_, None) => {
                watch.remove(connection);
                Ok(())
            }
        };
        connection.watched = interest;
        if done.is_err() {
            // The host has no room for another watch: unwatched it would hang.
            connection.watched = None;
            self.remove(slot, watch);
        }
    }

    fn remove(&mut self, slot: u32, watch: &mut Watch<'_>) {
        let Some(connection) = self.connections[slot as usize].take() else { return };
        watch.remove(&connection);
        if connection.queued {
            self.queue.retain(|other| *other != slot);
        }
        if self.names.get(&connection.ports) == Some(&slot) {
            self.names.remove(&connection.ports);
        }
        if connection.known {
            self.resets.push_back(Reset { from: HOST, ports: connection.ports });
        }
        self.free.push(slot);
        if self.full {
            self.full = false;
            self.full = watch.add(&*self.listener, LISTENER).is_err();
        }
    }

    /// Gives the guest what it is to get, as far as it has buffers.
    fn send(&mut self, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        while !self.resets.is_empty() || !self.queue.is_empty() {
            let Some(mut chain) = self.rx.pop()? else { break };
            if chain.writable_len() < HEADER {
                return Err(GuestFault::new("a buffer for packets has no room for a header"));
            }
            if let Some(reset) = self.resets.pop_front() {
                chain.write_at(0, &self.reset(&reset).encode())?;
                self.rx.push(chain, u32::try_from(HEADER).expect("a header is small"));
                continue;
            }
            let slot = self.queue.pop_front().expect("one of the two lists has something");
            let connection = self.connections[slot as usize].as_mut().expect("who is removed leaves the queue");
            connection.queued = false;
            match connection.fill(&mut chain, self.guest)? {
                Some(length) => self.rx.push(chain, length),
                None => self.rx.undo_pop(chain),
            }
            self.settle(slot, watch);
        }
        self.rx.signal();
        Ok(())
    }

    fn reset(&self, reset: &Reset) -> Header {
        let Ports { host, guest } = reset.ports;
        let (src_cid, dst_cid) = (reset.from, self.guest);
        let header = Header { src_cid, dst_cid, src_port: host, dst_port: guest, ..Header::default() };
        Header { kind: STREAM, op: op::RST, ..header }
    }
}

impl Handler for VsockHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        watch.add(&self.rx, RX)?;
        watch.add(&self.tx, TX)?;
        if !self.full {
            watch.add(&*self.listener, LISTENER)?;
        }
        for (token, slot) in (FIRST..).zip(&self.connections) {
            if let Some(connection) = slot
                && let Some(set) = connection.watched
            {
                watch.add_for(connection, set, token)?;
            }
        }
        Ok(())
    }

    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            RX => self.rx.kicked(),
            TX => {
                self.tx.kicked();
                self.receive(watch)?;
            }
            LISTENER => self.accept(watch),
            _ => self.ready_connection(token - FIRST, watch),
        }
        self.send(watch)?;
        while self.stalled && self.resets.len() < MOST_RESETS {
            self.receive(watch)?;
            self.send(watch)?;
        }
        Ok(())
    }
}
