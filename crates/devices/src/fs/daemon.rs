//! virtiofsd, whether it runs at the moment or not.
//!
//! The options are those that the C virtiofsd (QEMU's, in Debian 12) and the one in Rust have in common. The folder is
//! an open descriptor of it, so no name needs quoting. It gets the socket to listen at as its standard input, with us
//! waiting to be let in, and the socket's name is gone before it starts: nobody else can connect.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::ShareSpec;
use super::sandbox::{self, FOLDER};
use crate::helper::{Backoff, Words};
use crate::starter::{self, Helper, Launched};
use crate::unix;
use crate::vhost_user::Connection;

/// How long it may take to its first answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// virtiofsd, whether it runs at the moment or not.
pub(super) struct Daemon {
    /// What the log calls it.
    name: String,
    helper: Helper,
    running: Option<Running>,
    /// When it is started again.
    pub(super) backoff: Backoff,
}

struct Running {
    process: starter::Running,
    started: Instant,
    connection: Connection,
}

impl Daemon {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// It does not run, or not as it should.
    pub(super) fn open(spec: &ShareSpec, helper: Helper) -> anyhow::Result<Self> {
        let backoff = Backoff::new().context("Cannot make a timer for virtiofsd")?;
        let mut daemon = Self { name: name(spec), helper, running: None, backoff };
        daemon.start()?;
        Ok(daemon)
    }

    /// What it can do; nothing while it does not run.
    pub(super) fn features(&self) -> u64 {
        self.running.as_ref().map_or(0, |running| running.connection.features())
    }

    /// The connection, while it runs.
    pub(super) fn connection(&mut self) -> Option<&mut Connection> {
        self.running.as_mut().map(|running| &mut running.connection)
    }

    /// Has the timer be ready for a start, if it does not run.
    pub(super) fn wanted(&mut self) {
        if self.running.is_none() {
            self.backoff.hurry();
        }
    }

    /// The timer may be ready. Whether it has been started.
    pub(super) fn restart(&mut self) -> anyhow::Result<bool> {
        if !self.backoff.due() || self.running.is_some() {
            return Ok(false);
        }
        self.start().inspect_err(|_| self.backoff.schedule(Duration::ZERO))?;
        Ok(true)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut process = self.helper.start()?;
        let socket = process.socket.take().expect("it has just been started");
        match Connection::open(socket, PATIENCE) {
            Ok(connection) => self.running = Some(Running { process, started, connection }),
            Err(error) => {
                process.end();
                anyhow::bail!("{}: cannot start virtiofsd: {error}{}", self.name, process.words.last());
            }
        }
        Ok(())
    }

    /// It has ended or lost its mind: clears away what is left, and sets the timer. Nothing of it runs any more.
    pub(super) fn lost(&mut self, why: &io::Error) {
        let Some(mut running) = self.running.take() else { return };
        let status = running.process.end();
        let words = running.process.words.last();
        log::warn!("{}: virtiofsd has ended ({why}; {status}), it is started again{words}", self.name);
        self.backoff.schedule(running.started.elapsed());
    }

    /// Ends it.
    pub(super) fn end(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.process.end();
            // A guest that ends and starts it over and over waits for it, longer each time.
            self.backoff.schedule(running.started.elapsed());
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts `program` in virtiofsd's place. It dies with the thread that does so.
pub(super) fn launch(program: &Path, spec: &ShareSpec) -> anyhow::Result<Launched> {
    let path = spec.path.canonicalize().with_context(|| format!("Cannot find {}", spec.path.display()))?;
    let (listener, socket) = socket().context("Cannot make a socket for virtiofsd: set TMPDIR")?;
    let (words, their_words) = Words::pair().context("Cannot make a socket for virtiofsd")?;
    let mut command = Command::new(program);
    // One thread gives requests back in the order it has taken them in, so those that it owes at its end are known.
    command.args(["--fd=0", "--thread-pool-size=1", "-o", "sandbox=chroot"]);
    command.args(["-o", &format!("source={FOLDER}"), "-o", &format!("cache={}", spec.cache.name())]).current_dir(&path);
    // What is typed at our terminal is not for it.
    command.stdin(listener).stdout(Stdio::null()).stderr(their_words).process_group(0);
    sandbox::confine(&mut command, spec.readonly);
    let cannot = || format!("{}: cannot start {} on {}", name(spec), program.display(), path.display());
    let child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => anyhow::anyhow!(
            "{}: {error}: this user may not make namespaces (see /proc/sys/user/max_user_namespaces)",
            cannot()
        ),
        _ => anyhow::anyhow!("{}: {error}", cannot()),
    })?;
    Ok(Launched { child, socket, words })
}

fn name(spec: &ShareSpec) -> String {
    format!("Shared folder {}", spec.id())
}

/// A socket that listens, under no name, and one that is connected to it.
fn socket() -> anyhow::Result<(OwnedFd, UnixStream)> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("vmm-{}-{number}", std::process::id()));
    // One that is there is somebody else's, and an error.
    DirBuilder::new().mode(0o700).create(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    let path = folder.join("fs");
    let sockets = unix::listen(&path, 1, "virtiofsd").and_then(|listener| Ok((listener.into(), unix::connect(&path)?)));
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(&folder);
    sockets
}
