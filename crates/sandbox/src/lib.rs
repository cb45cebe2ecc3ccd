//! What the process of a machine takes from itself before its guest runs, so that a guest that has taken over the process
//! has gained little: see `threat-model.md`.
//!
//! It knows neither devices nor machines: what they need is told by data.

mod landlock;
mod namespaces;
mod rights;
mod seccomp;

use std::path::PathBuf;

use anyhow::Context as _;
pub use landlock::Access;
use seccomp::Stop;

/// How strictly a process is confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// A system call that is not in the policy ends the process, and files that are not named do not open
    #[default]
    On,
    /// The same, in a network namespace of its own, which the host takes some milliseconds to take apart
    Strict,
    /// Such system calls are reported, once each, and made
    Report,
    /// As if there was no sandbox
    Off,
}

/// What ends a process that breaks out of its policy.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The exit code.
    pub code: u8,
    /// Called at last, in a signal handler: it may only load, compare and make system calls.
    pub last: fn(),
}

/// What a process goes on to need of the host, besides what it has open.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// What it opens, now and after each reboot of its guest.
    pub files: Vec<(PathBuf, Access)>,
    /// It uses interfaces of the host's.
    pub host_network: bool,
}

/// The parts of the sandbox; tests take one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// The filters on system calls.
    pub seccomp: bool,
    /// The rules for files.
    pub landlock: bool,
    /// Namespaces of its own, but for that of the network.
    pub namespaces: bool,
    /// That of the network, too.
    pub network: bool,
    /// No capabilities and no cores.
    pub rights: bool,
}

impl Layers {
    /// Those that a mode has. Reports are what filters can give, and nothing else: who looks for what a machine needs is not
    /// to be kept from it by another layer.
    fn of(mode: Mode) -> Self {
        let on = matches!(mode, Mode::On | Mode::Strict);
        let network = mode == Mode::Strict;
        Self { seccomp: mode != Mode::Off, landlock: on, namespaces: on, network, rights: on }
    }
}

/// Confines the process, which has one thread.
///
/// # Errors
///
/// The host has no filters on system calls. What else it does not have is logged.
pub fn confine(mode: Mode, needs: &Needs, end: End) -> anyhow::Result<()> {
    confine_by(Layers::of(mode), mode, needs, end)
}

/// As [`confine`], by these layers alone.
///
/// # Errors
///
/// See there.
pub fn confine_by(layers: Layers, mode: Mode, needs: &Needs, end: End) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    // Where the files are found is told before anything of that changes.
    if layers.namespaces {
        missing.extend(namespaces::enter(layers.network && !needs.host_network));
    }
    seccomp::no_new_privileges().context("Cannot give up new privileges")?;
    if layers.rights {
        let rights = rights::limit_resources().and_then(|()| rights::drop_capabilities(needs.host_network));
        missing.extend(rights.err().map(|error| format!("some capabilities or cores ({error})")));
    }
    if layers.landlock {
        match landlock::enter(&needs.files) {
            Ok(version) => missing.extend((version < 4).then(|| format!("Landlock {version} knows no TCP"))),
            Err(error) => missing.push(format!("no Landlock ({error})")),
        }
    }
    if layers.seccomp {
        let End { code, last } = end;
        rights::share_heap();
        seccomp::prepare(Stop { mode, code: code.into(), last })
            .and_then(|()| seccomp::enter(MAIN))
            .context("Cannot filter system calls (CONFIG_SECCOMP_FILTER): say --sandbox off to go without")?;
    }
    if !missing.is_empty() {
        log::info!("The sandbox is not complete on this host: {}", missing.join("; "));
    }
    Ok(())
}

/// The kind of the thread that is confined first.
const MAIN: &str = "main";

/// Confines the calling thread further, to what its kind needs: `vcpu`, `io`, `api` or `session`. Does nothing where the
/// process is not confined.
pub fn confine_thread(kind: &str) {
    // Main's holds already, so that it can be done is known.
    seccomp::enter(kind).expect("a thread of a confined process can be confined further");
}
