//! PID 1 of the emulated host: makes a small Linux out of the machine's own files, runs one command in it, and passes
//! its streams and its exit code on.
//!
//! The xtask binary itself is the initramfs's init: it is static, and this is its `main` when it is started under the
//! name [`INIT`]. The other side is [`super::session`]. Both know [`Spec`] and these ports of a virtio console:
//!
//! | port | direction | what |
//! |---|---|---|
//! | 1 | in | lines: `eof N` (standard input ended after N bytes), `resize ROWS COLUMNS` |
//! | 1 | out | lines: `ready`, then `exit CODE T O E` with the numbers of bytes written to ports 2, 3 and 4 |
//! | 2 | both | standard input; with a terminal, all that is typed and shown |
//! | 3, 4 | out | standard output and standard error, as far as they are not the terminal |
//!
//! Who runs the command trusts it: nothing here confines it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Resource, Rlimit, WaitOptions, setrlimit};
use rustix::system::{RebootCommand, init_module, reboot, sethostname};

use super::spec::Spec;
use super::{network, pty};

/// The name under which the xtask binary is the init of the emulated host.
pub(crate) const INIT: &str = "vmm-host-init";

/// Never returns: the other side ends the emulated host when it has read all that the command wrote.
pub(crate) fn main() -> ! {
    if let Err(error) = set_up().and_then(|spec| run(&spec)) {
        // This goes to the console, which the other side shows when the emulated host ends too early.
        eprintln!("{error:#}");
        let _ = reboot(RebootCommand::PowerOff);
    }
    loop {
        thread::park();
    }
}

fn set_up() -> Result<Spec> {
    mount_at("devtmpfs", "/dev", "devtmpfs")?;
    mount_at("proc", "/proc", "proc")?;
    mount_at("sysfs", "/sys", "sysfs")?;
    // As `dmesg -n 1`: what KVM says of its guests is not for those who read a command's output.
    fs::write("/proc/sys/kernel/printk", "1")?;
    for name in fs::read_to_string("/modules/order")?.lines() {
        let module = fs::read(format!("/modules/{name}.ko"))?;
        init_module(&module, c"").with_context(|| format!("Cannot load the module {name}"))?;
    }
    let spec = Spec::read(Path::new("/"))?;
    mount_at("host", "/h", "virtiofs")?;
    for directory in ["/dev/pts", "/dev/shm"] {
        fs::create_dir(directory)?;
    }
    mount("devpts", "/dev/pts", "devpts", MountFlags::empty(), c"mode=620,ptmxmode=666")?;
    mount_at("shm", "/dev/shm", "tmpfs")?;
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        symlink(format!("/proc/self/fd{target}"), format!("/dev/{name}"))?;
    }
    // Not a plain chroot: in one, the kernel refuses user namespaces.
    for directory in ["/dev", "/proc", "/sys"] {
        mount_move(directory, format!("/h{directory}"))?;
    }
    std::env::set_current_dir("/h")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    mount_at("run", "/run", "tmpfs")?;
    fs::create_dir("/run/tmp")?;
    fs::set_permissions("/run/tmp", Permissions::from_mode(0o1777))?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2")?;
    mount_at("debugfs", "/sys/kernel/debug", "debugfs")?;
    network::set_up().context("Cannot set up the emulated host's network")?;
    sethostname(b"vmm-host")?;
    // As udev has them: an ordinary user's machines can be tried here.
    for device in ["/dev/kvm", "/dev/net/tun"] {
        fs::set_permissions(device, Permissions::from_mode(0o666))?;
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), maximum: Some(1 << 19) })?;
    load_modules_on_demand(&spec)?;
    Ok(spec)
}

fn mount_at(source: &str, target: &str, kind: &str) -> Result<()> {
    mount(source, target, kind, MountFlags::empty(), None).with_context(|| format!("Cannot mount {kind} at {target}"))
}

/// The machine has no modules for this kernel in the place where modprobe looks for them.
fn load_modules_on_demand(spec: &Spec) -> Result<()> {
    let mut script = b"#!/bin/sh\nexec /sbin/modprobe -d '".to_vec();
    script.extend(spec.modules.as_os_str().as_encoded_bytes());
    script.extend(b"' \"$@\"\n");
    fs::write("/run/modprobe", script)?;
    fs::set_permissions("/run/modprobe", Permissions::from_mode(0o755))?;
    Ok(fs::write("/proc/sys/kernel/modprobe", "/run/modprobe")?)
}

fn run(spec: &Spec) -> Result<()> {
    let mut control = open_port(1)?;
    let ports = [open_port(2)?, open_port(3)?, open_port(4)?];
    let (streams, child) = start(spec)?;
    writeln!(control, "ready")?;

    let terminal = streams.terminal;
    let input_length = Arc::new(AtomicU64::new(u64::MAX));
    let (input_ended, end_input) = io::pipe()?;
    let (command_ended, end_command) = io::pipe()?;
    let lines = control.try_clone()?;
    let length = input_length.clone();
    thread::spawn(move || listen(lines, terminal.as_ref(), &length, end_input));
    let from = ports[0].try_clone()?;
    thread::spawn(move || copy_input(from, streams.input, &input_length, &input_ended));
    let mut copies: Vec<JoinHandle<u64>> = Vec::new();
    for (from, to) in streams.output.into_iter().zip(ports) {
        let command_ended = command_ended.try_clone()?;
        copies.push(thread::spawn(move || from.map_or(0, |from| copy_output(from, to, &command_ended))));
    }
    let code = match child {
        Ok(child) => wait_for(child)?,
        Err(code) => code,
    };
    drop(end_command);
    let mut line = format!("exit {code}");
    for copy in copies {
        let written = copy.join().map_err(|_| anyhow::anyhow!("A stream's thread failed"))?;
        line.push_str(&format!(" {written}"));
    }
    // What the command left in the page cache reaches the machine's files.
    rustix::fs::sync();
    writeln!(control, "{line}")?;
    Ok(())
}

/// Our ends of the command's streams.
struct Streams {
    input: File,
    /// The terminal, standard output, standard error; what the command does not have is not there.
    output: [Option<File>; 3],
    terminal: Option<File>,
}

/// Starts the command. Its process, or the exit code that a shell gives when there can be none.
fn start(spec: &Spec) -> Result<(Streams, Result<u32, u8>)> {
    let (program, arguments) = spec.arguments.split_first().context("There is no command to run")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(spec.environment.iter().cloned());
    command.current_dir(&spec.directory);
    let (input, terminal) = match &spec.terminal {
        Some(terminal) => {
            let (master, slave) = pty::open(terminal.rows, terminal.columns)?;
            pty::make_controlling(&mut command);
            (master.try_clone()?, Some((master, slave)))
        }
        None => {
            let (reader, writer) = io::pipe()?;
            command.stdin(reader);
            (File::from(OwnedFd::from(writer)), None)
        }
    };
    let mut streams = Streams { input, output: [None, None, None], terminal: None };
    let (mut stdout, mut stderr) = (None, None);
    if let Some((master, slave)) = terminal {
        command.stdin(slave.try_clone()?);
        stdout = Some(slave.try_clone()?).filter(|_| spec.terminal.is_some_and(|terminal| terminal.stdout));
        stderr = Some(slave).filter(|_| spec.terminal.is_some_and(|terminal| terminal.stderr));
        streams.output[0] = Some(master.try_clone()?);
        streams.terminal = Some(master);
    }
    command.stdout(or_pipe(stdout, &mut streams.output[1])?);
    let mut stderr = or_pipe(stderr, &mut streams.output[2])?;
    command.stderr(stderr.try_clone()?);

    let child = spawn(&mut command, spec);
    if let Err((_, message)) = &child {
        writeln!(stderr, "{message}")?;
    }
    Ok((streams, child.map_err(|(code, _)| code)))
}

/// The command's end of a stream: the terminal, or else a pipe whose other end goes to `ours`.
fn or_pipe(terminal: Option<File>, ours: &mut Option<File>) -> Result<File> {
    if let Some(terminal) = terminal {
        return Ok(terminal);
    }
    let (reader, writer) = io::pipe()?;
    *ours = Some(File::from(OwnedFd::from(reader)));
    Ok(File::from(OwnedFd::from(writer)))
}

fn spawn(command: &mut Command, spec: &Spec) -> Result<u32, (u8, String)> {
    if let Err(error) = fs::read_dir(&spec.directory) {
        return Err((126, format!("xtask: Cannot enter {}: {error}", spec.directory.display())));
    }
    command.spawn().map(|child| child.id()).map_err(|error| {
        let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        (code, format!("xtask: Cannot run {}: {error}", command.get_program().display()))
    })
}

/// Waits for the command and meanwhile, as PID 1 must, for all processes that lost their parent.
fn wait_for(child: u32) -> Result<u8> {
    loop {
        let Some((pid, status)) = rustix::process::wait(WaitOptions::empty())? else { continue };
        if u32::try_from(pid.as_raw_nonzero().get()).is_ok_and(|pid| pid == child) {
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code,
                (None, Some(signal)) => 128 + signal,
                (None, None) => continue,
            };
            return Ok(u8::try_from(code).unwrap_or(u8::MAX));
        }
    }
}

/// A port, once both sides are there.
fn open_port(number: u32) -> Result<File> {
    for _ in 0..10_000 {
        if let Some(path) = find_port(number)? {
            let port = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("Cannot open {}", path.display()))?;
            while !is_connected(&port)? {
                thread::sleep(Duration::from_millis(1));
            }
            return Ok(port);
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("Port {number} does not come up")
}

/// Ports are named `vport`, the device's number, `p`, the port's number.
fn find_port(number: u32) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let name = entry?.file_name();
        let device = Path::new("/dev").join(&name);
        if name.to_string_lossy().ends_with(&format!("p{number}")) && device.exists() {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

fn is_connected(port: &File) -> Result<bool> {
    let mut polled = [PollFd::new(port, PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(!polled[0].revents().contains(PollFlags::HUP))
}

/// Does what the other side's lines say, until it is gone.
fn listen(lines: File, terminal: Option<&File>, length: &AtomicU64, end_input: PipeWriter) {
    let mut end_input = Some(end_input);
    for line in BufReader::new(lines).lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        match (words.as_slice(), terminal) {
            (["eof", bytes], _) => {
                length.store(bytes.parse().unwrap_or(0), Ordering::Release);
                end_input = None;
            }
            (["resize", rows, columns], Some(terminal)) => {
                if let (Ok(rows), Ok(columns)) = (rows.parse(), columns.parse()) {
                    let _ = pty::resize(terminal, rows, columns);
                }
            }
            _ => {}
        }
    }
    drop(end_input);
}

/// Copies standard input up to its announced length, and then lets `to` go, so that the command sees its end.
fn copy_input(mut from: File, to: File, length: &AtomicU64, ended: &PipeReader) {
    let mut to = Some(to);
    let mut buffer = vec![0; 1 << 15];
    let mut copied = 0;
    loop {
        let announced = length.load(Ordering::Acquire);
        if copied >= announced {
            return;
        }
        // Once the end is announced, only what is still under way is waited for.
        match wait(&from, Some(ended).filter(|_| announced == u64::MAX)) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(_) => return,
        }
        let Ok(count @ 1..) = from.read(&mut buffer) else { return };
        copied += count as u64;
        // A command that does not want its input any more does not stop it from being read.
        if to.as_mut().is_some_and(|to| to.write_all(&buffer[..count]).is_err()) {
            to = None;
        }
    }
}

/// Copies until the end, or until the command is gone and what it left behind is copied. Returns the number of bytes.
fn copy_output(mut from: File, mut to: File, ended: &PipeReader) -> u64 {
    let mut buffer = vec![0; 1 << 15];
    let mut copied = 0;
    while let Ok(true) = wait(&from, Some(ended)) {
        // A terminal whose last user is gone answers EIO.
        match from.read(&mut buffer) {
            Ok(count @ 1..) if to.write_all(&buffer[..count]).is_ok() => copied += count as u64,
            _ => break,
        }
    }
    copied
}

/// Waits until there is something to read, and says true, or until `ended` has lost its other end.
fn wait(from: &File, ended: Option<&PipeReader>) -> io::Result<bool> {
    let mut waited = vec![PollFd::new(from, PollFlags::IN)];
    waited.extend(ended.map(|ended| PollFd::new(ended, PollFlags::IN)));
    loop {
        match poll(&mut waited, None) {
            Ok(_) => return Ok(!waited[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
