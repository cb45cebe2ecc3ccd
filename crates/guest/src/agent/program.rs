//! A program as it will be started: where it is, whose it is, and in which environment.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use guest::request::{Answer, Program, Trouble};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use super::reaper::{Child, Reaper};
use super::sys;
use super::users::{Files, User};

/// Where programs are if nobody says so.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a program does not run.
#[derive(Debug)]
pub(crate) struct NotStarted {
    pub(crate) kind: Trouble,
    pub(crate) message: String,
}

impl NotStarted {
    fn new(kind: Trouble, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::new(Trouble::Other, message)
    }
}

impl From<NotStarted> for Answer {
    fn from(NotStarted { kind, message }: NotStarted) -> Self {
        Self::NotStarted { kind, message }
    }
}

/// A program that can be started once its input and output are set.
pub(crate) struct Prepared {
    pub(crate) command: Command,
    /// Whom it runs as, if not as the agent.
    pub(crate) uid: Option<u32>,
    name: String,
}

/// Finds the program and all that it needs. In a `terminal`, its standard input becomes its controlling terminal.
///
/// # Errors
///
/// There is no such program, user or working directory.
pub(crate) fn prepare(program: &Program, terminal: bool) -> Result<Prepared, NotStarted> {
    let [name, arguments @ ..] = program.argv.as_slice() else {
        return Err(NotStarted::other("No program is named"));
    };
    let cwd = Path::new(program.cwd.as_deref().unwrap_or("/"));
    if !cwd.is_dir() {
        return Err(NotStarted::other(format!("There is no working directory {}", cwd.display())));
    }
    let files = Files::read().map_err(NotStarted::other)?;
    let switch = program.user.as_deref().map(|user| files.find(user)).transpose().map_err(NotStarted::other)?;
    let user = switch.clone().unwrap_or_else(|| files.by_uid(rustix::process::getuid().as_raw()));
    let env = environment(program, &user, terminal)?;
    let path = env.iter().rev().find(|(key, _)| key == "PATH").map_or(PATH, |(_, value)| value);

    let mut command = Command::new(find(name, path, cwd)?);
    command.arg0(name).args(arguments).current_dir(cwd).env_clear().envs(env);
    let uid = switch.as_ref().map(|user| user.uid);
    become_the_user(&mut command, switch, terminal);
    Ok(Prepared { command, uid, name: name.clone() })
}

impl Prepared {
    /// Starts it.
    pub(crate) fn start(mut self, reaper: &Reaper) -> Result<Arc<Child>, NotStarted> {
        reaper.spawn(&mut self.command).map_err(|error| {
            let kind = match error.raw_os_error() {
                // The program is there: what is not is its interpreter.
                Some(libc::ENOENT | libc::ENOTDIR) => Trouble::NotFound,
                Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ELIBBAD | libc::ETXTBSY) => {
                    Trouble::NotExecutable
                }
                _ => Trouble::Other,
            };
            NotStarted::new(kind, format!("Cannot run {}: {error}", self.name))
        })
    }
}

/// What the program's environment is, with what it cannot do without.
fn environment(program: &Program, user: &User, terminal: bool) -> Result<Vec<(String, String)>, NotStarted> {
    let mut env = program.env.clone();
    if let Some((key, _)) = env.iter().find(|(key, _)| key.is_empty() || key.contains('=')) {
        return Err(NotStarted::other(format!("{key:?} is no name of a variable")));
    }
    let mut add = |key: &str, value: &str| {
        if !env.iter().any(|(known, _)| known == key) {
            env.push((key.to_owned(), value.to_owned()));
        }
    };
    add("PATH", PATH);
    add("HOME", &user.home);
    if let Some(name) = &user.name {
        add("USER", name);
        add("LOGNAME", name);
    }
    if terminal {
        add("TERM", "xterm");
    }
    Ok(env)
}

/// Where a program is. A name with a slash is taken as it is.
fn find(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, NotStarted> {
    if name.is_empty() {
        return Err(NotStarted::other("The program's name is empty"));
    }
    if name.contains('/') {
        return Ok(name.into());
    }
    let mut kind = Trouble::NotFound;
    for folder in path.split(':') {
        let program = cwd.join(folder).join(name);
        let Ok(metadata) = fs::metadata(&program) else { continue };
        if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
            return Ok(program);
        }
        kind = Trouble::NotExecutable;
    }
    let what = if kind == Trouble::NotFound { "There is no program" } else { "No permission to run" };
    Err(NotStarted::new(kind, format!("{what} {name} in {path}")))
}

/// Has the program heed its signals, and lead a session of its own, with a terminal if it has one, as `user` if there is one.
fn become_the_user(command: &mut Command, user: Option<User>, terminal: bool) {
    let user = user.map(|user| {
        let groups: Vec<Gid> = user.groups.into_iter().map(Gid::from_raw).collect();
        (Uid::from_raw(user.uid), Gid::from_raw(user.gid), groups)
    });
    sys::before_exec(command, move || -> io::Result<()> {
        sys::heed_signals();
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if let Some((uid, gid, groups)) = &user {
            set_thread_groups(groups)?;
            set_thread_gid(*gid)?;
            set_thread_uid(*uid)?;
        }
        Ok(())
    });
}
