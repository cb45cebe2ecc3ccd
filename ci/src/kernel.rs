//! `cargo xtask kernel`: builds the small guest kernel, from Debian's source of Linux 6.12 and the configuration in
//! `resources/kernel`, and keeps it in the [`cache`].
//!
//! The build is a function of the source's version, the configuration, the compiler and this recipe: time, user and
//! host are fixed in the image, so the same inputs make the same kernel.
//!
//! Left out: modules and headers. All that the kernel can do is in the image.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{self, Package};
use crate::cache;
use crate::progress::{self, Step};
use crate::setup;

/// A fragment: every line of it must be in the complete configuration.
const CONFIG: &str = include_str!("../../resources/kernel/config-6.12");

/// What the kernel says of who built it, and when: the same every time.
const BUILD: [&str; 4] =
    ["ARCH=x86_64", "KBUILD_BUILD_TIMESTAMP=1970-01-01", "KBUILD_BUILD_USER=vmm", "KBUILD_BUILD_HOST=vmm"];

/// What `cargo xtask kernel` takes: nothing.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The small guest kernel.
pub(crate) struct SmallKernel {
    /// The image that loaders of distributions' kernels take, compressed with lz4.
    pub(crate) bzimage: PathBuf,
    /// The uncompressed ELF.
    pub(crate) vmlinux: PathBuf,
    /// Package and version of the source, for records.
    pub(crate) package: String,
}

/// Builds the kernel unless the cache has it, and prints where its two images are.
pub(crate) fn run(_args: Args) -> Result<()> {
    setup::run()?;
    let kernel = small_kernel()?;
    println!("{}\n{}", kernel.bzimage.display(), kernel.vmlinux.display());
    Ok(())
}

/// The small guest kernel, built if the cache does not have it.
pub(crate) fn small_kernel() -> Result<SmallKernel> {
    let package = Package::named("linux-source-6.12")?;
    let compiler = compiler()?;
    let fragment = without_comments(CONFIG);
    let inputs = [package.version.as_str(), &fragment, &compiler, &BUILD.join(" ")];
    let entry = cache::entry("small-kernel", &inputs, |folder| build(&package, &fragment, folder))?;
    Ok(SmallKernel {
        bzimage: entry.join("bzImage"),
        vmlinux: entry.join("vmlinux"),
        package: format!("{} {}", package.name, package.version),
    })
}

/// Builds in `folder`, and leaves the two images and the complete configuration there.
fn build(package: &Package, fragment: &str, folder: &Path) -> Result<()> {
    let step = progress::step("Building the small guest kernel, once; this takes some minutes and 2 GB of disk");
    let work = folder.join("build");
    fs::create_dir(&work)?;
    package.unpack(&work)?;
    let source = work.join("usr/src").join(&package.name);
    apt::run(Command::new("tar").arg("-xf").arg(source.with_added_extension("tar.xz")).arg("-C").arg(&work))?;
    let tree = work.join(&package.name);
    let file = work.join("fragment");
    fs::write(&file, fragment)?;
    make(&step, &tree, &[&format!("KCONFIG_ALLCONFIG={}", file.display()), "allnoconfig"])?;
    let complete = fs::read_to_string(tree.join(".config"))?;
    let lost = lost_lines(fragment, &complete);
    ensure!(lost.is_empty(), "The kernel's configuration did not take over: {}", lost.join(", "));
    let jobs = std::thread::available_parallelism()?;
    make(&step, &tree, &[&format!("-j{jobs}"), "bzImage", "vmlinux"])?;
    fs::write(folder.join("config"), complete)?;
    fs::rename(tree.join("arch/x86/boot/bzImage"), folder.join("bzImage"))?;
    // The symbols are for a debugger; a loader would have to read past them.
    apt::run(Command::new("strip").arg("-o").arg(folder.join("vmlinux")).arg(tree.join("vmlinux")))?;
    fs::remove_dir_all(&work).context("Cannot remove the kernel's build folder")
}

/// Runs make, and shows what it does last; its errors are in ours if it fails.
fn make(step: &Step, tree: &Path, targets: &[&str]) -> Result<()> {
    let errors = tree.join("errors");
    let mut make = Command::new("make")
        .current_dir(tree)
        .args(BUILD)
        .args(targets)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&errors)?)
        .spawn()
        .context("Cannot run make: run `cargo xtask setup`")?;
    for line in BufReader::new(make.stdout.take().context("make has no output")?).lines() {
        step.at(line?.trim());
    }
    let status = make.wait()?;
    if !status.success() {
        bail!("make failed ({status}): {}", fs::read_to_string(&errors)?.trim());
    }
    Ok(())
}

/// The lines that set something, so that a better comment does not mean a new build.
fn without_comments(fragment: &str) -> String {
    let sets = |line: &&str| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_");
    fragment.lines().filter(sets).flat_map(|line| [line, "\n"]).collect()
}

/// The lines of the fragment that the complete configuration does not hold, since something that they need is missing.
fn lost_lines<'a>(fragment: &'a str, complete: &str) -> Vec<&'a str> {
    let is_lost = |line: &str| match line.strip_prefix("# CONFIG_").and_then(|rest| rest.split_once(" is not set")) {
        // An option that cannot be set is not set either.
        Some((option, _)) => complete.contains(&format!("\nCONFIG_{option}=")),
        None => !complete.lines().any(|other| other == line),
    };
    fragment.lines().filter(|line| is_lost(line)).collect()
}

/// The compiler's name and version.
fn compiler() -> Result<String> {
    let output = Command::new("gcc").arg("--version").output().context("Cannot run gcc: run `cargo xtask setup`")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_the_configuration_dropped_is_lost() {
        let complete = "#\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n";
        assert_eq!(lost_lines("CONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_D is not set\n", complete), [""; 0]);
        assert_eq!(
            lost_lines("CONFIG_B=y\nCONFIG_C=y\n# CONFIG_A is not set\n", complete),
            ["CONFIG_B=y", "CONFIG_C=y", "# CONFIG_A is not set"]
        );
    }

    #[test]
    fn comments_are_no_part_of_what_is_built() {
        let fragment = "# Why.\nCONFIG_A=y\n\n# CONFIG_B is not set\n";
        assert_eq!(without_comments(fragment), "CONFIG_A=y\n# CONFIG_B is not set\n");
    }

    #[test]
    fn the_fragment_says_each_thing_once() {
        let mut options: Vec<&str> = CONFIG
            .lines()
            .filter_map(|line| line.strip_prefix("# ").unwrap_or(line).strip_prefix("CONFIG_"))
            .filter_map(|line| line.split([' ', '=']).next())
            .collect();
        let all = options.len();
        options.sort_unstable();
        options.dedup();
        assert_eq!(options.len(), all);
    }
}
