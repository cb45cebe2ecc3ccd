//! The outer process of a fleet, the one that was started: it makes the namespaces, has pasta lead into them, passes
//! signals on, and tells whoever waits that all is up.
//!
//! pasta must be outside of the fleet's network and inside of its PID namespace, so that nothing is left when that ends: so
//! it is this process's child.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use fleet::rules::UPLINK;
use fleet::spec::Fleet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::control::{self, Request};
use crate::place::{Place, runtime};
use crate::process::Failed;
use crate::{host, namespaces};

/// The network between the fleet's and pasta (RFC 3927), which nobody sees.
const ADDRESS: &str = "169.254.89.2";
pub(crate) const ROUTER: &str = "169.254.89.1";
const MASK: &str = "255.255.255.252";

/// pasta is there in some milliseconds, or says why not.
const PASTA: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(10);
/// How often pasta is looked after.
const ROUND: Duration = Duration::from_secs(1);

/// What the watcher says to the outer process, one a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Word {
    /// What is to lead into the fleet and out of it, from now on.
    Uplink(Uplink),
    /// All services are started, and healthy where they say how.
    Ready,
}

/// What leads into the fleet and out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Uplink {
    /// `ADDRESS/PORT`, as pasta has it.
    tcp: Vec<String>,
    udp: Vec<String>,
    internet: bool,
}

impl Uplink {
    /// What the fleet needs.
    pub(crate) fn of(fleet: &Fleet) -> Self {
        let ports = |udp: bool| {
            let all = fleet.services.values().flat_map(|service| &service.publish);
            all.filter(|publish| publish.udp == udp)
                .map(|publish| format!("{}/{}", publish.address, publish.host))
                .collect()
        };
        Self { tcp: ports(false), udp: ports(true), internet: fleet.services.values().any(|service| service.internet) }
    }

    fn is_needed(&self) -> bool {
        self.internet || !self.tcp.is_empty() || !self.udp.is_empty()
    }
}

/// Runs the fleet to its end.
pub(crate) fn run(file: &Path, fleet: &Fleet, place: &Place, behind: bool) -> anyhow::Result<ExitCode> {
    if behind {
        // Whoever started us may be the leader of our group already.
        let _ = rustix::process::setsid();
    }
    let file = std::path::absolute(file).context("cannot tell the current folder")?;
    let _lock = place.take()?.with_context(|| format!("the fleet {} runs already", fleet.name))?;
    let signals = signals()?;
    namespaces::prepare()?;
    let (stream, theirs) = UnixStream::pair().context("cannot make a socket")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("init").arg(file).arg(&fleet.name).stdin(OwnedFd::from(theirs));
    // In there everybody is root, who would look for these files elsewhere.
    command.env("PATH", host::path()).env("XDG_RUNTIME_DIR", runtime());
    let mut init = command.spawn().context("cannot start the fleet's first process")?;
    // It holds the other end of the stream, whose end is the end of the fleet.
    drop(command);
    let mut outer = Outer { place, init: init.id(), stream, pasta: None, uplink: Uplink::default() };
    let ended = outer.listen(&signals);
    // A PID namespace ends when all that were in it are waited for, and pasta is ours to wait for.
    outer.end_pasta();
    if ended.is_err() {
        let _ = init.kill();
    }
    let status = init.wait().context("cannot wait for the fleet's first process")?;
    ended?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if let Some(code) = code {
        let _ = fs::remove_file(place.socket());
        return Ok(ExitCode::from(code));
    }
    Err(Failed(format!("the fleet's first process was ended ({status})")).into())
}

/// A stream that has a byte for each signal. A thread cannot be had: the next process is in another PID namespace, and
/// threads would have to be in it, too.
fn signals() -> anyhow::Result<UnixStream> {
    let (signals, theirs) = UnixStream::pair().context("cannot make a socket")?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        let theirs = theirs.try_clone().context("cannot duplicate a socket")?;
        pipe::register(signal, theirs).context("cannot wait for signals")?;
    }
    Ok(signals)
}

struct Outer<'a> {
    place: &'a Place,
    init: u32,
    stream: UnixStream,
    pasta: Option<Child>,
    uplink: Uplink,
}

impl Outer<'_> {
    /// Does what the watcher says until it has gone. The first signal is an orderly end, the second one the end.
    fn listen(&mut self, mut signals: &UnixStream) -> anyhow::Result<()> {
        let mut lines = BufReader::new(self.stream.try_clone().context("cannot duplicate a socket")?);
        let mut line = String::new();
        let mut stops = 0;
        let round = Timespec::try_from(ROUND).context("a second is a time")?;
        loop {
            let mut wanted = [PollFd::new(&self.stream, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
            match poll(&mut wanted, Some(&round)) {
                Err(error) if error != Errno::INTR => return Err(error).context("cannot wait for the fleet"),
                _ => {}
            }
            let [said, signalled] = wanted.map(|fd| !fd.revents().is_empty());
            if signalled {
                let _ = signals.read(&mut [0]);
                stops += 1;
                ensure!(stops < 2, Failed("it was ended before its machines had ended in order".into()));
                self.stream.write_all(b"stop\n").context("the watcher has gone")?;
            }
            // What came with a line before is not seen by poll any more.
            while said || !lines.buffer().is_empty() {
                line.clear();
                if lines.read_line(&mut line).context("cannot hear of the fleet")? == 0 {
                    return Ok(());
                }
                self.hear(&line)?;
                if lines.buffer().is_empty() {
                    break;
                }
            }
            if self.pasta.as_mut().is_some_and(|pasta| !matches!(pasta.try_wait(), Ok(None))) {
                // With the fleet it ends, too, and then that is heard of now.
                let mut wanted = [PollFd::new(&self.stream, PollFlags::IN)];
                if poll(&mut wanted, Some(&round)).is_ok_and(|ready| ready > 0) {
                    continue;
                }
                eprintln!("vmm: pasta has ended, it is started again");
                self.start_pasta()?;
            }
        }
    }

    fn hear(&mut self, line: &str) -> anyhow::Result<()> {
        match serde_json::from_str(line).context("the watcher is not understood")? {
            Word::Ready => notify("READY=1"),
            Word::Uplink(uplink) => {
                if uplink != self.uplink {
                    self.uplink = uplink;
                    self.start_pasta()?;
                }
                self.stream.write_all(b"uplink\n").context("the watcher has gone")?;
            }
        }
        Ok(())
    }

    fn end_pasta(&mut self) {
        if let Some(mut pasta) = self.pasta.take() {
            let _ = pasta.kill();
            let _ = pasta.wait();
        }
    }

    /// Starts pasta as the uplink is now, in place of the one that runs.
    fn start_pasta(&mut self) -> anyhow::Result<()> {
        self.end_pasta();
        if !self.uplink.is_needed() {
            return Ok(());
        }
        let (ready, log) = (self.place.pasta(), self.place.folder.join("pasta.log"));
        let _ = fs::remove_file(&ready);
        let namespace = format!("/proc/{}/ns/net", self.init);
        let namespace = File::open(&namespace).with_context(|| format!("cannot open {namespace}"))?;
        let words = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = Command::new("pasta");
        command.env("PATH", host::path());
        command.args(["--foreground", "--quiet", "--stderr", "--runas", "0", "--config-net", "--netns-only"]);
        command.args(["--ns-ifname", UPLINK, "--ipv4-only", "--no-map-gw", "-T", "none", "-U", "none"]);
        command.args(["--address", ADDRESS, "--netmask", MASK, "--gateway", ROUTER]);
        // What is asked of it by UDP goes to the host's name server, one at 127.0.0.1 too.
        command.args(["--dns-forward", ROUTER]);
        for (flag, ports) in [("-t", &self.uplink.tcp), ("-u", &self.uplink.udp)] {
            if ports.is_empty() {
                command.args([flag, "none"]);
            }
            for port in ports {
                command.args([flag, port]);
            }
        }
        // By its path it cannot be opened by a process that has given up what pasta gives up first.
        command.arg("--pid").arg(&ready).args(["--netns", "/proc/self/fd/0"]).stdin(namespace);
        // What is typed at our terminal is not for it: it is needed to the end.
        command.process_group(0);
        let mut pasta = command.stdout(Stdio::null()).stderr(words).spawn().context("cannot start pasta")?;
        let start = Instant::now();
        while !ready.exists() {
            let ended = pasta.try_wait().context("cannot wait for pasta")?;
            if ended.is_some() || start.elapsed() > PASTA {
                let words = fs::read_to_string(&log).unwrap_or_default();
                let words = words.lines().filter(|line| !line.contains("syslog")).collect::<Vec<_>>().join("; ");
                bail!(Failed(format!("pasta does not lead into the fleet's network: {words}")));
            }
            thread::sleep(LOOK);
        }
        self.pasta = Some(pasta);
        Ok(())
    }
}

/// Tells systemd (sd_notify(3)), where that has started us.
fn notify(state: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_encoded_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        eprintln!("vmm: cannot tell systemd at {} ({error})", path.display());
    }
}

/// Starts the fleet behind, and returns when it is up.
pub(crate) fn behind(file: &Path, place: &Place) -> anyhow::Result<ExitCode> {
    fs::create_dir_all(&place.folder).with_context(|| format!("cannot make {}", place.folder.display()))?;
    let path = place.folder.join("output");
    let output = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path);
    let output = output.with_context(|| format!("cannot make {}", path.display()))?;
    let errors = output.try_clone().context("cannot duplicate a descriptor")?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["up", "--behind", "--file"]).arg(file).stdin(Stdio::null()).stdout(output).stderr(errors);
    let mut child = command.spawn().context("cannot start a process")?;
    while UnixStream::connect(place.socket()).is_err() {
        if let Some(status) = child.try_wait().context("cannot wait for the fleet")? {
            let words = fs::read_to_string(&path).unwrap_or_default();
            let words = words.trim().strip_prefix("vmm: ").unwrap_or(words.trim()).to_owned();
            ensure!(!status.success(), "the fleet has ended at once");
            bail!(Failed(words));
        }
        thread::sleep(LOOK);
    }
    control::ask(place, &Request::Ready).map_err(|error| Failed(format!("{error:#}")))?;
    Ok(ExitCode::SUCCESS)
}
