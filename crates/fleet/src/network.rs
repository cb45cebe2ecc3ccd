//! The fleet's network, in its own namespace: a bridge, a tap for each machine, rules and names. Programs that are kept
//! by others do all of it: `ip`, `nft`, `dnsmasq`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use fleet::plan::{DNS, GATEWAY, Machine};
use fleet::rules::{BRIDGE, OUTSIDE_NAMES, View};
use fleet::spec::Subnet;
use rustix::process::{Pid, Signal, kill_process};

use crate::process::run;
use crate::publish::Published;
use crate::up::ROUTER;

/// The network as it is.
pub(crate) struct Network {
    /// What dnsmasq reads.
    hosts: PathBuf,
    /// The names of the fleet.
    inside: NameServer,
    /// And those of outside, once somebody may get there.
    outside: Option<NameServer>,
    subnet: Subnet,
    /// What was loaded last.
    rules: String,
    names: String,
    published: Published,
}

impl Network {
    /// Makes it, without machines. `hosts` is a file for dnsmasq.
    pub(crate) fn new(subnet: Subnet, hosts: PathBuf) -> anyhow::Result<Self> {
        // Before there is an interface: none of them is to have an address of its own making.
        for (name, value) in [("ipv6/conf/default/disable_ipv6", "1"), ("ipv4/ip_forward", "1")] {
            let path = format!("/proc/sys/net/{name}");
            // A kernel without IPv6 does not have the first.
            match fs::write(&path, value) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot write {path}"));
                }
                _ => {}
            }
        }
        let (gateway, dns, prefix) = (subnet.address(GATEWAY), subnet.address(DNS), Subnet::PREFIX);
        ip(&format!(
            "link set lo up\nlink add {BRIDGE} type bridge stp_state 0 mcast_snooping 0\n\
             address add {gateway}/{prefix} dev {BRIDGE}\naddress add {dns}/{prefix} dev {BRIDGE}\nlink set {BRIDGE} up\n"
        ))?;
        // What comes to a published port at 127.0.0.1 goes on to a machine; the rules let nothing come the other way.
        fs::write(format!("/proc/sys/net/ipv4/conf/{BRIDGE}/route_localnet"), "1").context("cannot route 127.0.0.1")?;
        fs::write(&hosts, "").with_context(|| format!("cannot write {}", hosts.display()))?;
        let view = View { subnet, services: &std::collections::BTreeMap::new(), machines: Vec::new() };
        load(&view.nft())?;
        let inside = NameServer::start(subnet, &hosts, false)?;
        Ok(Self {
            hosts,
            inside,
            outside: None,
            subnet,
            rules: String::new(),
            names: String::new(),
            published: Published::default(),
        })
    }

    /// Makes the machine's tap, which a process without rights may open.
    pub(crate) fn add(&self, machine: &Machine) -> anyhow::Result<()> {
        let tap = machine.tap();
        ip(&format!(
            "tuntap add dev {tap} mode tap user 0 vnet_hdr\nlink set {tap} master {BRIDGE}\nlink set {tap} up\n"
        ))
    }

    /// The machine is no more.
    pub(crate) fn remove(&self, machine: &Machine) -> anyhow::Result<()> {
        ip(&format!("link delete {}\n", machine.tap()))
    }

    /// Makes rules and names those of the view, if they are others.
    pub(crate) fn update(&mut self, view: &View<'_>) -> anyhow::Result<()> {
        if self.inside.has_ended() {
            self.inside = NameServer::start(self.subnet, &self.hosts, false)?;
        }
        let (rules, names) = (view.nft(), view.hosts());
        if rules != self.rules {
            load(&rules)?;
            self.rules = rules;
        }
        if names != self.names {
            fs::write(&self.hosts, &names).with_context(|| format!("cannot write {}", self.hosts.display()))?;
            for server in [Some(&self.inside), self.outside.as_ref()].into_iter().flatten() {
                server.read_again()?;
            }
            self.names = names;
        }
        // After the names: one that is just starting would end at being told of them.
        if view.has_internet() && self.outside.as_mut().is_none_or(NameServer::has_ended) {
            self.outside = Some(NameServer::start(self.subnet, &self.hosts, true)?);
        }
        self.published.update(view)
    }
}

fn ip(lines: &str) -> anyhow::Result<()> {
    run("ip", &["-batch", "-"], lines).context("cannot set the fleet's network up")
}

fn load(rules: &str) -> anyhow::Result<()> {
    run("nft", &["-f", "-"], rules).context(
        "cannot load the fleet's rules (they need nf_conntrack_bridge: `modprobe nf_conntrack_bridge` as root)",
    )
}

/// A dnsmasq.
struct NameServer(Child);

impl NameServer {
    /// One that knows the names of the fleet. Of names with a dot it asks pasta, if `outside`, who asks the host's server.
    fn start(subnet: Subnet, hosts: &Path, outside: bool) -> anyhow::Result<Self> {
        let mut command = Command::new("dnsmasq");
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--no-poll"]);
        command.args(["--bind-interfaces", "--except-interface=lo", "--local-ttl=0", "--pid-file="]);
        // There is nobody else here, and nothing that one could do to another.
        command.args(["--user=root", "--group=", "--log-facility=-"]);
        match outside {
            true => command
                .args([format!("--port={OUTSIDE_NAMES}"), format!("--server={ROUTER}")])
                .args(["--domain-needed", "--bogus-priv"]),
            false => command.arg("--local=/#/"),
        };
        let mut file = OsString::from("--addn-hosts=");
        file.push(hosts);
        command.arg(format!("--listen-address={}", subnet.address(DNS))).arg(file);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Self).context("cannot start dnsmasq")
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }

    /// It reads its hosts when it is told to, and not before.
    fn read_again(&self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.0), Signal::HUP).context("cannot tell dnsmasq of new names")
    }
}
