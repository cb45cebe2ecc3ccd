//! A value in a configuration file that may be a table, or the text that the flag of the same name takes.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};

/// For `#[serde(deserialize_with)]` on an `Option<T>`: `mem = "1G,prefault"` says the same as a table with `size` and
/// `prefault`, and `cpus = 2` the same as `cpus = "2"`.
///
/// # Errors
///
/// What is wrong with the text or the table, as [`crate::from_str`] or `T` itself says it.
pub fn text_or_table<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    from.deserialize_any(TextOrTable(PhantomData)).map(Some)
}

struct TextOrTable<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for TextOrTable<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table, or the text that the flag takes")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        crate::from_str(text).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}
