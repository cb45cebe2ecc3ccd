//! MAC addresses: as text, and one that stays the same for a VM without being written down.

use std::fmt;
use std::io::Read as _;
use std::str::FromStr;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// A unicast MAC address: `02:11:22:33:44:55`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address as it stands in a frame.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The address of the device `id` of the VM `vm`: always the same for the same names, and another for others as far
    /// as 46 bits of a hash can tell. Locally administered (IEEE 802, bit 1 of the first byte), so it is no vendor's.
    pub fn of_names(vm: &str, id: &str) -> Self {
        // No name holds a zero byte, so different pairs of names are different texts.
        let text = vm.bytes().chain([0]).chain(id.bytes());
        // FNV-1a, whose high bits are folded in, since its low ones alone are weak.
        let hash = text.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
        Self::local([a ^ g, b ^ h, c, d, e, f])
    }

    /// An address by chance, for a VM without a name.
    ///
    /// # Errors
    ///
    /// The host gives no random bytes.
    pub fn random() -> anyhow::Result<Self> {
        let mut bytes = [0; 6];
        let mut source = std::fs::File::open("/dev/urandom").context("Cannot open /dev/urandom for a MAC address")?;
        source.read_exact(&mut bytes).context("Cannot read /dev/urandom for a MAC address")?;
        Ok(Self::local(bytes))
    }

    fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }
}

impl FromStr for Mac {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()));
            let Some(part) = part else { bail!("`{text}` is not a MAC address: say one such as 02:11:22:33:44:55") };
            *byte = u8::from_str_radix(part, 16).expect("it is two hexadecimal digits");
        }
        if parts.next().is_some() {
            bail!("`{text}` is too long for a MAC address: say six bytes such as 02:11:22:33:44:55");
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            bail!("`{text}` is not one device's MAC address: make the first byte even, such as 02, and not all zero");
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = anyhow::Error;

    fn try_from(text: String) -> anyhow::Result<Self> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_names_have_the_same_address_and_others_have_others() {
        let mac = Mac::of_names("web", "tap0");
        assert_eq!(mac, Mac::of_names("web", "tap0"));
        for (vm, id) in [("web2", "tap0"), ("web", "tap1"), ("we", "btap0"), ("", "webtap0")] {
            assert_ne!(mac, Mac::of_names(vm, id), "{vm} {id}");
        }
        let mut all: Vec<_> = (0..2000).map(|vm| Mac::of_names(&format!("vm{vm}"), "tap0").to_string()).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 2000);
    }

    #[test]
    fn an_address_that_is_made_is_local_and_one_devices() {
        for mac in [Mac::of_names("web", "tap0"), Mac::of_names("", ""), Mac::random().unwrap()] {
            assert_eq!(mac.bytes()[0] & 3, 2, "{mac}");
            assert_eq!(mac.to_string().parse::<Mac>().unwrap(), mac);
        }
    }

    #[test]
    fn what_is_no_devices_address_is_refused() {
        let long = "02:00:00:00:00:00:00";
        for text in ["", "02:00", long, "01:00:00:00:00:00", "00:00:00:00:00:00", "2:0:0:0:0:1", "02-00-00-00-00-01"] {
            let fault = text.parse::<Mac>().unwrap_err().to_string();
            assert!(fault.contains("02"), "{text}: {fault}");
        }
        assert!("02:00:00:00:00:+1".parse::<Mac>().is_err());
    }
}
