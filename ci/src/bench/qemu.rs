//! QEMU, the yardstick: its files, so that it too runs from memory alone, and its command line.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::tools::LOADER;
use crate::apt;

const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// The program as `qemu`, its libraries and its firmware, by name in the folder that they are to be in.
pub(super) fn files() -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::from([("qemu".to_owned(), PathBuf::from(PROGRAM))]);
    for line in apt::output(Command::new("ldd").arg(PROGRAM))?.lines() {
        // Each line is `NAME => PATH (ADDRESS)`, `PATH (ADDRESS)` for the loader, or a name without a file.
        let path = line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
        if let Some(path) = path {
            let name = path.file_name().context("A library has no name")?.to_string_lossy().into_owned();
            files.insert(name, path);
        }
    }
    for firmware in fs::read_dir("/usr/share/qemu")? {
        let firmware = firmware?;
        let name = firmware.file_name().to_string_lossy().into_owned();
        if name.ends_with(".bin") || name.ends_with(".rom") {
            files.insert(name, firmware.path());
        }
    }
    Ok(files)
}

/// The words that run a microvm with a kernel's command line and `options`, which are separated by spaces.
pub(super) fn words(cmdline: &str, options: &str) -> Vec<String> {
    let fixed = "-enable-kvm -cpu host -display none -nodefaults -no-user-config -no-reboot";
    let words = [LOADER, "--library-path", ".", "./qemu", "-L", ".", "-append", cmdline].into_iter();
    words.chain(fixed.split(' ')).chain(options.split_whitespace()).map(str::to_owned).collect()
}

/// The version of its package.
pub(super) fn version() -> Result<String> {
    apt::output(Command::new("dpkg-query").args(["--show", "--showformat", "${Version}", "qemu-system-x86"]))
}
