//! Markdown links: each relative one leads to a file or folder of the project.
//!
//! Left out: links to other hosts, and whether a heading exists in the file that a link names.

use std::path::Path;

use super::Finding;
use super::source::Source;

pub(super) fn check(source: &Source, root: &Path) -> Vec<Finding> {
    if !source.name.ends_with(".md") {
        return Vec::new();
    }
    let file = root.join(&source.name);
    let folder = file.parent().unwrap_or(root);
    let mut findings = Vec::new();
    let mut in_block = false;
    for (number, line) in (1..).zip(source.text.lines()) {
        in_block ^= line.trim_start().starts_with("```");
        if in_block {
            continue;
        }
        for target in targets(line).filter(|target| !folder.join(target).exists()) {
            let what = format!("the link to {target} leads nowhere");
            findings.push(source.finding(number, what, "name a file that exists, relative to this one"));
        }
    }
    findings
}

/// The files that the links `[text](file#heading)` of a line name.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#', ' ']).next())
        .filter(|target| !target.is_empty() && !target.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_a_missing_file_is_found_with_its_line() {
        let root = tempfile::tempdir().unwrap();
        let text = "a\n[b](gone.md) and [c](d/gone.rs#e)\n".to_owned();
        let found = check(&Source::new("README.md", text), root.path());
        assert_eq!(found.iter().map(|finding| finding.line).collect::<Vec<_>>(), [2, 2]);
        assert!(found[0].what.contains("gone.md"), "{}", found[0]);
    }

    #[test]
    fn links_that_resolve_and_links_elsewhere_are_clean() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("doc")).unwrap();
        std::fs::write(root.path().join("doc/b.md"), "").unwrap();
        let text = "[a](b.md#c) [d](../doc) [e](https://example.org/x) [f](#g)\n```\n[h](gone)\n```\n".to_owned();
        assert_eq!(check(&Source::new("doc/a.md", text), root.path()), []);
    }
}
