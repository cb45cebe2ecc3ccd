//! The outside of an emulated host: starts QEMU and virtiofsd, moves the streams, and ends both with the command.
//!
//! Nothing is left behind, however this ends: the two processes die with us, and what would be files (initramfs, sockets)
//! are file descriptors that they inherit. The inside, and the lines that are exchanged, are [`super::inside`].

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest::initramfs::Archive;

use super::Host;
use super::emulator::Emulator;
use super::inside::INIT;
use super::process::{Helper, Signals};
use super::spec::Spec;
use super::terminal::Terminal;
use crate::assets::{self, Kernel};

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// How much of the console and of the helpers' messages is kept for the case of a failure.
const LOG_BYTES: usize = 8 << 10;

/// Where the command's streams come from and go to.
pub(super) struct Streams {
    pub(super) input: Box<dyn Read + Send>,
    /// The terminal, standard output, standard error.
    pub(super) output: [Box<dyn Write + Send>; 3],
    pub(super) terminal: Option<Terminal>,
    /// Whether signals and changes of the window are for this session.
    pub(super) catch_signals: bool,
}

/// How a command came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// With this exit code, 128 and the signal's number if it died of one.
    Exited(u8),
    /// It took longer than the host's time limit.
    TimedOut,
    /// We were to end.
    Signalled(i32),
}

enum Event {
    Signal(i32),
    /// A line from the inside.
    Line(String),
    /// The inside is gone.
    Gone,
    /// So many bytes more were passed on to this of the outputs.
    Passed(usize, u64),
    /// Nobody takes this output any more.
    Refused(io::Error),
}

/// Runs the command of `spec` in a new emulated host.
pub(super) fn run(host: &Host, spec: &Spec, kernel: &Kernel, streams: Streams) -> Result<Ended> {
    let deadline = (host.timeout > 0).then(|| Instant::now() + Duration::from_secs(host.timeout));
    let (events, incoming) = mpsc::channel();
    let signals = streams.catch_signals.then(|| catch_signals(events.clone())).transpose()?;
    let (log_reader, log) = io::pipe()?;
    let (files, virtiofsd) = share_files(&log)?;
    let mut ports = Vec::new();
    let mut far_ends = Vec::new();
    for _ in 0..4 {
        let (near, far) = UnixStream::pair()?;
        ports.push(near);
        far_ends.push(OwnedFd::from(far));
    }
    let initramfs = initramfs(spec, kernel)?;
    let qemu = start_qemu(host, kernel, Inherited { files, ports: far_ends, initramfs }, log)?;
    let log = thread::spawn(move || tail(log_reader));

    let mut session = Session { control: ports.remove(0), terminal: streams.terminal, deadline, incoming };
    listen(session.control.try_clone()?, events.clone());
    send_input(streams.input, ports[0].try_clone()?, session.control.try_clone()?);
    for (index, (to, from)) in streams.output.into_iter().zip(ports).enumerate() {
        pass_output(index, from, to, events.clone());
    }
    let ended = session.wait();
    drop((qemu, virtiofsd, signals, session));
    let Some(ended) = ended? else {
        let log = log.join().unwrap_or_default();
        // Every start brings the same warnings of features that are not emulated.
        let log: Vec<&str> = log.lines().filter(|line| !line.contains(": warning: TCG doesn't support")).collect();
        bail!("The emulated host ended before the command did. Its last words:\n{}", log.join("\n"));
    };
    Ok(ended)
}

struct Session {
    control: UnixStream,
    terminal: Option<Terminal>,
    deadline: Option<Instant>,
    incoming: Receiver<Event>,
}

impl Session {
    /// Waits for the command's end; nothing if the emulated host ended first.
    fn wait(&mut self) -> Result<Option<Ended>> {
        let mut passed = [0; 3];
        let mut exit: Option<(u8, [u64; 3])> = None;
        loop {
            if let Some((code, written)) = exit
                && written == passed
            {
                return Ok(Some(Ended::Exited(code)));
            }
            match self.next_event() {
                None => return Ok(Some(Ended::TimedOut)),
                Some(Event::Signal(libc::SIGWINCH)) => self.resize()?,
                Some(Event::Signal(signal)) => return Ok(Some(Ended::Signalled(signal))),
                Some(Event::Line(line)) if line == "ready" => {
                    if let Some(terminal) = &self.terminal {
                        terminal.make_raw()?;
                    }
                }
                Some(Event::Line(line)) => exit = Some(parse_exit(&line)?),
                Some(Event::Gone) => return Ok(None),
                Some(Event::Passed(output, bytes)) => passed[output] += bytes,
                Some(Event::Refused(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(Some(Ended::Signalled(libc::SIGPIPE)));
                }
                Some(Event::Refused(error)) => return Err(error).context("Cannot pass output on"),
            }
        }
    }

    /// The next event; nothing when the time is over.
    fn next_event(&self) -> Option<Event> {
        let Some(deadline) = self.deadline else { return self.incoming.recv().ok() };
        self.incoming.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }

    fn resize(&mut self) -> Result<()> {
        if let Some(terminal) = &self.terminal {
            let (rows, columns) = terminal.size()?;
            writeln!(self.control, "resize {rows} {columns}")?;
        }
        Ok(())
    }
}

fn parse_exit(line: &str) -> Result<(u8, [u64; 3])> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["exit", code, terminal, stdout, stderr] = words.as_slice() else {
        bail!("The emulated host sent a line that is not understood: {line}");
    };
    Ok((code.parse()?, [terminal.parse()?, stdout.parse()?, stderr.parse()?]))
}

fn catch_signals(events: Sender<Event>) -> Result<Signals> {
    Signals::catch(move |signal| events.send(Event::Signal(signal)).is_ok())
}

/// Passes on the lines of the inside.
fn listen(control: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        for line in BufReader::new(control).lines().map_while(Result::ok) {
            if events.send(Event::Line(line)).is_err() {
                return;
            }
        }
        let _ = events.send(Event::Gone);
    });
}

/// Sends the input in, and then word of its end.
fn send_input(mut from: Box<dyn Read + Send>, mut to: UnixStream, mut control: UnixStream) {
    thread::spawn(move || -> io::Result<()> {
        let sent = io::copy(&mut from, &mut to)?;
        writeln!(control, "eof {sent}")
    });
}

/// Passes on what the command writes, as it comes.
fn pass_output(index: usize, mut from: UnixStream, mut to: Box<dyn Write + Send>, events: Sender<Event>) {
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let result = to.write_all(&buffer[..count]).and_then(|()| to.flush());
            let event = match result {
                Ok(()) => Event::Passed(index, count as u64),
                Err(error) => Event::Refused(error),
            };
            if events.send(event).is_err() {
                return;
            }
        }
    });
}

/// Starts virtiofsd on the machine's files. Returns the connection to it.
fn share_files(log: &io::PipeWriter) -> Result<(OwnedFd, Helper)> {
    // The socket is in a directory of our own, and gone before anybody else could find it.
    let directory = tempfile::tempdir().context("Cannot make a directory for a socket: set TMPDIR")?;
    let path = directory.path().join("files");
    let listener = OwnedFd::from(UnixListener::bind(&path)?);
    let connection = OwnedFd::from(UnixStream::connect(&path)?);
    drop(directory);

    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(VIRTIOFSD)
    } else {
        // virtiofsd changes its root, which only an administrator may, if only of a name space of his own.
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--mount", VIRTIOFSD]);
        unshare
    };
    command
        .arg(format!("--fd={}", listener.as_raw_fd()))
        .args(["-o", "source=/", "-o", "cache=auto", "-o", "sandbox=chroot", "-o", "log_level=warn"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.try_clone()?);
    Ok((connection, Helper::start(&mut command, vec![listener])?))
}

/// The initramfs: the modules, this very program as its init, and the command.
fn initramfs(spec: &Spec, kernel: &Kernel) -> Result<OwnedFd> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "h"] {
        archive.directory(directory)?;
    }
    let program = std::fs::read("/proc/self/exe").context("Cannot read this program")?;
    archive.file(INIT, 0o755, loaded_part(&program)?)?;
    spec.write(&mut archive)?;
    let file = rustix::fs::memfd_create("initramfs", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(file);
    let modules = assets::host_modules(kernel)?;
    io::copy(&mut File::open(&modules)?, &mut file).context("Cannot write the initramfs")?;
    file.write_all(&archive.finish()?).context("Cannot write the initramfs")?;
    Ok(OwnedFd::from(file))
}

/// The part of an ELF file up to the end of what is loaded: what follows is for debuggers, and twice as much.
fn loaded_part(program: &[u8]) -> Result<&[u8]> {
    const LOAD: u64 = 1;
    let number = |offset: usize, length: usize| -> Option<u64> {
        let bytes = program.get(offset..offset.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let end = || -> Option<usize> {
        let (table, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
        let mut end = 0;
        for index in 0..count {
            let header = usize::try_from(table.checked_add(index * size)?).ok()?;
            if number(header, 4)? == LOAD {
                end = end.max(number(header + 8, 8)?.checked_add(number(header + 0x20, 8)?)?);
            }
        }
        usize::try_from(end).ok()
    };
    end().and_then(|end| program.get(..end)).context("This program is not the ELF file that it should be")
}

struct Inherited {
    files: OwnedFd,
    ports: Vec<OwnedFd>,
    initramfs: OwnedFd,
}

fn start_qemu(host: &Host, kernel: &Kernel, inherited: Inherited, log: io::PipeWriter) -> Result<Helper> {
    let emulator = Emulator::find()?;
    let mut command = emulator.command();
    let mem = host.mem;
    let accelerator = if host.icount {
        // Idle, the clock jumps to the next timer: what waits for the machine's files is charged arbitrary time.
        command.args(["-icount", "shift=0,sleep=off"]);
        "tcg,thread=single,tb-size=1024"
    } else if host.cpus == 1 && !emulator.is_sound() {
        // Idle, the clock follows the real one: it does not jump while the host waits for the machine's files.
        command.args(["-icount", "shift=0,sleep=on"]);
        "tcg,thread=single,tb-size=1024"
    } else {
        "tcg,thread=multi,tb-size=1024"
    };
    command
        .args(["-M", "q35,hpet=off", "-accel", accelerator])
        .args(["-cpu", "EPYC-Rome-v2,+svm,-sha-ni", "-smp", &host.cpus.to_string(), "-m", &mem.to_string()])
        .args(["-object", &format!("memory-backend-memfd,id=mem,size={mem}M,share=on"), "-numa", "node,memdev=mem"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .args(["-chardev", &format!("socket,id=files,fd={}", inherited.files.as_raw_fd())])
        .args(["-device", "vhost-user-fs-pci,chardev=files,tag=host", "-device", "virtio-serial-pci"]);
    for (index, port) in inherited.ports.iter().enumerate() {
        let number = index + 1;
        command
            .args(["-chardev", &format!("socket,id=port{number},fd={}", port.as_raw_fd())])
            .args(["-device", &format!("virtserialport,chardev=port{number},nr={number}")]);
    }
    if let Some(disk) = &host.disk {
        let path = disk.to_str().context("The path of the disk is not text")?.replace(',', ",,");
        command.args(["-drive", &format!("if=virtio,format=raw,cache=writeback,file={path}")]);
    }
    command
        .arg("-kernel")
        .arg(&kernel.vmlinuz)
        .args(["-initrd", &format!("/proc/self/fd/{}", inherited.initramfs.as_raw_fd())])
        .args([
            "-append",
            &format!("console=ttyS0 reboot=t panic=-1 quiet mitigations=off cryptomgr.notests rdinit=/{INIT}"),
        ])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut files = inherited.ports;
    files.extend([inherited.files, inherited.initramfs]);
    Helper::start(&mut command, files)
}

/// Reads to the end and keeps the last of it.
fn tail(mut from: PipeReader) -> String {
    let mut kept = VecDeque::new();
    let mut buffer = vec![0; LOG_BYTES];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        kept.extend(&buffer[..count]);
        kept.drain(..kept.len().saturating_sub(LOG_BYTES));
    }
    String::from_utf8_lossy(kept.make_contiguous()).into_owned()
}
