//! What makes the load that `bench io` measures: fio, iperf3 and a small program of ours, with the libraries that they
//! need, for a guest and for the emulated host.
//!
//! Debian's fio is linked with the clients of several storage clusters, 80 MB that take seconds to start in an emulated
//! guest. Empty libraries take their place: none of them is used.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use guest::initramfs::Archive;

use crate::apt::{self, Package};
use crate::cache;

/// The programs' packages and those of the libraries that they use.
const PACKAGES: [&str; 10] =
    ["busybox-static", "fio", "iperf3", "libaio1", "libc6", "libiperf0", "libnuma1", "libsctp1", "libssl3", "zlib1g"];
/// What fio is linked with and we do not have it use.
const ABSENT: [&str; 8] = [
    "libgfapi.so.0",
    "libibverbs.so.1",
    "libnbd.so.0",
    "libpmem.so.1",
    "libpmemblk.so.1",
    "librados.so.2",
    "librbd.so.1",
    "librdmacm.so.1",
];
/// Versions of symbols, as their beginnings, of the libraries that fio does use.
const PRESENT: [&str; 4] = ["GLIBC_", "LIBAIO_", "libnuma_", "ZLIB_"];
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
/// The dynamic linker, in a folder of ours and in the guest's.
pub(super) const LOADER: &str = "ld-linux-x86-64.so.2";

const RR: &str = include_str!("../../guest/rr.rs");
const INIT: &str = include_str!("../../guest/load.sh");

/// The tools, ready to use.
pub(super) struct Tools {
    /// Its init is `ci/guest/load.sh`.
    pub(super) initramfs: PathBuf,
    /// `rr`, `iperf3` and all libraries by name.
    pub(super) host: BTreeMap<String, PathBuf>,
    /// Packages and their versions, for records.
    pub(super) versions: BTreeMap<String, String>,
}

/// Makes the tools if the cache does not have them.
pub(super) fn tools() -> Result<Tools> {
    let packages = PACKAGES.iter().map(|name| Package::named(name)).collect::<Result<Vec<_>>>()?;
    let versions: Vec<String> =
        packages.iter().map(|package| format!("{} {}", package.name, package.version)).collect();
    let inputs: Vec<&str> = versions.iter().map(String::as_str).chain([RR, INIT, include_str!("tools.rs")]).collect();
    let entry = cache::entry("load-tools", &inputs, |folder| make(&packages, folder))?;
    let mut host = BTreeMap::new();
    for file in fs::read_dir(entry.join("files"))? {
        let file = file?;
        host.insert(file.file_name().to_string_lossy().into_owned(), file.path());
    }
    let named = |package: &Package| ["fio", "iperf3"].contains(&package.name.as_str());
    let versions = packages.into_iter().filter(named).map(|package| (package.name, package.version)).collect();
    Ok(Tools { initramfs: entry.join("initramfs"), host, versions })
}

fn make(packages: &[Package], folder: &Path) -> Result<()> {
    let (root, files) = (folder.join("root"), folder.join("files"));
    fs::create_dir(&files)?;
    for package in packages {
        package.unpack(&root)?;
    }
    let source = folder.join("rr.rs");
    fs::write(&source, RR)?;
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "-O", "--target", "x86_64-unknown-linux-gnu", "-C", "target-feature=+crt-static"]);
    apt::run(rustc.args(["-C", "panic=abort", "-C", "strip=symbols"]).arg(&source).arg("-o").arg(files.join("rr")))?;
    for name in ["fio", "iperf3"] {
        fs::copy(root.join("usr/bin").join(name), files.join(name))?;
    }
    stand_ins(&files)?;
    add_libraries(&root, &files)?;

    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "tmp", "lib", "bin"] {
        archive.directory(directory)?;
    }
    archive.symlink("lib64", "lib")?;
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let busybox = root.join("bin/busybox");
    archive.file("bin/busybox", 0o755, &fs::read(&busybox)?)?;
    for applet in apt::output(Command::new(&busybox).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    for file in fs::read_dir(&files)? {
        let (name, path) = file.map(|file| (file.file_name(), file.path()))?;
        let name = name.to_str().context("A file has no name")?;
        let directory = if name.contains(".so") { "lib" } else { "bin" };
        archive.file(&format!("{directory}/{name}"), 0o755, &fs::read(path)?)?;
    }
    fs::remove_dir_all(root)?;
    Ok(fs::write(folder.join("initramfs"), archive.finish()?)?)
}

/// Makes the empty libraries, and `libabsent.so` to preload: it has what fio would look for in them.
fn stand_ins(files: &Path) -> Result<()> {
    let undefined = apt::output(Command::new("nm").args(["--dynamic", "--undefined-only"]).arg(files.join("fio")))?;
    let mut assembly = String::new();
    for line in undefined.lines() {
        // Each line is `U NAME` or `U NAME@VERSION`.
        let Some(symbol) = line.trim().strip_prefix("U ") else { continue };
        let (name, version) = symbol.split_once('@').unwrap_or((symbol, ""));
        let absent = match version {
            "" => name.starts_with("rados_") || name.starts_with("rbd_"),
            version => !PRESENT.iter().any(|present| version.trim_start_matches('@').starts_with(present)),
        };
        if absent {
            assembly.push_str(&format!(".globl {name}\n.type {name}, @function\n{name}:\n"));
        }
    }
    assembly.push_str("ud2\n");
    let source = files.join("absent.s");
    fs::write(&source, assembly)?;
    let library = |name: &str| {
        let mut gcc = Command::new("gcc");
        gcc.args(["-shared", "-nostdlib", &format!("-Wl,-soname,{name}"), "-o"]).arg(files.join(name));
        gcc
    };
    apt::run(library("libabsent.so").arg(&source))?;
    fs::write(&source, "\n")?;
    for name in ABSENT {
        apt::run(library(name).arg(&source))?;
    }
    Ok(fs::remove_file(source)?)
}

/// Adds the libraries that the programs need to the folder that they are in.
fn add_libraries(root: &Path, files: &Path) -> Result<()> {
    let loader = root.join(LIBRARIES[0]).join(LOADER);
    fs::copy(&loader, files.join(LOADER))?;
    let path = [files.to_owned(), root.join(LIBRARIES[0]), root.join(LIBRARIES[1])];
    let path = path.map(|folder| folder.display().to_string()).join(":");
    for program in ["fio", "iperf3"] {
        let mut list = Command::new(&loader);
        let listed = apt::output(list.args(["--library-path", &path, "--list"]).arg(files.join(program)))?;
        for line in listed.lines().filter(|line| !line.contains(LOADER)) {
            // Each line is `NAME => PATH (ADDRESS)`, or the kernel's own `NAME (ADDRESS)`.
            let Some((name, found)) = line.trim().split_once(" => ") else { continue };
            let found = Path::new(found.split(" (").next().unwrap_or(found));
            ensure!(found.is_absolute(), "{program} needs the library {name}, and no package here has it");
            if !files.join(name).exists() {
                fs::copy(found, files.join(name)).with_context(|| format!("Cannot copy {name}"))?;
            }
        }
    }
    Ok(())
}
