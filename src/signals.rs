//! Signals as events of the main loop.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

/// Signals that have arrived.
pub(crate) struct Signals {
    source: session::Signals,
    arrived: Vec<i32>,
}

impl Signals {
    /// As [`session::Signals::block`].
    pub(crate) fn block(others: &[i32]) -> io::Result<Self> {
        Ok(Self { source: session::Signals::block(others)?, arrived: Vec::new() })
    }

    /// The signals that have arrived since the last call, oldest first.
    pub(crate) fn take(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.arrived)
    }
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.source.as_fd().as_raw_fd(), EventSet::IN)).expect("a signalfd can be watched");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.arrived.extend(self.source.receive());
    }
}
