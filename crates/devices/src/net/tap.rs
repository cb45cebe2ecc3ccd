//! The host's end of a card: a tap device, whose frames begin with the header of VIRTIO 1.2, section 5.1.6.
//!
//! A tap that is not there is made where we may (`CAP_NET_ADMIN`), and goes with us. One that is there is used as it is:
//! who made it has said its MTU and its owner.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, bail};

use super::{HEADER, NetSpec, feature, sys};

/// The queues of one tap.
pub(super) struct Tap {
    /// What `ip link` calls it.
    pub(super) name: String,
    pub(super) queues: Vec<File>,
    /// As it was when the tap was opened; none if it is in another network namespace.
    pub(super) mtu: Option<u16>,
}

impl Tap {
    /// Opens the tap `name` with as many queues as are asked for.
    ///
    /// # Errors
    ///
    /// Why it cannot be had, with the cure.
    pub(super) fn open(name: &str, spec: &NetSpec) -> anyhow::Result<Self> {
        let exists = sys::index(name).is_some();
        let several = spec.queues() > 1;
        let mut queues = Vec::new();
        for _ in 0..spec.queues() {
            let queue = open_device()?;
            sys::attach_tap(queue.as_fd(), name, several).map_err(|error| refusal(name, several, exists, &error))?;
            sys::set_header_length(queue.as_fd(), HEADER).with_context(|| format!("Cannot use tap {name}"))?;
            queues.push(queue);
        }
        if !exists && let Some(mtu) = spec.mtu {
            sys::set_mtu(name, mtu).with_context(|| format!("Cannot set the MTU of tap {name} to {mtu}"))?;
        }
        if let Some(bridge) = &spec.bridge {
            join(name, bridge)?;
        }
        let up = sys::is_up(name).and_then(|up| if up { Ok(()) } else { sys::set_up(name) });
        up.with_context(|| format!("Cannot set tap {name} up: do it with `ip link set {name} up` as root"))?;
        Self::with(name.to_owned(), queues, spec)
    }

    /// Takes the tap that the inherited descriptor `fd` is.
    ///
    /// # Errors
    ///
    /// It is none.
    pub(super) fn inherit(fd: i32, spec: &NetSpec) -> anyhow::Result<Self> {
        if fd < 3 {
            bail!("fd={fd} is not possible: the first three are the standard streams");
        }
        let file = sys::adopt(fd).with_context(|| {
            format!("There is no descriptor {fd}: open the tap in the process that starts this one, without O_CLOEXEC")
        })?;
        let name = sys::tap_name(file.as_fd()).ok().flatten().with_context(|| {
            format!("Descriptor {fd} is no tap with a header: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")
        })?;
        sys::set_header_length(file.as_fd(), HEADER).with_context(|| format!("Cannot use descriptor {fd}"))?;
        Self::with(name, vec![file], spec)
    }

    fn with(name: String, queues: Vec<File>, spec: &NetSpec) -> anyhow::Result<Self> {
        let mtu = sys::mtu(&name).ok();
        if let (Some(asked), Some(mtu)) = (spec.mtu, mtu)
            && asked > mtu
        {
            bail!("Tap {name} takes packets of {mtu} bytes, fewer than mtu={asked}: `ip link set {name} mtu {asked}`");
        }
        Ok(Self { name, queues, mtu })
    }
}

/// Makes the queue `index` ready for a guest that has accepted `features`. Only the first is used from the start
/// (section 5.1.6.5.5). What came for the last guest is dropped: it may need what this one cannot do.
pub(super) fn prepare(queue: &File, index: usize, features: u64) -> anyhow::Result<()> {
    if index > 0 {
        return enable(queue, false).context("Cannot switch off a queue of the tap");
    }
    set_offloads(queue.as_fd(), features).context("Cannot set the offloads of the tap")?;
    // Its own queue is of a thousand frames (`txqueuelen`). The kernel drops what has no room in a byte.
    let mut reader = queue;
    for _ in 0..1024 {
        if reader.read(&mut [0; HEADER]).is_err() {
            break;
        }
    }
    Ok(())
}

/// Uses the first `count` of these queues.
pub(super) fn use_queues<'a>(name: &str, queues: impl Iterator<Item = &'a File>, count: usize) {
    // The first is always used, and may be one of a tap that has no others.
    for (index, queue) in queues.enumerate().skip(1) {
        if let Err(error) = enable(queue, index < count) {
            log::warn!("{name}: cannot switch queue {index} of the tap: {error}");
        }
    }
}

fn enable(queue: &File, on: bool) -> io::Result<()> {
    match sys::enable_queue(queue.as_fd(), on) {
        // It is so already.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

fn set_offloads(queue: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let pairs = [
        (feature::GUEST_CSUM, libc::TUN_F_CSUM),
        (feature::GUEST_TSO4, libc::TUN_F_TSO4),
        (feature::GUEST_TSO6, libc::TUN_F_TSO6),
    ];
    let accepted = pairs.iter().filter(|(feature, _)| features & feature != 0);
    sys::set_offloads(queue, accepted.fold(0, |all, (_, offload)| all | offload))
}

fn open_device() -> anyhow::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun");
    opened.map_err(|error| {
        let cure = match error.kind() {
            io::ErrorKind::NotFound => "load the module with `modprobe tun`, or say user instead of a tap",
            io::ErrorKind::PermissionDenied => "give this user the device, or say user instead of a tap",
            _ => "say user instead of a tap",
        };
        anyhow::Error::new(error).context(format!("Cannot open /dev/net/tun: {cure}"))
    })
}

fn refusal(name: &str, several: bool, exists: bool, error: &io::Error) -> anyhow::Error {
    let kind = if several { " multi_queue" } else { "" };
    let make = format!("`ip tuntap add {name} mode tap{kind} user $USER` as root");
    match error.raw_os_error() {
        Some(libc::EPERM) if exists => {
            anyhow::anyhow!("Tap {name} is not ours: `ip tuntap del {name} mode tap`, then {make}")
        }
        Some(libc::EPERM) => anyhow::anyhow!("There is no tap {name}, and we may not make it: {make}"),
        Some(libc::EBUSY) => anyhow::anyhow!("Tap {name} is taken: name another, or end the process that has it"),
        Some(libc::EINVAL) if exists => anyhow::anyhow!(
            "{name} is no tap, or one with{} several queues: name another, or make it by {make}",
            if several { "out" } else { "" }
        ),
        _ => anyhow::anyhow!("Cannot use tap {name}: {error}"),
    }
}

fn join(name: &str, bridge: &str) -> anyhow::Result<()> {
    let Some(port) = sys::index(name) else { bail!("Tap {name} has gone") };
    let master = std::fs::read_link(format!("/sys/class/net/{name}/master"));
    if master.is_ok_and(|master| master.file_name().is_some_and(|name| name == bridge)) {
        return Ok(());
    }
    sys::join_bridge(bridge, port).map_err(|error| match error.raw_os_error() {
        Some(libc::ENODEV) => {
            anyhow::anyhow!("There is no bridge {bridge}: make it with `ip link add {bridge} type bridge` as root")
        }
        Some(libc::EOPNOTSUPP) => anyhow::anyhow!("{bridge} is no bridge: name one (`ip link show type bridge`)"),
        Some(libc::EPERM) => anyhow::anyhow!(
            "We may not put tap {name} into bridge {bridge}: `ip link set {name} master {bridge}` as root"
        ),
        Some(libc::EBUSY) => {
            anyhow::anyhow!("Tap {name} is in a bridge already: drop bridge=, or `ip link set {name} nomaster` as root")
        }
        _ => anyhow::anyhow!("Cannot put tap {name} into bridge {bridge}: {error}"),
    })
}
