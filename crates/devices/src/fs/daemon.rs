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
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::ShareSpec;
use super::sandbox::{self, FOLDER};
use crate::helper::{Backoff, Words, end};
use crate::unix;
use crate::vhost_user::Connection;

/// How long it may take to its first answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// virtiofsd, whether it runs at the moment or not.
pub(super) struct Daemon {
    /// What the log calls it.
    name: String,
    program: PathBuf,
    spec: ShareSpec,
    running: Option<Running>,
    /// When it is started again.
    pub(super) backoff: Backoff,
}

struct Running {
    child: Child,
    started: Instant,
    connection: Connection,
    words: Words,
}

impl Daemon {
    /// Starts it. It dies with the thread that does so, here and later.
    ///
    /// # Errors
    ///
    /// It does not run, or not as it should.
    pub(super) fn open(program: &Path, spec: &ShareSpec) -> anyhow::Result<Self> {
        let path = spec.path.canonicalize().with_context(|| format!("Cannot find {}", spec.path.display()))?;
        let backoff = Backoff::new().context("Cannot make a timer for virtiofsd")?;
        let (name, spec) = (format!("Shared folder {}", spec.id()), ShareSpec { path, ..spec.clone() });
        let mut daemon = Self { name, program: program.to_owned(), spec, running: None, backoff };
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
        let (listener, socket) = socket().context("Cannot make a socket for virtiofsd: set TMPDIR")?;
        let (words, their_words) = Words::pair().context("Cannot make a socket for virtiofsd")?;
        let ShareSpec { path, cache, readonly, .. } = &self.spec;
        let mut command = Command::new(&self.program);
        // One thread gives requests back in the order it has taken them in, so those that it owes at its end are known.
        command.args(["--fd=0", "--thread-pool-size=1", "-o", "sandbox=chroot"]);
        command.args(["-o", &format!("source={FOLDER}"), "-o", &format!("cache={}", cache.name())]).current_dir(path);
        // What is typed at our terminal is not for it.
        command.stdin(listener).stdout(Stdio::null()).stderr(their_words).process_group(0);
        sandbox::confine(&mut command, *readonly);
        let started = Instant::now();
        let cannot = format!("{}: cannot start {} on {}", self.name, self.program.display(), path.display());
        let mut child = command.spawn().map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => anyhow::anyhow!(
                "{cannot}: {error}: this user may not make namespaces (see /proc/sys/user/max_user_namespaces)"
            ),
            _ => anyhow::anyhow!("{cannot}: {error}"),
        })?;
        // What the command holds of the sockets would keep the end of virtiofsd from us.
        drop(command);
        match Connection::open(socket, PATIENCE) {
            Ok(connection) => self.running = Some(Running { child, started, connection, words }),
            Err(error) => {
                end(&mut child);
                anyhow::bail!("{cannot}: {error}{}", words.last());
            }
        }
        Ok(())
    }

    /// It has ended or lost its mind: clears away what is left, and sets the timer. Nothing of it runs any more.
    pub(super) fn lost(&mut self, why: &io::Error) {
        let Some(mut running) = self.running.take() else { return };
        let status = end(&mut running.child);
        let words = running.words.last();
        log::warn!("{}: virtiofsd has ended ({why}; {status}), it is started again{words}", self.name);
        self.backoff.schedule(running.started.elapsed());
    }

    /// Ends it.
    pub(super) fn end(&mut self) {
        if let Some(mut running) = self.running.take() {
            end(&mut running.child);
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
