//! Can this host's KVM run an unmodified kernel? A tiny guest executes what an emulating KVM lacks.
//!
//! Some hosts have a `/dev/kvm` that opens and answers every request, but runs the guest's
//! supervisor code in KVM's instruction emulator, because the processor offers neither svm nor vmx
//! to it. That emulator does not know all instructions that every kernel executes. What the guest
//! here executes decides; how long it takes is information only.
//!
//! The guest is in 64-bit mode from its first instruction, with page tables, GDT and IDT of its own
//! (AMD64 Architecture Programmer's Manual, volume 2, 4.8, 5.3, 8.9), in [`MEMORY`] bytes at 0.
//! Left out on purpose: everything that a kernel does not need in its first milliseconds.
#![allow(unsafe_code, reason = "KVM takes guest memory as an address")]

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use kvm_bindings::{kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::host::Host;
use crate::kick::{Kicker, RunPage, install_kick_handler};

/// The guest's time. It needs microseconds on hardware and milliseconds where it is emulated.
const LIMIT: Duration = Duration::from_secs(2);

/// The guest's memory, in bytes, and where in it things are.
const MEMORY: usize = 0x1_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const OPERAND: u64 = 0x7000;
const XSAVE_AREA: u64 = 0x8000;
const ON_INT3: u64 = 0x9000;
const ON_FAULT: u64 = 0x9100;
const CODE: u64 = 0xa000;
const STACK: u64 = 0x1_0000;

/// The ports at which a trial ends.
const PASSED: u16 = 0xf4;
const FAILED: u16 = 0xf5;

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;
const INT3_VECTOR: u64 = 3;

/// Instructions that the first trial executes, and so what [`Probe::pace`] is the time of.
pub const PACE_INSTRUCTIONS: u32 = 20_000;

/// One thing that the guest tries, from [`CODE`] on.
struct Trial {
    instruction: &'static str,
    code: &'static [u8],
}

/// What the `rbp`, `rsi` and `rdi` in these are is set in [`registers`].
const TRIALS: [Trial; 4] = [
    Trial {
        instruction: "a counting loop",
        code: &[
            0xff, 0xc9, // dec ecx
            0x75, 0xfc, // jnz to the dec
            0xe6, 0xf4, // out PASSED, al
            0xf4, // hlt
        ],
    },
    Trial {
        instruction: "lock cmpxchg16b",
        code: &[
            0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b [rsi]: zero there becomes rcx:rbx
            0x48, 0x39, 0x1e, // cmp [rsi], rbx
            0x74, 0x03, // je over the next two
            0xe6, 0xf5, // out FAILED, al
            0xf4, // hlt
            0xe6, 0xf4, // out PASSED, al
            0xf4, // hlt
        ],
    },
    Trial {
        instruction: XRSTOR,
        code: &[
            0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1: the x87 state alone
            0x31, 0xd2, // xor edx, edx
            0x48, 0x0f, 0xae, 0x2f, // xrstor64 [rdi]
            0xe6, 0xf4, // out PASSED, al
            0xf4, // hlt
        ],
    },
    Trial {
        instruction: "int3",
        code: &[
            0xcc, // int3
            0xe6, 0xf4, // out PASSED, al
            0xf4, // hlt
        ],
    },
];
const XRSTOR: &str = "xrstor";

/// The handler of int3.
const INT3_HANDLER: [u8; 2] = [
    0x48, 0xcf, // iretq
];

/// The handler of every other exception.
const FAULT_HANDLER: [u8; 3] = [
    0xe6, 0xf5, // out FAILED, al
    0xf4, // hlt
];

/// What the tiny guest found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What this KVM cannot do; empty where it can run a kernel.
    pub lacking: Vec<Lacking>,
    /// How long `KVM_CREATE_VM` took, which some hosts' settings make slow.
    pub creation: Duration,
    /// How long [`PACE_INSTRUCTIONS`] took.
    pub pace: Duration,
}

/// One instruction that this KVM cannot run, and how that showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// The instruction.
    pub instruction: &'static str,
    /// What happened instead.
    pub outcome: String,
}

impl Probe {
    /// Whether an unmodified kernel can run.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.lacking.is_empty()
    }
}

/// What was found; [`CURE`] is the way out where that is bad.
impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lacking, pace, .. } = self;
        if lacking.is_empty() {
            return write!(f, "a tiny guest ran {PACE_INSTRUCTIONS} instructions in {pace:.1?}");
        }
        f.write_str("KVM here emulates instructions and an unmodified kernel cannot boot: ")?;
        for (index, Lacking { instruction, outcome }) in lacking.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{instruction} ({outcome})")?;
        }
        Ok(())
    }
}

/// What to do on a host whose KVM emulates.
pub const CURE: &str = "use a host whose processor offers svm or vmx (on a virtual machine, turn \
                        nested virtualisation on outside), or `cargo xtask host -- COMMAND`";

/// Why KVM may have given up on a guest: the sentence to print beside a KVM_EXIT_INTERNAL_ERROR, if
/// it is this host that cannot run unmodified kernels.
pub fn explain(host: &Host) -> Option<String> {
    let probe = run(host).ok().filter(|probe| !probe.usable())?;
    Some(format!("{probe}: {CURE}"))
}

/// What a machine can do without, and what is lost then.
const USEFUL: [(Cap, &str); 4] = [
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER (guests calibrate a slower timer)"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK (a guest's clock stands still in a snapshot)"),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API (interrupts reach 255 processors at most)"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM (no read-only guest memory)"),
];

/// The useful capabilities that this KVM lacks, each with what is lost.
pub fn missing_useful(host: &Host) -> Vec<&'static str> {
    let missing = USEFUL.iter().filter(|(cap, _)| !host.kvm().check_extension(*cap));
    missing.map(|&(_, name)| name).collect()
}

/// Makes the tiny guest, runs it, and takes it down again; within [`LIMIT`] and a little.
///
/// # Errors
///
/// Where KVM refuses to make the guest, which is another thing than running it badly.
pub fn run(host: &Host) -> anyhow::Result<Probe> {
    install_kick_handler()?;
    let started = Instant::now();
    let vm = host.kvm().create_vm().context("KVM makes no virtual machine")?;
    let creation = started.elapsed();
    let guest = Guest::new(host, vm)?;
    let page = RunPage::map(guest.vcpu.as_raw_fd(), guest.vm.run_size()).context("Cannot map a kvm_run page")?;
    let kicker = Kicker::new(page);

    let deadline = Instant::now() + LIMIT;
    let (done, is_done) = mpsc::channel::<()>();
    let thread = std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || {
            // Dropped at the end however it comes, which is what the watch below waits for.
            let _done = done;
            guest.try_all(deadline)
        })
        .context("Cannot start a thread")?;
    if is_done.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
        kicker.kick(&thread);
    }
    let (lacking, pace) = thread.join().map_err(|_| anyhow!("The tiny guest's thread died"))??;
    Ok(Probe { lacking, creation, pace })
}

/// The tiny guest. Its parts are dropped in this order, memory last.
struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    /// The registers to begin each trial with.
    sregs: kvm_sregs,
    has_xsave: bool,
    memory: GuestMemoryMmap,
}

impl Guest {
    fn new(host: &Host, vm: VmFd) -> anyhow::Result<Self> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
            .context("Cannot map a tiny guest's memory")?;
        write_tables(&memory)?;
        let userspace_addr = memory.get_host_address(GuestAddress(0))? as u64;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr,
        };
        // SAFETY: the range is the mapping above, which outlives the machine in this struct.
        unsafe { vm.set_user_memory_region(slot) }.context("KVM refuses a tiny guest's memory")?;
        let vcpu = vm.create_vcpu(0).context("KVM makes no virtual processor")?;
        let cpuid = host.supported_cpuid()?;
        vcpu.set_cpuid2(&cpuid).context("KVM refuses the CPUID that it supports")?;
        let features = cpuid.as_slice().iter().find(|leaf| leaf.function == 1);
        let has_xsave = features.is_some_and(|leaf| leaf.ecx & 1 << 26 != 0);
        let reset = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        Ok(Self { sregs: long_mode(reset, has_xsave), vcpu, vm, has_xsave, memory })
    }

    /// Every trial, and how long the first took.
    fn try_all(mut self, deadline: Instant) -> anyhow::Result<(Vec<Lacking>, Duration)> {
        let mut lacking = Vec::new();
        let mut pace = None;
        // Where KVM does not show XSAVE, a kernel does not use it, nor may it be executed.
        let has_xsave = self.has_xsave;
        for trial in TRIALS.iter().filter(|trial| has_xsave || trial.instruction != XRSTOR) {
            let started = Instant::now();
            if let Some(outcome) = self.attempt(trial, deadline)? {
                let in_handler = self.vcpu.get_regs().is_ok_and(|regs| regs.rip == ON_INT3);
                let instruction = if in_handler { "iretq" } else { trial.instruction };
                lacking.push(Lacking { instruction, outcome });
            }
            pace.get_or_insert(started.elapsed());
        }
        Ok((lacking, pace.unwrap_or_default()))
    }

    /// Runs one trial from fresh registers. `None` where it ends as it should.
    fn attempt(&mut self, trial: &Trial, deadline: Instant) -> anyhow::Result<Option<String>> {
        self.memory.write_slice(trial.code, GuestAddress(CODE))?;
        self.vcpu.set_mp_state(kvm_mp_state::default()).context("KVM_SET_MP_STATE")?;
        self.vcpu.set_sregs(&self.sregs).context("KVM refuses a tiny guest's system registers")?;
        self.vcpu.set_regs(&registers()).context("KVM refuses a tiny guest's registers")?;
        while Instant::now() < deadline {
            let outcome = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PASSED, _)) => None,
                Ok(VcpuExit::IoOut(FAILED, _)) => Some("faults or gives a wrong result".into()),
                Ok(VcpuExit::InternalError) => Some("KVM gives up on it".into()),
                Ok(VcpuExit::Shutdown) => Some("a triple fault".into()),
                Ok(other) => Some(format!("the unexpected exit {other:?}")),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => return Err(error).context("KVM_RUN"),
            };
            self.complete_exit();
            return Ok(outcome);
        }
        Ok(Some(format!("no end within {} s", LIMIT.as_secs())))
    }

    /// KVM finishes a port access when it is entered again, and would overwrite registers set
    /// before that (KVM API, 5, `KVM_EXIT_IO`). A kick that this swallows came after the deadline,
    /// which is looked at before the guest is next entered.
    fn complete_exit(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        // It returns EINTR, by design.
        let _ = self.vcpu.run();
        self.vcpu.set_kvm_immediate_exit(0);
    }
}

/// Page tables that map the first 2 MiB to themselves, GDT, IDT and the handlers.
fn write_tables(memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    for (table, entry) in [
        (PML4, PDPT | PRESENT_WRITABLE),
        (PDPT, PD | PRESENT_WRITABLE),
        (PD, PRESENT_WRITABLE | LARGE),
        (GDT + u64::from(CODE_SELECTOR), 0x00af_9b00_0000_ffff), // 64-bit code
        (GDT + u64::from(DATA_SELECTOR), 0x00cf_9300_0000_ffff), // data
    ] {
        memory.write_obj(entry, GuestAddress(table))?;
    }
    for vector in 0..32 {
        let handler = if vector == INT3_VECTOR { ON_INT3 } else { ON_FAULT };
        // The handler's address is below 64 KiB, so the gate's upper parts stay zero.
        let interrupt_gate = 0x8e00 << 32 | u64::from(CODE_SELECTOR) << 16 | handler;
        memory.write_obj(interrupt_gate, GuestAddress(IDT + vector * 16))?;
    }
    memory.write_slice(&INT3_HANDLER, GuestAddress(ON_INT3))?;
    memory.write_slice(&FAULT_HANDLER, GuestAddress(ON_FAULT))?;
    Ok(())
}

/// The registers that every trial begins with; each uses what it needs of them.
fn registers() -> kvm_regs {
    kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        rcx: u64::from(PACE_INSTRUCTIONS / 2),
        rbx: 0x1122_3344_5566_7788,
        rsi: OPERAND,
        rdi: XSAVE_AREA,
        ..Default::default()
    }
}

/// 64-bit mode, privileged, with the tables above.
fn long_mode(reset: kvm_sregs, has_xsave: bool) -> kvm_sregs {
    const PE_MP_ET_NE_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    const PAE_OSFXSR: u64 = 1 << 5 | 1 << 9;
    const OSXSAVE: u64 = 1 << 18;
    const LME_LMA: u64 = 1 << 8 | 1 << 10;
    let segment = |selector, type_, long| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    let data = segment(DATA_SELECTOR, 3, 0);
    let table = |base, limit| kvm_dtable { base, limit, ..Default::default() };
    kvm_sregs {
        cs: segment(CODE_SELECTOR, 11, 1),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        gdt: table(GDT, 3 * 8 - 1),
        idt: table(IDT, 32 * 16 - 1),
        cr0: PE_MP_ET_NE_PG,
        cr3: PML4,
        cr4: PAE_OSFXSR | if has_xsave { OSXSAVE } else { 0 },
        efer: LME_LMA,
        ..reset
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_tiny_guest_ends_in_time_with_a_verdict() {
        let host = Host::open(Path::new(Host::DEVICE)).expect("KVM's device");
        let started = Instant::now();
        let probe = run(&host).expect("a tiny guest");
        assert!(started.elapsed() < LIMIT * 2, "{:?}", started.elapsed());
        assert!(!probe.pace.is_zero() && !probe.creation.is_zero(), "{probe:?}");
        println!("{probe}; made in {:?}, paced in {:?}", probe.creation, probe.pace);
        let known = ["lock cmpxchg16b", XRSTOR, "int3", "iretq"];
        for lack in &probe.lacking {
            // A loop runs everywhere: if it fails, the guest is wrong and not KVM.
            assert!(known.contains(&lack.instruction), "{lack:?}");
        }
        match explain(&host) {
            None => assert!(probe.usable()),
            Some(text) => assert!(text.contains(probe.lacking[0].instruction), "{text}"),
        }
    }

    #[test]
    fn an_endless_guest_is_stopped() {
        let host = Host::open(Path::new(Host::DEVICE)).expect("KVM's device");
        let mut guest = Guest::new(&host, host.kvm().create_vm().expect("a machine")).expect("a guest");
        let endless = Trial { instruction: "jmp", code: &[0xeb, 0xfe] };
        let deadline = Instant::now() + Duration::from_millis(50);
        install_kick_handler().expect("a handler");
        let page = RunPage::map(guest.vcpu.as_raw_fd(), guest.vm.run_size()).expect("a page");
        let thread = std::thread::spawn(move || guest.attempt(&endless, deadline));
        while Instant::now() < deadline {
            std::thread::yield_now();
        }
        Kicker::new(page).kick(&thread);
        let outcome = thread.join().expect("the thread").expect("KVM_RUN");
        assert_eq!(outcome, Some("no end within 2 s".into()));
    }

    #[test]
    fn a_faulting_instruction_is_seen() {
        let host = Host::open(Path::new(Host::DEVICE)).expect("KVM's device");
        let mut guest = Guest::new(&host, host.kvm().create_vm().expect("a machine")).expect("a guest");
        let undefined = Trial { instruction: "ud2", code: &[0x0f, 0x0b, 0xf4] };
        let deadline = Instant::now() + LIMIT;
        assert!(guest.attempt(&undefined, deadline).expect("KVM_RUN").is_some());
    }

    #[test]
    fn what_lacks_is_named() {
        let lacking = |instruction, outcome: &str| Lacking { instruction, outcome: outcome.into() };
        let mut probe = Probe {
            lacking: vec![lacking("xrstor", "KVM gives up on it"), lacking("int3", "a triple fault")],
            creation: Duration::ZERO,
            pace: Duration::from_millis(10),
        };
        assert!(!probe.usable());
        let text = probe.to_string();
        assert!(text.ends_with("xrstor (KVM gives up on it), int3 (a triple fault)"), "{text}");
        probe.lacking.clear();
        assert!(probe.usable());
        assert_eq!(probe.to_string(), "a tiny guest ran 20000 instructions in 10.0ms");
    }
}
