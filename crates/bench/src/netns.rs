//! Networks of the run's own, so that nothing of the host's is touched or measured:
//!
//! ```text
//!   outside                                     inside
//!   server ── bridge 10.213.0.1 ─┬─ veth ─────── veth 10.213.0.2: the process, the container
//!                                └─ tap ── a machine, 10.213.0.2
//! ```
//!
//! Both namespaces end with the descriptors that this holds; nothing is left behind, whatever kills the run.

#![allow(unsafe_code, reason = "to leave a namespace is unsafe where threads share what they have; here is one thread")]

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// The server's address.
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);
/// The contenders' address, one at a time.
pub(crate) const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);
/// The workload's port.
pub(crate) const PORT: u16 = 7213;
/// The tap device of machines.
pub(crate) const TAP: &str = "bench-tap";

/// The two namespaces. As long as this is there, this thread and what it starts are outside.
pub(crate) struct Network {
    home: File,
    outside: File,
    inside: File,
}

impl Network {
    /// Makes them. Needs root, and iproute2's `ip`.
    pub(crate) fn make() -> anyhow::Result<Self> {
        let home = current()?;
        let made = Self::make_from(home.try_clone()?);
        if made.is_err() {
            enter(&home)?;
        }
        made
    }

    fn make_from(home: File) -> anyhow::Result<Self> {
        leave().context("no right to make a network of its own: it needs root")?;
        let inside = current()?;
        leave()?;
        let network = Self { home, outside: current()?, inside };
        let peer = network.inside_path();
        ip("link add bench-veth type veth peer name bench-peer")?;
        ip(&format!("link set bench-peer netns {}", peer.display()))?;
        ip("link add bench-bridge type bridge forward_delay 0")?;
        ip(&format!("tuntap add {TAP} mode tap vnet_hdr"))?;
        for port in ["bench-veth", TAP] {
            ip(&format!("link set {port} master bench-bridge up"))?;
        }
        ip(&format!("address add {OUTSIDE}/8 dev bench-bridge"))?;
        ip("link set bench-bridge up")?;
        ip("link set lo up")?;
        network.enter_inside()?;
        let set_up = ip(&format!("address add {INSIDE}/8 dev bench-peer"))
            .and_then(|()| ip("link set bench-peer up"))
            .and_then(|()| ip("link set lo up"));
        network.leave_inside()?;
        set_up.map(|()| network)
    }

    /// Where the inner one can be opened.
    pub(crate) fn inside_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.inside.as_raw_fd()).into()
    }

    /// What this thread starts now is inside.
    pub(crate) fn enter_inside(&self) -> anyhow::Result<()> {
        enter(&self.inside)
    }

    /// And now outside again.
    pub(crate) fn leave_inside(&self) -> anyhow::Result<()> {
        enter(&self.outside)
    }

    /// Machines and the process have the same address with different cards: nobody remembers the last one's.
    pub(crate) fn forget_neighbours(&self) -> anyhow::Result<()> {
        ip("neighbour flush dev bench-bridge")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = enter(&self.home);
    }
}

fn current() -> anyhow::Result<File> {
    File::open("/proc/thread-self/ns/net").context("cannot open a network namespace")
}

fn leave() -> anyhow::Result<()> {
    // SAFETY: this program has one thread whenever it gets here, and no descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.context("cannot make a network namespace")
}

fn enter(namespace: &File) -> anyhow::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("cannot enter a network namespace")
}

fn ip(words: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(words.split(' ')).output();
    let output = output.context("cannot run ip (Debian 12: apt install iproute2)")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words}: {}", error.trim());
    Ok(())
}
