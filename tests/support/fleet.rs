//! A fleet in a folder of its own: `vmm up` and its siblings, and clients of what it publishes.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::process::{Ended, Running, Vmm};
use super::{asset, until, vmm};

/// A fleet's file in a folder of its own, and the folders that it makes files in.
pub(crate) struct Fleet {
    folder: Rc<TempDir>,
    name: &'static str,
    kernel: PathBuf,
    /// What runs `vmm`.
    wrapper: Vec<String>,
}

/// How often it is asked what only an answer tells.
pub(crate) const PACE: Duration = Duration::from_millis(300);

/// A web server that says who it is, at port 80.
pub(crate) const WEB: &str =
    "mkdir -p /tmp/w; echo $(hostname) $SAYS > /tmp/w/index.html; exec busybox httpd -f -p 80 -h /tmp/w";

/// Where the example fleets are.
const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/fleets");

/// A machine takes no longer to become healthy: a database starts in it, in an emulated host.
const HEALTHY: Duration = Duration::from_secs(300);

/// Who asks waits no longer for an answer.
const ANSWER: Duration = Duration::from_secs(60);

impl Fleet {
    /// A fleet with these services, named `shop`.
    pub(crate) fn new(services: &str) -> Self {
        let fleet = Self::named("shop");
        fs::create_dir(fleet.path("shop")).expect("there is room for files");
        fleet.write(services);
        fleet
    }

    fn named(name: &'static str) -> Self {
        let folder = Rc::new(tempfile::tempdir().expect("there is room for files"));
        let fleet = Self { folder, name, kernel: asset("small-vmlinux"), wrapper: Vec::new() };
        fs::create_dir(fleet.path("runtime")).expect("there is room for files");
        fleet
    }

    /// The example fleet with this name, after `edit` of its file, with the small kernel.
    pub(crate) fn example(name: &'static str, edit: impl FnOnce(String) -> String) -> Self {
        let fleet = Self::named(name);
        for folder in [name, "counter"] {
            fs::create_dir(fleet.path(folder)).expect("there is room for files");
            for file in fs::read_dir(Path::new(EXAMPLES).join(folder)).expect("the project has it") {
                let file = file.expect("it can be listed");
                let copy = PathBuf::from(fleet.path(folder)).join(file.file_name());
                fs::copy(file.path(), copy).expect("there is room for files");
            }
        }
        let text = fs::read_to_string(fleet.path(&format!("{name}/fleet.toml"))).expect("it is there");
        fleet.write(&edit(text));
        fleet
    }

    /// Makes the file another one.
    pub(crate) fn write(&self, services: &str) {
        let text = format!("kernel = '{}'\n{services}", self.kernel.display());
        fs::write(self.path(&format!("{}/fleet.toml", self.name)), text).expect("there is room for files");
    }

    /// A file or a folder beside the fleet's.
    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).into_os_string().into_string().expect("a path of text")
    }

    /// From now on another command runs `vmm`.
    pub(crate) fn by(mut self, wrapper: Vec<String>) -> Self {
        self.wrapper = wrapper;
        self
    }

    /// From now on an ordinary user runs `vmm`: whoever tests, or else nobody, who has copies of what he cannot get to.
    pub(crate) fn by_an_ordinary_user(mut self, services: &str) -> Self {
        if !rustix::process::geteuid().is_root() {
            return self;
        }
        let programs = self.path("programs");
        fs::create_dir(&programs).expect("there is room for files");
        let copy = |from: &Path, name: &str| {
            let to = Path::new(&programs).join(name);
            fs::copy(from, &to).expect("there is room for files");
            to
        };
        self.kernel = copy(&self.kernel, "vmlinux");
        for name in ["vmm", "vmm-fleet"] {
            copy(&vmm().with_file_name(name), name);
        }
        self.write(services);
        let chown = Command::new("chown").args(["-R", "nobody:nogroup"]).arg(self.folder.path()).status();
        assert!(chown.expect("there is such a program").success());
        let script = format!("shift; HOME={programs} exec {programs}/vmm \"$@\"");
        let nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "sh", "-c", &script, "sh"];
        self.by(nobody.map(str::to_owned).to_vec())
    }

    /// `vmm` in the fleet's folder.
    pub(crate) fn vmm(&self, words: &[&str]) -> Vmm {
        let (runtime, data) =
            (format!("XDG_RUNTIME_DIR={}", self.path("runtime")), format!("XDG_DATA_HOME={}", self.path("data")));
        let folder = self.path(self.name);
        let mut wrapper = vec!["env", "--chdir", &folder, &runtime, &data];
        wrapper.extend(self.wrapper.iter().map(String::as_str));
        Vmm::new(words).with(&self.folder).by(&wrapper)
    }

    /// Starts it in the foreground.
    pub(crate) fn up(&self) -> Running {
        self.vmm(&["up"]).spawn()
    }

    /// Starts it in the foreground, and waits until these machines of it are healthy, one after the other.
    pub(crate) fn up_to(&self, machines: &[&str]) -> Running {
        let running = self.up();
        for machine in machines {
            let (healthy, start) = (format!("{machine}: it is healthy"), Instant::now());
            while !running.stderr.text(0).contains(&healthy) {
                let goes_on = !running.ends_within(PACE) && start.elapsed() < HEALTHY;
                let said = || format!("{}\n{}", running.stdout().text(0), running.stderr.text(0));
                assert!(goes_on, "{machine} does not become healthy:\n{}", said());
            }
        }
        running
    }

    /// Ends it, and nothing of it is left.
    #[track_caller]
    pub(crate) fn down(&self, running: Running) {
        self.done(&["down"]);
        let ended = running.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        self.assert_nothing_runs();
    }

    /// Runs a verb that must succeed.
    #[track_caller]
    pub(crate) fn done(&self, words: &[&str]) -> Ended {
        let ended = self.vmm(words).run();
        assert_eq!(ended.code, Some(0), "{words:?}: {ended:?}\n{}", self.said());
        ended
    }

    /// What it has said so far, if it is in the background.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.path(&format!("runtime/vmm/fleets/{}/output", self.name))).unwrap_or_default()
    }

    /// The machines of a service that are in this state.
    pub(crate) fn count(&self, service: &str, state: &str) -> usize {
        let ended = self.vmm(&["services"]).run();
        let name = format!("{}-{service}-", self.name);
        let of = |line: &&str| line.starts_with(&name) && line.ends_with(&format!("  {state}"));
        ended.stdout.lines().filter(of).count()
    }

    /// Waits until so many machines of a service are in this state.
    pub(crate) fn wait_for(&self, service: &str, count: usize, state: &str) {
        until(&format!("{service} {state}: {count}"), || {
            let is = self.count(service, state) == count;
            std::thread::sleep(if is { Duration::ZERO } else { PACE });
            is
        });
    }

    /// Nothing of it is left that runs.
    pub(crate) fn assert_nothing_runs(&self) {
        for words in [&format!("{}-", self.name), "exe init", "exe watch", "pasta", "dnsmasq", "virtiofsd"] {
            until(&format!("no process with {words:?}"), || processes(words).is_empty());
        }
        let taps = fs::read_dir("/sys/class/net").expect("it is mounted").filter_map(Result::ok);
        let left: Vec<_> =
            taps.map(|tap| tap.file_name()).filter(|name| name.to_string_lossy().starts_with("tap")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Asks at a port of this host. Returns what is answered with status 200.
pub(crate) fn ask(port: u16, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.trim_end().to_owned()),
        _ => Err(io::Error::other(answer)),
    }
}

/// Waits for an answer that begins with `words`, at the pace of somebody who waits: the guests need the processor more.
pub(crate) fn until_answered(port: u16, words: &str) {
    until(&format!("the answer {words:?}"), || {
        let answered = ask(port, "/").is_ok_and(|answer| answer.starts_with(words));
        std::thread::sleep(if answered { Duration::ZERO } else { PACE });
        answered
    });
}

/// A port that nobody has.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.local_addr().expect("it has a port").port()
}

/// The processes whose command line contains `words`, with their command lines.
fn found(words: &str) -> Vec<(Pid, String)> {
    let entries = fs::read_dir("/proc").expect("it is mounted").filter_map(Result::ok);
    let processes = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw)?;
        Some((pid, fs::read_to_string(entry.path().join("cmdline")).ok()?.replace('\0', " ")))
    });
    processes.filter(|(_, line)| line.contains(words)).collect()
}

/// The command lines that contain `words`.
pub(crate) fn processes(words: &str) -> Vec<String> {
    found(words).into_iter().map(|(_, line)| line).collect()
}

/// Kills the processes whose command line contains `words`: there is one at least.
pub(crate) fn kill(words: &str) {
    let found = found(words);
    assert!(!found.is_empty(), "{words:?} does not run");
    for (pid, _) in found {
        // Some of them end with others.
        let _ = kill_process(pid, Signal::KILL);
    }
}
