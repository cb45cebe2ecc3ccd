//! The half of a shared folder that runs on an I/O thread: it watches over virtiofsd, and answers in its place while no
//! virtiofsd has the queues.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use anyhow::Context as _;
use memory::Ram;
use virtio::{Active, Chain, GuestFault, Handler, VirtQueue, Watch};

use super::daemon::Daemon;
use crate::served::Served;

/// Tokens: the kick of each queue, the interrupt of each queue, virtiofsd, and the time to start it again.
const KICK: u32 = 0;
const CALL: u32 = 2;
const DAEMON: u32 = 4;
const RESTART: u32 = 5;

/// `struct fuse_in_header` up to `unique` (`linux/fuse.h`).
const IN_HEADER: usize = 16;
const OPCODE: usize = 4;
const UNIQUE: usize = 8;
/// `struct fuse_out_header`.
const OUT_HEADER: usize = 16;
const FUSE_INIT: u32 = 26;

/// Watches over virtiofsd.
pub struct FsHandler {
    daemon: Daemon,
    queues: [Served; 2],
    /// Whether virtiofsd has the queues.
    served: bool,
    memory: Arc<Ram>,
    features: u64,
}

impl FsHandler {
    /// What may fail does before `daemon` is taken.
    pub(super) fn new(queues: [VirtQueue; 2], active: Active, daemon: &mut Option<Daemon>) -> anyhow::Result<Self> {
        let [first, second] = queues.map(Served::new);
        let queues = [first, second].map(|queue| queue.context("Cannot make an eventfd for virtiofsd"));
        let [first, second] = queues;
        let queues = [first?, second?];
        let mut daemon = daemon.take().context("A shared folder that is used was started again")?;
        // By the I/O thread: this one may end before the device does, and virtiofsd with it.
        daemon.wanted();
        let Active { memory, features, .. } = active;
        Ok(Self { daemon, queues, served: false, memory, features })
    }

    /// Gives back the queues and virtiofsd, which may still be at work on them.
    pub(super) fn stop(self) -> (Vec<VirtQueue>, Daemon) {
        (self.queues.into_iter().map(|queue| queue.queue).collect(), self.daemon)
    }

    /// Answers what is in a queue of ours with EIO. A request for a new session is what virtiofsd begins with: it waits
    /// for that, unless `hopeless`.
    fn refuse(&mut self, index: usize, hopeless: bool, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        if self.served {
            return Ok(());
        }
        let mut begins = false;
        let queue = &mut self.queues[index].queue;
        while let Some(mut chain) = queue.pop()? {
            if !hopeless && opcode(&chain)? == Some(FUSE_INIT) {
                queue.undo_pop(chain);
                begins = true;
                break;
            }
            let written = refuse(&mut chain)?;
            queue.push(chain, written);
        }
        queue.signal();
        if begins && let Err(error) = self.hand_over(watch) {
            self.lost(&error, true, watch)?;
        }
        Ok(())
    }

    /// Gives the queues to virtiofsd, if it runs.
    fn hand_over(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        let Some(connection) = self.daemon.connection() else { return Ok(()) };
        // The kicks are for it now.
        for Served { queue, .. } in &self.queues {
            watch.remove(queue);
        }
        self.served = true;
        connection.start(&self.queues, &self.memory, self.features)
    }

    /// virtiofsd is of no use any more: what it owes ends in EIO.
    fn lost(&mut self, why: &io::Error, hopeless: bool, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        if let Some(connection) = self.daemon.connection() {
            watch.remove(connection);
        }
        self.daemon.lost(why);
        if !std::mem::take(&mut self.served) {
            return Ok(());
        }
        for (token, Served { queue, .. }) in (KICK..).zip(&mut self.queues) {
            queue.take_back(None);
            queue.kicked();
            // What it had given back it may not have said.
            queue.interrupt();
            watch.add(queue, token).map_err(|error| cannot_watch(&error))?;
        }
        (0..self.queues.len()).try_for_each(|index| self.refuse(index, hopeless, watch))
    }

    fn restart(&mut self, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let result = self.daemon.restart();
        match &result {
            Ok(false) => return Ok(()),
            Ok(true) => {
                if let Some(connection) = self.daemon.connection() {
                    watch.add(connection, DAEMON).map_err(|error| cannot_watch(&error))?;
                }
            }
            Err(error) => log::warn!("{error:#}"),
        }
        // A mount may wait for it; where it cannot be started, no longer.
        (0..self.queues.len()).try_for_each(|index| self.refuse(index, result.is_err(), watch))
    }
}

impl Handler for FsHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        for ((kick, call), queue) in (KICK..).zip(CALL..).zip(&self.queues) {
            queue.watch(watch, call)?;
            if !self.served {
                watch.add(&queue.queue, kick)?;
            }
        }
        if let Some(connection) = self.daemon.connection() {
            watch.add(connection, DAEMON)?;
        }
        watch.add(&self.daemon.backoff, RESTART)
    }

    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            RESTART => self.restart(watch),
            DAEMON => self.lost(&ErrorKind::UnexpectedEof.into(), false, watch),
            CALL.. => {
                self.queues[(token - CALL) as usize].relay();
                Ok(())
            }
            // One from before virtiofsd got the queues must not take their kicks from it.
            _ if self.served => Ok(()),
            token => {
                let index = (token - KICK) as usize;
                self.queues[index].queue.kicked();
                self.refuse(index, false, watch)
            }
        }
    }
}

/// What a request asks for; nothing that is shorter than a request's header.
fn opcode(chain: &Chain) -> Result<Option<u32>, GuestFault> {
    if chain.readable_len() < IN_HEADER {
        return Ok(None);
    }
    let mut opcode = [0; 4];
    chain.read_at(OPCODE, &mut opcode)?;
    Ok(Some(u32::from_le_bytes(opcode)))
}

/// Answers a request with EIO, if there is room for an answer. Returns how many bytes that took.
fn refuse(chain: &mut Chain) -> Result<u32, GuestFault> {
    if chain.readable_len() < IN_HEADER || chain.writable_len() < OUT_HEADER {
        return Ok(0);
    }
    let mut unique = [0; 8];
    chain.read_at(UNIQUE, &mut unique)?;
    let mut answer = [0; OUT_HEADER];
    answer[0] = 16;
    answer[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
    answer[8..].copy_from_slice(&unique);
    chain.write_at(0, &answer)?;
    Ok(16)
}

fn cannot_watch(error: &io::Error) -> GuestFault {
    GuestFault::new(format!("the host cannot wait for virtiofsd: {error}"))
}
