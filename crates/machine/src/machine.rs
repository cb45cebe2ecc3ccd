//! A machine that is built and paused, or running.

use std::cell::RefCell;
use std::convert::Infallible;
use std::num::NonZeroU8;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::Context;
use boot::cache::Cache;
use boot::{AcpiSpec, Sources, Start, tells_panics_apart};
use bus::{Bus, EndLatch};
use devices::console::{Console, VirtioConsole};
use devices::legacy::power::{PowerButton, RESET, SLEEP_CONTROL, SLEEP_STATUS};
use devices::legacy::{Platform, Wiring};
use devices::{Attach, Controls, Starter, hvc};
use kvm::x86::cpuid::{CpuidSpec, Template};
use kvm::x86::msr::boot_msrs;
use kvm::x86::regs::Entry;
use kvm::{Host, Vcpu, Vm};
use memory::{Ram, layout};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::VmConfig;
use crate::counts::{ExitCounts, Sum};
use crate::cpus::CpusSpec;
use crate::error::ConfigError;
use crate::outcome::{Outcome, UNTOUCHED};
use crate::slots::Slots;
use crate::timer::BootTimer;
use crate::vcpu::{End, STACK, Shared, VcpuThread};

/// What a machine uses and does not own: it outlives the machine, and the next one after a reboot.
pub struct Surroundings<'a> {
    /// KVM.
    pub host: &'a Host,
    /// The host's side of the serial port.
    pub console: &'a Console,
    /// The host's side of the virtio console, where there is one.
    pub virtio_console: Option<&'a VirtioConsole>,
    /// Where unpacked kernels are kept.
    pub cache: Option<&'a Cache>,
    /// Where the phases of the start are marked.
    pub timer: &'a Arc<BootTimer>,
    /// Written when the guest has ended.
    pub ended: &'a EventFd,
    /// What starts the helpers of devices, where that is another process.
    pub starter: Option<&'a Starter>,
    /// What the threads that run for the guest do first.
    pub threads: AtStart,
}

/// What threads do first, such as to confine themselves.
#[derive(Clone, Copy)]
pub struct AtStart {
    /// Those of processors.
    pub vcpu: fn(),
    /// Those of devices.
    pub io: fn(),
}

/// A machine whose processors do not run.
pub struct Paused {
    machine: Machine,
    vcpus: Vec<Vcpu>,
}

/// A machine whose processors run, each on a thread of its own.
pub struct Running {
    processors: Processors,
    machine: Machine,
}

/// What a machine has besides its processors.
struct Machine {
    ram: Ram,
    button: PowerButton,
    controls: Controls,
    shared: Arc<Shared>,
    /// The host processor for each virtual one, where they are pinned.
    pins: Vec<Option<usize>>,
    /// What a processor's thread does first.
    at_start: fn(),
    /// Whether this guest's panics can be told from its restarts.
    panics_are_warm: bool,
    _vm: Vm,
}

impl Paused {
    /// Builds a machine, with its guest's kernel in memory and its first processor at the entry.
    ///
    /// # Errors
    ///
    /// A [`ConfigError`] where the configuration is at fault, any other error where the host is.
    pub fn build(config: &VmConfig, around: &Surroundings<'_>) -> anyhow::Result<Self> {
        let host = around.host;
        let kernel = config.kernel.as_ref().ok_or(ConfigError::NoKernel)?;
        let cpus = config.cpus.clone().unwrap_or_default();
        let mut mem = config.mem.clone().unwrap_or_default();
        mem.shared |= config.devices.share_memory();
        let count = cpus.validate(host)?;
        let address_bits = host.address_bits()?;
        mem.validate(address_bits).map_err(ConfigError::from)?;
        let ram = mem.map().map_err(ConfigError::from)?;
        around.timer.mark("memory");
        let ends = Arc::new(EndLatch::default());
        let counts: Arc<[ExitCounts]> = (0..count.get()).map(|_| ExitCounts::default()).collect();
        let lines = Lines::default();
        let mut platform = Platform::build(Wiring {
            ends: ends.clone(),
            marked: boot_mark(config, around.timer, &counts),
            console: around.console,
            line: &|gsi| lines.add(gsi),
        })?;
        let mut slots = Slots::new(config.transport.unwrap_or_default(), &ram, &lines, address_bits, around.threads.io);
        let attached = config.devices.attach(config.name.as_deref(), around.starter, &mut slots);
        let controls = attached.map_err(ConfigError::of_device)?;
        let mut parameters = vec![platform.kernel_parameters];
        if let Some(console) = around.virtio_console {
            slots.attach("console".into(), None, console.attach_hvc())?;
            parameters.push(hvc::KERNEL_PARAMETER);
        }
        let mut dsdt = std::mem::take(&mut platform.aml);
        dsdt.extend(slots.aml());
        parameters.extend(slots.kernel_parameters());
        let cmdline = config.cmdline.clone().unwrap_or_default().line(&parameters.join(" "));
        let (sleep_control, sleep_status, reset) = (SLEEP_CONTROL, SLEEP_STATUS, RESET);
        let acpi = AcpiSpec { vcpus: count.get(), dsdt, pci: slots.has_pci(), sleep_control, sleep_status, reset };
        let sources =
            Sources { kernel, initrd: config.initrd.as_deref(), cmdline: &cmdline, acpi: &acpi, cache: around.cache };
        // KVM_CREATE_VM waits until no processor of the host is in an RCU section any more, ten
        // milliseconds and longer. The kernel is loaded meanwhile.
        let (mut vm, start) = thread::scope(|scope| {
            let builder = thread::Builder::new().name("kvm".into()).stack_size(STACK);
            let vm = builder.spawn_scoped(scope, || Vm::new(host, &ram)).context("Cannot start a thread")?;
            let start = boot::load(&sources, &ram).map_err(ConfigError::from)?;
            anyhow::Ok((vm.join().expect("making a machine does not panic")?, start))
        })?;
        around.timer.mark("kvm+kernel");
        let mmio = slots.connect(&mut vm)?;
        lines.connect_to(&vm)?;
        let vcpus = build_vcpus(&cpus, count, host, &vm)?;
        enter(&vcpus[0], start, &ram)?;
        around.timer.mark("vcpus");

        let mut ports = Bus::default();
        platform.insert_into(&mut ports);
        ram.write_obj(UNTOUCHED, GuestAddress(layout::RESET_WORD)).context("Guest memory has no first page")?;
        let shared = Shared {
            ports,
            mmio,
            ends,
            counts,
            stop: AtomicBool::new(false),
            end: Mutex::new(None),
            ended: around.ended.try_clone().context("Cannot duplicate an eventfd")?,
        };
        let pins = (0..count.get()).map(|index| cpus.pin.as_ref().map(|pin| pin.for_vcpu(index)));
        let machine = Machine {
            ram,
            button: platform.button,
            controls,
            shared: Arc::new(shared),
            pins: pins.collect(),
            at_start: around.threads.vcpu,
            panics_are_warm: tells_panics_apart(&cmdline),
            _vm: vm,
        };
        Ok(Self { machine, vcpus })
    }

    /// Lets the processors run. When it returns their threads are past their beginning.
    pub fn resume(self) -> anyhow::Result<Running> {
        let Self { machine, vcpus } = self;
        machine.shared.stop.store(false, Ordering::SeqCst);
        vcpus.iter().for_each(Vcpu::excuse_pause);
        let mut processors = Processors { threads: Vec::with_capacity(vcpus.len()), shared: machine.shared.clone() };
        let (beginning, begun) = mpsc::channel();
        for (vcpu, pin) in vcpus.into_iter().zip(&machine.pins) {
            let (at_start, beginning) = (machine.at_start, beginning.clone());
            let begin = move || {
                at_start();
                drop(beginning);
            };
            let thread = VcpuThread::spawn(vcpu, machine.shared.clone(), *pin, begin);
            processors.threads.push(thread.context("Cannot start a processor's thread")?);
        }
        drop(beginning);
        // Nothing is sent: it is over when the last of them has begun.
        let _: Result<Infallible, _> = begun.recv();
        Ok(Running { processors, machine })
    }

    /// Whether the guest has ended, before it was paused.
    pub fn has_ended(&self) -> bool {
        self.machine.has_ended()
    }

    /// The ways to its devices.
    pub fn controls(&self) -> &Controls {
        &self.machine.controls
    }

    /// How the guest ended; `None` where it had not.
    pub fn outcome(&self) -> Option<Outcome> {
        self.machine.outcome()
    }
}

impl Running {
    /// Whether the guest has ended.
    pub fn has_ended(&self) -> bool {
        self.machine.has_ended()
    }

    /// The ways to its devices.
    pub fn controls(&self) -> &Controls {
        &self.machine.controls
    }

    /// Presses the power button. A guest may or may not listen to it.
    pub fn press_power_button(&self) {
        self.machine.button.press();
    }

    /// Stops the processors where they are.
    pub fn pause(mut self) -> Paused {
        let vcpus = self.processors.stop();
        Paused { machine: self.machine, vcpus }
    }

    /// Stops the processors and says how the guest ended; `None` where it had not.
    pub fn finish(&mut self) -> Option<Outcome> {
        self.processors.stop();
        self.machine.outcome()
    }
}

impl Machine {
    fn has_ended(&self) -> bool {
        self.shared.end.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn outcome(&self) -> Option<Outcome> {
        let Self { ram, shared, panics_are_warm, .. } = self;
        log::info!("exits: {}", Sum(&shared.counts));
        let reset_word = ram.read_obj(GuestAddress(layout::RESET_WORD)).unwrap_or(UNTOUCHED);
        let end = shared.end.lock().unwrap_or_else(PoisonError::into_inner).take();
        Some(match end? {
            End::Guest(end) => Outcome::of_end(end, reset_word, *panics_are_warm),
            End::TripleFault => Outcome::of_restart(true, reset_word, *panics_are_warm),
            End::Internal(error) => Outcome::InternalError(error),
            End::Host(error) => Outcome::HostFailure(error.to_string()),
        })
    }
}

/// The threads of a machine's processors.
struct Processors {
    threads: Vec<VcpuThread>,
    shared: Arc<Shared>,
}

impl Processors {
    /// Gets all of them out of the guest, and the processors back.
    fn stop(&mut self) -> Vec<Vcpu> {
        self.shared.stop.store(true, Ordering::SeqCst);
        for vcpu in &self.threads {
            vcpu.kicker.kick(&vcpu.thread);
        }
        let threads = self.threads.drain(..);
        threads.map(|vcpu| vcpu.thread.join().expect("a processor's thread does not panic")).collect()
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The interrupt lines that devices ask for before there is a machine to connect them to.
#[derive(Default)]
pub(crate) struct Lines(RefCell<Vec<(u32, EventFd)>>);

impl Lines {
    pub(crate) fn add(&self, gsi: u32) -> anyhow::Result<EventFd> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("Cannot make an eventfd")?;
        self.0.borrow_mut().push((gsi, line.try_clone().context("Cannot duplicate an eventfd")?));
        Ok(line)
    }

    fn connect_to(self, vm: &Vm) -> anyhow::Result<()> {
        self.0.into_inner().into_iter().try_for_each(|(gsi, line)| vm.connect_irq_line(gsi, &line))
    }
}

/// Makes the processors and tells them what to say of themselves.
fn build_vcpus(cpus: &CpusSpec, count: NonZeroU8, host: &Host, vm: &Vm) -> anyhow::Result<Vec<Vcpu>> {
    let supported = host.supported_cpuid()?;
    let spec = CpuidSpec {
        vcpus: count,
        features: cpus.features.clone(),
        tsc_deadline: host.has_tsc_deadline(),
        tsc_khz: None,
    };
    let template = Template::new(supported.as_slice(), &spec).map_err(ConfigError::from)?;
    let msrs = boot_msrs();
    let build = |index| {
        let vcpu = vm.vcpu(index)?;
        vcpu.identify(&template.for_vcpu(index), &msrs)?;
        Ok(vcpu)
    };
    (0..count.get()).map(build).collect()
}

/// Puts the first processor at the kernel's entry.
fn enter(vcpu: &Vcpu, start: Start, ram: &Ram) -> anyhow::Result<()> {
    let gdt = layout::GDT;
    let entry = match start {
        Start::Linux64(rip) => {
            Entry::Linux64 { rip, zero_page: layout::ZERO_PAGE, page_tables: layout::PAGE_TABLES.start, gdt }
        }
        Start::Pvh(eip) => Entry::Pvh { eip, start_info: layout::PVH_START_INFO, gdt },
    };
    for (at, descriptor) in (gdt..).step_by(8).zip(entry.gdt_entries()) {
        ram.write_obj(descriptor, GuestAddress(at)).context("Guest memory has no first page")?;
    }
    vcpu.enter(entry)
}

/// What happens when the guest marks the end of its boot.
fn boot_mark(config: &VmConfig, timer: &Arc<BootTimer>, counts: &Arc<[ExitCounts]>) -> Box<dyn FnOnce() + Send> {
    if !config.boot_timer {
        return Box::new(|| ());
    }
    let (timer, counts) = (timer.clone(), counts.clone());
    Box::new(move || {
        timer.mark("guest-mark");
        eprintln!("{}boot-timer: exits {}", timer.report(), Sum(&counts));
    })
}
