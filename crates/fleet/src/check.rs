//! Reads a fleet's file and says everything that is wrong with it at once, each with its line.
//!
//! Each service is read by itself, so that a fault in one hides none in another. TOML's own rules are the exception: what
//! breaks them ends the reading. Left out on purpose: whether an image that a registry has is there, since asking for it
//! is fetching it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use devices::net::Publish;
use serde::Deserialize as _;
use toml::{Table, Value};

use crate::spec::{Condition, Disk, Fleet, Restart, Service, Source, Subnet, name};

/// A file larger than that is a mistake.
const LARGEST: u64 = 1 << 20;
/// More machines of one service than one host runs.
pub const MOST_REPLICAS: u32 = 200;
const MOST_SERVICES: usize = 200;
/// A secret is a key or a password.
const LARGEST_SECRET: u64 = 1 << 20;
/// What stands outside of the services.
const TOP: [&str; 4] = ["name", "kernel", "subnet", "services"];

/// Something wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The line that it is in, from 1.
    pub line: usize,
    /// What it is, and the way out.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.text)
    }
}

/// Reads the text of the file at `path`.
///
/// # Errors
///
/// The file cannot be read.
pub fn read(path: &Path) -> Result<String, Fault> {
    let unreadable = |error| Fault { line: 1, text: format!("the file cannot be read ({error}): say -f FILE") };
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > LARGEST {
        return Err(Fault { line: 1, text: "the file is larger than 1M: say -f FILE with a fleet in TOML".into() });
    }
    fs::read_to_string(path).map_err(unreadable)
}

/// The fleet that `text` describes, which stands in the file at `path`: paths in it count from its folder.
///
/// # Errors
///
/// Everything that is wrong, in the order of the lines.
pub fn check(path: &Path, text: &str) -> Result<Fleet, Vec<Fault>> {
    let folder = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or_default();
    let table: Table = toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
        vec![Fault { line, text: error.message().trim().replace('\n', ", ") }]
    })?;
    let mut checker = Checker { text, folder, faults: Vec::new() };
    let fleet = checker.fleet(table);
    checker.faults.sort_by_key(|fault| fault.line);
    if checker.faults.is_empty() { Ok(fleet) } else { Err(checker.faults) }
}

struct Checker<'a> {
    text: &'a str,
    folder: PathBuf,
    faults: Vec<Fault>,
}

impl Checker<'_> {
    fn fault(&mut self, line: usize, text: impl Into<String>) {
        self.faults.push(Fault { line, text: text.into() });
    }

    /// A fault of a key of a service.
    fn of_service(&mut self, service: &str, key: &str, text: impl fmt::Display) {
        let line = self.line(service, key);
        self.fault(line, format!("service {service}: {text}"));
    }

    fn fleet(&mut self, mut table: Table) -> Fleet {
        for key in table.keys().filter(|key| !TOP.contains(&key.as_str())) {
            let near = kv::nearest(key, TOP).map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
            self.faults.push(Fault { line: self.top(key), text: format!("there is no `{key}` here{near}") });
        }
        let folder_name = self.folder.file_name().map(|name| name.to_string_lossy().to_lowercase());
        let fleet_name = self.take(&mut table, "name").or(folder_name).unwrap_or_default();
        if let Err(error) = name(&fleet_name) {
            let line = self.top("name");
            self.fault(line, format!("the fleet's name: {error} (say `name = \"…\"`)"));
        }
        let kernel: Option<PathBuf> = self.take(&mut table, "kernel").map(|path: PathBuf| self.folder.join(path));
        if let Some(kernel) = kernel.as_ref().filter(|kernel| !kernel.is_file()) {
            let line = self.top("kernel");
            self.fault(line, format!("there is no kernel at {}", kernel.display()));
        }
        let subnet: Subnet = self.take(&mut table, "subnet").unwrap_or_default();
        let mut services = BTreeMap::new();
        match table.remove("services") {
            Some(Value::Table(tables)) if (1..=MOST_SERVICES).contains(&tables.len()) => {
                let all: BTreeSet<String> = tables.keys().cloned().collect();
                for (service, value) in tables {
                    if let Some(read) = self.service(&service, &value, kernel.as_ref()) {
                        services.insert(service, read);
                    }
                }
                self.links(&services, &all);
            }
            _ => self.fault(1, format!("it has 1 to {MOST_SERVICES} services: say [services.NAME]")),
        }
        Fleet { name: fleet_name, kernel, subnet, services }
    }

    fn take<T: for<'a> serde::Deserialize<'a>>(&mut self, table: &mut Table, key: &str) -> Option<T> {
        let value = table.remove(key)?;
        value.try_into().map_err(|error: toml::de::Error| self.fault(self.top(key), error.message().trim())).ok()
    }

    fn service(&mut self, service: &str, value: &Value, kernel: Option<&PathBuf>) -> Option<Service> {
        if let Err(error) = name(service) {
            self.of_service(service, "", error);
        }
        let keys: Vec<String> = value.as_table().into_iter().flat_map(|table| table.keys().cloned()).collect();
        let mut read = match Service::deserialize(value.clone()) {
            Ok(read) => read,
            Err(error) => {
                let message = error.message().trim().replace('\n', ", ");
                // Of a value, serde's words do not say which it is: the one that is the fault even by itself.
                let named = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
                let key = named.map(str::to_owned).or_else(|| keys.into_iter().find(|key| is_at_fault(value, key)));
                let key = key.unwrap_or_default();
                let near = named.and_then(|named| kv::nearest(named, message.split('`').skip(3).step_by(2)));
                let near = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                let message = message.split(", expected one of").next().unwrap_or_default();
                let place = if named.is_some() || key.is_empty() { String::new() } else { format!("{key}: ") };
                self.of_service(service, &key, format!("{place}{message}{near}"));
                return None;
            }
        };
        self.resolve(&mut read, kernel);
        self.alone(service, &read);
        Some(read)
    }

    /// Makes paths absolute.
    fn resolve(&self, service: &mut Service, kernel: Option<&PathBuf>) {
        service.kernel = service.kernel.take().map(|path| self.folder.join(path)).or_else(|| kernel.cloned());
        for path in [&mut service.rootfs, &mut service.disk].into_iter().flatten().chain(service.secrets.values_mut()) {
            *path = self.folder.join(&*path);
        }
        if let Some(image) = service.image.as_mut().filter(|image| image.starts_with(['.', '/'])) {
            *image = self.folder.join(&*image).display().to_string();
        }
        for volume in &mut service.volumes {
            if let Source::Host(path) = &mut volume.source {
                *path = self.folder.join(&*path);
            }
        }
        for disk in &mut service.disks {
            if let Disk::Host { path, .. } = disk {
                *path = self.folder.join(&*path);
            }
        }
    }

    /// What can be judged of a service without the others.
    fn alone(&mut self, name: &str, service: &Service) {
        let roots = [service.image.is_some(), service.rootfs.is_some(), service.disk.is_some()];
        if roots.iter().filter(|root| **root).count() > 1 {
            self.of_service(name, "", "it has one root: say one of image, rootfs and disk, or none of them");
        }
        if service.command.is_empty() && service.entrypoint.is_none() && service.image.is_none() {
            self.of_service(name, "", "it has nothing to run: say command = [\"PROGRAM\", …]");
        }
        for (key, path) in [("rootfs", &service.rootfs), ("disk", &service.disk), ("kernel", &service.kernel)] {
            let Some(path) = path else { continue };
            let there = if key == "rootfs" { path.is_dir() } else { path.exists() && !path.is_dir() };
            if !there {
                self.of_service(name, key, format!("there is no {key} at {}", path.display()));
            }
        }
        if let Some(image) = service.image.as_ref().filter(|image| image.starts_with('/') && !Path::new(image).exists())
        {
            self.of_service(name, "image", format!("there is no image at {image}"));
        }
        if service.image.as_ref().is_some_and(String::is_empty) {
            self.of_service(name, "image", "an image has a name: say a reference, a folder or an archive");
        }
        if service.has_disk() && service.replicas > 1 {
            let text = "several machines cannot share one disk: say rootfs or image, and volumes, or 1";
            self.of_service(name, "replicas", text);
        }
        if service.replicas > MOST_REPLICAS {
            self.of_service(name, "replicas", format!("{} are too many: {MOST_REPLICAS} at most", service.replicas));
        }
        for volume in &service.volumes {
            if let Source::Host(path) = &volume.source
                && !path.is_dir()
            {
                self.of_service(name, "volumes", format!("there is no folder {}", path.display()));
            }
        }
        for disk in &service.disks {
            if let Disk::Host { path, .. } = disk
                && (!path.exists() || path.is_dir())
            {
                self.of_service(name, "disks", format!("there is no disk at {}", path.display()));
            }
        }
        for variable in service.env.keys().filter(|name| name.is_empty() || name.contains(['=', '\0'])) {
            self.of_service(name, "env", format!("`{}` is no variable's name", variable.escape_debug()));
        }
        for (secret, path) in &service.secrets {
            if secret.is_empty() || secret.contains('/') || matches!(secret.as_str(), "." | "..") {
                self.of_service(name, "secrets", format!("`{}` is no file's name", secret.escape_debug()));
            }
            match File::open(path).and_then(|file| file.metadata()) {
                Ok(file) if file.is_file() && file.len() <= LARGEST_SECRET => {}
                Ok(_) => self.of_service(name, "secrets", format!("{} is no file of 1M at most", path.display())),
                Err(error) => {
                    self.of_service(name, "secrets", format!("{} cannot be read ({error})", path.display()));
                }
            }
        }
    }

    /// What services say of each other.
    fn links(&mut self, services: &BTreeMap<String, Service>, all: &BTreeSet<String>) {
        for (name, service) in services {
            for (other, condition) in &service.depends_on {
                self.condition(name, other, *condition, services.get(other), all);
            }
            for allow in service.allow.iter().filter(|allow| !all.contains(&allow.service)) {
                let near = near(&allow.service, all);
                self.of_service(name, "allow", format!("there is no service `{}`{near}", allow.service));
            }
        }
        if let Err(cycle) = crate::plan::order(services) {
            let first = cycle.first().cloned().unwrap_or_default();
            let way = cycle.join(" → ");
            self.of_service(&first, "depends_on", format!("it waits for itself: {way} → {first}"));
        }
        let mut disks: BTreeMap<&str, &str> = BTreeMap::new();
        for (name, service) in services {
            for disk in &service.disks {
                if let Disk::Named { name: own, .. } = disk
                    && let Some(first) = disks.insert(own, name)
                {
                    self.of_service(name, "disks", format!("the disk `{own}` is named twice: {first} has it, too"));
                }
            }
        }
        let mut taken: Vec<(&str, &Publish)> = Vec::new();
        for (name, service) in services {
            for publish in &service.publish {
                // Whatever the address: inside, a port leads to one service.
                let same = |other: &Publish| other.host == publish.host && other.udp == publish.udp;
                match taken.iter().find(|(_, other)| same(other)) {
                    Some((first, _)) => {
                        let text = format!("port {} is published twice: {first} has it, too", publish.host);
                        self.of_service(name, "publish", text);
                    }
                    None => taken.push((name, publish)),
                }
            }
        }
    }

    fn condition(
        &mut self,
        name: &str,
        other: &str,
        condition: Condition,
        found: Option<&Service>,
        all: &BTreeSet<String>,
    ) {
        if !all.contains(other) {
            self.of_service(name, "depends_on", format!("there is no service `{other}`{}", near(other, all)));
        }
        let Some(found) = found else { return };
        if condition == Condition::Healthy && found.health.is_none() {
            let text = format!("it waits for {other} to be healthy, which says no health: add it, or say \"started\"");
            self.of_service(name, "depends_on", text);
        }
        if condition == Condition::Completed && found.restart == Restart::Always {
            let text = format!("it waits for {other} to be completed, which never is with restart = \"always\"");
            self.of_service(name, "depends_on", text);
        }
    }

    /// The line of a key outside of the services.
    fn top(&self, key: &str) -> usize {
        self.text.lines().position(|line| starts_with_key(line, key)).map_or(1, |line| line + 1)
    }

    /// The line of a service's key, or of the service. A fault is nearly always in a file that is written plainly; where
    /// it is not, the first line stands for it.
    fn line(&self, service: &str, key: &str) -> usize {
        let header = |line: &str| -> Option<String> {
            let inside = line.trim().strip_prefix('[')?.split(']').next()?;
            Some(inside.replace([' ', '"', '\''], ""))
        };
        let own = format!("services.{service}");
        let mut found = 1;
        let mut here = false;
        for (index, line) in self.text.lines().enumerate() {
            if let Some(header) = header(line) {
                here = header == own;
                if here {
                    found = index + 1;
                } else if !key.is_empty() && header == format!("{own}.{key}") {
                    return index + 1;
                }
            } else if here && !key.is_empty() && starts_with_key(line, key) {
                return index + 1;
            }
        }
        found
    }
}

/// Whether a service with this key alone, and what every service needs, cannot be read.
fn is_at_fault(service: &Value, key: &str) -> bool {
    let alone = service.get(key).map(|value| Table::from_iter([(key.to_owned(), value.clone())]));
    alone.is_some_and(|alone| Service::deserialize(Value::Table(alone)).is_err())
}

fn starts_with_key(line: &str, key: &str) -> bool {
    let rest = line.trim_start_matches(['[', ' ', '\t', '"', '\'']).strip_prefix(key);
    rest.is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ', '\t']).starts_with(['=', '.', ']']))
}

fn near(word: &str, all: &BTreeSet<String>) -> String {
    kv::nearest(word, all.iter().map(String::as_str))
        .map(|near| format!("; did you mean `{near}`?"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
