//! What the agent does as PID 1 of an initramfs, from the first process to the last.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest::request::{Answer, Setup};
use guest::{GUEST_PORT, HOST_PORT, frame};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use super::reaper::Reaper;
use super::serve::Agent;
use super::{STACK, log, modules, mounts, network, power, stream, sys};

/// The host's CID.
const HOST: u32 = 2;
/// How long the vsock device may take to appear.
const DEVICE: Duration = Duration::from_secs(10);
/// How long the host may take to hear of a failure.
const GOODBYE: Duration = Duration::from_secs(10);
/// A clock that is as little off as this stays as it is.
const NEAR: Duration = Duration::from_secs(1);

/// Sets the machine up, runs its main command, and powers off.
pub(crate) fn run_as_init() -> ! {
    if let Err(message) = run() {
        log(&message);
    }
    power::off()
}

/// Listens to the host in a machine that has an init of its own. Returns why it cannot.
pub(crate) fn run_as_service() -> String {
    let start = || Ok((Reaper::start()?, sys::listen_vsock(GUEST_PORT)?));
    match start() {
        Ok((reaper, listener)) => Arc::new(Agent::new(reaper, false)).listen(&listener),
        Err(error) => cannot_listen(&error),
    }
}

fn run() -> Result<(), String> {
    mounts::system()?;
    modules::load();
    let reaper = Reaper::start().map_err(|error| format!("Cannot start a thread: {error}"))?;
    let control = connect().map_err(|error| format!("Cannot connect to the host's port {HOST_PORT}: {error}"))?;
    let control = File::from(control);
    let listener = sys::listen_vsock(GUEST_PORT).map_err(|error| cannot_listen(&error));
    let set_up = listener.and_then(|listener| {
        let setup = frame::read_message(&mut &control).map_err(|error| error.to_string())?;
        set_up(&setup)?;
        Ok(listener)
    });
    let listener = match set_up {
        Ok(listener) => listener,
        Err(message) => {
            let _ = frame::write_message(&mut &control, &Answer::Failed { message: message.clone() });
            stream::finish(&control, GOODBYE);
            return Err(message);
        }
    };
    let agent = Arc::new(Agent::new(Arc::clone(&reaper), true));
    let listens = Arc::clone(&agent);
    let listening = thread::Builder::new().stack_size(STACK).spawn(move || listens.listen(&listener));
    listening.map_err(|error| format!("Cannot start a thread: {error}"))?;
    frame::write_message(&mut &control, &Answer::Ready).map_err(|error| format!("The host has gone: {error}"))?;
    agent.serve_main(&control);
    // The main command has ended: what it has left behind has no more time.
    power::end_processes(&reaper, Duration::ZERO);
    Ok(())
}

fn cannot_listen(error: &io::Error) -> String {
    format!("Cannot listen at vsock port {GUEST_PORT}: {error}")
}

/// Connects to the host. The device can come a little later than its driver.
fn connect() -> io::Result<OwnedFd> {
    let start = Instant::now();
    loop {
        match sys::connect_vsock(HOST, HOST_PORT) {
            // No driver, no device, or none that is ready.
            Err(error)
                if start.elapsed() < DEVICE
                    && (matches!(
                        error.raw_os_error(),
                        Some(libc::ENODEV | libc::EAFNOSUPPORT | libc::ENETUNREACH)
                    ) || error.kind() == ErrorKind::Interrupted) =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Makes the machine what the host wants it to be.
fn set_up(setup: &Setup) -> Result<(), String> {
    set_clock(setup.clock);
    if !setup.hostname.is_empty() {
        let set = rustix::system::sethostname(setup.hostname.as_bytes());
        set.map_err(|error| format!("Cannot set the host name {:?}: {error}", setup.hostname))?;
    }
    let has_root = mounts::all(&setup.mounts)?;
    network::set_up(setup)?;
    if has_root {
        mounts::enter_new_root()?;
    }
    network::write_names(setup, Path::new("/"));
    Ok(())
}

/// Sets the clock, unless it is right.
fn set_clock(nanoseconds: u64) {
    let wanted = Duration::from_nanos(nanoseconds);
    let now = clock_gettime(ClockId::Realtime);
    let now = Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0));
    if now.abs_diff(wanted) < NEAR {
        return;
    }
    let Timespec { tv_sec, tv_nsec } = stream::timespec(wanted);
    if let Err(error) = clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec }) {
        log(&format!("Cannot set the clock: {error}"));
    }
}
