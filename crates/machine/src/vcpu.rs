//! The thread of one virtual processor: runs the guest and answers its exits.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use bus::{Bus, EndLatch, GuestEnd};
use kvm::{Exit, InternalError, Kicker, Vcpu};
use vmm_sys_util::eventfd::EventFd;

use crate::counts::{ExitCounts, count};

/// What the processors of one machine share. Nothing in it is locked while the guest runs.
pub(crate) struct Shared {
    /// The devices behind ports.
    pub(crate) ports: Bus,
    /// The devices behind memory addresses.
    pub(crate) mmio: Bus,
    /// The end that a device reported.
    pub(crate) ends: Arc<EndLatch>,
    /// One for each processor.
    pub(crate) counts: Arc<[ExitCounts]>,
    /// Tells the processors to leave the guest.
    pub(crate) stop: AtomicBool,
    /// Why the first processor that ended the guest did; the others are stopped.
    pub(crate) end: Mutex<Option<End>>,
    /// Written when `end` is.
    pub(crate) ended: EventFd,
}

/// Why a processor ended the guest.
#[derive(Debug)]
pub(crate) enum End {
    /// The guest said so.
    Guest(GuestEnd),
    /// It crashed, or reset itself by crashing.
    TripleFault,
    /// KVM cannot go on.
    Internal(InternalError),
    /// The host cannot.
    Host(io::Error),
}

/// Bytes of a thread's stack: ample, and too small for the host to make it one huge page.
pub(crate) const STACK: usize = 256 << 10;

/// A processor that runs. Joining its thread gives the processor back.
pub(crate) struct VcpuThread {
    pub(crate) thread: JoinHandle<Vcpu>,
    pub(crate) kicker: Kicker,
}

impl VcpuThread {
    /// Starts the thread `vcpu-N`, pinned to a host processor where that is asked for; it calls
    /// `begin` before it runs anything of the guest's.
    pub(crate) fn spawn(
        mut vcpu: Vcpu,
        shared: Arc<Shared>,
        pin: Option<usize>,
        begin: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let kicker = vcpu.kicker();
        let builder = Builder::new().name(format!("vcpu-{}", vcpu.index())).stack_size(STACK);
        let thread = builder.spawn(move || {
            begin();
            let pinned = pin.map_or(Ok(()), kvm::pin_to);
            let end = match pinned {
                Ok(()) => run(&mut vcpu, &shared),
                Err(error) => Some(End::Host(error)),
            };
            if let Some(end) = end {
                shared.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
                shared.ended.write(1).expect("a counter that is written once a processor is never full");
            }
            vcpu
        })?;
        Ok(Self { thread, kicker })
    }
}

/// Runs the guest until it ends, or until it is told to stop (`None`).
fn run(vcpu: &mut Vcpu, shared: &Shared) -> Option<End> {
    let counts = &shared.counts[usize::from(vcpu.index())];
    loop {
        let stuck = match vcpu.run() {
            Ok(Exit::PortOut { port, width, data }) => {
                count(&counts.port);
                data.chunks(width).for_each(|element| shared.ports.write(port.into(), element));
                match shared.ends.get() {
                    Some(end) => return Some(End::Guest(end)),
                    None => continue,
                }
            }
            Ok(Exit::PortIn { port, width, data }) => {
                count(&counts.port);
                data.chunks_mut(width).for_each(|element| shared.ports.read(port.into(), element));
                continue;
            }
            Ok(Exit::MmioRead { address, data }) => {
                count(&counts.mmio);
                shared.mmio.read(address, data);
                continue;
            }
            Ok(Exit::MmioWrite { address, data }) => {
                count(&counts.mmio);
                shared.mmio.write(address, data);
                continue;
            }
            Ok(Exit::Kicked) => {
                count(&counts.kick);
                match shared.stop.load(Ordering::SeqCst) {
                    true => return None,
                    false => continue,
                }
            }
            Ok(Exit::TripleFault) => {
                count(&counts.end);
                return Some(End::TripleFault);
            }
            Ok(Exit::Stuck(stuck)) => stuck,
            Err(error) => return Some(End::Host(error)),
        };
        count(&counts.end);
        return Some(End::Internal(vcpu.explain(stuck)));
    }
}
