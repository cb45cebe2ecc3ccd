//! A network card as asked for, and what can be refused before anything is opened.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::bail;
use kv::Size;
use serde::{Deserialize, Serialize};
use virtio::Limit;

use super::{Ipv4Net, Mac, Publish};
use crate::Transport;

/// More pairs of queues than any machine of ours has processors.
const MOST_QUEUES: u16 = 64;
/// The longest name of an interface (`IFNAMSIZ`, less the zero at its end).
const NAME_LENGTH: usize = 15;
/// What IPv4 asks of every link (RFC 791), and the most that 16 bits of an IP packet's length allow.
const MTU: std::ops::RangeInclusive<u16> = 68..=65521;

/// A network card: `tap0,bridge=br0` or `user,publish=8080:80`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct NetSpec {
    /// The host's tap device with this name; made, and gone with the VM, if it is not there
    pub tap: Option<String>,
    /// An open tap device (`IFF_VNET_HDR`), as the number of a descriptor that is inherited
    pub fd: Option<i32>,
    /// Through passt: the host's own addresses and no rights needed
    pub user: bool,
    /// Through a process that listens at this socket (vhost-user), such as a switch in user space
    pub vhost_user: Option<PathBuf>,
    /// The card's name for later changes; the tap's unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's other devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
    /// MAC address; made from the names of VM and card unless said
    pub mac: Option<Mac>,
    /// The largest packet, in bytes; the tap's own unless said
    pub mtu: Option<u16>,
    /// Pairs of queues, at best one for each processor; 1 unless said
    pub queues: Option<u16>,
    /// Whether the host's kernel moves the frames (vhost-net): on, off or auto
    #[arg(value_parser = kv::from_str::<Vhost>)]
    pub vhost: Vhost,
    /// The host's bridge that the tap joins
    pub bridge: Option<String>,
    /// With `user`: ports of the host that lead to the guest, [ADDRESS:]HOST:GUEST[/udp]; 127.0.0.1 unless said
    pub publish: Vec<Publish>,
    /// With `user`: the guest's IPv4 address, such as 10.0.2.15/24, in a network where the gateway is number 2 and the DNS
    /// server number 3. Without it, it is the host's own, and the gateway's leads to the host's 127.0.0.1. With a tap, what
    /// the agent of `vmm run` sets up
    pub address: Option<Ipv4Net>,
    /// Frames from the guest with another MAC address than the card's are dropped
    pub antispoof: bool,
    /// The guest's IP addresses: frames from any other are dropped, too, and all that is neither ARP nor IP
    pub guest_ip: Vec<IpAddr>,
    /// Bytes a second to the guest, such as 50M; no limit unless said
    pub rx_rate: Option<Size>,
    /// Bytes to the guest that pass at once after a pause; one second's worth unless said
    pub rx_burst: Option<Size>,
    /// Frames a second to the guest; no limit unless said
    pub rx_frames: Option<u64>,
    /// Frames to the guest that pass at once after a pause; one second's worth unless said
    pub rx_frames_burst: Option<u64>,
    /// Bytes a second from the guest; no limit unless said
    pub tx_rate: Option<Size>,
    /// Bytes from the guest that pass at once after a pause; one second's worth unless said
    pub tx_burst: Option<Size>,
    /// Frames a second from the guest; no limit unless said
    pub tx_frames: Option<u64>,
    /// Frames from the guest that pass at once after a pause; one second's worth unless said
    pub tx_frames_burst: Option<u64>,
}

/// Who moves the frames between the queues and the tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vhost {
    /// The kernel where it can, and no option has to see the frames.
    #[default]
    Auto,
    /// The kernel.
    On,
    /// This process.
    Off,
}

/// Limits on bytes and on frames in one direction.
pub(super) type Limits = (Option<Limit>, Option<Limit>);

/// One direction's options, by name.
type Rates = [(&'static str, Option<u64>, Option<u64>); 2];

impl NetSpec {
    /// The name by which the card is addressed while the VM runs.
    pub fn id(&self) -> String {
        let id = self.id.clone().or_else(|| self.tap.clone());
        let other = if self.vhost_user.is_some() { "vhost-user" } else { "user" };
        id.unwrap_or_else(|| self.fd.map_or_else(|| other.to_owned(), |fd| format!("fd{fd}")))
    }

    /// How many pairs of queues the device has.
    pub fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// Whether an option has to see the frames, which the kernel's vhost-net does not let it.
    /// Whether the host's end is passt.
    pub(crate) fn is_user(&self) -> bool {
        self.tap.is_none() && self.fd.is_none() && self.vhost_user.is_none()
    }

    pub(super) fn sees_frames(&self) -> bool {
        self.guards() || self.rx_limits().is_some() || self.tx_limits().is_some()
    }

    pub(super) fn guards(&self) -> bool {
        self.antispoof || !self.guest_ip.is_empty()
    }

    pub(super) fn rx_limits(&self) -> Option<Limits> {
        limits(self.rx_rates())
    }

    pub(super) fn tx_limits(&self) -> Option<Limits> {
        limits(self.tx_rates())
    }

    fn rx_rates(&self) -> Rates {
        let bytes = ("rx-rate", self.rx_rate.map(Size::bytes), self.rx_burst.map(Size::bytes));
        [bytes, ("rx-frames", self.rx_frames, self.rx_frames_burst)]
    }

    fn tx_rates(&self) -> Rates {
        let bytes = ("tx-rate", self.tx_rate.map(Size::bytes), self.tx_burst.map(Size::bytes));
        [bytes, ("tx-frames", self.tx_frames, self.tx_frames_burst)]
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        let ends = [self.tap.is_some(), self.fd.is_some(), self.user, self.vhost_user.is_some()];
        if ends.iter().filter(|end| **end).count() != 1 {
            bail!("A network card has one host's end: say one of tap=NAME, fd=N, user and vhost-user=SOCKET");
        }
        let id = self.id();
        for (key, name) in [("tap", &self.tap), ("bridge", &self.bridge)] {
            if let Some(name) = name
                && (name.is_empty()
                    || name.len() > NAME_LENGTH
                    || matches!(name.as_str(), "." | "..")
                    || name.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control()))
            {
                bail!("{key}={name} is no interface's name: it has 1 to {NAME_LENGTH} letters, digits and dashes");
            }
        }
        if let Some(mtu) = self.mtu
            && !MTU.contains(&mtu)
        {
            bail!("{id}: mtu={mtu} is not possible: it is {} to {}", MTU.start(), MTU.end());
        }
        if !(1..=MOST_QUEUES).contains(&self.queues()) {
            bail!("{id}: queues={} is not possible: a card has 1 to {MOST_QUEUES}", self.queues());
        }
        if self.queues() > 1 && self.tap.is_none() {
            bail!("{id}: several queues need tap=NAME: drop queues=");
        }
        if self.bridge.is_some() && self.tap.is_none() {
            bail!("{id}: bridge= is for tap=NAME: say that, or drop it");
        }
        if !self.publish.is_empty() && !self.user {
            bail!("{id}: publish= is for user: say that, or forward the port on the host");
        }
        if self.vhost_user.is_some() && self.address.is_some() {
            bail!("{id}: address= is for user and taps: drop it, and give the guest its address in the guest");
        }
        if self.vhost == Vhost::On && (self.user || self.vhost_user.is_some()) {
            bail!("{id}: vhost=on is for a tap: drop it");
        }
        if self.vhost_user.is_some() && self.sees_frames() {
            bail!("{id}: limits and anti-spoofing see every frame, which goes past us with vhost-user=: drop them");
        }
        if self.vhost == Vhost::On && self.sees_frames() {
            bail!("{id}: limits and anti-spoofing see every frame, which vhost=on does not let them: say vhost=off");
        }
        for (name, rate, burst) in self.rx_rates().into_iter().chain(self.tx_rates()) {
            if rate == Some(0) || burst == Some(0) {
                bail!("{id}: a limit of 0 on {name}= lets nothing through: say more, or drop it");
            }
            if rate.is_none() && burst.is_some() {
                bail!("{id}: a burst without {name}= is of no use: say {name}=, or drop it");
            }
        }
        Ok(())
    }
}

fn limits(rates: Rates) -> Option<Limits> {
    let limit = |(_, rate, burst): (_, Option<u64>, Option<u64>)| {
        rate.map(|per_second| Limit { per_second, burst: burst.unwrap_or(per_second) })
    };
    let [bytes, frames] = rates.map(limit);
    (bytes.is_some() || frames.is_some()).then_some((bytes, frames))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> NetSpec {
        kv::from_str(text).unwrap()
    }

    #[test]
    fn the_first_word_is_the_tap_and_user_needs_no_value() {
        let tap = spec("tap0,bridge=br0,mac=02:00:00:00:00:01,queues=2,vhost=off,guest-ip=[10.0.0.2,fd00::2]");
        assert_eq!((tap.id(), tap.queues(), tap.vhost), ("tap0".into(), 2, Vhost::Off));
        assert_eq!(tap.guest_ip, ["10.0.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
        tap.validate().unwrap();
        let user = spec("user,publish=[8080:80,53:53/udp],id=net0");
        assert_eq!((user.id(), user.publish.len(), user.publish[1].udp), ("net0".into(), 2, true));
        user.validate().unwrap();
        assert_eq!(spec("user,publish=8080:80").publish.len(), 1);
        assert_eq!(spec("fd=7").id(), "fd7");
        let other = spec("vhost-user=/run/switch,mtu=9000");
        assert_eq!((other.id(), other.vhost_user.as_deref()), ("vhost-user".into(), Some("/run/switch".as_ref())));
        other.validate().unwrap();
    }

    #[test]
    fn a_key_or_an_address_that_does_not_exist_is_refused() {
        for (text, word) in [("tap0,macs=x", "macs"), ("tap0,mac=x", "MAC"), ("user,publish=80", "HOST:GUEST")] {
            let fault = kv::from_str::<NetSpec>(text).unwrap_err().to_string();
            assert!(fault.contains(word), "{fault}");
        }
    }

    #[test]
    fn what_has_to_see_the_frames_is_known() {
        for text in ["tap0,antispoof", "tap0,guest-ip=10.0.0.2", "tap0,rx-rate=1M", "tap0,tx-frames=10"] {
            assert!(spec(text).sees_frames(), "{text}");
            let fault = spec(&format!("{text},vhost=on")).validate().unwrap_err().to_string();
            assert!(fault.contains("vhost=off"), "{fault}");
        }
        assert!(!spec("tap0,queues=4,mtu=9000").sees_frames());
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_way_out() {
        for (text, cure) in [
            ("", "tap=NAME"),
            ("tap0,user", "one of"),
            ("tap0,fd=3", "one of"),
            ("a-name-of-16-char", "1 to 15"),
            ("tap=a/b", "1 to 15"),
            ("tap0,bridge=..", "1 to 15"),
            ("tap=tap%d", "1 to 15"),
            ("tap0,mtu=67", "68 to 65521"),
            ("tap0,mtu=65522", "68 to 65521"),
            ("tap0,queues=0", "1 to 64"),
            ("tap0,queues=65", "1 to 64"),
            ("fd=3,queues=2", "tap=NAME"),
            ("user,bridge=br0", "tap=NAME"),
            ("tap0,publish=80:80", "user"),
            ("vhost-user=/run/switch,address=10.0.2.15/24", "drop it"),
            ("user,vhost=on", "drop it"),
            ("vhost-user=/run/switch,vhost=on", "drop it"),
            ("vhost-user=/run/switch,antispoof", "drop them"),
            ("vhost-user=/run/switch,rx-rate=1M", "drop them"),
            ("vhost-user=/run/switch,user", "one of"),
            ("vhost-user=/run/switch,queues=2", "tap=NAME"),
            ("tap0,rx-rate=0", "rx-rate="),
            ("tap0,tx-frames=5,tx-frames-burst=0", "tx-frames="),
            ("tap0,tx-burst=5", "tx-rate="),
        ] {
            let fault = spec(text).validate().unwrap_err().to_string();
            assert!(fault.contains(cure), "{text}: {fault}");
        }
    }
}
