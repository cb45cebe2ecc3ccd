//! A guest's IPv4 address and the network around it, as text.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// An address and the network that it is in: `10.0.2.15/24`. The network has room for the gateway, number 2, and the DNS
/// server, number 3, of which the guest's address is neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Net {
    address: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Net {
    /// The guest's address.
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// The length of the network's prefix, in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Where everything else is reached.
    pub fn gateway(self) -> Ipv4Addr {
        self.number(2)
    }

    /// Who knows the names.
    pub fn dns(self) -> Ipv4Addr {
        self.number(3)
    }

    fn number(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() & self.mask() | number)
    }

    fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }
}

impl FromStr for Ipv4Net {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let wrong = || format!("`{text}` is not an address with its network: say one such as 10.0.2.15/24");
        let (address, prefix) = text.split_once('/').with_context(wrong)?;
        let net = Self { address: address.parse().with_context(wrong)?, prefix: prefix.parse().with_context(wrong)? };
        anyhow::ensure!((8..=29).contains(&net.prefix), "`{text}`: a network's prefix is 8 to 29 bits long: say /24");
        let number = net.address.to_bits() & !net.mask();
        let taken = matches!(number, 0 | 2 | 3) || number == !net.mask();
        anyhow::ensure!(!taken, "`{text}` is not free in its network: say {}", net.number(4));
        Ok(net)
    }
}

impl TryFrom<String> for Ipv4Net {
    type Error = anyhow::Error;

    fn try_from(text: String) -> anyhow::Result<Self> {
        text.parse()
    }
}

impl From<Ipv4Net> for String {
    fn from(net: Ipv4Net) -> Self {
        net.to_string()
    }
}

impl fmt::Display for Ipv4Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_and_dns_server_are_in_the_network() {
        let net: Ipv4Net = "10.0.2.15/24".parse().unwrap();
        assert_eq!((net.address(), net.prefix()), ([10, 0, 2, 15].into(), 24));
        assert_eq!((net.gateway(), net.dns()), ([10, 0, 2, 2].into(), [10, 0, 2, 3].into()));
        let small: Ipv4Net = "192.168.7.140/29".parse().unwrap();
        assert_eq!((small.gateway(), small.dns()), ([192, 168, 7, 138].into(), [192, 168, 7, 139].into()));
        assert_eq!(small.to_string(), "192.168.7.140/29");
    }

    #[test]
    fn what_cannot_be_is_refused_with_an_example() {
        for text in ["", "10.0.2.15", "10.0.2/24", "10.0.2.15/x", "10.0.2.15/7", "10.0.2.15/30", "::1/64"] {
            let fault = format!("{:#}", text.parse::<Ipv4Net>().unwrap_err());
            assert!(fault.contains("say "), "{text}: {fault}");
        }
        for number in [0, 2, 3, 255] {
            let fault = format!("10.0.2.{number}/24").parse::<Ipv4Net>().unwrap_err().to_string();
            assert!(fault.contains("10.0.2.4"), "{fault}");
        }
    }
}
