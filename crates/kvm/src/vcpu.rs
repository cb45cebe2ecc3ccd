//! One virtual processor.
#![allow(unsafe_code, reason = "the reason for an exit is a union in a page shared with the kernel")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::Context;
use kvm_bindings::{CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, Msrs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use memory::{FileRegion, Ram};
use vm_memory::{Bytes, GuestAddress};

use crate::exit::{Exit, InternalError, Stuck};
use crate::kick::{Kicker, RunPage};
use crate::x86::regs::{self, Entry};

/// The longest instruction, in bytes.
const LONGEST_INSTRUCTION: usize = 15;

/// One virtual processor. It belongs to the thread that runs it.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    page: Arc<RunPage>,
    /// To show the instruction at which KVM gave up.
    ram: Ram,
    /// Files that are guest memory, from which somebody may take pages away.
    files: Vec<Arc<FileRegion>>,
    /// How often that had happened when it was last looked at.
    losses: u64,
}

impl Vcpu {
    pub(crate) fn new(
        fd: VcpuFd,
        index: u8,
        run_size: usize,
        ram: Ram,
        files: Vec<Arc<FileRegion>>,
    ) -> anyhow::Result<Self> {
        let page = RunPage::map(fd.as_raw_fd(), run_size).context("Cannot map a kvm_run page")?;
        Ok(Self { fd, index, page, ram, files, losses: 0 })
    }

    /// Counts from 0; also the local APIC's id.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// A handle with which another thread gets this processor out of the guest.
    pub fn kicker(&self) -> Kicker {
        Kicker::new(self.page.clone())
    }

    /// What the processor says of itself, and the registers that every kernel expects at its
    /// entry.
    pub fn identify(&self, cpuid: &CpuId, msrs: &Msrs) -> anyhow::Result<()> {
        let index = self.index;
        self.fd.set_cpuid2(cpuid).with_context(|| format!("KVM refuses the CPUID of vcpu-{index}"))?;
        let set = self.fd.set_msrs(msrs).with_context(|| format!("KVM refuses the MSRs of vcpu-{index}"))?;
        match msrs.as_slice().get(set) {
            Some(msr) => anyhow::bail!("KVM refuses to set MSR {:#x} of vcpu-{index}", msr.index),
            None => Ok(()),
        }
    }

    /// Puts the first processor at the kernel's entry. The others wait for it to start them.
    pub fn enter(&self, entry: Entry) -> anyhow::Result<()> {
        let reset = self.fd.get_sregs().context("KVM_GET_SREGS")?;
        self.fd.set_sregs(&entry.sregs(reset)).context("KVM refuses the entry's system registers")?;
        self.fd.set_regs(&entry.regs()).context("KVM refuses the entry's registers")
    }

    /// Tells a guest with KVM's clock that the host had stopped it, so that its watchdogs let that time pass
    /// (`KVM_KVMCLOCK_CTRL`).
    pub fn excuse_pause(&self) {
        // Without that clock it is an error, and there is nobody to tell.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until it needs an answer, or a kick arrives.
    ///
    /// # Errors
    ///
    /// Where KVM_RUN itself fails, which says that the host is at fault: out of memory, or guest
    /// memory that is gone.
    pub fn run(&mut self) -> io::Result<Exit<'_>> {
        let page = &self.page;
        Ok(match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => Exit::PortIn { port, width: page.port_width().into(), data },
            Ok(VcpuExit::IoOut(port, data)) => Exit::PortOut { port, width: page.port_width().into(), data },
            Ok(VcpuExit::MmioRead(address, data)) => Exit::MmioRead { address, data },
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::MmioWrite { address, data },
            Ok(VcpuExit::Shutdown) => Exit::TripleFault,
            Ok(VcpuExit::Intr) => page.kicked(),
            Ok(VcpuExit::InternalError) => Exit::Stuck(Stuck::Internal),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Exit::Stuck(Stuck::Other(format!("the processor refused to enter the guest, reason {reason:#x}")))
            }
            Ok(other) => Exit::Stuck(Stuck::Other(format!("KVM exit {other:?} that was not asked for"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => page.kicked(),
            Err(error) if error.errno() == libc::EFAULT && heal(&self.files, &mut self.losses) => Exit::Kicked,
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        })
    }

    /// Says where and at what the guest is stuck, right after [`Vcpu::run`] said that it is.
    pub fn explain(&mut self, stuck: Stuck) -> InternalError {
        match stuck {
            Stuck::Internal => self.internal_error(),
            Stuck::Other(reason) => self.where_it_is(reason),
        }
    }

    /// Reads KVM's reason for KVM_EXIT_INTERNAL_ERROR.
    fn internal_error(&mut self) -> InternalError {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this field of the union is the valid one, and every
        // bit pattern is a value of it.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        // SAFETY: as above; it is meaningful only with the flag that is asked for below.
        let seen = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return self.where_it_is(format!("KVM internal error {}", failure.suberror));
        }
        let mut error = self.where_it_is("KVM cannot emulate an instruction".into());
        let with_bytes = failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if failure.ndata > 0 && with_bytes {
            let length = usize::from(seen.insn_size).min(seen.insn_bytes.len());
            error.instruction = seen.insn_bytes[..length].to_vec();
        }
        error
    }

    fn where_it_is(&self, reason: String) -> InternalError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let sregs = self.fd.get_sregs().unwrap_or_default();
        let instruction = self.instruction_at(sregs.cs.base.wrapping_add(rip)).unwrap_or_default();
        InternalError { reason, rip, mode: regs::mode(&sregs), instruction }
    }

    /// The bytes at a linear address, as far as they are mapped and lie in one page.
    fn instruction_at(&self, linear: u64) -> Option<Vec<u8>> {
        let translation = self.fd.translate_gva(linear).ok().filter(|found| found.valid != 0)?;
        let in_page = 0x1000 - usize::try_from(linear & 0xfff).ok()?;
        let mut bytes = vec![0; LONGEST_INSTRUCTION.min(in_page)];
        self.ram.read_slice(&mut bytes, GuestAddress(translation.physical_address)).ok()?;
        Some(bytes)
    }
}

/// Whether a file that is guest memory has become shorter since `losses` was taken down: then there are zeros now in
/// place of what is missing, and the guest can go on.
fn heal(files: &[Arc<FileRegion>], losses: &mut u64) -> bool {
    let now = files.iter().map(|file| file.heal()).sum();
    std::mem::replace(losses, now) != now
}
