//! Where an image's packages come from: the mirrors of the machine's own apt, with its way to reach them.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;

/// The keys of all of Debian's suites, in the package debian-archive-keyring, which every Debian has.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The machine's settings that say how a mirror is reached and how old its lists may be.
const OPTIONS: &[&str] =
    &["Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries", "Acquire::ForceIPv"];

/// Where packages come from.
#[derive(Debug)]
pub(super) struct Sources {
    /// The suite, such as bookworm.
    pub(super) suite: String,
    /// Lines of a sources.list: the suite, its updates and its security updates.
    pub(super) lines: Vec<String>,
    /// Options for apt.
    pub(super) options: Vec<String>,
    /// The state of apt's lists: an image is made anew when they are.
    pub(super) lists: String,
    /// When the newest of the lists was made, in seconds since 1970.
    pub(super) time: u64,
}

impl Sources {
    /// The machine's sources, for its own suite or another one.
    pub(super) fn of_machine(suite: Option<&str>) -> Result<Self> {
        if apt::package_lists()?.is_empty() {
            apt::update_lists()?;
        }
        let format = "$(ORIGIN) $(CODENAME) $(REPO_URI)";
        let targets =
            apt::output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
        let (suite, lines) = lines_for(&targets, suite)?;
        let settings = apt::output(Command::new("apt-config").arg("dump"))?;
        let is_wanted = |line: &&str| OPTIONS.iter().any(|option| line.starts_with(option));
        let options = settings.lines().filter(is_wanted).map(str::to_owned).collect();
        let lists = apt::package_lists()?;
        let time = lists.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).max();
        Ok(Self { suite, lines, options, time: time.context("apt's lists have no time")?, lists })
    }
}

/// The suite and the lines of a sources.list for it. `targets` has a line `ORIGIN CODENAME URI` for each index of
/// packages that the machine's apt knows; of them, Debian's own count.
fn lines_for(targets: &str, suite: Option<&str>) -> Result<(String, Vec<String>)> {
    let debian: Vec<(&str, &str)> =
        targets.lines().filter_map(|line| line.strip_prefix("Debian ")?.split_once(' ')).collect();
    let Some(own) = debian.iter().map(|(codename, _)| *codename).find(|codename| !codename.contains('-')) else {
        bail!("apt has no suite of Debian to make an image from: add one to its sources, then run `apt-get update`");
    };
    let suite = suite.unwrap_or(own);
    let mut lines = Vec::new();
    for (codename, uri) in debian {
        // Another release of Debian, or backports: not what the suite's users have.
        let Some(part @ ("" | "-updates" | "-security")) = codename.strip_prefix(own) else { continue };
        let line = format!("deb [signed-by={KEYS}] {uri} {suite}{part} main");
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    Ok((suite.to_owned(), lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "Other nodistro http://other.example/\n\
                           Debian bookworm http://mirror.example/debian/\n\
                           Debian bookworm http://mirror.example/debian/\n\
                           Debian bookworm-backports http://mirror.example/debian/\n\
                           Debian bookworm-security http://mirror.example/security/\n\
                           Debian trixie http://mirror.example/debian/\n";

    #[test]
    fn an_image_comes_from_the_mirrors_of_the_machine_and_from_debian_alone() {
        let (suite, lines) = lines_for(TARGETS, None).unwrap();
        assert_eq!(suite, "bookworm");
        let signed = format!("deb [signed-by={KEYS}]");
        assert_eq!(
            lines,
            [
                format!("{signed} http://mirror.example/debian/ bookworm main"),
                format!("{signed} http://mirror.example/security/ bookworm-security main"),
            ]
        );
    }

    #[test]
    fn another_suite_comes_from_the_same_mirrors() {
        let (suite, lines) = lines_for(TARGETS, Some("trixie")).unwrap();
        assert_eq!(suite, "trixie");
        assert_eq!(lines.len(), 2);
        assert!(lines[1].ends_with("http://mirror.example/security/ trixie-security main"), "{lines:?}");
    }

    #[test]
    fn a_machine_without_debian_sources_is_told_what_to_add() {
        let error = lines_for("Other nodistro http://other.example/\n", None).unwrap_err().to_string();
        assert!(error.contains("apt-get update") && !error.contains('\n'), "{error}");
    }
}
