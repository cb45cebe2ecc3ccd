//! The network as the host wants it: addresses, routes, names.
//!
//! Left out on purpose: DHCP, since the host knows what it gave.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use guest::request::{Interface, Setup};

use super::root::Root;
use super::{log, sys};

/// Sets the loop-back interface and the host's up.
///
/// # Errors
///
/// A sentence that names what did not work.
pub(crate) fn set_up(setup: &Setup) -> Result<(), String> {
    // A kernel without a network has none, and nobody may need it.
    if let Err(error) = sys::set_up("lo") {
        log(&format!("Cannot set the loop-back interface up: {error}"));
    }
    for interface in &setup.interfaces {
        one(interface).map_err(|error| format!("Cannot set up the network card {}: {error}", interface.name))?;
    }
    Ok(())
}

fn one(interface: &Interface) -> io::Result<()> {
    let Interface { name, addresses, gateways } = interface;
    let index = sys::interface_index(name)?;
    // The host gives no address twice; without this nobody could use one for a second.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
    for address in addresses {
        match address.ip {
            IpAddr::V4(ip) => sys::set_ipv4(name, ip, mask(address.prefix)?)?,
            IpAddr::V6(_) if address.prefix > 128 => return Err(too_long()),
            IpAddr::V6(ip) => sys::add_ipv6(index, ip, address.prefix)?,
        }
    }
    sys::set_up(name)?;
    for gateway in gateways {
        match gateway {
            IpAddr::V4(gateway) => sys::route_ipv4(*gateway)?,
            IpAddr::V6(gateway) => sys::route_ipv6(index, *gateway)?,
        }
    }
    Ok(())
}

fn mask(prefix: u8) -> io::Result<Ipv4Addr> {
    if prefix > 32 {
        return Err(too_long());
    }
    Ok(Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)))
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the prefix is longer than the address")
}

/// Writes the names that programs look up, where the root can be written to.
pub(crate) fn write_names(setup: &Setup, root: &Path) {
    let mut files = vec![("etc/hostname", format!("{}\n", setup.hostname)), ("etc/hosts", hosts(setup))];
    if !setup.nameservers.is_empty() {
        files.push(("etc/resolv.conf", resolv_conf(setup)));
    }
    for (path, text) in files {
        match Root::open(root).and_then(|root| root.write(Path::new(path), &text)) {
            // Read-only, or the host has mounted its own there.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EBUSY)) => {}
            Err(error) => log(&format!("Cannot write /{path}: {error}")),
            Ok(()) => {}
        }
    }
}

fn hosts(setup: &Setup) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    let mut addresses = setup.interfaces.iter().flat_map(|interface| &interface.addresses).peekable();
    let name = &setup.hostname;
    if addresses.peek().is_none() {
        let _ = writeln!(text, "127.0.1.1 {name}");
    }
    for address in addresses {
        let _ = writeln!(text, "{} {name}", address.ip);
    }
    text
}

fn resolv_conf(setup: &Setup) -> String {
    let mut text = String::new();
    if !setup.search.is_empty() {
        let _ = writeln!(text, "search {}", setup.search.join(" "));
    }
    for server in &setup.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}

#[cfg(test)]
mod tests {
    use guest::request::Address;

    use super::*;

    fn setup() -> Setup {
        let address = |ip: &str, prefix| Address { ip: ip.parse().unwrap(), prefix };
        let interface = Interface {
            name: "eth0".into(),
            addresses: vec![address("10.0.2.15", 24), address("fd00::15", 64)],
            gateways: Vec::new(),
        };
        Setup {
            hostname: "web".into(),
            interfaces: vec![interface],
            nameservers: vec!["10.0.2.3".parse().unwrap(), "fd00::3".parse().unwrap()],
            search: vec!["a.test".into(), "b.test".into()],
            ..Setup::default()
        }
    }

    #[test]
    fn a_prefix_becomes_a_mask() {
        let masks = [0, 8, 24, 32].map(|prefix| mask(prefix).unwrap().to_string());
        assert_eq!(masks, ["0.0.0.0", "255.0.0.0", "255.255.255.0", "255.255.255.255"]);
        assert!(mask(33).is_err());
    }

    #[test]
    fn the_names_of_the_machine_are_written_into_the_root() {
        let root = tempfile::tempdir().unwrap();
        write_names(&setup(), root.path());
        let read = |name: &str| std::fs::read_to_string(root.path().join("etc").join(name)).unwrap();
        assert_eq!(read("hostname"), "web\n");
        assert_eq!(read("resolv.conf"), "search a.test b.test\nnameserver 10.0.2.3\nnameserver fd00::3\n");
        assert!(read("hosts").contains("\n10.0.2.15 web\nfd00::15 web\n"));
    }

    #[test]
    fn without_dns_servers_the_root_keeps_its_own() {
        let root = tempfile::tempdir().unwrap();
        write_names(&Setup { nameservers: Vec::new(), interfaces: Vec::new(), ..setup() }, root.path());
        assert!(!root.path().join("etc/resolv.conf").exists());
        let hosts = std::fs::read_to_string(root.path().join("etc/hosts")).unwrap();
        assert!(hosts.ends_with("127.0.1.1 web\n"));
    }
}
