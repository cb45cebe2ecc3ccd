//! Kernel modules that the host has put into the initramfs, in the order in which they need each other.
//!
//! Left out on purpose: dependencies and parameters, which whoever made the list has dealt with, and modules that are
//! compressed in a way that the kernel does not know.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

use super::log;

/// The modules, and the list of their paths below this folder, one a line.
const FOLDER: &str = "/modules";
const LIST: &str = "order";

/// `MODULE_INIT_COMPRESSED_FILE`, `linux/module.h`.
const COMPRESSED: i32 = 4;

/// The first byte of an ELF file. Whatever is none is taken for compressed.
const ELF: u8 = 0x7f;

/// Loads all modules of the list, if there is one. Each trouble is a line at the console: what a module was needed for
/// will say what is missing.
pub(crate) fn load() {
    let folder = Path::new(FOLDER);
    let Ok(list) = fs::read_to_string(folder.join(LIST)) else { return };
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = folder.join(name);
        if let Err(error) = load_one(&path) {
            log(&format!("Cannot load the module {name}: {error}"));
        }
        // It lies in memory, and nobody asks for it twice.
        let _ = fs::remove_file(path);
    }
}

fn load_one(path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut first = [0];
    file.read_exact(&mut first)?;
    file.rewind()?;
    match finit_module(&file, c"", if first == [ELF] { 0 } else { COMPRESSED }) {
        // It is there, as a module or as a part of the kernel.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
