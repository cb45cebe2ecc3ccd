//! A fleet as its file says it: the types that the TOML is read into, and what each value must look like.
//!
//! What takes more than one value to judge is in [`check`](crate::check).

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use devices::net::Publish;
use guest::request::{Check, Program};
use machine::CpusSpec;
use memory::MemorySpec;
use serde::Deserialize;

/// Several services, each of one machine or several equal ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Fleet {
    /// Its name, which the names of its machines begin with.
    pub name: String,
    /// The kernel of services that name none; `vmm run`'s own where there is none either.
    pub kernel: Option<PathBuf>,
    /// The network that its machines are in.
    pub subnet: Subnet,
    /// By name.
    pub services: BTreeMap<String, Service>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The image that is its root: a reference, a folder or an archive.
    pub image: Option<String>,
    /// The folder that is its root. With no root at all it has the host's own programs.
    pub rootfs: Option<PathBuf>,
    /// The disk image that is its root.
    pub disk: Option<PathBuf>,
    /// The kernel, if it is not the fleet's.
    pub kernel: Option<PathBuf>,
    /// The program and its arguments; those of the image where there are none.
    #[serde(default)]
    pub command: Vec<String>,
    /// What stands before the command, in place of the image's own.
    pub entrypoint: Option<Vec<String>>,
    /// Processors.
    #[serde(default)]
    pub cpus: Text<CpusSpec>,
    /// RAM.
    #[serde(default)]
    pub mem: Text<MemorySpec>,
    /// Folders of the host's and named ones.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// Disks of its own, after that of its root.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Variables of the command's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Files that appear in `/run/secrets`, by their name there.
    #[serde(default)]
    pub secrets: BTreeMap<String, PathBuf>,
    /// Whom the command runs as.
    pub user: Option<String>,
    /// Where it starts.
    pub workdir: Option<String>,
    /// Ports of the host that lead to its machines, in turn.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// How many machines.
    #[serde(default = "one")]
    pub replicas: u32,
    /// When a machine that has ended is started again.
    #[serde(default)]
    pub restart: Restart,
    /// How to find out whether it does its work.
    pub health: Option<Health>,
    /// Which services it waits for.
    #[serde(default)]
    pub depends_on: BTreeMap<String, Condition>,
    /// Whom it may talk to.
    #[serde(default)]
    pub allow: Vec<Allow>,
    /// Whether it reaches what the host reaches.
    #[serde(default)]
    pub internet: bool,
    /// How long it has to end by itself.
    #[serde(default)]
    pub grace: Grace,
}

fn one() -> u32 {
    1
}

impl Service {
    /// Whether it has a disk, which two machines cannot share.
    pub fn has_disk(&self) -> bool {
        self.disk.is_some() || !self.disks.is_empty()
    }

    /// Whether a machine of `other` is one of this, so that nothing need be started anew.
    pub fn same_machine(&self, other: &Self) -> bool {
        let network_apart = |service: &Self| Self {
            publish: Vec::new(),
            replicas: 0,
            restart: Restart::default(),
            depends_on: BTreeMap::new(),
            allow: Vec::new(),
            internet: false,
            grace: Grace::default(),
            ..service.clone()
        };
        network_apart(self) == network_apart(other)
    }
}

/// A number or a text, of which the second is one that `vmm run` takes as a flag's value.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "NumberOrText", bound(deserialize = "T: serde::de::DeserializeOwned"))]
pub struct Text<T> {
    /// As it was said.
    pub said: Option<String>,
    kind: std::marker::PhantomData<T>,
}

impl<T> Default for Text<T> {
    fn default() -> Self {
        Self { said: None, kind: std::marker::PhantomData }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u32),
    Text(String),
}

impl<T: serde::de::DeserializeOwned> TryFrom<NumberOrText> for Text<T> {
    type Error = String;

    fn try_from(value: NumberOrText) -> Result<Self, String> {
        let said = match value {
            NumberOrText::Number(number) => number.to_string(),
            NumberOrText::Text(text) => text,
        };
        kv::from_str::<T>(&said).map_err(|error| error.to_string())?;
        Ok(Self { said: Some(said), ..Self::default() })
    }
}

/// When a machine that has ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    No,
    /// When its command's exit code is not 0, and when it failed.
    #[default]
    OnFailure,
    /// Whenever it ends.
    Always,
}

/// What a service that is depended on must have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// All its machines run.
    Started,
    /// All its machines are healthy.
    Healthy,
    /// All its machines have ended with 0.
    Completed,
}

/// A folder that a machine has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Volume {
    /// Where it comes from.
    pub source: Source,
    /// Where the machine has it.
    pub guest: String,
    /// Whether it cannot be written.
    pub readonly: bool,
}

/// Where a volume comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of the host's.
    Host(PathBuf),
    /// A folder that the fleet keeps under this name.
    Named(String),
}

impl FromStr for Volume {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (source, guest, readonly) = match text.split(':').collect::<Vec<_>>()[..] {
            [source, guest] | [source, guest, "rw"] => (source, guest, false),
            [source, guest, "ro"] => (source, guest, true),
            _ => bail!("the volume `{text}` is not understood: say HOST:GUEST, NAME:GUEST or HOST:GUEST:ro"),
        };
        ensure!(guest.starts_with('/'), "the volume `{text}`: the guest's folder begins with a slash");
        let source = match source.starts_with(['/', '.']) {
            true => Source::Host(source.into()),
            false => {
                name(source).with_context(|| format!("the volume `{text}`"))?;
                Source::Named(source.to_owned())
            }
        };
        Ok(Self { source, guest: guest.to_owned(), readonly })
    }
}

impl TryFrom<String> for Volume {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|error| format!("{error:#}"))
    }
}

/// A disk that a machine has, beside that of its root.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Disk {
    /// A raw image of the host's.
    Host {
        /// Where it is.
        path: PathBuf,
        /// Whether it cannot be written.
        readonly: bool,
    },
    /// One that the fleet keeps under this name. It is blank at first.
    Named {
        /// Its name.
        name: String,
        /// Its size in bytes.
        size: u64,
    },
}

/// A disk's smallest unit (VIRTIO 1.2, 5.2).
const SECTOR: u64 = 512;

impl TryFrom<String> for Disk {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.starts_with(['/', '.']) {
            let path = text.strip_suffix(":ro");
            return Ok(Self::Host { path: path.unwrap_or(&text).into(), readonly: path.is_some() });
        }
        let wrong =
            |why: String| format!("the disk `{text}` is not understood ({why}): say NAME:SIZE, ./PATH or ./PATH:ro");
        let (own, size) = text.split_once(':').ok_or_else(|| wrong("it has no size".into()))?;
        name(own).map_err(|error| wrong(error.to_string()))?;
        let kv::Size(size) = size.parse().map_err(|error: kv::Error| wrong(error.to_string()))?;
        match size > 0 && size % SECTOR == 0 && i64::try_from(size).is_ok() {
            true => Ok(Self::Named { name: own.to_owned(), size }),
            false => Err(wrong(format!("its size is no multiple of {SECTOR} bytes"))),
        }
    }
}

/// How to find out whether a machine does its work.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "HealthText")]
pub struct Health {
    /// What is asked.
    pub check: Check,
    /// How long from one answer to the next question.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How many bad answers in a row make a healthy machine an unhealthy one.
    pub retries: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HealthText {
    tcp: Option<u16>,
    http: Option<String>,
    port: Option<u16>,
    exec: Option<Vec<String>>,
    interval: Option<Span>,
    timeout: Option<Span>,
    retries: Option<u32>,
}

impl TryFrom<HealthText> for Health {
    type Error = String;

    fn try_from(text: HealthText) -> Result<Self, String> {
        let HealthText { tcp, http, port, exec, interval, timeout, retries } = text;
        let check = match (tcp, http, exec) {
            (Some(port), None, None) => Check::Tcp { port },
            (None, Some(path), None) if path.starts_with('/') => Check::Http { port: port.unwrap_or(80), path },
            (None, None, Some(argv)) if !argv.is_empty() => Check::Exec(Program { argv, ..Program::default() }),
            _ => return Err("health is one of { tcp = 80 }, { http = \"/path\", port = 80 } and { exec = […] }".into()),
        };
        if port.is_some() && !matches!(check, Check::Http { .. }) {
            return Err("health has a port with http only: drop it".into());
        }
        let span = |span: Option<Span>, usual| span.map_or(Duration::from_secs(usual), |Span(span)| span);
        Ok(Self { check, interval: span(interval, 2), timeout: span(timeout, 5), retries: retries.unwrap_or(3).max(1) })
    }
}

/// A span of time, such as `2s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Span(Duration);

/// Longer spans are mistakes.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no span of time: say one such as 500ms, 2s or 1m, of a day at most");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        let unit = match &text[digits.len()..] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            _ => return Err(wrong()),
        };
        let span = number.checked_mul(unit).map(Duration::from_millis);
        span.filter(|span| !span.is_zero() && *span <= LONGEST).map(Self).ok_or_else(wrong)
    }
}

/// How long a machine has to end by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Grace(pub Duration);

impl Default for Grace {
    fn default() -> Self {
        Self(Duration::from_secs(10))
    }
}

impl TryFrom<String> for Grace {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Span::try_from(text).map(|Span(span)| Self(span))
    }
}

/// Whom a service may talk to: `db:5432`, `db:53/udp`, or `db` for anything.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Allow {
    /// The other service.
    pub service: String,
    /// Its port, or any of any protocol.
    pub port: Option<Port>,
}

/// A port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its number.
    pub number: u16,
    /// UDP, otherwise TCP.
    pub udp: bool,
}

impl TryFrom<String> for Allow {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is nobody to talk to: say SERVICE:PORT, SERVICE:PORT/udp, or SERVICE for all");
        let (service, port) = match text.split_once(':') {
            None => (text.as_str(), None),
            Some((service, port)) => {
                let (number, udp) = match port.split_once('/') {
                    None | Some((_, "tcp")) => (port.trim_end_matches("/tcp"), false),
                    Some((number, "udp")) => (number, true),
                    Some(_) => return Err(wrong()),
                };
                let number = number.parse().ok().filter(|number| *number != 0).ok_or_else(wrong)?;
                (service, Some(Port { number, udp }))
            }
        };
        Ok(Self { service: service.to_owned(), port })
    }
}

/// A network of 65,536 IPv4 addresses. Of the first 256 the host's side has some; the others are machines'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Subnet(Ipv4Addr);

impl Subnet {
    /// The length of its prefix, in bits.
    pub const PREFIX: u8 = 16;

    /// The address with this number.
    pub fn address(self, number: u16) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.0.to_bits() | u32::from(number))
    }
}

impl Default for Subnet {
    fn default() -> Self {
        Self(Ipv4Addr::new(10, 89, 0, 0))
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let address = text.strip_suffix("/16").and_then(|address| address.parse::<Ipv4Addr>().ok());
        let address = address.filter(|address| address.is_private() && address.octets()[2..] == [0, 0]);
        address.map(Self).ok_or_else(|| format!("`{text}` is no network for a fleet: say one such as 10.89.0.0/16"))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, Self::PREFIX)
    }
}

/// The longest name of a fleet or of a service: three of them are a host name (RFC 1123).
const NAME_LENGTH: usize = 24;

/// Checks a name, which becomes part of a host name.
///
/// # Errors
///
/// What it is made of.
pub fn name(text: &str) -> anyhow::Result<()> {
    let letters = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    let ends = !text.starts_with('-') && !text.ends_with('-');
    ensure!(
        letters && ends && (1..=NAME_LENGTH).contains(&text.len()),
        "`{}` is no name: it has 1 to {NAME_LENGTH} small letters, digits and dashes, and no dash at its ends",
        text.escape_debug()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(text: &str) -> Result<Health, toml::de::Error> {
        #[derive(Deserialize)]
        struct Holder {
            health: Health,
        }
        toml::from_str::<Holder>(&format!("health = {text}")).map(|holder| holder.health)
    }

    #[test]
    fn a_volume_is_a_folder_of_the_hosts_or_a_named_one() {
        let volume = |text: &str| text.parse::<Volume>().unwrap();
        assert_eq!(volume("/srv:/data:ro").source, Source::Host("/srv".into()));
        assert!(volume("./srv:/data:ro").readonly && !volume("./srv:/data").readonly);
        assert_eq!(volume("data:/data").source, Source::Named("data".into()));
        for wrong in ["", "data", "data:x", "da_ta:/x", ":/x", "data:/x:no", "../:/x:ro:y"] {
            assert!(wrong.parse::<Volume>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_disk_is_an_image_of_the_hosts_or_a_named_one_with_its_size() {
        let disk = |text: &str| Disk::try_from(text.to_owned());
        assert_eq!(disk("./a.img:ro"), Ok(Disk::Host { path: "./a.img".into(), readonly: true }));
        assert_eq!(disk("/dev/sdz"), Ok(Disk::Host { path: "/dev/sdz".into(), readonly: false }));
        assert_eq!(disk("data:1G"), Ok(Disk::Named { name: "data".into(), size: 1 << 30 }));
        for wrong in
            ["", "data", "data:", "data:0", "data:100", "data:99999999999G", "data:-1G", "../data:1G:x", "a/b:1G"]
        {
            assert!(wrong.starts_with('.') || disk(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn health_is_exactly_one_question() {
        let usual = health("{ tcp = 80 }").unwrap();
        assert_eq!((usual.check, usual.retries), (Check::Tcp { port: 80 }, 3));
        let http = health("{ http = '/up', interval = '500ms', timeout = '1m' }").unwrap();
        assert_eq!(http.check, Check::Http { port: 80, path: "/up".into() });
        assert_eq!((http.interval, http.timeout), (Duration::from_millis(500), Duration::from_secs(60)));
        for wrong in ["{}", "{ tcp = 1, http = '/' }", "{ http = 'x' }", "{ exec = [] }", "{ tcp = 1, port = 2 }"] {
            assert!(health(wrong).is_err(), "{wrong}");
        }
        for span in ["0s", "2", "-1s", "2 h", "99999999999999999999s", "1441m", "s"] {
            assert!(health(&format!("{{ tcp = 1, interval = '{span}' }}")).is_err(), "{span}");
        }
    }

    #[test]
    fn whom_one_may_talk_to_is_a_service_with_or_without_a_port() {
        let allow = |text: &str| Allow::try_from(text.to_owned());
        assert_eq!(allow("db:5432").unwrap().port, Some(Port { number: 5432, udp: false }));
        assert_eq!(allow("db:53/udp").unwrap().port, Some(Port { number: 53, udp: true }));
        assert_eq!(allow("db").unwrap(), Allow { service: "db".into(), port: None });
        for wrong in ["db:", "db:0", "db:70000", "db:53/icmp", "db:a"] {
            assert!(allow(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_is_private_and_has_sixteen_bits() {
        let subnet = |text: &str| Subnet::try_from(text.to_owned());
        assert_eq!(subnet("10.7.0.0/16").unwrap().address(0x0102), Ipv4Addr::new(10, 7, 1, 2));
        for wrong in ["10.7.0.0/24", "10.7.1.0/16", "8.8.0.0/16", "x/16", ""] {
            assert!(subnet(wrong).is_err(), "{wrong}");
        }
    }
}
