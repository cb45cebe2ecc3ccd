//! vhost-net: the host's kernel moves the frames between a card's queues and its tap.
//!
//! One `/dev/vhost-net` a pair of queues, each with a thread of the kernel. The kernel is told where guest memory and the
//! rings are, and gets the queues' kicks and interrupts as eventfds; this process only hears of faults.
//!
//! Left out until there are snapshots: the log of pages that the kernel writes, and the positions in the rings, which it
//! keeps; a reset, for which alone a card is stopped today, forgets them anyway.
#![allow(unsafe_code, reason = "system calls by libc; each is one call with its arguments checked by the types here")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};

use anyhow::Context as _;
use memory::Ram;
use virtio::{GuestFault, Handler, VirtQueue, Watch};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::control::{Control, Queues};
use crate::served::Served;

/// `linux/vhost.h`.
const TYPE: u32 = 0xaf;
const GET_FEATURES: libc::Ioctl = libc::_IOR::<u64>(TYPE, 0x00);
const SET_FEATURES: libc::Ioctl = libc::_IOW::<u64>(TYPE, 0x00);
const SET_OWNER: libc::Ioctl = libc::_IO(TYPE, 0x01);
/// Its size is that of an empty table.
const SET_MEMORY: libc::Ioctl = libc::_IOW::<u64>(TYPE, 0x03);
const SET_SIZE: libc::Ioctl = libc::_IOW::<Number>(TYPE, 0x10);
const SET_ADDRESSES: libc::Ioctl = libc::_IOW::<Addresses>(TYPE, 0x11);
const SET_POSITION: libc::Ioctl = libc::_IOW::<Number>(TYPE, 0x12);
const GET_POSITION: libc::Ioctl = libc::_IOWR::<Number>(TYPE, 0x12);
const SET_KICK: libc::Ioctl = libc::_IOW::<Descriptor>(TYPE, 0x20);
const SET_CALL: libc::Ioctl = libc::_IOW::<Descriptor>(TYPE, 0x21);
const SET_ERROR: libc::Ioctl = libc::_IOW::<Descriptor>(TYPE, 0x22);
const SET_BACKEND: libc::Ioctl = libc::_IOW::<Descriptor>(TYPE, 0x30);

/// The most pieces of memory (the module's parameter `max_mem_regions` unless it was changed).
const MOST_REGIONS: usize = 64;

/// Tokens: an interrupt of each queue, the error of each queue, and the control queue's kick.
const ERROR: u32 = 0x1000;
const CONTROL: u32 = 0x0fff;

/// `struct vhost_vring_state`.
#[repr(C)]
struct Number {
    ring: u32,
    number: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct Descriptor {
    ring: u32,
    descriptor: RawFd,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    ring: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory` with its array, and `struct vhost_memory_region`.
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    regions: [Region; MOST_REGIONS],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest: u64,
    length: u64,
    host: u64,
    flags: u64,
}

/// A queue of the tap and who moves its frames.
pub(super) struct Pair {
    kernel: File,
    tap: File,
}

/// The two rings of a pair, as vhost-net numbers them.
const RINGS: [u32; 2] = [0, 1];

/// Opens as many of the kernel's devices as there are queues of the tap.
///
/// # Errors
///
/// The kernel has none, or this user may not use it.
pub(super) fn open(count: usize) -> anyhow::Result<Vec<File>> {
    let open_one = || {
        let file = OpenOptions::new().read(true).write(true).open("/dev/vhost-net").map_err(|error| {
            let cure = match error.kind() {
                io::ErrorKind::NotFound => "load the module with `modprobe vhost_net`, or say vhost=off",
                _ => "give this user the device, or say vhost=off",
            };
            anyhow::Error::new(error).context(format!("Cannot open /dev/vhost-net: {cure}"))
        })?;
        // SAFETY: no memory is passed.
        check(unsafe { libc::ioctl(file.as_raw_fd(), SET_OWNER) }).context("Cannot own a /dev/vhost-net")?;
        Ok(file)
    };
    (0..count).map(|_| open_one()).collect()
}

pub(super) fn pairs(kernel: Vec<File>, taps: Vec<File>) -> Vec<Pair> {
    kernel.into_iter().zip(taps).map(|(kernel, tap)| Pair { kernel, tap }).collect()
}

/// The features that the kernel can do.
pub(super) fn features(pairs: &[Pair]) -> u64 {
    let of = |pair: &Pair| {
        let mut features = 0u64;
        // SAFETY: `features` lives across the call.
        let result = unsafe { libc::ioctl(pair.kernel.as_raw_fd(), GET_FEATURES, &raw mut features) };
        if result == 0 { features } else { 0 }
    };
    pairs.first().map_or(0, of)
}

impl Pair {
    /// Has the kernel move frames.
    fn start(&self, rings: &[Ring; 2], memory: &Ram, features: u64) -> io::Result<()> {
        let kernel = &self.kernel;
        set(kernel, SET_FEATURES, &(features & self::features(std::slice::from_ref(self))))?;
        set(kernel, SET_MEMORY, &table(memory)?)?;
        for (ring, Ring { served: Served { queue, call, .. }, error }) in RINGS.into_iter().zip(rings) {
            let state = queue.state();
            set(kernel, SET_SIZE, &Number { ring, number: state.size.into() })?;
            set(kernel, SET_POSITION, &Number { ring, number: state.next_avail.into() })?;
            let addresses = Addresses {
                ring,
                flags: 0,
                descriptors: host(memory, state.desc_table)?,
                used: host(memory, state.used_ring)?,
                available: host(memory, state.avail_ring)?,
                log: 0,
            };
            set(kernel, SET_ADDRESSES, &addresses)?;
            for (ioctl, event) in [(SET_KICK, queue.kick()), (SET_CALL, call), (SET_ERROR, error)] {
                set(kernel, ioctl, &Descriptor { ring, descriptor: event.as_raw_fd() })?;
            }
        }
        RINGS.into_iter().try_for_each(|ring| self.set_backend(ring, self.tap.as_raw_fd()))
    }

    /// Has it touch the queues no more. It has stopped when this returns.
    fn stop(&self) {
        for ring in RINGS {
            for result in
                [self.set_backend(ring, -1), set(&self.kernel, SET_KICK, &Descriptor { ring, descriptor: -1 })]
            {
                if let Err(error) = result {
                    log::error!("vhost-net does not give a queue back: {error}");
                }
            }
        }
    }

    /// How far the kernel has read the available ring.
    fn position(&self, ring: u32) -> io::Result<u16> {
        let mut number = Number { ring, number: 0 };
        // SAFETY: `number` lives across the call, and is of the type that the number was made for.
        check(unsafe { libc::ioctl(self.kernel.as_raw_fd(), GET_POSITION, &raw mut number) })?;
        u16::try_from(number.number).map_err(io::Error::other)
    }

    fn set_backend(&self, ring: u32, descriptor: RawFd) -> io::Result<()> {
        set(&self.kernel, SET_BACKEND, &Descriptor { ring, descriptor })
    }
}

/// Calls with a pointer to what `ioctl` takes: the constants above say what that is.
fn set<T>(kernel: &File, ioctl: libc::Ioctl, value: &T) -> io::Result<()> {
    // SAFETY: `value` lives across the call, and is of the type that the number was made for, or a table whose length
    // it begins with.
    check(unsafe { libc::ioctl(kernel.as_raw_fd(), ioctl, std::ptr::from_ref(value)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn table(memory: &Ram) -> io::Result<Table> {
    let mut table = Table { count: 0, padding: 0, regions: [Region::default(); MOST_REGIONS] };
    for region in memory.iter() {
        let slot = table.regions.get_mut(table.count as usize).ok_or(io::ErrorKind::OutOfMemory)?;
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        *slot = Region { guest: region.start_addr().0, length: region.len(), host: host as u64, flags: 0 };
        table.count += 1;
    }
    Ok(table)
}

fn host(memory: &Ram, address: u64) -> io::Result<u64> {
    memory.get_host_address(GuestAddress(address)).map(|host| host as u64).map_err(io::Error::other)
}

/// A queue that the kernel serves.
struct Ring {
    served: Served,
    /// What the kernel writes to when the ring is broken.
    error: EventFd,
}

impl Ring {
    fn new(queue: VirtQueue) -> io::Result<Self> {
        Ok(Self { served: Served::new(queue)?, error: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }
}

/// Watches over what the kernel does.
pub struct VhostHandler {
    name: String,
    pairs: Vec<Pair>,
    /// Two for each of the first of them, as many as the driver has enabled.
    rings: Vec<[Ring; 2]>,
    control: Option<Control>,
    /// How many pairs the driver uses.
    used: usize,
}

impl VhostHandler {
    /// Has the kernel begin, with the first `used` pairs in use. What may fail does before `pairs` are taken.
    pub(super) fn new(
        name: String,
        (pairs, used): (&mut Vec<Pair>, usize),
        queues: Queues,
        memory: &Ram,
        features: u64,
    ) -> anyhow::Result<Self> {
        let rings = queues.pairs.into_iter().map(|(rx, tx)| Ok([Ring::new(rx)?, Ring::new(tx)?]));
        let rings = rings.collect::<io::Result<Vec<_>>>().context("Cannot make eventfds for vhost-net")?;
        for (index, pair) in pairs.iter().enumerate() {
            super::tap::prepare(&pair.tap, index, features)?;
        }
        for (pair, rings) in pairs.iter().zip(&rings) {
            if let Err(error) = pair.start(rings, memory, features) {
                pairs.iter().for_each(Pair::stop);
                return Err(error).context("vhost-net does not take a queue: say vhost=off");
            }
        }
        let mut handler = Self { name, pairs: std::mem::take(pairs), rings, control: queues.control, used: 1 };
        handler.use_pairs(used.min(handler.rings.len()));
        Ok(handler)
    }

    /// Gives back the queues and the pairs.
    pub(super) fn stop(self) -> (Vec<VirtQueue>, Vec<Pair>) {
        let mut queues = Vec::new();
        self.pairs.iter().for_each(Pair::stop);
        for (pair, rings) in self.pairs.iter().zip(self.rings) {
            for (ring, Ring { mut served, .. }) in RINGS.into_iter().zip(rings) {
                // Without it, the queue goes on behind what was given back.
                served.queue.take_back(pair.position(ring).ok());
                queues.push(served.queue);
            }
        }
        queues.extend(self.control.map(Control::into_queue));
        (queues, self.pairs)
    }

    /// How many pairs the driver uses.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// The driver uses this many pairs from now on.
    fn use_pairs(&mut self, count: usize) {
        self.used = count;
        let taps = self.pairs.iter().map(|pair| &pair.tap).take(self.rings.len());
        super::tap::use_queues(&self.name, taps, count);
    }

    /// The rings with their tokens.
    fn rings(&self) -> impl Iterator<Item = (u32, &Ring)> {
        (0..).zip(self.rings.iter().flatten())
    }
}

impl Handler for VhostHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        for (token, ring) in self.rings() {
            watch.add(&ring.error, ERROR + token)?;
            ring.served.watch(watch, token)?;
        }
        self.control.as_ref().map_or(Ok(()), |control| watch.add(control.queue(), CONTROL))
    }

    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            CONTROL => {
                let most = self.rings.len();
                if let Some(count) = self.control.as_mut().map_or(Ok(None), |control| control.serve(most))? {
                    self.use_pairs(count);
                }
            }
            ERROR.. => {
                self.pairs.iter().for_each(Pair::stop);
                let ring = token - ERROR;
                return Err(GuestFault::new(format!("queue {ring}: vhost-net finds its rings or a chain broken")));
            }
            token => {
                if let Some((_, ring)) = self.rings().nth(token as usize) {
                    ring.served.relay();
                }
            }
        }
        Ok(())
    }
}
