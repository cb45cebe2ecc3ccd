//! The network card (VIRTIO 1.2, section 5.1): a tap of the host, moved by this process or by its kernel (vhost-net), or
//! passt, for which no rights are needed, or another process (vhost-user).
//!
//! ```text
//! Net ──start──▶ NetHandler ─┬─ FrameHandler: chains ─▶ guard ─▶ limits ─▶ Port (tap | passt)
//!  ▲                         ├─ VhostHandler: the kernel has queues and tap, and says when something breaks
//!  │                         └─ PeerHandler: another process has the queues, or nobody
//!  └── link, traffic ────────┘
//! ```
//!
//! The guest is the adversary of every header and every length, and the network of every frame; the header's meaning is
//! for the tap to check. Offered are checksums and segmentation both ways, mergeable buffers and several queues. Left out
//! on purpose: UFO, which Linux has given up, hashes for RSS, filters and VLANs in the device, announcements.

mod control;
mod counters;
mod guard;
mod handler;
mod ipv4;
mod mac;
mod passt;
mod peer;
mod port;
mod publish;
mod spec;
mod sys;
mod tap;
mod vhost;

#[cfg(test)]
pub(crate) mod tests;

pub use counters::{Counters, Traffic};
pub use handler::FrameHandler;
pub use ipv4::Ipv4Net;
pub use mac::Mac;
pub use peer::PeerHandler;
pub use publish::Publish;
pub use spec::{NetSpec, Vhost};
pub use vhost::VhostHandler;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio::{Active, GuestFault, Handler, Kind, RateLimiter, VirtQueue, VirtioDevice, Watch};

use crate::starter::{Helper, Launched, Starter};
use control::Queues;
use guard::Guard;
use handler::Setup;
use passt::Passt;
use peer::Peer;
use port::Port;
use tap::Tap;

/// Feature bits (section 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const MQ: u64 = 1 << 22;
    /// All that a tap does for or leaves to the guest.
    pub(super) const OFFLOADS: u64 = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
}

/// `struct virtio_net_hdr`, which precedes each frame (section 5.1.6).
const HEADER: usize = 12;
/// An Ethernet header with one VLAN tag.
const ETHERNET: usize = 18;
/// The largest frame with its header: 64 KiB that were not cut into segments.
const LARGEST: usize = HEADER + ETHERNET + (64 << 10);
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// What a link has that does not say.
const USUAL_MTU: u16 = 1500;

/// A network card.
pub struct Net {
    spec: NetSpec,
    name: String,
    mac: Mac,
    mtu: u16,
    queue_sizes: Vec<u16>,
    features: u64,
    ring_features: u64,
    link: Arc<AtomicBool>,
    traffic: Arc<Traffic>,
    /// While there is no handler that has it.
    end: Option<End>,
    /// How many pairs of queues the driver uses, as of the last stop.
    used: usize,
}

/// What of a card is saved.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    mac: Mac,
    pairs: u16,
}

/// The host's end.
enum End {
    Frames(Vec<Port>),
    Vhost(Vec<vhost::Pair>),
    Peer(Option<Peer>),
}

impl Net {
    /// Opens the tap or starts passt, by `starter` where there is one. `vm` is the VM's name, from which the MAC address is made; without it that is made
    /// by chance.
    ///
    /// # Errors
    ///
    /// The user's: why the host's end cannot be had, and what to do about it.
    pub fn open(spec: &NetSpec, vm: Option<&str>, starter: Option<&Starter>) -> anyhow::Result<Self> {
        let helper = match starter {
            Some(starter) => Helper::Starter(starter.clone(), spec.id()),
            None => Self::helper(spec, passt::PROGRAM),
        };
        Self::open_with(spec, vm, helper)
    }

    /// passt, or what is in its place.
    fn helper(spec: &NetSpec, passt: &str) -> Helper {
        let (spec, passt) = (spec.clone(), passt.to_owned());
        Helper::Own(Box::new(move || passt::launch(&passt, &spec)))
    }

    /// Starts passt, where this card has it.
    pub(crate) fn launch(spec: &NetSpec) -> anyhow::Result<Launched> {
        passt::launch(passt::PROGRAM, spec)
    }

    fn open_with(spec: &NetSpec, vm: Option<&str>, helper: Helper) -> anyhow::Result<Self> {
        spec.validate()?;
        let id = spec.id();
        let mac = match (spec.mac, vm) {
            (Some(mac), _) => mac,
            (None, Some(vm)) => Mac::of_names(vm, &id),
            (None, None) => Mac::random()?,
        };
        let name = format!("Network card {id}");
        let tap = match (&spec.tap, spec.fd) {
            (Some(tap), _) => Some(Tap::open(tap, spec)?),
            (None, Some(fd)) => Some(Tap::inherit(fd, spec)?),
            (None, None) => None,
        };
        let mut features = feature::MAC | feature::STATUS | feature::MRG_RXBUF;
        let mut ring_features = virtio::features::EVENT_IDX | virtio::features::INDIRECT_DESC;
        let mtu = spec.mtu.or(tap.as_ref().and_then(|tap| tap.mtu));
        if mtu.is_some() {
            features |= feature::MTU;
        }
        let mut link = true;
        let end = match (tap, &spec.vhost_user) {
            (None, Some(path)) => {
                log::info!("{name}: {mac}, by the process at {}", path.display());
                let peer = Peer::open(path)?;
                features =
                    (features | feature::OFFLOADS) & (peer.features() | !(feature::OFFLOADS | feature::MRG_RXBUF));
                ring_features &= peer.features();
                link = peer.is_connected();
                End::Peer(Some(peer))
            }
            (None, None) => {
                log::info!("{name}: {mac}, by passt");
                End::Frames(vec![Port::Passt(Box::new(Passt::open(helper)?))])
            }
            (Some(tap), _) => {
                features |= feature::OFFLOADS;
                let tap_name = tap.name.clone();
                let end = end_of(tap, spec)?;
                if let End::Vhost(pairs) = &end {
                    features &= vhost::features(pairs) | !feature::MRG_RXBUF;
                    ring_features &= vhost::features(pairs);
                }
                let mover = if matches!(end, End::Vhost(_)) { "vhost-net" } else { "this process" };
                log::info!("{name}: {mac}, tap {tap_name}, by {mover}");
                end
            }
        };
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(spec.queues())];
        if spec.queues() > 1 {
            features |= feature::MQ | feature::CTRL_VQ;
            queue_sizes.push(CONTROL_SIZE);
        }
        let (spec, link, traffic) = (spec.clone(), Arc::new(AtomicBool::new(link)), Arc::default());
        let mtu = mtu.unwrap_or(USUAL_MTU);
        Ok(Self { spec, name, mac, mtu, queue_sizes, features, ring_features, link, traffic, end: Some(end), used: 1 })
    }

    /// The name by which the card is addressed.
    pub fn id(&self) -> String {
        self.spec.id()
    }

    /// The address that the guest is told.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// What has been moved and dropped, which the kernel does not say of what it moves.
    pub fn traffic(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }

    fn setup(&self) -> anyhow::Result<Setup> {
        let limiter = |limits: Option<spec::Limits>| {
            let limiter = limits.map(|(bytes, frames)| RateLimiter::new(bytes, frames)).transpose();
            limiter.context("Cannot make a timer for a network card's rate limit")
        };
        Ok(Setup {
            name: self.name.clone(),
            guard: self.spec.guards().then(|| Guard::new(self.mac, &self.spec.guest_ip)),
            rx_limiter: limiter(self.spec.rx_limits())?,
            tx_limiter: limiter(self.spec.tx_limits())?,
            traffic: self.traffic.clone(),
            link: self.link.clone(),
            frame: HEADER + ETHERNET + usize::from(self.mtu),
        })
    }
}

/// Has the kernel move the frames where that is wanted and possible.
fn end_of(tap: Tap, spec: &NetSpec) -> anyhow::Result<End> {
    let wanted = match spec.vhost {
        Vhost::On => true,
        Vhost::Auto => !spec.sees_frames(),
        Vhost::Off => false,
    };
    if wanted {
        match vhost::open(tap.queues.len()) {
            Ok(kernel) => return Ok(End::Vhost(vhost::pairs(kernel, tap.queues))),
            Err(error) if spec.vhost == Vhost::On => return Err(error),
            Err(error) => log::debug!("vhost=auto means off: {error:#}"),
        }
    }
    Ok(End::Frames(tap.queues.into_iter().map(Port::Tap).collect()))
}

impl VirtioDevice for Net {
    type Handler = NetHandler;

    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn ring_features(&self) -> u64 {
        self.ring_features
    }

    /// `struct virtio_net_config` (section 5.1.4), up to the MTU.
    fn config(&self) -> Vec<u8> {
        let status = if self.link.load(Ordering::Relaxed) { LINK_UP } else { 0 };
        let mut config = self.mac.bytes().to_vec();
        for field in [status, self.spec.queues(), self.mtu] {
            config.extend(field.to_le_bytes());
        }
        config
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<NetHandler> {
        let setup = self.setup()?;
        let queues = Queues::take(&mut active, self.spec.queues().into())?;
        let features = active.features;
        // What may fail leaves the host's end where it is, for the next start.
        match self.end.as_mut().context("A network card that runs was started again")? {
            End::Frames(ports) => {
                for (index, port) in ports.iter_mut().enumerate() {
                    port.prepare(index, features)?;
                }
                let handler = FrameHandler::new(setup, (std::mem::take(ports), self.used), queues, active);
                self.end = None;
                Ok(NetHandler::Frames(handler))
            }
            End::Vhost(pairs) => {
                let handler =
                    VhostHandler::new(self.name.clone(), (pairs, self.used), queues, &active.memory, features)?;
                self.end = None;
                Ok(NetHandler::Vhost(handler))
            }
            End::Peer(peer) => {
                let pair = queues.pairs.into_iter().next().context("A network card has a pair of queues")?;
                let handler = PeerHandler::new(self.name.clone(), peer, pair.into(), active, self.link.clone())?;
                self.end = None;
                Ok(NetHandler::Peer(handler))
            }
        }
    }

    fn stop(&mut self, handler: NetHandler) -> Vec<VirtQueue> {
        self.used = handler.used();
        match handler {
            NetHandler::Frames(handler) => {
                let (queues, ports) = handler.stop();
                self.end = Some(End::Frames(ports));
                queues
            }
            NetHandler::Vhost(handler) => {
                let (queues, pairs) = handler.stop();
                self.end = Some(End::Vhost(pairs));
                queues
            }
            NetHandler::Peer(handler) => {
                let (queues, peer) = handler.stop();
                self.end = Some(End::Peer(Some(peer)));
                queues
            }
        }
    }

    fn reset(&mut self) {
        self.used = 1;
    }

    /// The address too: it may have been made by chance, and the driver has read it.
    fn save(&self, handler: Option<&NetHandler>) -> anyhow::Result<Value> {
        let pairs = u16::try_from(handler.map_or(self.used, NetHandler::used))?;
        Ok(serde_json::to_value(State { mac: self.mac, pairs })?)
    }

    fn load(&mut self, state: Value) -> anyhow::Result<()> {
        let State { mac, pairs } = serde_json::from_value(state)?;
        let most = self.spec.queues();
        anyhow::ensure!((1..=most).contains(&pairs), "its driver uses {pairs} pairs of queues, and there are {most}");
        (self.mac, self.used) = (mac, pairs.into());
        Ok(())
    }
}

/// Who moves the frames.
#[allow(clippy::large_enum_variant, reason = "there is one a card, and it is moved only at start and stop")]
pub enum NetHandler {
    /// This process.
    Frames(FrameHandler),
    /// The kernel.
    Vhost(VhostHandler),
    /// Another process.
    Peer(PeerHandler),
}

impl NetHandler {
    /// How many pairs of queues the driver uses.
    fn used(&self) -> usize {
        match self {
            Self::Frames(handler) => handler.used(),
            Self::Vhost(handler) => handler.used(),
            Self::Peer(_) => 1,
        }
    }
}

impl Handler for NetHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        match self {
            Self::Frames(handler) => handler.watch(watch),
            Self::Vhost(handler) => handler.watch(watch),
            Self::Peer(handler) => handler.watch(watch),
        }
    }

    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match self {
            Self::Frames(handler) => handler.ready(token, watch),
            Self::Vhost(handler) => handler.ready(token, watch),
            Self::Peer(handler) => handler.ready(token, watch),
        }
    }
}
