//! What a fleet comes to: the order of its services, and each machine's name, address and command line.
//!
//! A machine's address follows from its name, so that a change of the file moves no machine that it does not change.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use crate::spec::{Disk, Fleet, Service, Source, Subnet};

/// The number of the bridge's address, which machines know as their gateway (`Ipv4Net::gateway`).
pub const GATEWAY: u16 = 2;
/// The number of the address that names are asked at (`Ipv4Net::dns`).
pub const DNS: u16 = 3;
/// The first number of a machine's address.
const FIRST: u16 = 0x100;

/// The services, each after those that it waits for.
///
/// # Errors
///
/// Services that wait for each other, in that order.
pub fn order(services: &BTreeMap<String, Service>) -> Result<Vec<String>, Vec<String>> {
    let mut ordered: Vec<String> = Vec::new();
    let mut left: BTreeSet<&String> = services.keys().collect();
    let waits_for = |name: &String, left: &BTreeSet<&String>| {
        services[name].depends_on.keys().find(|other| left.contains(other)).cloned()
    };
    while let Some(first) = left.first().copied() {
        if let Some(free) = left.iter().find(|name| waits_for(name, &left).is_none()).copied() {
            left.remove(free);
            ordered.push(free.clone());
            continue;
        }
        // Each of them waits for another of them: who follows that way comes round.
        let mut way = vec![first.clone()];
        while let Some(next) = way.last().and_then(|last| waits_for(last, &left)) {
            if let Some(start) = way.iter().position(|name| *name == next) {
                way.drain(..start);
                // The cycle begins with the first of its names, wherever the search came into it.
                let lowest = (0..way.len()).min_by_key(|index| &way[*index]).unwrap_or_default();
                way.rotate_left(lowest);
                return Err(way);
            }
            way.push(next);
        }
    }
    Ok(ordered)
}

/// One machine of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Machine {
    /// Its service.
    pub service: String,
    /// From 1.
    pub index: u32,
    /// The number of its address.
    pub number: u16,
}

impl Machine {
    /// Its name, by which `vmm ps` and the others know it.
    pub fn name(&self, fleet: &str) -> String {
        format!("{fleet}-{}-{}", self.service, self.index)
    }

    /// The tap that its network card is on.
    pub fn tap(&self) -> String {
        format!("tap{}", self.number)
    }

    /// Its network card's address, one of those that anybody may give (IEEE 802).
    pub fn mac(&self) -> String {
        let [high, low] = self.number.to_be_bytes();
        format!("02:00:00:00:{high:02x}:{low:02x}")
    }

    /// Its address.
    pub fn address(&self, subnet: Subnet) -> Ipv4Addr {
        subnet.address(self.number)
    }
}

/// The addresses that are in use.
#[derive(Debug, Default)]
pub struct Addresses(BTreeSet<u16>);

impl Addresses {
    /// The machine of this service with this index; the address stays its own until it is given back.
    pub fn machine(&mut self, service: &str, index: u32) -> Machine {
        // FNV-1a: any spread will do, as long as it is the same tomorrow.
        let hash = format!("{service}-{index}")
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let room = u64::from(u16::MAX - FIRST);
        let start = u16::try_from(hash % room).unwrap_or_default();
        let all = (0..u16::MAX - FIRST).map(|step| {
            let number = (u64::from(start) + u64::from(step)) % room;
            FIRST + u16::try_from(number).unwrap_or_default()
        });
        let number = all.into_iter().find(|number| !self.0.contains(number)).unwrap_or(FIRST);
        self.0.insert(number);
        Machine { service: service.to_owned(), index, number }
    }

    /// The machine is no more.
    pub fn give_back(&mut self, machine: &Machine) {
        self.0.remove(&machine.number);
    }
}

/// Where a fleet's files are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Its folder while it runs.
    pub runtime: PathBuf,
    /// Its named volumes.
    pub volumes: PathBuf,
}

impl Places {
    /// The folder that a service finds at `/run/secrets`.
    pub fn secrets(&self, service: &str) -> PathBuf {
        self.runtime.join("secrets").join(service)
    }

    /// The named disk: no named volume has a dot in its name.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.volumes.join(format!("{name}.img"))
    }

    /// What the machine has written.
    pub fn log(&self, machine: &Machine) -> PathBuf {
        self.runtime.join("logs").join(format!("{}-{}", machine.service, machine.index))
    }
}

/// The arguments of `vmm` that run the machine.
pub fn arguments(fleet: &Fleet, service: &Service, machine: &Machine, places: &Places) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["run".into(), "--name".into(), machine.name(&fleet.name).into()];
    let mut flag = |name: &str, value: OsString| arguments.extend([OsString::from(name), value]);
    flag("--output-at", places.log(machine).into());
    let (address, mac, tap) = (machine.address(fleet.subnet), machine.mac(), machine.tap());
    let prefix = Subnet::PREFIX;
    flag("--net", format!("tap={tap},address={address}/{prefix},mac={mac},antispoof,guest-ip={address}").into());
    for (name, path) in [("--kernel", &service.kernel), ("--rootfs", &service.rootfs), ("--disk", &service.disk)] {
        if let Some(path) = path {
            flag(name, path.into());
        }
    }
    for (name, text) in [
        ("--image", &service.image),
        ("--cpus", &service.cpus.said),
        ("--mem", &service.mem.said),
        ("--user", &service.user),
    ] {
        if let Some(text) = text {
            flag(name, text.into());
        }
    }
    // Without a word, a command on the host's programs would have the folder that we are in.
    let workdir = service.workdir.as_deref().or(service.image.is_none().then_some("/"));
    if let Some(workdir) = workdir {
        flag("--workdir", workdir.into());
    }
    for volume in &service.volumes {
        let path = match &volume.source {
            Source::Host(path) => path.clone(),
            Source::Named(name) => places.volumes.join(name),
        };
        flag("--volume", share(&path, &volume.guest, volume.readonly));
    }
    for disk in &service.disks {
        let (path, readonly) = match disk {
            Disk::Host { path, readonly } => (path.clone(), *readonly),
            Disk::Named { name, .. } => (places.disk(name), false),
        };
        let mut text = path.into_os_string();
        text.push(if readonly { ",readonly" } else { "" });
        flag("--extra-disk", text);
    }
    if !service.secrets.is_empty() {
        flag("--volume", share(&places.secrets(&machine.service), "/run/secrets", true));
    }
    for (name, value) in &service.env {
        flag("--env", format!("{name}={value}").into());
    }
    let mut command = service.command.clone();
    if let Some(entrypoint) = &service.entrypoint {
        match (service.image.is_some(), entrypoint.split_first()) {
            (true, Some((program, rest))) => {
                flag("--entrypoint", program.into());
                command.splice(..0, rest.iter().cloned());
            }
            _ => drop(command.splice(..0, entrypoint.iter().cloned())),
        }
    }
    if !command.is_empty() {
        arguments.push("--".into());
        arguments.extend(command.into_iter().map(OsString::from));
    }
    arguments
}

fn share(path: &Path, guest: &str, readonly: bool) -> OsString {
    let mut text = path.as_os_str().to_owned();
    text.push(format!(":{guest}{}", if readonly { ":ro" } else { "" }));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::check;

    fn fleet(text: &str) -> Fleet {
        check(Path::new("/srv/shop/fleet.toml"), text).unwrap()
    }

    #[test]
    fn a_service_comes_after_those_that_it_waits_for() {
        let fleet = fleet(
            "[services.a]\ncommand = ['true']\ndepends_on = { c = 'started' }\n\
             [services.b]\ncommand = ['true']\n\
             [services.c]\ncommand = ['true']\ndepends_on = { b = 'started' }\n",
        );
        assert_eq!(order(&fleet.services).unwrap(), ["b", "c", "a"]);
    }

    #[test]
    fn an_address_follows_from_the_name_and_belongs_to_one_machine() {
        let (mut some, mut others) = (Addresses::default(), Addresses::default());
        let first = some.machine("web", 1);
        others.machine("other", 7);
        assert_eq!(others.machine("web", 1), first);
        let all: BTreeSet<u16> = (0..20_000).map(|index| some.machine("app", index).number).collect();
        assert_eq!(all.len(), 20_000);
        assert!(all.iter().all(|number| (FIRST..u16::MAX).contains(number)));
        assert!(first.tap().len() <= 15);
        some.give_back(&first);
        assert_eq!(some.machine("web", 1), first);
    }

    #[test]
    fn a_machine_is_one_command_and_no_secret_is_in_it() {
        let fleet = fleet(
            "[services.web]\ncommand = ['sh', '-c', 'true']\nmem = '64M'\nuser = 'nobody'\nenv = { A = 'b' }\n\
             volumes = ['/usr:/data:ro', 'data:/srv']\ndisks = ['data:1G', '/proc/version:ro']\n\
             secrets = { key = '/proc/version' }\n",
        );
        let machine = Addresses::default().machine("web", 2);
        let places = Places { runtime: "/run/shop".into(), volumes: "/var/shop".into() };
        let all = arguments(&fleet, &fleet.services["web"], &machine, &places);
        let line = all.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ");
        let (address, mac, tap) = (machine.address(fleet.subnet), machine.mac(), machine.tap());
        assert_eq!(
            line,
            format!(
                "run --name shop-web-2 --output-at /run/shop/logs/web-2 \
                 --net tap={tap},address={address}/16,mac={mac},antispoof,guest-ip={address} --mem 64M --user nobody --workdir / --volume /usr:/data:ro --volume /var/shop/data:/srv \
                 --extra-disk /var/shop/data.img --extra-disk /proc/version,readonly \
                 --volume /run/shop/secrets/web:/run/secrets:ro --env A=b -- sh -c true"
            )
        );
    }
}
