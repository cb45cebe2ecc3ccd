//! Splits a text into items, with regard to quotes and brackets. The rules stand at the head of the crate.

use std::borrow::Cow;

use crate::Error;

/// Deeper brackets than any configuration has, and few enough for any stack.
const DEEPEST: usize = 8;

/// `key=value`, or a bare word, which has no key. Quotes and brackets are still round the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Item<'a> {
    pub(crate) whole: &'a str,
    pub(crate) key: Option<&'a str>,
    pub(crate) value: &'a str,
}

/// All items of `text`.
pub(crate) fn split(text: &str) -> Result<Vec<Item<'_>>, Error> {
    let mut items = Vec::new();
    let mut left = (!text.is_empty()).then_some(text);
    while let Some(text) = left {
        let (item, rest) = first(text)?;
        items.push(item);
        left = rest;
    }
    Ok(items)
}

/// The first item of `text`, and what follows its comma if there is one.
pub(crate) fn first(text: &str) -> Result<(Item<'_>, Option<&str>), Error> {
    let (whole, rest) = text.split_at(end_of_item(text)?);
    let item = match whole.split_once('=') {
        _ if whole.is_empty() => {
            return Err(Error("A comma has nothing before or after it: drop it".into()));
        }
        _ if whole.starts_with(['"', '[']) => Item { whole, key: None, value: whole },
        None => Item { whole, key: None, value: whole },
        Some(("", value)) => {
            return Err(Error(format!("`={value}` has no key: say KEY={value}")));
        }
        Some((key, "")) => {
            let empty = format!("{key}=\"\" for an empty text");
            return Err(Error(format!("`{key}=` has no value: say {key}=VALUE, or {empty}")));
        }
        Some((key, value)) => Item { whole, key: Some(key), value },
    };
    Ok((item, rest.strip_prefix(',')))
}

/// Where the comma after the first item stands, or the text's end.
pub(crate) fn end_of_item(text: &str) -> Result<usize, Error> {
    let (mut at, mut depth) = (0, 0);
    let (mut value_starts, mut has_key) = (true, false);
    // Only ASCII is looked for, so every position found is between characters.
    while let Some(&byte) = text.as_bytes().get(at) {
        match byte {
            b'"' if value_starts => {
                at = after_value(text, at + unquote(&text[at..])?.1)?;
                value_starts = false;
                continue;
            }
            b'[' if value_starts && depth == DEEPEST => {
                return Err(Error(format!("More than {DEEPEST} brackets are within each other: use fewer")));
            }
            b'[' if value_starts => (depth, has_key) = (depth + 1, false),
            b']' if depth > 0 => {
                depth -= 1;
                at = after_value(text, at + 1)?;
                value_starts = false;
                continue;
            }
            b',' if depth == 0 => return Ok(at),
            b',' => (value_starts, has_key) = (true, false),
            b'=' if !has_key => (value_starts, has_key) = (true, true),
            _ => value_starts = false,
        }
        at += 1;
    }
    if depth > 0 {
        return Err(Error(format!("`{text}` has a `[` without its `]`: close it, or quote the value if it is meant")));
    }
    Ok(at)
}

/// `at` itself, after making sure that the value which ends there is the whole value.
fn after_value(text: &str, at: usize) -> Result<usize, Error> {
    match text.as_bytes().get(at) {
        None | Some(b',' | b']') => Ok(at),
        Some(_) => Err(Error(format!(
            "`{}` follows the end of a quoted or bracketed value: put a comma between, or the whole value in quotes (a \
             quote in it is doubled)",
            &text[at..]
        ))),
    }
}

/// What stands in the quotes with which `text` begins, and the length of that with the quotes; without quotes, all of it.
pub(crate) fn unquote(text: &str) -> Result<(Cow<'_, str>, usize), Error> {
    let Some(inner) = text.strip_prefix('"') else { return Ok((text.into(), text.len())) };
    let mut end = 0;
    while let Some(found) = inner[end..].find('"') {
        end += found;
        if !inner[end + 1..].starts_with('"') {
            let unquoted = &inner[..end];
            let content = if unquoted.contains('"') { unquoted.replace("\"\"", "\"").into() } else { unquoted.into() };
            return Ok((content, end + 2));
        }
        end += 2;
    }
    Err(Error(format!("`{text}` has a quote that is not closed: close it, or double it if it is meant")))
}

/// What stands in the brackets round `text`, or `text` itself where there are none round all of it.
pub(crate) fn unbracket(text: &str) -> Result<&str, Error> {
    let inner = text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
    Ok(match inner {
        Some(inner) if end_of_item(text)? == text.len() => inner,
        _ => text,
    })
}
