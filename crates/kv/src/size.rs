//! An amount of memory or storage, in bytes: `512M`. K is 2^10, M 2^20, and so on to E, 2^60.
//!
//! Whether a bare number is acceptable (`--mem 512` is a frequent mistake) is left to whoever uses the size.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

use crate::Error;

/// Each unit's letter stands for 2^10 times the one before it.
const UNITS: &str = "KMGTPE";
const EXPECTED: &str = "say a whole number with K, M, G, T, P or E, such as 512M";

/// An amount in bytes. As text it is `512M`, or `512MiB`, `512MB`, `512m`, which all mean 512 × 2^20; a number alone is
/// bytes. It prints as the shortest exact text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(pub u64);

impl Size {
    /// The amount in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            let why = if suffix.is_empty() {
                "A size is missing".into()
            } else if suffix.starts_with('-') {
                format!("`{suffix}` is negative, which a size cannot be")
            } else {
                format!("`{suffix}` is not a size")
            };
            return Err(Error(format!("{why}: {EXPECTED}")));
        }
        if suffix.starts_with(['.', ',']) {
            return Err(Error(format!(
                "`{text}` is a fraction: say a whole number of the next smaller unit, such as 1536M for 1.5G"
            )));
        }
        let Some(shift) = shift_of(suffix) else {
            return Err(Error(format!("`{text}` is not a size, there is no unit `{suffix}`: {EXPECTED}")));
        };
        // A number of digits that `u64` cannot hold is too large whatever its unit is.
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
        bytes
            .map(Self)
            .ok_or_else(|| Error(format!("`{text}` is too large: a size is less than 16E, which is 2^64 bytes")))
    }
}

/// The power of two that a suffix stands for.
fn shift_of(suffix: &str) -> Option<u32> {
    let mut letters = suffix.chars();
    let Some(unit) = letters.next().map(|c| c.to_ascii_uppercase()) else { return Some(0) };
    let rest = letters.as_str();
    if unit == 'B' {
        return rest.is_empty().then_some(0);
    }
    let known = ["", "i", "B", "iB"].iter().any(|known| known.eq_ignore_ascii_case(rest));
    (1..).zip(UNITS.chars()).find(|&(_, letter)| known && letter == unit).map(|(power, _)| power * 10)
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thousands = if self.0 == 0 { 0 } else { self.0.trailing_zeros() / 10 };
        let number = self.0 >> (thousands * 10);
        match (1..).zip(UNITS.chars()).find(|&(power, _)| power == thousands) {
            Some((_, unit)) => f.pad(&format!("{number}{unit}")),
            None => f.pad(&number.to_string()),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { serializer.serialize_u64(self.0) }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(SizeVisitor)
        } else {
            deserializer.deserialize_u64(SizeVisitor)
        }
    }
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as 512M, or a number of bytes")
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
        Ok(Size(bytes))
    }

    fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
        u64::try_from(bytes)
            .map(Size)
            .map_err(|_| E::custom(format!("`{bytes}` is negative, which a size cannot be: {EXPECTED}")))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fault(text: &str) -> String {
        text.parse::<Size>().expect_err("not a size").to_string()
    }

    #[test]
    fn every_usual_spelling_is_understood() {
        for text in ["512M", "512m", "512Mi", "512MiB", "512MB", "512mb", "524288K", "536870912", "536870912B"] {
            assert_eq!(text.parse(), Ok(Size(512 << 20)), "{text}");
        }
        for (power, unit) in (1..).zip(UNITS.chars()) {
            assert_eq!(format!("1{unit}").parse(), Ok(Size(1 << (10 * power))));
        }
        assert_eq!("15E".parse(), Ok(Size(15 << 60)));
        assert_eq!("18446744073709551615".parse(), Ok(Size(u64::MAX)));
        assert_eq!("0".parse(), Ok(Size(0)));
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_way_out() {
        for text in ["12Q", "M", "x", "1MM", "1iB", "1Bi", "0x10", "1 M", " 1M", "1M ", "１M", "1Kb2", "1é"] {
            assert!(fault(text).contains("is not a size"), "{text}: {}", fault(text));
            assert!(fault(text).contains("such as 512M"), "{text}");
        }
        assert!(fault("").contains("missing"));
        assert!(fault("-1M").contains("negative"));
        assert!(fault("1.5G").contains("1536M"));
        for text in ["16E", "18446744073709551616", "99999999999999999999999999999K"] {
            assert!(fault(text).contains("too large"), "{text}");
        }
    }

    #[test]
    fn a_size_prints_as_its_shortest_exact_text() {
        for (bytes, text) in [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1K"), (1536, "1536"), (512 << 20, "512M")] {
            assert_eq!(Size(bytes).to_string(), text);
        }
        assert_eq!(Size((2 << 30) + (1 << 20)).to_string(), "2049M");
        assert_eq!(Size(15 << 60).to_string(), "15E");
        assert_eq!(format!("{:>6}", Size(1 << 30)), "    1G");
    }

    #[test]
    fn serde_takes_text_or_bytes_and_no_negative_number() {
        use serde::de::IntoDeserializer;
        use serde::de::value::{Error, I64Deserializer, StrDeserializer, U64Deserializer};
        let text: StrDeserializer<'_, Error> = "2G".into_deserializer();
        assert_eq!(Size::deserialize(text), Ok(Size(2 << 30)));
        let bytes: U64Deserializer<Error> = 4096_u64.into_deserializer();
        assert_eq!(Size::deserialize(bytes), Ok(Size(4096)));
        let signed: I64Deserializer<Error> = 4096_i64.into_deserializer();
        assert_eq!(Size::deserialize(signed), Ok(Size(4096)));
        let negative: I64Deserializer<Error> = (-1_i64).into_deserializer();
        assert!(Size::deserialize(negative).expect_err("negative").to_string().contains("negative"));
    }

    proptest! {
        #[test]
        fn what_prints_reads_back(bytes in any::<u64>(), zeros in 0_u32..64) {
            let size = Size(bytes.unbounded_shl(zeros));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn no_text_panics(text in "[0-9]{0,22}\\PC{0,4}") {
            let _ = text.parse::<Size>();
        }
    }
}
