//! The entropy device (VIRTIO 1.2, section 5.4): the host's random bytes, written straight into the guest's buffers.
//!
//! The device may give fewer bytes than there is room for, so a request is cut to [`MOST`]; a guest that offers
//! gigabytes cannot keep the thread from its other work. Left out on purpose: nothing.

mod sys;

#[cfg(test)]
mod tests;

use std::io;

use anyhow::{Context as _, bail};
use kv::Size;
use serde::{Deserialize, Serialize};
use virtio::{Active, GuestFault, Handler, Kind, Limit, RateLimiter, VirtQueue, VirtioDevice, Watch};

use crate::Transport;

/// A source of random bytes: `rate=64K`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RngSpec {
    /// The device's name; rng unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's other devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
    /// Bytes a second, such as 64K; no limit unless said
    pub rate: Option<Size>,
    /// Bytes that pass at once after a pause; one second's worth unless said
    pub burst: Option<Size>,
}

impl RngSpec {
    /// The name by which the device is addressed while the VM runs.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or("rng")
    }

    /// Checks what was asked for.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        let id = self.id();
        if self.rate == Some(Size(0)) || self.burst == Some(Size(0)) {
            bail!("{id}: a limit of 0 lets nothing through: say more, or drop rate= and burst=");
        }
        if self.rate.is_none() && self.burst.is_some() {
            bail!("{id}: a burst without rate= is of no use: say rate=, or drop it");
        }
        Ok(())
    }

    fn limit(&self) -> Option<Limit> {
        self.rate.map(|rate| Limit { per_second: rate.bytes(), burst: self.burst.unwrap_or(rate).bytes() })
    }
}

/// Entries of the queue.
const QUEUE_SIZE: u16 = 64;
/// The most bytes for one request: with a full ring, one wake-up takes a few milliseconds.
const MOST: usize = 16 << 10;

/// What the I/O thread tells us about.
const REQUESTS: u32 = 0;
const LIMITER: u32 = 1;

/// A source of random bytes.
pub struct Rng {
    spec: RngSpec,
}

impl Rng {
    /// Waits until the host has gathered entropy, which it has within seconds of its own start: no request ever waits
    /// for it later.
    ///
    /// # Errors
    ///
    /// The spec is not possible, or the host gives no random bytes.
    pub fn new(spec: &RngSpec) -> anyhow::Result<Self> {
        spec.validate()?;
        sys::wait_for_entropy().context("The host gives no random bytes")?;
        Ok(Self { spec: spec.clone() })
    }
}

impl VirtioDevice for Rng {
    type Handler = RngHandler;

    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<RngHandler> {
        let limiter = self.spec.limit().map(|limit| RateLimiter::new(Some(limit), None)).transpose();
        let limiter = limiter.context("Cannot make a timer for a rate limit")?;
        Ok(RngHandler { queue: active.take(0)?, limiter, failed: false })
    }

    fn stop(&mut self, handler: RngHandler) -> Vec<VirtQueue> {
        vec![handler.queue]
    }
}

/// The half of an [`Rng`] that owns its queue.
pub struct RngHandler {
    queue: VirtQueue,
    limiter: Option<RateLimiter>,
    /// The log has said that the host gives nothing.
    failed: bool,
}

impl RngHandler {
    fn serve(&mut self) -> Result<(), GuestFault> {
        while let Some(mut chain) = self.queue.pop()? {
            let wanted = chain.writable_len().min(MOST);
            if wanted == 0 {
                return Err(GuestFault::new("a request for random bytes has no room for any"));
            }
            if let Some(limiter) = &mut self.limiter
                && !limiter.admit(wanted as u64)
            {
                self.queue.undo_pop(chain);
                break;
            }
            let filled = sys::fill(&mut chain, wanted)?;
            if filled < wanted && !std::mem::replace(&mut self.failed, true) {
                log::error!("The host gives no random bytes any more: {}", io::Error::last_os_error());
            }
            self.queue.push(chain, u32::try_from(filled).expect("a request is cut to a few KiB"));
        }
        self.queue.signal();
        Ok(())
    }
}

impl Handler for RngHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        watch.add(&self.queue, REQUESTS)?;
        self.limiter.as_ref().map_or(Ok(()), |limiter| watch.add(limiter, LIMITER))
    }

    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match (token, &mut self.limiter) {
            (LIMITER, Some(limiter)) => limiter.refilled(),
            _ => self.queue.kicked(),
        }
        self.serve()
    }
}
