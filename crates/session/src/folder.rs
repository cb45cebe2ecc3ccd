//! The folder of one machine: `$XDG_RUNTIME_DIR/vmm/NAME`, or else `/run/vmm/NAME` for root, or one below the folder for
//! temporary files.
//!
//! | file | what it is |
//! |---|---|
//! | `lock` | locked by the machine's process for as long as it lives |
//! | `machine.json` | a [`Record`] |
//! | `end.json` | an [`End`], of a machine that ran in the background |
//! | `vsock`, `vsock_1024` | the sockets by which host and guest reach each other |
//! | `console.log`, `output.log` | what the guest said at its console; what the command of a machine in the background wrote |
//! | `vmm.log` | what the process of a machine in the background had to say |
//!
//! Whoever makes or removes a folder holds the lock of all folders meanwhile, which is a file beside them.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How many lines of the console are shown when a machine fails.
const LAST_LINES: usize = 20;
/// The longest name: it is the host name, too (`hostname(7)`).
const LONGEST_NAME: usize = 63;
/// What else is beside the folders of machines.
const RESERVED: [&str; 2] = ["lock", "fleets"];
/// More than this is no record of ours.
const MOST_JSON: u64 = 1 << 20;

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The name.
    pub name: String,
    /// What runs there, and its arguments.
    pub command: Vec<String>,
    /// What its root is.
    pub root: String,
    /// Where its starter keeps what its command writes, as plain text, if that is known.
    pub output: Option<PathBuf>,
    /// The ports that lead to it, as they were asked for.
    pub ports: Vec<String>,
    /// Seconds since 1970.
    pub started: u64,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The exit code, as `vmm run` in the foreground would have had it.
    pub code: u8,
    /// Why the command did not come to its end.
    pub trouble: Option<String>,
    /// Seconds since 1970.
    pub when: u64,
}

/// The folder of a machine that this process runs.
pub struct Folder {
    path: PathBuf,
    /// It stays when the machine has ended.
    keep: bool,
    _lock: File,
}

impl Folder {
    /// Makes the folder of a machine of this name. What an earlier one of the same name has left is removed.
    ///
    /// # Errors
    ///
    /// Such a machine runs; or the folder cannot be made.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        check_name(name)?;
        let base = base()?;
        let _all = lock_all(&base)?;
        let path = base.join(name);
        ensure!(
            !is_alive(&path)?,
            "a machine named {name} runs: choose another --name, or end that one (`vmm stop {name}`)"
        );
        remove(&path)?;
        DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let lock = open_lock(&path)?;
        lock.try_lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { path, keep: false, _lock: lock })
    }

    /// Has it stay when the machine has ended.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Says what the machine is.
    pub fn describe(&self, record: &Record) -> anyhow::Result<()> {
        write(&self.path.join("machine.json"), record)
    }

    /// Says how the machine has ended, if anybody will ask.
    pub fn ended(self, code: u8, trouble: Option<String>) -> anyhow::Result<()> {
        if self.keep {
            clean(&self.path);
            write(&self.path.join("end.json"), &End { code, trouble, when: now() })?;
        }
        Ok(())
    }

    /// Where its files are.
    pub fn files(&self) -> Files<'_> {
        Files(&self.path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep
            && let Some(Ok(_all)) = self.path.parent().map(lock_all)
        {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Where the files of a machine are.
#[derive(Clone, Copy)]
pub struct Files<'a>(&'a Path);

impl<'a> Files<'a> {
    /// The folder that they are in.
    pub fn folder(self) -> &'a Path {
        self.0
    }

    /// The socket by which the host reaches the guest.
    pub fn vsock(self) -> PathBuf {
        self.0.join("vsock")
    }

    /// The socket that the guest reaches at `port`.
    pub fn guests_port(self, port: u32) -> PathBuf {
        self.0.join(format!("vsock_{port}"))
    }

    /// What the guest says at its console.
    pub fn console(self) -> PathBuf {
        self.0.join("console.log")
    }

    /// What the command of a machine in the background writes.
    pub fn output(self) -> PathBuf {
        self.0.join("output.log")
    }

    /// What the process of a machine in the background has to say.
    pub fn log(self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// The last lines of the console, for people.
    pub fn last_console_lines(self) -> String {
        last_lines(&fs::read(self.console()).unwrap_or_default())
    }
}

/// A machine that was started some time, by whomever.
pub struct Machine {
    /// Its folder.
    pub path: PathBuf,
    /// What it is.
    pub record: Record,
    /// What has become of it.
    pub state: State,
}

/// What has become of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its process lives.
    Running,
    /// It has ended, and says how.
    Ended(End),
    /// Its process was killed.
    Dead,
}

impl Machine {
    /// All that there are, by their names.
    pub fn all() -> anyhow::Result<Vec<Self>> {
        let base = base()?;
        let _all = lock_all(&base)?;
        let entries = fs::read_dir(&base).with_context(|| format!("cannot read {}", base.display()))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut machines: Vec<_> = names.filter_map(|name| Self::read(&base.join(name)).ok().flatten()).collect();
        machines.sort_by(|one, other| one.record.name.cmp(&other.record.name));
        Ok(machines)
    }

    /// The one of this name.
    pub fn find(name: &str) -> anyhow::Result<Self> {
        let base = base()?;
        check_name(name)?;
        let _all = lock_all(&base)?;
        Self::read(&base.join(name))?
            .with_context(|| format!("there is no machine named {name}: `vmm ps --all` shows those that there are"))
    }

    /// The one of this name, which must run.
    pub fn running(name: &str) -> anyhow::Result<Self> {
        let machine = Self::find(name)?;
        match &machine.state {
            State::Running => Ok(machine),
            State::Ended(_) => bail!("{name} has ended: start it again with `vmm run --detach --name {name} …`"),
            State::Dead => bail!("{name} is dead, its process was killed: `vmm rm {name}` removes what is left of it"),
        }
    }

    fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        if !path.is_dir() {
            return Ok(None);
        }
        let alive = is_alive(path)?;
        // One that is just being made has none yet.
        let Some(record) = read(&path.join("machine.json"))? else { return Ok(None) };
        let state = match (alive, read(&path.join("end.json"))?) {
            (true, _) => State::Running,
            (false, Some(end)) => State::Ended(end),
            (false, None) => {
                clean(path);
                State::Dead
            }
        };
        Ok(Some(Self { path: path.to_owned(), record, state }))
    }

    /// Where its files are.
    pub fn files(&self) -> Files<'_> {
        Files(&self.path)
    }

    /// Waits until its process has ended. Returns how it ended, if it says so.
    pub fn wait(&self) -> anyhow::Result<Option<End>> {
        // An attached one takes its folder with it.
        if let Ok(lock) = File::open(self.path.join("lock")) {
            lock.lock_shared().context("cannot wait for a lock")?;
        }
        read(&self.path.join("end.json"))
    }

    /// Whether its process lives.
    pub fn is_alive(&self) -> bool {
        is_alive(&self.path).unwrap_or(false)
    }

    /// Removes what is left of one that has ended.
    pub fn remove(&self) -> anyhow::Result<()> {
        let _all = self.path.parent().map(lock_all).transpose()?;
        ensure!(!self.is_alive(), "{} runs: `vmm stop` it, or say --force", self.record.name);
        remove(&self.path)
    }
}

/// Where the folders of all machines are.
fn base() -> anyhow::Result<PathBuf> {
    let user = rustix::process::geteuid();
    let path = match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("vmm"),
        None if user.is_root() => "/run/vmm".into(),
        None => std::env::temp_dir().join(format!("vmm-{}", user.as_raw())),
    };
    let name = path.display();
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {name}: set XDG_RUNTIME_DIR to a folder of yours"));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(&path).with_context(|| format!("cannot examine {name}"))?;
    ensure!(
        found.is_dir() && found.uid() == user.as_raw() && found.mode() & 0o022 == 0,
        "{name} is not a folder that only you can write to: set XDG_RUNTIME_DIR to one"
    );
    Ok(path)
}

/// Keeps others from making and removing folders.
fn lock_all(base: &Path) -> anyhow::Result<File> {
    let lock = open_lock(base)?;
    lock.lock().with_context(|| format!("cannot lock {}", base.display()))?;
    Ok(lock)
}

fn open_lock(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

fn is_alive(path: &Path) -> anyhow::Result<bool> {
    match File::open(path.join("lock")).map(|lock| lock.try_lock_shared()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) | Ok(Err(TryLockError::Error(error))) => {
            Err(error).with_context(|| format!("cannot examine {}", path.display()))
        }
        Ok(Err(TryLockError::WouldBlock)) => Ok(true),
        Ok(Ok(())) => Ok(false),
    }
}

/// Removes what only a living machine needs.
fn clean(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b"vsock") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Whole or not at all.
fn write(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    let written = fs::write(&new, serde_json::to_vec(value)?).and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("cannot open {}", path.display()))?,
    };
    let value = serde_json::from_reader(io::Read::take(file, MOST_JSON));
    value.map(Some).with_context(|| format!("{} is damaged: remove its folder", path.display()))
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A name is a word of a path, of a line, and the guest's host name.
fn check_name(name: &str) -> anyhow::Result<()> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' || byte == b'_';
    ensure!(
        (1..=LONGEST_NAME).contains(&name.len())
            && name.bytes().all(fine)
            && name.as_bytes()[0].is_ascii_alphanumeric()
            && !RESERVED.contains(&name),
        "{name:?} is no name for a machine: up to {LONGEST_NAME} letters, digits, and - . _ within"
    );
    Ok(())
}

impl Record {
    /// A name for a machine that was given none: what runs there, and a number that no other has.
    pub fn name_for(command: &[String]) -> String {
        let program = command.first().and_then(|word| Path::new(word).file_name()?.to_str()).unwrap_or_default();
        let fine = program.chars().filter(char::is_ascii_alphanumeric).take(20).collect::<String>();
        let word = if fine.is_empty() { "run" } else { &fine };
        format!("{word}-{}", std::process::id())
    }

    /// That of a machine that starts now.
    pub fn now(name: String, command: Vec<String>, root: String, ports: Vec<String>) -> Self {
        Self { name, command, root, ports, output: None, started: now() }
    }
}

/// The last lines of what a guest wrote, without what could do something to a terminal.
fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(LAST_LINES).collect();
    let clean = |line: &&str| format!("  | {}\n", line.trim_end().replace(char::is_control, " "));
    lines.iter().rev().map(clean).collect()
}

#[cfg(test)]
mod tests;
