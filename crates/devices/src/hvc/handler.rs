//! A virtio console's half on an I/O thread.

use std::io;
use std::sync::Arc;

use virtio::{GuestFault, Handler, VirtQueue, Watch};

use super::port::Port;
use crate::console::output::OUTPUT;

/// What the I/O thread tells us about.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const INPUT: u32 = 2;

/// Bytes that are copied at once.
const PIECE: usize = 4096;

/// The half of an [`Hvc`](super::Hvc) that owns its queues.
pub struct HvcHandler {
    receive: VirtQueue,
    transmit: VirtQueue,
    port: Arc<Port>,
}

impl HvcHandler {
    pub(super) fn new(receive: VirtQueue, transmit: VirtQueue, port: Arc<Port>) -> Self {
        Self { receive, transmit, port }
    }

    pub(super) fn stop(self) -> Vec<VirtQueue> {
        vec![self.receive, self.transmit]
    }

    /// Takes what the guest says.
    fn listen(&mut self) -> Result<(), GuestFault> {
        let mut piece = [0; PIECE];
        while let Some(chain) = self.transmit.pop()? {
            let end = chain.readable_len();
            // What would give way at once to what comes after it in the same buffer is not looked at.
            let mut lost = end.saturating_sub(OUTPUT);
            let mut at = lost;
            while at < end {
                let piece = &mut piece[..(end - at).min(PIECE)];
                chain.read_at(at, piece)?;
                self.port.say(piece, std::mem::take(&mut lost));
                at += piece.len();
            }
            self.transmit.push(chain, 0);
        }
        self.transmit.signal();
        Ok(())
    }

    /// Gives the guest its input.
    fn speak(&mut self) -> Result<(), GuestFault> {
        let mut piece = [0; PIECE];
        while let Some(mut chain) = self.receive.pop()? {
            let room = chain.writable_len().min(PIECE);
            if room == 0 {
                return Err(GuestFault::new("a buffer for input has no room"));
            }
            let count = self.port.hear(&mut piece[..room]);
            if count == 0 {
                self.receive.undo_pop(chain);
                break;
            }
            chain.write_at(0, &piece[..count])?;
            self.receive.push(chain, u32::try_from(count).expect("a piece is small"));
        }
        self.receive.signal();
        Ok(())
    }
}

impl Handler for HvcHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        watch.add(&self.receive, RECEIVE)?;
        watch.add(&self.transmit, TRANSMIT)?;
        watch.add(self.port.input(), INPUT)
    }

    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            TRANSMIT => {
                self.transmit.kicked();
                return self.listen();
            }
            RECEIVE => self.receive.kicked(),
            _ => drop(self.port.input().read()),
        }
        self.speak()
    }
}
