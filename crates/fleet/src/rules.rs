//! Who may talk to whom, as nftables' text, and what names mean, as dnsmasq's.
//!
//! Between taps a frame passes only with its sender's own addresses, as ARP between two that may talk to each other, and
//! as IPv4 from one to another that it was allowed; the answers pass by connection tracking. A machine reaches of the
//! host's side the name server alone, and what is behind it only where it was said: then names of outside are answered,
//! too, which for the others would be a way out. There is no IPv6.
//!
//! The rules are loaded as a whole, at once, whenever something changes: connections outlive that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::plan::{DNS, GATEWAY, Machine};
use crate::spec::{Service, Subnet};

/// The bridge that all machines are on.
pub const BRIDGE: &str = "fleet0";
/// The way out, which pasta makes.
pub const UPLINK: &str = "uplink0";
/// The port at which names of outside are served, too, for those who may get there.
pub const OUTSIDE_NAMES: u16 = 5353;

/// What the rules are made from.
pub struct View<'a> {
    /// The network.
    pub subnet: Subnet,
    /// Each of them has a machine's rights and names.
    pub services: &'a BTreeMap<String, Service>,
    /// Each with whether it is healthy.
    pub machines: Vec<(&'a Machine, bool)>,
}

impl View<'_> {
    /// What `nft -f -` reads.
    pub fn nft(&self) -> String {
        let mut text = String::new();
        for table in ["bridge", "ip"] {
            // One that is not there cannot be deleted.
            let _ = writeln!(text, "table {table} fleet {{}}\ndelete table {table} fleet");
        }
        self.bridge(&mut text);
        self.ip(&mut text);
        text
    }

    /// What dnsmasq reads as hosts: each service's name for all of its healthy machines, and each machine's own.
    pub fn hosts(&self) -> String {
        let mut text = String::new();
        for (machine, _) in self.machines.iter().filter(|(_, healthy)| *healthy) {
            let (address, Machine { service, index, .. }) = (machine.address(self.subnet), machine);
            let _ = writeln!(text, "{address} {service} {service}-{index}");
        }
        text
    }

    /// Whether any machine reaches what the host reaches.
    pub fn has_internet(&self) -> bool {
        self.services.values().any(|service| service.internet)
    }

    /// The taps: each has its addresses, and nothing passes that is not allowed.
    fn bridge(&self, text: &mut String) {
        let (mut own, mut links, mut open, mut flows) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (machine, _) in &self.machines {
            let (tap, from) = (machine.tap(), machine.address(self.subnet));
            own.insert(format!("\"{tap}\" . {} . {from}", machine.mac()));
            let allow = self.services.get(&machine.service).map(|service| service.allow.as_slice()).unwrap_or_default();
            for allow in allow {
                for (other, _) in self.machines.iter().filter(|(other, _)| other.service == allow.service) {
                    let to = other.address(self.subnet);
                    links.insert(format!("\"{tap}\" . \"{}\"", other.tap()));
                    links.insert(format!("\"{}\" . \"{tap}\"", other.tap()));
                    match allow.port {
                        None => open.insert(format!("{from} . {to}")),
                        Some(port) => {
                            let protocol = if port.udp { "udp" } else { "tcp" };
                            flows.insert(format!("{from} . {to} . {protocol} . {}", port.number))
                        }
                    };
                }
            }
        }
        text.push_str("table bridge fleet {\n");
        set(text, "own", "ifname . ether_addr . ipv4_addr", &own);
        set(text, "links", "ifname . ifname", &links);
        set(text, "open", "ipv4_addr . ipv4_addr", &open);
        set(text, "flows", "ipv4_addr . ipv4_addr . inet_proto . inet_service", &flows);
        text.push_str(
            "  chain prerouting {
    type filter hook prerouting priority -300; policy drop;
    ether type ip iifname . ether saddr . ip saddr @own accept
    ether type arp iifname . ether saddr . arp saddr ip @own iifname . arp saddr ether . arp saddr ip @own accept
  }
  chain forward {
    type filter hook forward priority 0; policy drop;
    ether type arp iifname . oifname @links accept
    ether type ip ct state established,related accept
    ether type ip ip saddr . ip daddr @open accept
    ether type ip ip saddr . ip daddr . ip protocol . th dport @flows accept
  }
}
",
        );
    }

    /// The host's side: the name server, published ports, the way out.
    fn ip(&self, text: &mut String) {
        let dns = self.subnet.address(DNS);
        let gateway = self.subnet.address(GATEWAY);
        let internet: BTreeSet<String> = self
            .machines
            .iter()
            .filter(|(machine, _)| self.services.get(&machine.service).is_some_and(|service| service.internet))
            .map(|(machine, _)| machine.address(self.subnet).to_string())
            .collect();
        text.push_str("table ip fleet {\n");
        let tcp = self.services.values().flat_map(|service| &service.publish).filter(|publish| !publish.udp);
        let published: BTreeSet<String> = tcp.map(|publish| publish.host.to_string()).collect();
        set(text, "internet", "ipv4_addr", &internet);
        set(text, "published", "inet_service", &published);
        let _ = write!(
            text,
            "  chain input {{
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname \"lo\" accept
    iifname \"{BRIDGE}\" ip daddr {dns} udp dport 53 accept
    iifname \"{BRIDGE}\" ip daddr {dns} tcp dport 53 accept
    iifname \"{BRIDGE}\" ip daddr {dns} ip saddr @internet udp dport {OUTSIDE_NAMES} accept
    iifname \"{BRIDGE}\" ip daddr {dns} ip saddr @internet tcp dport {OUTSIDE_NAMES} accept
    iifname \"{UPLINK}\" tcp dport @published accept
  }}
  chain forward {{
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname \"{BRIDGE}\" oifname \"{UPLINK}\" ip saddr @internet accept
    iifname \"{UPLINK}\" oifname \"{BRIDGE}\" ct status dnat accept
  }}
  chain names {{
    type nat hook prerouting priority -100; policy accept;
    iifname \"{BRIDGE}\" ip daddr {dns} ip saddr @internet udp dport 53 dnat to {dns}:{OUTSIDE_NAMES}
    iifname \"{BRIDGE}\" ip daddr {dns} ip saddr @internet tcp dport 53 dnat to {dns}:{OUTSIDE_NAMES}
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    oifname \"{BRIDGE}\" ip saddr 127.0.0.0/8 snat to {gateway}
    oifname \"{UPLINK}\" masquerade
  }}
"
        );
        for (chain, hook, from) in [
            ("outside", "prerouting priority -100", format!("iifname \"{UPLINK}\"")),
            ("inside", "output priority -100", "oifname \"lo\"".to_owned()),
        ] {
            let _ = writeln!(text, "  chain {chain} {{\n    type nat hook {hook}; policy accept;");
            for (name, service) in self.services {
                self.published(text, name, service, &from);
            }
            text.push_str("  }\n");
        }
        text.push_str("}\n");
    }

    /// A service's UDP ports lead to its healthy machines in turn. TCP is a proxy's business, which can try another one.
    fn published(&self, text: &mut String, name: &str, service: &Service, from: &str) {
        let healthy: Vec<Ipv4Addr> = self
            .machines
            .iter()
            .filter(|(machine, healthy)| *healthy && machine.service == name)
            .map(|(machine, _)| machine.address(self.subnet))
            .collect();
        if healthy.is_empty() {
            return;
        }
        let map: Vec<String> =
            healthy.iter().enumerate().map(|(index, address)| format!("{index} : {address}")).collect();
        for publish in service.publish.iter().filter(|publish| publish.udp) {
            let _ = writeln!(
                text,
                "    {from} udp dport {} dnat to numgen inc mod {} map {{ {} }}:{}",
                publish.host,
                map.len(),
                map.join(", "),
                publish.guest
            );
        }
    }
}

fn set(text: &mut String, name: &str, kind: &str, elements: &BTreeSet<String>) {
    let _ = write!(text, "  set {name} {{ type {kind};");
    if !elements.is_empty() {
        let all = elements.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let _ = write!(text, " elements = {{ {all} }};");
    }
    text.push_str(" }\n");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::check::check;
    use crate::plan::Addresses;

    fn view(text: &str, healthy: bool, look: impl FnOnce(&View, &[Machine])) {
        let fleet = check(Path::new("/srv/shop/fleet.toml"), text).unwrap();
        let mut addresses = Addresses::default();
        let mut machines = Vec::new();
        for (name, service) in &fleet.services {
            machines.extend((1..=service.replicas).map(|index| addresses.machine(name, index)));
        }
        let all = machines.iter().map(|machine| (machine, healthy)).collect();
        look(&View { subnet: fleet.subnet, services: &fleet.services, machines: all }, &machines);
    }

    const TEXT: &str = "[services.db]\ncommand = ['true']\n\
                        [services.web]\ncommand = ['true']\nallow = ['db:5432']\npublish = ['8080:80/udp', '81:80']\nreplicas = 2\n";

    #[test]
    fn a_flow_is_one_way_and_arp_goes_both() {
        view(TEXT, true, |view, machines| {
            let (text, db, web) = (view.nft(), &machines[0], &machines[1]);
            let (from, to) = (web.address(view.subnet), db.address(view.subnet));
            assert!(text.contains(&format!("{from} . {to} . tcp . 5432")) && !text.contains(&format!("{to} . {from}")));
            for (a, b) in [(db, web), (web, db)] {
                assert!(text.contains(&format!("\"{}\" . \"{}\"", a.tap(), b.tap())));
            }
            let (one, other) = (&machines[1], &machines[2]);
            assert!(
                !text.contains(&format!("\"{}\" . \"{}\"", one.tap(), other.tap())),
                "of one service, and strangers"
            );
        });
    }

    #[test]
    fn names_and_published_ports_lead_to_healthy_machines() {
        view(TEXT, true, |view, machines| {
            let (one, other) = (machines[1].address(view.subnet), machines[2].address(view.subnet));
            assert!(view.hosts().contains(&format!("{one} web web-1\n{other} web web-2\n")));
            let rule = format!("udp dport 8080 dnat to numgen inc mod 2 map {{ 0 : {one}, 1 : {other} }}:80");
            assert_eq!(view.nft().matches(&rule).count(), 2);
            assert!(view.nft().contains("set published { type inet_service; elements = { 81 }; }"));
        });
        view(TEXT, false, |view, _| {
            assert_eq!((view.hosts().as_str(), view.nft().contains("dnat to numgen")), ("", false));
        });
    }

    #[test]
    fn nobody_gets_out_who_was_not_let() {
        view(TEXT, true, |view, _| {
            assert!(view.nft().contains("set internet { type ipv4_addr; }") && !view.has_internet());
        });
        view("[services.a]\ncommand = ['true']\ninternet = true\n", true, |view, machines| {
            let address = machines[0].address(view.subnet);
            assert!(view.nft().contains(&format!("set internet {{ type ipv4_addr; elements = {{ {address} }}; }}")));
            assert!(view.has_internet());
        });
    }
}
