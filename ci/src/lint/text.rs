//! Rules on one file by itself: length, header, left-overs, names of tests, reasons for `unsafe` and for shared locks.
//!
//! clippy and rustfmt check the code that they compile; these rules also see what is compiled elsewhere or not at all.

use super::Finding;
use super::source::{Source, identifiers};

/// A file longer than this is two files.
const LINES: usize = 600;

/// Macros that stand for code not yet written or not yet removed.
const LEFT_OVERS: [&str; 3] = ["todo", "unimplemented", "dbg"];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = trailing_whitespace(source);
    if source.is_rust() {
        for rule in [header, length, left_overs, test_names, unsafe_modules, shared_locks] {
            findings.extend(rule(source));
        }
    }
    findings
}

fn trailing_whitespace(source: &Source) -> Vec<Finding> {
    let lines = (1..).zip(source.text.split('\n'));
    lines
        .filter(|(_, line)| line.ends_with([' ', '\t', '\r']))
        .map(|(number, _)| source.finding(number, "white space at the end of the line", "remove it"))
        .collect()
}

fn header(source: &Source) -> Vec<Finding> {
    if source.text.starts_with("//! ") {
        return Vec::new();
    }
    vec![source.finding(1, "no header", "begin the file with //! and say what it is, and what is left out")]
}

fn length(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().count();
    if lines <= LINES {
        return Vec::new();
    }
    vec![source.finding(LINES, format!("{lines} lines, more than {LINES}"), "split the file by what it does")]
}

fn left_overs(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ((number, line), text) in (1..).zip(source.code.lines()).zip(source.text.lines()) {
        for name in LEFT_OVERS {
            if identifiers(line).any(|word| word == name) && line.contains(&format!("{name}!")) {
                findings.push(source.finding(number, format!("{name}! is a left-over"), "finish the code"));
            }
        }
        // `cargo xtask test --all` runs these, and only these.
        if line.contains("#[ignore") && !text.contains("#[ignore = \"long: ") {
            let cure = "run it or remove it, or say #[ignore = \"long: …\"] with what it does";
            findings.push(source.finding(number, "an ignored test", cure));
        }
    }
    findings
}

fn test_names(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut is_test = false;
    for (number, line) in (1..).zip(source.code.lines()) {
        is_test |= line.trim().starts_with("#[test]");
        let Some((_, rest)) = line.split_once("fn ").filter(|_| is_test) else { continue };
        is_test = false;
        let name = identifiers(rest).next().unwrap_or_default();
        if name.split('_').filter(|word| !word.is_empty()).count() < 3 {
            let cure = "name it by the sentence that it proves, three words at least";
            findings.push(source.finding(number, format!("the test {name} has no sentence for a name"), cure));
        }
    }
    findings
}

fn unsafe_modules(source: &Source) -> Vec<Finding> {
    let mut lines = (1..).zip(source.code.lines());
    let first_use = lines.find(|(_, line)| identifiers(line).any(|word| word == "unsafe"));
    let finding = match (first_use, opt_in(&source.code)) {
        // Tests in a file of their own may be covered by what they test.
        (Some((line, _)), None) if source.file_name() != "tests.rs" => source.finding(
            line,
            "unsafe in a file that does not opt in",
            "do without, or begin the file with #![allow(unsafe_code, reason = \"…\")]",
        ),
        (None, Some(line)) => source.finding(line, "opts in to unsafe and has none", "remove the line"),
        (Some(_), Some(line)) if source.name.ends_with("src/lib.rs") || source.name.ends_with("src/main.rs") => {
            source.finding(line, "opens the whole crate to unsafe", "move what needs it to a module that opts in")
        }
        _ => return Vec::new(),
    };
    vec![finding]
}

/// The line that opens the door to `unsafe` in a module. A long one is wrapped.
fn opt_in(code: &str) -> Option<usize> {
    let mut attributes = code.match_indices("#![allow(");
    let (at, _) = attributes.find(|(at, start)| code[at + start.len()..].trim_start().starts_with("unsafe_code"))?;
    Some(code[..at].matches('\n').count() + 1)
}

fn shared_locks(source: &Source) -> Vec<Finding> {
    let text: Vec<&str> = source.text.lines().collect();
    let mut findings = Vec::new();
    for (number, line) in source.production() {
        let shared = line.contains("Arc<Mutex<") || line.contains("Arc<RwLock<");
        // A function that takes one was given it by what declares it.
        let declares = shared && !identifiers(line).any(|word| word == "fn");
        let mut before = text.iter().take(number - 1).rev().map(|line| line.trim());
        let above = before.find(|line| !line.starts_with("#[")).unwrap_or_default();
        let said = (above.starts_with("//") && !above.starts_with("//!"))
            || text.get(number - 1).is_some_and(|line| line.contains("// "));
        if declares && !said {
            let cure = "say in a comment which two threads need it, or let one thread own it";
            findings.push(source.finding(number, "a shared lock without its reason", cure));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `check` says about `text` in a file of production code.
    fn found(text: &str) -> Vec<String> {
        found_in("crates/a/src/b.rs", text)
    }

    fn found_in(name: &str, text: &str) -> Vec<String> {
        check(&Source::new(name, text.to_owned())).iter().map(ToString::to_string).collect()
    }

    fn assert_one(found: &[String], start: &str) {
        assert!(matches!(found, [one] if one.starts_with(start)), "{found:?} is not one {start}");
    }

    #[test]
    fn a_clean_file_has_no_findings() {
        let text = "//! What it is.\n\n#![allow(unsafe_code, reason = \"it maps\")]\n\nfn a() { unsafe { b() } }\n\
                    // The vCPU and the I/O thread.\ntype C = Arc<Mutex<u8>>;\n\
                    #[test]\nfn three_words_suffice() {}\n";
        assert_eq!(found(text), Vec::<String>::new());
    }

    #[test]
    fn white_space_at_a_line_end_is_found_in_any_file() {
        assert_one(&found_in("a.md", "a\nb \n"), "a.md:2: white space");
        assert_one(&found_in("a.toml", "a = 1\t\n"), "a.toml:1: white space");
        assert_eq!(found_in("a.md", "a\n  b\n"), Vec::<String>::new());
    }

    #[test]
    fn a_file_without_a_header_is_found() {
        assert_one(&found("use a;\n"), "crates/a/src/b.rs:1: no header");
        assert_one(&found("/// a\n"), "crates/a/src/b.rs:1: no header");
    }

    #[test]
    fn a_file_of_601_lines_is_found_and_one_of_600_is_not() {
        let text = format!("//! a\n{}", "\n".repeat(LINES - 1));
        assert_eq!(found(&text), Vec::<String>::new());
        assert_one(&found(&format!("{text}\n")), "crates/a/src/b.rs:600: 601 lines");
    }

    #[test]
    fn left_overs_are_found_in_code_and_not_in_text() {
        assert_one(&found("//! a\nfn a() { todo!() }\n"), "crates/a/src/b.rs:2: todo! is");
        assert_one(&found("//! a\nfn a() { dbg!(1); }\n"), "crates/a/src/b.rs:2: dbg! is");
        assert_one(&found("//! a\n#[ignore = \"broken\"]\n"), "crates/a/src/b.rs:2: an ignored test");
        assert_eq!(found("//! a\n#[ignore = \"long: 100 boots\"]\n"), Vec::<String>::new());
        assert_eq!(found("//! todo!()\nlet todo = \"dbg!(1)\";\n"), Vec::<String>::new());
    }

    #[test]
    fn a_test_named_by_two_words_is_found() {
        assert_one(
            &found("//! a\n#[test]\n#[should_panic]\nfn it_works() {}\n"),
            "crates/a/src/b.rs:4: the test it_works",
        );
        assert_eq!(found("//! a\n#[test]\nfn it_works_well() {}\nfn helper() {}\n"), Vec::<String>::new());
    }

    #[test]
    fn unsafe_needs_an_opt_in_and_an_opt_in_needs_unsafe() {
        let opt_in = "//! a\n#![allow(unsafe_code, reason = \"b\")]\n";
        let block = "fn a() { unsafe { b() } }\n";
        assert_one(&found(&format!("//! a\n{block}")), "crates/a/src/b.rs:2: unsafe in a file");
        assert_one(&found(opt_in), "crates/a/src/b.rs:2: opts in");
        assert_one(&found_in("crates/a/src/lib.rs", &format!("{opt_in}{block}")), "crates/a/src/lib.rs:2: opens");
        let wrapped = "//! a\n#![allow(\n    unsafe_code,\n    reason = \"b\"\n)]\n";
        assert_eq!(found(&format!("{wrapped}{block}")), Vec::<String>::new());
        assert_eq!(found("//! unsafe\nfn a() { unsafe_code(\"unsafe\") }\n"), Vec::<String>::new());
    }

    #[test]
    fn a_shared_lock_needs_its_reason_outside_tests() {
        let lock = "type A = Arc<Mutex<u8>>;\n";
        assert_one(&found(&format!("//! a\n{lock}")), "crates/a/src/b.rs:2: a shared lock");
        assert_eq!(found_in("crates/a/src/tests.rs", &format!("//! a\n{lock}")), Vec::<String>::new());
        assert_eq!(found(&format!("//! a\n#[cfg(test)]\nmod tests {{\n{lock}}}\n")), Vec::<String>::new());
    }
}
