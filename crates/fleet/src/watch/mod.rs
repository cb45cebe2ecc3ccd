//! The watcher: it makes the machines those that the fleet's file says, and keeps them so.
//!
//! There is one loop. Whatever happens is an event; after each, what is is compared with what should be, and the next step
//! of each machine is done ([`steps`]). Nothing in the loop waits for a machine.

mod life;
mod replica;
mod steps;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fleet::check::{check, read};
use fleet::plan::{Addresses, Places};
use fleet::spec::{Disk, Fleet, Source};

use crate::control::{self, Answer, Request, Status};
use crate::host;
use crate::network::Network;
use crate::place::{Place, runtime};
use crate::up::{Uplink, Word};
use replica::{Phase, Replica};

/// What has happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// A machine's agent has answered.
    Up { life: u64 },
    /// A machine's health was asked after.
    Health { life: u64, healthy: bool },
    /// A machine has ended; the last lines of what it wrote.
    Ended { life: u64, code: i32, last: Vec<String> },
    /// Somebody wants something.
    Request(Request, UnixStream),
    /// The uplink is as it was asked for.
    Uplink,
    /// The outer process wants the fleet to end.
    Stop,
}

/// When nothing happens, it is time for whatever was put off.
const ROUND: Duration = Duration::from_millis(100);

/// A fleet that runs.
struct Watcher {
    fleet: Fleet,
    /// Each after those that it waits for.
    order: Vec<String>,
    replicas: BTreeMap<(String, u32), Replica>,
    addresses: Addresses,
    network: Network,
    places: Places,
    runtime: PathBuf,
    vmm: PathBuf,
    events: Sender<Event>,
    outer: UnixStream,
    uplink: Uplink,
    /// The last life's number.
    lives: u64,
    /// The machine that is being made anew because the file has changed.
    replaced: Option<(String, u32)>,
    /// Who wants to know when all is settled.
    waiting: Vec<UnixStream>,
    was_ready: bool,
    ending: bool,
}

/// Runs the fleet to its end. Standard input is the stream to the outer process.
pub(crate) fn run(file: &Path, name: &str) -> anyhow::Result<ExitCode> {
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("there is no outer process")?;
    let outer = UnixStream::from(stdin);
    let text = read(file).map_err(|fault| anyhow::anyhow!("{}", fault.text))?;
    let Ok(fleet) = check(file, &text) else { bail!("{} has changed: start it again", file.display()) };
    let place = Place::of(name)?;
    let (events, arrived) = mpsc::channel();
    listen_to_outer(outer.try_clone().context("cannot duplicate a socket")?, events.clone())?;
    let network = Network::new(fleet.subnet, place.folder.join("hosts"))?;
    let order = fleet::plan::order(&fleet.services).unwrap_or_default();
    let mut watcher = Watcher {
        order,
        replicas: BTreeMap::new(),
        addresses: Addresses::default(),
        network,
        places: place.places(),
        runtime: runtime(),
        vmm: host::vmm()?,
        events: events.clone(),
        outer,
        uplink: Uplink::default(),
        lives: 0,
        replaced: None,
        waiting: Vec::new(),
        was_ready: false,
        ending: false,
        fleet,
    };
    watcher.say_uplink()?;
    // Who publishes a port that cannot be had starts nothing; then the outer process says so, and we end.
    match arrived.recv().context("the outer process has gone")? {
        Event::Uplink => {}
        // Nothing else can have happened yet.
        _ => return Ok(ExitCode::SUCCESS),
    }
    watcher.put_files()?;
    control::listen(&place, &events)?;
    watcher.watch(&arrived)?;
    Ok(ExitCode::SUCCESS)
}

/// What the outer process says. When it has gone, so are we.
fn listen_to_outer(outer: UnixStream, events: Sender<Event>) -> anyhow::Result<()> {
    let listen = move || {
        for line in BufReader::new(outer).lines().map_while(Result::ok) {
            let event = if line == "uplink" { Event::Uplink } else { Event::Stop };
            if events.send(event).is_err() {
                break;
            }
        }
        std::process::exit(1);
    };
    thread::Builder::new().name("outer".into()).spawn(listen).context("cannot start a thread")?;
    Ok(())
}

impl Watcher {
    fn watch(&mut self, arrived: &Receiver<Event>) -> anyhow::Result<()> {
        loop {
            self.step()?;
            if self.ending && self.replicas.is_empty() {
                return Ok(());
            }
            if let Ok(event) = arrived.recv_timeout(ROUND) {
                self.take(event)?;
                while let Ok(event) = arrived.try_recv() {
                    self.take(event)?;
                }
            }
        }
    }

    fn take(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Up { life } => {
                if let Some(Replica { phase: Phase::Running { up, .. }, .. }) = self.with_life(life) {
                    *up = true;
                }
            }
            Event::Health { life, healthy: now } => {
                if let Some(replica) = self.with_life(life)
                    && let Phase::Running { healthy, .. } = &mut replica.phase
                    && *healthy != now
                {
                    *healthy = now;
                    let name = format!("{}-{}", replica.machine.service, replica.machine.index);
                    say(&name, if now { "it is healthy" } else { "it is not healthy" });
                }
            }
            Event::Ended { life, code, last } => self.ended(life, code, &last),
            Event::Request(request, stream) => match self.answer(request, &stream) {
                Ok(Some(answer)) => control::answer(&stream, &answer),
                Ok(None) => self.waiting.push(stream),
                Err(error) => {
                    control::answer(&stream, &Answer { error: Some(format!("{error:#}")), ..Answer::default() });
                }
            },
            Event::Uplink => {}
            Event::Stop => self.ending = true,
        }
        Ok(())
    }

    fn with_life(&mut self, life: u64) -> Option<&mut Replica> {
        self.replicas.values_mut().find(|replica| replica.has_life(life))
    }

    fn ended(&mut self, life: u64, code: i32, last: &[String]) {
        let Some(key) = self.replicas.iter().find(|(_, replica)| replica.has_life(life)).map(|(key, _)| key.clone())
        else {
            return;
        };
        let name = format!("{}-{}", key.0, key.1);
        let Some(replica) = self.replicas.get_mut(&key) else { return };
        if matches!(replica.phase, Phase::Stopping { .. }) {
            replica.phase = Phase::Ended;
            let wanted = self.fleet.services.get(&key.0).filter(|service| key.1 <= service.replicas && !self.ending);
            match wanted {
                Some(service) => replica.renew(service),
                None => self.forget(&key),
            }
            return;
        }
        if let Some(words) = replica.ended(code) {
            say(&name, &words);
        }
        if replica.is_given_up() {
            for line in last {
                say(&name, &format!("  {line}"));
            }
        }
    }

    /// The machine is no more.
    fn forget(&mut self, key: &(String, u32)) {
        let Some(replica) = self.replicas.remove(key) else { return };
        self.addresses.give_back(&replica.machine);
        if let Err(error) = self.network.remove(&replica.machine) {
            say(&format!("{}-{}", key.0, key.1), &format!("{error:#}"));
        }
    }

    /// Answers a request at once, or says that its answer must wait until all is settled.
    fn answer(&mut self, request: Request, stream: &UnixStream) -> anyhow::Result<Option<Answer>> {
        // What was put off is answered later, by the same clock.
        stream.set_read_timeout(None).context("cannot set a socket up")?;
        match request {
            Request::Status => return Ok(Some(Answer { error: None, machines: self.status() })),
            Request::Ready => {}
            Request::Scale(numbers) => {
                for (name, number) in &numbers {
                    let service = self.fleet.services.get(name);
                    let service = service.with_context(|| format!("there is no service `{name}`"))?;
                    if service.has_disk() && *number > 1 {
                        bail!("service {name}: several machines cannot share one disk");
                    }
                    if *number > fleet::check::MOST_REPLICAS {
                        bail!("service {name}: {number} are too many: {} at most", fleet::check::MOST_REPLICAS);
                    }
                }
                for (name, number) in numbers {
                    if let Some(service) = self.fleet.services.get_mut(&name) {
                        service.replicas = number;
                    }
                }
            }
            Request::Apply { path, text } => {
                let fleet = check(&path, &text).map_err(|faults| {
                    anyhow::anyhow!("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
                })?;
                if fleet.name != self.fleet.name || fleet.subnet != self.fleet.subnet {
                    bail!("a running fleet keeps its name and its subnet: `vmm down` first");
                }
                self.order = fleet::plan::order(&fleet.services).unwrap_or_default();
                self.fleet = fleet;
                self.put_files()?;
                self.say_uplink()?;
                self.forgive();
            }
            Request::Down => {
                self.ending = true;
                return Ok(Some(Answer::default()));
            }
        }
        if self.ending {
            bail!("the fleet is ending");
        }
        self.was_ready = false;
        Ok(None)
    }

    /// What was given up is tried again when the file is applied.
    fn forgive(&mut self) {
        for ((name, _), replica) in &mut self.replicas {
            if let Some(service) = self.fleet.services.get(name).filter(|_| replica.is_given_up()) {
                replica.renew(service);
            }
        }
    }

    fn status(&self) -> Vec<Status> {
        let status = |replica: &Replica| Status {
            name: replica.machine.name(&self.fleet.name),
            service: replica.machine.service.clone(),
            address: replica.machine.address(self.fleet.subnet).to_string(),
            state: replica.state().to_owned(),
            restarts: replica.restarts,
        };
        self.replicas.values().map(status).collect()
    }

    /// Tells the outer process what is to lead in and out.
    fn say_uplink(&mut self) -> anyhow::Result<()> {
        self.uplink = Uplink::of(&self.fleet);
        self.say_outer(&Word::Uplink(self.uplink.clone()))
    }

    fn say_outer(&mut self, word: &Word) -> anyhow::Result<()> {
        let mut line = serde_json::to_string(word)?;
        line.push('\n');
        self.outer.write_all(line.as_bytes()).context("the outer process has gone")
    }

    /// Puts secrets and named volumes where machines find them.
    fn put_files(&self) -> anyhow::Result<()> {
        let make = |path: &Path| {
            let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
            made.with_context(|| format!("cannot make {}", path.display()))
        };
        for (name, service) in &self.fleet.services {
            for volume in &service.volumes {
                if let Source::Named(volume) = &volume.source {
                    make(&self.places.volumes.join(volume))?;
                }
            }
            for disk in &service.disks {
                if let Disk::Named { name, size } = disk {
                    make(&self.places.volumes)?;
                    make_disk(&self.places.disk(name), *size)?;
                }
            }
            let folder = self.places.secrets(name);
            for (secret, path) in &service.secrets {
                make(&folder)?;
                let content = fs::read(path).with_context(|| format!("cannot read the secret {}", path.display()))?;
                // Whoever the command runs as may read it; on this host, nobody gets to the folder but us.
                let place = folder.join(secret);
                let put = fs::write(&place, content)
                    .and_then(|()| fs::set_permissions(&place, fs::Permissions::from_mode(0o444)));
                put.with_context(|| format!("cannot write {}", place.display()))?;
            }
        }
        Ok(())
    }
}

/// Makes a blank disk, if there is none. One that is there keeps its size and what is on it.
fn make_disk(path: &Path, size: u64) -> anyhow::Result<()> {
    let made = File::options().write(true).create_new(true).mode(0o600).open(path).and_then(|file| file.set_len(size));
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make the disk {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Says something of a machine.
fn say(name: &str, words: &str) {
    let _ = writeln!(io::stderr(), "vmm: {name}: {words}");
}
