//! `vhost-user`: a process of the host's, such as a switch in user space, moves the frames between a card's queues and
//! wherever it likes.
//!
//! The other listens at a socket and need not be there: without it the link is down (VIRTIO_NET_F_STATUS), and
//! connecting is tried again and again. Its successor goes on behind the last frame that was given back, so what the
//! other had taken and not given back is sent again.
//!
//! Left out on purpose: several pairs of queues.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use memory::Ram;
use virtio::{Active, ConfigChange, GuestFault, Handler, VirtQueue, Watch};

use super::feature;
use crate::helper::Backoff;
use crate::served::Served;
use crate::unix;
use crate::vhost_user::Connection;

/// How long one who listens may take to say what it can do.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tokens: the interrupt of each queue, the other, and the time to try again.
const PEER: u32 = 2;
const RETRY: u32 = 3;

/// The other process, whether it is there at the moment or not.
pub(super) struct Peer {
    path: PathBuf,
    connection: Option<Connection>,
    since: Instant,
    backoff: Backoff,
}

impl Peer {
    /// # Errors
    ///
    /// The host has no room for a timer, or there can be no socket at this path.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let backoff = Backoff::new().context("Cannot make a timer for vhost-user")?;
        let mut peer = Self { path: path.to_owned(), connection: None, since: Instant::now(), backoff };
        // One that is not there yet may come.
        let place = path.display();
        match peer.connect() {
            Ok(()) => Ok(peer),
            Err(error) if is_absence(&error) => {
                log::warn!("Nobody answers at {place} yet: the link is down until somebody does");
                Ok(peer)
            }
            Err(error) => Err(error).with_context(|| {
                format!("Cannot use {place} as a vhost-user socket: name the one that the switch listens at")
            }),
        }
    }

    /// What it can do. One that comes later must be able to do that, too; so if it is not there, that is nothing but
    /// what every device can.
    pub(super) fn features(&self) -> u64 {
        self.connection.as_ref().map_or(0, Connection::features)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    fn connect(&mut self) -> io::Result<()> {
        if self.connection.is_none() {
            self.connection = Some(Connection::open(unix::connect(&self.path)?, PATIENCE)?);
            self.since = Instant::now();
        }
        Ok(())
    }

    /// Connects, if need be, and gives it the queues.
    fn hand_over(&mut self, queues: &[Served], memory: &Ram, features: u64) -> io::Result<()> {
        self.connect()?;
        let connection = self.connection.as_mut().ok_or(ErrorKind::NotConnected)?;
        connection.start(queues, memory, features)
    }

    /// It has gone: sets the timer.
    fn lost(&mut self) {
        let lived = if self.connection.take().is_some() { self.since.elapsed() } else { Duration::ZERO };
        self.backoff.schedule(lived);
    }
}

/// Whether nobody is there, or nobody who has the time to answer: at a start as later, one may come.
fn is_absence(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, UnexpectedEof, WouldBlock};
    matches!(
        error.kind(),
        NotFound | ConnectionRefused | TimedOut | UnexpectedEof | WouldBlock | ConnectionReset | BrokenPipe
    )
}

/// Watches over what the other does.
pub struct PeerHandler {
    name: String,
    peer: Peer,
    queues: Vec<Served>,
    memory: Arc<Ram>,
    features: u64,
    /// Whether there is a link, for the device's configuration space.
    link: Arc<AtomicBool>,
    config_change: ConfigChange,
}

impl PeerHandler {
    /// What may fail does before `peer` is taken.
    pub(super) fn new(
        name: String,
        peer: &mut Option<Peer>,
        queues: [VirtQueue; 2],
        active: Active,
        link: Arc<AtomicBool>,
    ) -> anyhow::Result<Self> {
        let queues = queues.into_iter().map(Served::new).collect::<io::Result<Vec<_>>>();
        let queues = queues.context("Cannot make eventfds for vhost-user")?;
        let peer = peer.take().context("A network card that runs was started again")?;
        let Active { memory, config_change, .. } = active;
        let features = active.features & !(feature::MAC | feature::STATUS | feature::MTU);
        let mut handler = Self { name, peer, queues, memory, features, link, config_change };
        // By the I/O thread: this one is a processor's, and the other may take its time.
        handler.peer.backoff.hurry();
        Ok(handler)
    }

    /// Gives back the queues, with which the other has done, and the other.
    pub(super) fn stop(mut self) -> (Vec<VirtQueue>, Peer) {
        for Served { queue, .. } in &mut self.queues {
            if let Some(Err(error)) = self.peer.connection.as_mut().map(|connection| connection.stop(queue)) {
                log::warn!("{}: {} does not give a queue back: {error}", self.name, self.peer.path.display());
                self.peer.lost();
            }
        }
        (self.queues.into_iter().map(|served| served.queue).collect(), self.peer)
    }

    /// Whether the other has the queues now.
    fn hand_over(&mut self) -> bool {
        let result = self.peer.hand_over(&self.queues, &self.memory, self.features);
        match &result {
            Ok(()) => {
                log::debug!("{}: {} has the queues, the link is up", self.name, self.peer.path.display());
                self.set_link(true);
            }
            Err(error) => self.lost(error),
        }
        result.is_ok()
    }

    /// Nobody serves the queues now.
    fn lost(&mut self, why: &io::Error) {
        let had = self.peer.is_connected();
        log::debug!("{}: no link: {why}", self.name);
        self.peer.lost();
        if had {
            for Served { queue, .. } in &mut self.queues {
                queue.take_back(None);
                // What it had given back it may not have said.
                queue.interrupt();
            }
            let path = self.peer.path.display();
            log::warn!("{}: the process at {path} has gone ({why}), the link is down until one is back", self.name);
        }
        self.set_link(false);
    }

    fn set_link(&self, up: bool) {
        if self.link.swap(up, Ordering::Relaxed) != up {
            self.config_change.raise();
        }
    }
}

impl Handler for PeerHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            queue.watch(watch, token)?;
        }
        if let Some(connection) = &self.peer.connection {
            watch.add(connection, PEER)?;
        }
        watch.add(&self.peer.backoff, RETRY)
    }

    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            PEER => {
                if let Some(connection) = &self.peer.connection {
                    watch.remove(connection);
                    self.lost(&ErrorKind::UnexpectedEof.into());
                }
            }
            RETRY => {
                if !self.peer.backoff.due() {
                    return Ok(());
                }
                if let Some(connection) = &self.peer.connection {
                    watch.remove(connection);
                }
                if self.hand_over()
                    && let Some(connection) = &self.peer.connection
                    && let Err(error) = watch.add(connection, PEER)
                {
                    log::error!("{}: cannot wait for the end of the other process: {error}", self.name);
                }
            }
            token => {
                if let Some(queue) = self.queues.get(token as usize) {
                    queue.relay();
                }
            }
        }
        Ok(())
    }
}
