//! The memory balloon (VIRTIO 1.2, section 5.5): pages that the guest does not use go back to the host, by request (the
//! balloon is inflated to a target) or by themselves (free page reporting).
//!
//! What the guest gives up is dropped at once and reads as zero when it takes it back, so deflating is nothing but an
//! answer. Left out on purpose: hints about free pages, which are for migration; page poisoning, as a guest that needs
//! it then reports nothing; and the legacy rule that the host is told before a page is used (MUST_TELL_HOST).

mod handler;
mod statistics;

#[cfg(test)]
mod tests;

pub use handler::BalloonHandler;
pub use statistics::Statistics;

use std::time::Duration;

use anyhow::{Context as _, bail};
use kv::Size;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio::{Active, ConfigChange, Kind, VirtQueue, VirtioDevice};
use vmm_sys_util::timerfd::TimerFd;

use crate::Transport;
use handler::Queues;

/// Pages of the balloon, whatever the guest's or the host's are (section 5.5.6).
const PAGE: u64 = 4096;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;

/// Feature bits (section 5.5.3).
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const REPORTING: u64 = 1 << 5;
}

/// A balloon in the guest's memory: `256M,deflate-on-oom,free-page-reporting`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct BalloonSpec {
    /// Memory that the guest is to give up, such as 256M; 0 unless said
    pub size: Size,
    /// The device's name; balloon unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's other devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
    /// The guest may take memory back from the balloon before it runs out
    pub deflate_on_oom: bool,
    /// The guest gives up what it has freed, all the time
    pub free_page_reporting: bool,
    /// Seconds between two reports of the guest on its memory; none unless said
    pub stats_interval: Option<u32>,
}

impl BalloonSpec {
    /// The name by which the device is addressed while the VM runs.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or("balloon")
    }

    /// Checks what was asked for.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        pages(self.id(), self.size)?;
        if self.stats_interval == Some(0) {
            bail!("{}: stats-interval=0 is not possible: say 1 or more, or drop it", self.id());
        }
        Ok(())
    }
}

fn pages(id: &str, size: Size) -> anyhow::Result<u32> {
    match u32::try_from(size.bytes() / PAGE) {
        Ok(pages) if size.bytes().is_multiple_of(PAGE) => Ok(pages),
        Ok(_) => bail!("{id}: a balloon of {size} is not possible: its size is a multiple of 4K"),
        Err(_) => bail!("{id}: a balloon of {size} is not possible: say less than 16T"),
    }
}

/// A memory balloon.
pub struct Balloon {
    spec: BalloonSpec,
    /// What the balloon is to hold, in pages.
    target: u32,
    /// What the driver says that it holds, in pages.
    actual: u32,
    /// While there is a handler.
    config_change: Option<ConfigChange>,
}

/// What of a balloon is saved, in pages.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    target: u32,
    actual: u32,
}

impl Balloon {
    /// A balloon that is empty and has its first target.
    ///
    /// # Errors
    ///
    /// The spec is not possible.
    pub fn new(spec: &BalloonSpec) -> anyhow::Result<Self> {
        spec.validate()?;
        let target = pages(spec.id(), spec.size)?;
        Ok(Self { spec: spec.clone(), target, actual: 0, config_change: None })
    }

    /// Has the guest inflate or deflate the balloon to `size`, as far as it can.
    ///
    /// # Errors
    ///
    /// The size is not one that a balloon can have.
    pub fn set_target(&mut self, size: Size) -> anyhow::Result<()> {
        self.target = pages(self.spec.id(), size)?;
        self.spec.size = size;
        if let Some(config_change) = &self.config_change {
            config_change.raise();
        }
        Ok(())
    }

    /// Has the guest report on its memory that often.
    ///
    /// # Errors
    ///
    /// The balloon was not made for reports, or the interval is none.
    pub fn set_interval(&mut self, seconds: u32, handler: Option<&mut BalloonHandler>) -> anyhow::Result<()> {
        let id = self.spec.id();
        if self.spec.stats_interval.is_none() {
            bail!("{id} keeps no statistics: start the machine with --balloon stats-interval=SECONDS");
        }
        if seconds == 0 {
            bail!("{id}: statistics every 0 seconds are not possible: say 1 or more");
        }
        handler.map_or(Ok(()), |handler| handler.set_interval(seconds)).context("Cannot set a balloon's timer")?;
        self.spec.stats_interval = Some(seconds);
        Ok(())
    }

    /// The balloon as it is asked to be now.
    pub fn spec(&self) -> &BalloonSpec {
        &self.spec
    }

    /// What the balloon is to hold.
    pub fn target(&self) -> Size {
        Size(u64::from(self.target) * PAGE)
    }

    /// What the balloon holds, as the guest has it.
    pub fn actual(&self) -> Size {
        Size(u64::from(self.actual) * PAGE)
    }
}

impl VirtioDevice for Balloon {
    type Handler = BalloonHandler;

    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    /// Inflate, deflate, statistics, free page hints, free page reports (section 5.5.2).
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5]
    }

    fn features(&self) -> u64 {
        let offer = |wanted: bool, bit: u64| if wanted { bit } else { 0 };
        offer(self.spec.stats_interval.is_some(), feature::STATS_VQ)
            | offer(self.spec.deflate_on_oom, feature::DEFLATE_ON_OOM)
            | offer(self.spec.free_page_reporting, feature::REPORTING)
    }

    /// `num_pages` and `actual` of `struct virtio_balloon_config`; what follows belongs to features that are not offered.
    fn config(&self) -> Vec<u8> {
        [self.target.to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut actual = self.actual.to_le_bytes();
        // Only `actual` is the driver's to write.
        if let Some(there) = offset.checked_sub(4).and_then(|at| actual.get_mut(at..at + data.len())) {
            there.copy_from_slice(data);
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<BalloonHandler> {
        let (inflate, deflate) = (active.take(0)?, active.take(1)?);
        let has = |bit| active.features & bit != 0;
        let (with_statistics, with_reports) = (has(feature::STATS_VQ), has(feature::REPORTING));
        // Section 5.5.2 numbers the queues as if there were all; older versions of Linux leave no gaps. Either way those that
        // are there come in this order, and hints are not among them.
        let mut others = active.queues.into_iter();
        let reports = if with_reports { others.next_back() } else { None };
        let statistics = if with_statistics { others.next() } else { None };
        if with_reports && reports.is_none() || with_statistics && statistics.is_none() {
            bail!("the driver accepted a feature and did not set up its queue");
        }
        let timer = match (&statistics, self.spec.stats_interval) {
            (Some(_), Some(seconds)) => {
                let mut timer = TimerFd::new().context("Cannot make a timer for a balloon")?;
                let interval = Duration::from_secs(seconds.into());
                timer.reset(interval, Some(interval)).context("Cannot set a balloon's timer")?;
                Some(timer)
            }
            _ => None,
        };
        self.config_change = Some(active.config_change);
        let queues = Queues { inflate, deflate, statistics, reports };
        Ok(BalloonHandler::new(self.spec.id().to_owned(), active.memory, queues, timer))
    }

    fn stop(&mut self, handler: BalloonHandler) -> Vec<VirtQueue> {
        self.config_change = None;
        handler.stop()
    }

    /// A driver that has let go of the device has taken all pages back.
    fn reset(&mut self) {
        self.actual = 0;
    }

    fn save(&self, _handler: Option<&BalloonHandler>) -> anyhow::Result<Value> {
        Ok(serde_json::to_value(State { target: self.target, actual: self.actual })?)
    }

    fn load(&mut self, state: Value) -> anyhow::Result<()> {
        let State { target, actual } = serde_json::from_value(state)?;
        self.spec.size = Size(u64::from(target) * PAGE);
        (self.target, self.actual) = (target, actual);
        Ok(())
    }
}
