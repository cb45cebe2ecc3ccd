//! Boots a machine and stays with it until it ends: the main thread's loop.

use std::cell::RefCell;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use api::Server;
use boot::cache::Cache;
use devices::Starter;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm::Host;
use machine::{
    AtStart, BootTimer, ConfigError, ControlError, ControlRequest, Live, OnEnd, Outcome, Paused, Surroundings, VmConfig,
};
use sandbox::{Mode, confine_thread};
use session::{PASSED_ON, Session};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::confine::{self, Around};
use crate::consoles::{Consoles, EventLoop};
use crate::exit::{Usage, code_of_outcome, code_of_signal};
use crate::folders::{Api, Folders};
use crate::signals::Signals;
use crate::trim;

/// How long a guest has to power off after its power button was pressed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many signals a command may take without ending, before the next one ends the machine.
const MOST_PASSED_ON: u32 = 3;
/// How long the end of the guest's output waits for a reader that has stopped.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Boots what `config` describes, and listens at the socket of `api` for what is asked of it. Returns when the guest has ended
/// for good, or the command of `session`, without which a guest's end is an error. The process stays confined.
pub(crate) fn boot(
    config: &VmConfig,
    api: Option<Api<'_>>,
    session: Option<&Session>,
    sandbox: Mode,
    start: Instant,
) -> anyhow::Result<ExitCode> {
    let mut config = config.clone();
    // What is shown of them and what they answer to is the same.
    config.devices = config.devices.named().map_err(|error| Usage(format!("{error:#}")))?;
    let timer = Arc::new(BootTimer::new(start));
    let name = config.name.clone().unwrap_or_else(|| "vmm".into());
    // What the process list shows; the kernel keeps fifteen bytes of it.
    std::fs::write("/proc/self/comm", &name).context("Cannot name the process")?;
    let host = Host::open(Path::new(Host::DEVICE)).map_err(ConfigError::from)?;
    let cache = if config.no_kernel_cache { None } else { Cache::of_user() };
    let starter = if sandbox == Mode::Off { None } else { Starter::fork(&config.devices)? };
    let consoles = MainLoop::open_consoles(&config)?;
    confine::confine(sandbox, &config, &Around { cache: cache.as_ref(), api: api.as_ref(), session })?;
    let mut main_loop = MainLoop::new(consoles, api, session)?;
    if let Some(session) = session {
        session.start(|| confine_thread("session"))?;
    }
    loop {
        let paused = {
            let serial = main_loop.consoles.serial.borrow();
            let virtio = main_loop.consoles.virtio.as_ref().map(|console| console.borrow());
            let around = Surroundings {
                host: &host,
                console: &serial,
                virtio_console: virtio.as_deref(),
                cache: cache.as_ref(),
                timer: &timer,
                ended: &main_loop.ended,
                starter: starter.as_ref(),
                threads: AtStart { vcpu: || confine_thread("vcpu"), io: || confine_thread("io") },
            };
            Paused::build(&config, &around)?
        };
        main_loop.consoles.claim(&mut main_loop.events);
        timer.mark("first-instruction");
        let mut machine = Live::new(paused, config);
        machine.perform(ControlRequest::Start)?;
        trim::drop_startup_pages();
        let end = main_loop.run(&mut machine)?;
        let outcome = machine.finish();
        // With what has been changed since its start.
        config = machine.config().clone();
        if config.boot_timer {
            eprint!("{}", timer.report());
        }
        if let (End::Guest, Some(outcome)) = (&end, &outcome)
            && main_loop.restarts(&config, outcome)
        {
            log::info!("{outcome}: starting a new machine");
            continue;
        }
        // The kernel takes a whole process apart faster than we would take the machine apart. Devices finish first: what a
        // guest has flushed is safe anyway, what it has not need not be lost.
        if config.devices.is_empty() {
            std::mem::forget(machine);
        } else {
            drop(machine);
        }
        match (end, outcome) {
            (End::Command, _) => {
                main_loop.finish();
                return Ok(ExitCode::SUCCESS);
            }
            (_, Some(outcome)) if session.is_some() => {
                main_loop.finish();
                anyhow::bail!("{} before the command had ended", with_cure(&outcome, &host));
            }
            (_, Some(outcome)) => {
                main_loop.finish();
                eprintln!("{name}: {}", with_cure(&outcome, &host));
                return Ok(code_of_outcome(&outcome));
            }
            (End::Signal(signal), None) => {
                main_loop.finish();
                eprintln!("{name}: ended by signal {signal} before the guest powered off");
                return Ok(code_of_signal(signal));
            }
            (End::Quit | End::Guest, None) => {
                main_loop.finish();
                eprintln!("{name}: ended at the console");
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}

/// An outcome in one line, with what to do about it where that is known.
fn with_cure(outcome: &Outcome, host: &Host) -> String {
    match outcome {
        Outcome::InternalError(_) => {
            kvm::probe::explain(host).map_or(outcome.to_string(), |cure| format!("{outcome}; {cure}"))
        }
        outcome => outcome.to_string(),
    }
}

/// Why the loop ended.
enum End {
    /// The guest ended.
    Guest,
    /// The user typed Ctrl-A x.
    Quit,
    /// A signal, and no power off in time.
    Signal(u8),
    /// The command that the machine is there for has ended, or cannot be run.
    Command,
}

/// The main thread's loop: the consoles, signals, requests, and the end of the guest.
struct MainLoop<'a> {
    events: EventLoop,
    consoles: Consoles,
    signals: Rc<RefCell<Signals>>,
    server: Option<(Server, Folders)>,
    session: Option<&'a Session>,
    quit: Arc<AtomicBool>,
    /// Written when a guest has ended.
    ended: EventFd,
    /// The signal that pressed the power button, and when patience is over.
    stopping: Option<(u8, Instant)>,
    /// How many signals were passed on to the command.
    passed_on: u32,
}

impl<'a> MainLoop<'a> {
    /// Opens the consoles, and gives what says that the user typed Ctrl-A x.
    fn open_consoles(config: &VmConfig) -> anyhow::Result<(Consoles, Arc<AtomicBool>)> {
        let quit = Arc::new(AtomicBool::new(false));
        let asked = quit.clone();
        Ok((Consoles::open(config, move || asked.store(true, Ordering::Relaxed))?, quit))
    }

    fn new(
        (consoles, quit): (Consoles, Arc<AtomicBool>),
        api: Option<Api<'_>>,
        session: Option<&'a Session>,
    ) -> anyhow::Result<Self> {
        let others: &[i32] = if session.is_some() { &PASSED_ON } else { &[] };
        let signals = Signals::block(others).context("Cannot receive signals")?;
        kvm::install_kick_handler()?;
        let signals = Rc::new(RefCell::new(signals));
        let ended = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("Cannot make an eventfd")?;
        let mut events = EventLoop::new().map_err(|error| anyhow::anyhow!("Cannot make an event loop: {error}"))?;
        events.add_subscriber(signals.clone());
        // Its thread is to have the signals blocked, too.
        let server = api
            .map(|Api { socket, folders }| Ok((Server::listen(socket, || confine_thread("api"))?, folders)))
            .transpose()
            .map_err(|error: anyhow::Error| Usage(format!("{error:#}")))?;
        let called = server.as_ref().map(|(server, _)| server.called()).into_iter().chain(session.map(Session::ended));
        for wake in [&ended].into_iter().chain(called) {
            let wake = wake.try_clone().context("Cannot duplicate an eventfd")?;
            events.add_subscriber(Rc::new(RefCell::new(Wake(wake))));
        }
        Ok(Self { events, consoles, signals, server, session, quit, ended, stopping: None, passed_on: 0 })
    }

    /// Runs until the guest ends, or is to be ended.
    fn run(&mut self, machine: &mut Live) -> anyhow::Result<End> {
        loop {
            // One in each turn, so that clients keep neither signals nor the console waiting.
            if let Some((server, folders)) = &self.server
                && let Some(call) = server.next_call()
            {
                call.answer(|request| machine.perform(folders.open_for(request, machine.config())?));
            }
            if self.session.is_some_and(Session::has_ended) {
                // A guest with a disk of its own unmounts it before it powers off, by itself.
                if !writes_disks(machine.config()) || machine.has_ended() {
                    return Ok(End::Command);
                }
                self.stopping.get_or_insert((0, Instant::now() + PATIENCE));
            }
            if machine.has_ended() {
                return Ok(End::Guest);
            }
            if self.quit.load(Ordering::Relaxed) {
                return Ok(End::Quit);
            }
            let arrived = self.signals.borrow_mut().take();
            for signal in arrived {
                if let Some(end) = self.on_signal(signal, machine)? {
                    return Ok(end);
                }
            }
            let timeout = match self.stopping {
                None => -1,
                Some((signal, deadline)) => match deadline.saturating_duration_since(Instant::now()) {
                    Duration::ZERO if self.session.is_some_and(Session::has_ended) => return Ok(End::Command),
                    Duration::ZERO => return Ok(End::Signal(signal)),
                    left => i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1),
                },
            };
            self.events.run_with_timeout(timeout).map_err(|error| anyhow::anyhow!("The event loop failed: {error}"))?;
        }
    }

    fn on_signal(&mut self, signal: i32, machine: &mut Live) -> Result<Option<End>, ControlError> {
        match signal {
            libc::SIGTSTP => self.consoles.suspend(),
            libc::SIGCONT => self.consoles.resume(),
            libc::SIGWINCH => {
                self.consoles.resize();
                if let Some(session) = self.session {
                    session.resize();
                }
            }
            signal => {
                // Those that ask to end lose their patience with a command that does not; the others are its own business.
                let asks_to_end = [libc::SIGTERM, libc::SIGINT].contains(&signal);
                if (self.passed_on < MOST_PASSED_ON || !asks_to_end)
                    && self.session.is_some_and(|session| session.signal(signal))
                {
                    self.passed_on += u32::from(asks_to_end);
                    return Ok(None);
                }
                let signal = u8::try_from(signal).expect("signals have small numbers");
                // A machine that is there for a command has nobody who listens to its power button.
                if self.session.is_some() {
                    return Ok(Some(End::Signal(signal)));
                }
                if self.stopping.is_some() {
                    return Ok(Some(End::Signal(signal)));
                }
                log::info!("signal {signal}: pressing the guest's power button");
                // A paused guest would not hear it.
                for request in [ControlRequest::Resume, ControlRequest::PressPowerButton] {
                    match machine.perform(request) {
                        Ok(_) | Err(ControlError::Ended) => {}
                        Err(error) => return Err(error),
                    }
                }
                self.stopping = Some((signal, Instant::now() + PATIENCE));
            }
        }
        Ok(None)
    }

    /// Whether a guest that ended like this is followed by a new machine.
    fn restarts(&self, config: &VmConfig, outcome: &Outcome) -> bool {
        let action = match outcome {
            Outcome::Reboot => config.on_reboot.unwrap_or(OnEnd::Restart),
            Outcome::Panic => config.on_panic.unwrap_or(OnEnd::Exit),
            _ => OnEnd::Exit,
        };
        action == OnEnd::Restart && self.stopping.is_none()
    }

    /// Writes what is left of the guest's output; with the consoles goes their claim on the terminal.
    fn finish(self) {
        self.consoles.drain(LAST_WORDS);
    }
}

/// Whether the guest has something to unmount.
fn writes_disks(config: &VmConfig) -> bool {
    config.devices.disk.iter().any(|disk| !disk.readonly)
}

/// Wakes the loop up, once for each event where the descriptor is a semaphore; what for is seen elsewhere.
struct Wake(EventFd);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("an eventfd can be watched");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.0.read();
    }
}
