//! Key-value text, `path=x,ro`, to any serde type; sizes such as `512M`.
//!
//! The rules, all of them:
//!
//! - Text is items separated by commas; an item is `key=value` or a bare word.
//! - For a struct, a bare word that is the name of a field is `field=true`. The first item, if it is bare and names no
//!   field (or is quoted), is the value of the struct's first field: `512M,prefault` is `size=512M,prefault=true`.
//! - For an enum, the first item is a bare word, the variant's name, and what follows the comma is its content:
//!   `file,path=x,max=16M`. An externally tagged enum, serde's default, is what fits.
//! - A value that begins with `"` ends at the next `"`; within it `""` stands for one `"`. It may hold commas and brackets.
//! - A value that begins with `[` ends at its `]` and holds items of its own: a list (`[a,b]`), or a struct or an enum
//!   inside another. One item alone needs no brackets.
//! - Everywhere else quotes, brackets and further `=` stand for themselves. Spaces are never dropped.
//! - Booleans are `on`, `off`, `true`, `false`, `yes`, `no`; integers are decimal or `0x…`.
//! - An unknown key, a key given twice, an empty item, key or value is an error. An empty text is no items at all.
//!
//! Left out on purpose: floating point, tuples of mixed meaning, and `#[serde(flatten)]`, `untagged` and `tag`, which
//! hide the names and types of the fields from the format. Give a struct's first field no `alias`.

mod de;
pub mod help;
mod nearest;
mod size;
mod table;
mod text;

#[cfg(test)]
mod tests;

pub use nearest::nearest;
pub use size::Size;
pub use table::{text_or_table, texts_or_tables};

use serde::de::DeserializeOwned;

/// What is wrong with a text, in a sentence that names the key and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// Reads `text` as a `T`, by the rules at the head of this crate.
///
/// # Errors
///
/// One sentence: which key, what is allowed, and the nearest known name.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    T::deserialize(de::Value::new(text))
}
