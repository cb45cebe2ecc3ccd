//! A port of the host that leads to one of the guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// `[ADDRESS:]HOST:GUEST[/udp]`, such as `8080:80`. The host's side is bound to 127.0.0.1 unless an address is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Publish {
    /// The address of the host that is bound.
    pub address: IpAddr,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// UDP, otherwise TCP.
    pub udp: bool,
}

impl FromStr for Publish {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (ports, udp) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), false),
            Some((ports, "udp")) => (ports, true),
            Some((_, protocol)) => bail!("`{text}`: there is no protocol `{protocol}` here: say tcp or udp"),
        };
        let wrong =
            || format!("`{text}` is not a port to publish: say HOST:GUEST, such as 8080:80 or 0.0.0.0:53:53/udp");
        let (rest, guest) = ports.rsplit_once(':').with_context(wrong)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
            Some((address, host)) => {
                let address = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
                (address.parse().with_context(wrong)?, host)
            }
        };
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0).with_context(wrong);
        Ok(Self { address, host: port(host)?, guest: port(guest)?, udp })
    }
}

impl TryFrom<String> for Publish {
    type Error = anyhow::Error;

    fn try_from(text: String) -> anyhow::Result<Self> {
        text.parse()
    }
}

impl From<Publish> for String {
    fn from(publish: Publish) -> Self {
        publish.to_string()
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, host, guest, udp } = self;
        match address {
            IpAddr::V4(address) => write!(f, "{address}:{host}:{guest}")?,
            IpAddr::V6(address) => write!(f, "[{address}]:{host}:{guest}")?,
        }
        f.write_str(if *udp { "/udp" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_bound_to_this_host_alone_unless_an_address_is_said() {
        for (text, full) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("8080:80/tcp", "127.0.0.1:8080:80"),
            ("53:5353/udp", "127.0.0.1:53:5353/udp"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80"),
            ("[::1]:8080:80", "[::1]:8080:80"),
            (":::8080:80", "[::]:8080:80"),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), full);
            assert_eq!(full.parse::<Publish>().unwrap(), publish);
        }
    }

    #[test]
    fn what_is_no_port_is_refused_with_an_example() {
        for text in ["", "80", "80:", ":80", "0:80", "80:65536", "host:80:80", "-1:80", "80:80/sctp", "80:80/udp/tcp"] {
            let fault = format!("{:#}", text.parse::<Publish>().unwrap_err());
            assert!(fault.contains("say "), "{text}: {fault}");
        }
    }
}
