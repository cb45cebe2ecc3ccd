//! One file as the rules see it: its lines, and its code without comments and strings.
//!
//! The scanner knows Rust's comments (nested ones too), strings, raw strings, character literals and lifetimes. It is
//! not a parser: what looks like code inside a macro's arguments is code.

use super::Finding;

/// One text file.
pub(super) struct Source {
    /// Path from the workspace's folder, with `/`.
    pub(super) name: String,
    /// The text as it is.
    pub(super) text: String,
    /// The text with comments and literals blanked, line by line as in `text`; empty unless it is Rust.
    pub(super) code: String,
}

impl Source {
    /// Reads `text`, found at `name`.
    pub(super) fn new(name: &str, text: String) -> Self {
        let code = if name.ends_with(".rs") { blank(&text) } else { String::new() };
        Self { name: name.to_owned(), text, code }
    }

    /// Whether this is Rust.
    pub(super) fn is_rust(&self) -> bool {
        self.name.ends_with(".rs")
    }

    /// The file's name without its folder.
    pub(super) fn file_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }

    /// The lines of code, with their numbers, up to the tests at the file's end; none in a file of tests.
    pub(super) fn production(&self) -> impl Iterator<Item = (usize, &str)> {
        let tests = self.file_name() == "tests.rs" || self.name.split('/').any(|part| part == "tests");
        let lines: Vec<&str> = if tests { Vec::new() } else { self.code.lines().collect() };
        let end = lines
            .windows(2)
            .position(|pair| pair[0].trim() == "#[cfg(test)]" && pair[1].starts_with("mod "))
            .unwrap_or(lines.len());
        (1..).zip(lines.into_iter().take(end))
    }

    /// A finding in this file.
    pub(super) fn finding(&self, line: usize, what: impl Into<String>, cure: &'static str) -> Finding {
        Finding { file: self.name.clone(), line, what: what.into(), cure }
    }
}

/// The identifiers of a line of code.
pub(super) fn identifiers(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty() && !word.starts_with(|c: char| c.is_ascii_digit()))
}

/// Replaces comments and the content of literals by spaces; lines stay where they are.
fn blank(text: &str) -> String {
    let mut rest = text;
    let mut code = String::with_capacity(text.len());
    let mut previous = ' ';
    while let Some(first) = rest.chars().next() {
        let in_word = previous.is_alphanumeric() || previous == '_';
        let length = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            '"' => string(rest),
            '\'' => character(rest),
            'r' | 'b' | 'c' if !in_word => prefixed_string(rest),
            _ => 0,
        };
        if length == 0 {
            code.push(first);
            previous = first;
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            previous = ' ';
            rest = &rest[length..];
        }
    }
    code
}

/// The length of the comment, with comments nested in it, at the start of `text`.
fn block_comment(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of the string at the start of `text`, quotes included.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of the character literal at the start of `text`, or 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        // The escaped character itself may be a quote.
        Some((_, '\\')) => {
            chars.next();
            chars.find(|&(_, c)| c == '\'').map_or(text.len(), |(at, _)| at + 1)
        }
        Some(_) => chars.next().filter(|&(_, c)| c == '\'').map_or(0, |(at, _)| at + 1),
        None => 0,
    }
}

/// The length of a raw, byte or C string (or byte literal) at the start of `text`, or 0 if there is none.
fn prefixed_string(text: &str) -> usize {
    let prefix = text.len() - text.trim_start_matches(['r', 'b', 'c']).len();
    if prefix > 2 {
        return 0;
    }
    let raw = text[..prefix].contains('r');
    let rest = &text[prefix..];
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    if raw && rest[hashes..].starts_with('"') {
        let end = format!("\"{}", "#".repeat(hashes));
        let body = prefix + hashes + 1;
        return text[body..].find(&end).map_or(text.len(), |at| body + at + end.len());
    }
    match rest.chars().next() {
        Some('"') if !raw => prefix + string(rest),
        Some('\'') if !raw => match character(rest) {
            0 => 0,
            length => prefix + length,
        },
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_no_code() {
        let text = "a(\"x \\\" y\"); // b\n/* c /* d */ e */ f('\\'', 'g', r#\"h\"i\"#, b\"j\");\n";
        assert_eq!(identifiers(&blank(text)).collect::<Vec<_>>(), ["a", "f"]);
        assert_eq!(blank(text).len(), text.len());
    }

    #[test]
    fn lifetimes_and_words_that_end_in_r_stay_code() {
        let text = "impl<'a> Foo<'a> { fn for_r(&'static self, br: u8) {} }";
        assert_eq!(blank(text), text);
    }

    #[test]
    fn an_open_comment_or_string_ends_with_the_file() {
        assert_eq!(blank("a /* b").trim(), "a");
        assert_eq!(blank("a \"b\\").trim(), "a");
        assert_eq!(blank("a r#\"b\"").trim(), "a");
    }

    #[test]
    fn production_ends_where_the_tests_begin() {
        let text = "fn a() {}\n#[cfg(test)]\nfn helper() {}\n#[cfg(test)]\nmod tests {\n}\n";
        let source = Source::new("src/a.rs", text.to_owned());
        assert_eq!(source.production().count(), 3);
        assert_eq!(Source::new("src/a/tests.rs", text.to_owned()).production().count(), 0);
    }
}
