//! The serde format over the items of a text. Everything here knows names only as serde hands them over.

use std::borrow::Cow;
use std::fmt::Display;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use crate::text::{Item, end_of_item, first, split, unbracket, unquote};
use crate::{Error, nearest};

/// What is to become one value of some type: a whole text, or the value of one key.
#[derive(Clone, Copy)]
pub(crate) struct Value<'a> {
    /// `None` for a key that stands alone.
    text: Option<&'a str>,
    /// It is known to be one item, so a comma in it was quoted.
    single: bool,
}

impl<'a> Value<'a> {
    /// A text of any number of items.
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text: Some(text), single: false }
    }

    /// The value of one key, or one element of a list.
    fn of_item(text: &'a str) -> Self {
        Self { text: Some(text), single: true }
    }

    /// The text as one value, without its quotes.
    fn scalar(self) -> Result<Cow<'a, str>, Error> {
        let Some(text) = self.text else {
            return Err(Error("A value is missing: say KEY=VALUE".into()));
        };
        if text.is_empty() {
            return Err(Error("A value is missing".into()));
        }
        if text.starts_with('[') {
            return Err(Error(format!("`{text}` is a list where one value belongs: put it in quotes if it is meant")));
        }
        if !self.single {
            let end = end_of_item(text)?;
            if end < text.len() {
                let rest = &text[end + 1..];
                return Err(Error(format!(
                    "One value belongs here, so `{rest}` is too much: drop it, or put the whole in quotes"
                )));
            }
        }
        Ok(unquote(text)?.0)
    }

    /// The text as items; none where a key stands alone.
    fn items(self) -> Result<Vec<Item<'a>>, Error> {
        self.text.map_or_else(|| Ok(Vec::new()), |text| split(unbracket(text)?))
    }

    fn boolean(self) -> Result<bool, Error> {
        if self.text.is_none() {
            return Ok(true);
        }
        let word = self.scalar()?;
        match &*word {
            "on" | "true" | "yes" => Ok(true),
            "off" | "false" | "no" => Ok(false),
            _ => Err(Error(format!("`{word}` is neither on nor off: say on or off"))),
        }
    }

    fn integer(self) -> Result<i128, Error> {
        let word = self.scalar()?;
        let (sign, digits) = word.strip_prefix('-').map_or((1, &*word), |digits| (-1, digits));
        let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
            Some(digits) => (digits, 16),
            None => (digits, 10),
        };
        let number = digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(digits);
        // More digits than fit are too large for every integer type; the caller knows the bounds.
        let number = number.and_then(|digits| match i128::from_str_radix(digits, radix) {
            Err(error) if *error.kind() == std::num::IntErrorKind::PosOverflow => Some(i128::MAX),
            result => result.ok(),
        });
        number
            .map(|number| sign * number)
            .ok_or_else(|| Error(format!("`{word}` is not a whole number: say digits, such as 4 or 0x10")))
    }
}

macro_rules! integers {
    ($($method:ident $visit:ident $type:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let number = self.integer()?;
            let fits = <$type>::try_from(number).map_err(|_| {
                let word = self.text.unwrap_or_default();
                let size = if number < 0 { "small" } else { "large" };
                Error(format!("{word} is too {size}: say a number from {} to {}", <$type>::MIN, <$type>::MAX))
            })?;
            visitor.$visit(fits)
        }
    )*};
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = Error;

    integers! {
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64,
    }

    /// For types that take what comes, such as [`crate::Size`]: a flag, a list, or text.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.text {
            None => visitor.visit_bool(true),
            Some(text) if text.starts_with('[') => self.deserialize_seq(visitor),
            Some(_) => visitor.visit_str(&self.scalar()?),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.boolean()?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(&self.scalar()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut elements = Elements(self.items()?.into_iter());
        let value = visitor.visit_seq(&mut elements)?;
        match elements.0.next() {
            None => Ok(value),
            Some(extra) => Err(Error(format!("`{}` is one too many: drop it", extra.whole))),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Fields::new(self.items()?, None))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Fields::new(self.items()?, Some(fields)))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text = self.text.map(unbracket).transpose()?.filter(|text| !text.is_empty());
        let Some(text) = text else {
            return Err(Error(format!("A word is missing: say {}", one_of(variants))));
        };
        let (item, rest) = first(text)?;
        if item.key.is_some() {
            return Err(Error(format!("`{}` does not say which: begin with {}", item.whole, one_of(variants))));
        }
        visitor.visit_enum(Variant { name: item.whole, content: Value { text: rest, single: false } })
    }

    forward_to_deserialize_any! { f32 f64 unit unit_struct tuple_struct }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
}

/// Items as the fields of a struct or the entries of a map.
struct Fields<'a> {
    items: std::vec::IntoIter<Item<'a>>,
    /// `None` for a map, which takes any key.
    known: Option<&'static [&'static str]>,
    /// Keys that have had their value.
    seen: Vec<&'a str>,
    value: Value<'a>,
}

impl<'a> Fields<'a> {
    fn new(items: Vec<Item<'a>>, known: Option<&'static [&'static str]>) -> Self {
        Self { items: items.into_iter(), known, seen: Vec::new(), value: Value { text: None, single: true } }
    }

    /// The key that an item sets, and its value.
    fn key_and_value(&self, item: Item<'a>) -> Result<(&'a str, Value<'a>), Error> {
        if let Some(key) = item.key {
            return Ok((key, Value::of_item(item.value)));
        }
        let Some(known) = self.known else {
            return Ok((item.whole, Value { text: None, single: true }));
        };
        if known.contains(&item.whole) {
            return Ok((item.whole, Value { text: None, single: true }));
        }
        match known.first() {
            Some(field) if self.seen.is_empty() => Ok((field, Value::of_item(item.value))),
            _ => Err(unknown("key", item.whole, known)),
        }
    }
}

impl<'de> de::MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let (key, value) = self.key_and_value(item)?;
        if let Some(known) = self.known.filter(|known| !known.contains(&key)) {
            return Err(unknown("key", key, known));
        }
        if self.seen.contains(&key) {
            return Err(Error(format!("`{key}` is given twice: drop one")));
        }
        self.seen.push(key);
        self.value = value;
        let key: StrDeserializer<'_, Error> = key.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let key = self.seen.last().copied().unwrap_or_default();
        seed.deserialize(self.value).map_err(|error| match self.value.text {
            None => Error(format!("`{key}` needs a value: say {key}=VALUE")),
            Some(_) => Error(format!("{key}: {error}")),
        })
    }
}

/// Items as the elements of a list.
struct Elements<'a>(std::vec::IntoIter<Item<'a>>);

impl<'de> de::SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.0.next().map(|item| seed.deserialize(Value::of_item(item.whole))).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

/// A variant's name and what follows it.
struct Variant<'a> {
    name: &'a str,
    content: Value<'a>,
}

impl<'de, 'a> de::EnumAccess<'de> for Variant<'a> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name: StrDeserializer<'_, Error> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl Variant<'_> {
    /// Puts the variant's name before what is wrong with its content.
    fn named<T>(name: &str, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|error| Error(format!("{name}: {error}")))
    }
}

impl<'de> de::VariantAccess<'de> for Variant<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.content.text {
            None => Ok(()),
            Some(rest) => Err(Error(format!("`{}` stands alone: drop `,{rest}`", self.name))),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        Self::named(self.name, seed.deserialize(self.content))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        Self::named(self.name, self.content.deserialize_tuple(len, visitor))
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        Self::named(self.name, self.content.deserialize_struct("", fields, visitor))
    }
}

impl de::Error for Error {
    fn custom<T: Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("`{field}` is missing: say {field}=VALUE"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self(format!("`{field}` is given twice: drop one"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        unknown("key", field, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        unknown("word", variant, expected)
    }
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    let meant = nearest(name, known.iter().copied());
    let meant = meant.map(|meant| format!(" (did you mean `{meant}`?)")).unwrap_or_default();
    let known = if known.is_empty() { "nothing".into() } else { one_of(known) };
    Error(format!("Unknown {what} `{name}`{meant}: say {known}"))
}

fn one_of(names: &[&str]) -> String {
    match names {
        [name] => format!("`{name}`"),
        names => format!("one of `{}`", names.join("`, `")),
    }
}
