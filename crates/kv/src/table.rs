//! A value in a configuration file that may be a table, or the text that the flag of the same name takes.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// For `#[serde(deserialize_with)]` on an `Option<T>`: `mem = "1G,prefault"` says the same as a table with `size` and
/// `prefault`, and `cpus = 2` the same as `cpus = "2"`.
///
/// # Errors
///
/// What is wrong with the text or the table, as [`crate::from_str`] or `T` itself says it.
pub fn text_or_table<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    from.deserialize_any(TextOrTable(PhantomData)).map(Some)
}

/// The same for a list: one value that [`text_or_table`] takes, or an array of them.
///
/// # Errors
///
/// As [`text_or_table`].
pub fn texts_or_tables<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Vec<T>, D::Error> {
    from.deserialize_any(TextsOrTables(PhantomData))
}

struct TextsOrTables<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> Visitor<'de> for TextsOrTables<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tables, or texts that the flag takes")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
        TextOrTable(PhantomData).visit_str(text).map(|one| vec![one])
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        TextOrTable(PhantomData).visit_map(map).map(|one| vec![one])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(one) = seq.next_element_seed(TextOrTable(PhantomData))? {
            list.push(one);
        }
        Ok(list)
    }
}

struct TextOrTable<T>(PhantomData<T>);

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for TextOrTable<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<T, D::Error> {
        from.deserialize_any(self)
    }
}

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
