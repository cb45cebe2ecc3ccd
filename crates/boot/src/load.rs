//! Kernel, initrd, command line and tables, brought together in guest memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use memory::{Ram, layout};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::acpi::AcpiSpec;
use crate::cache::Cache;
use crate::cmdline::{self, CmdlineError};
use crate::image::{self, EntryChoice, ImageError, KaslrSeed, LoadOptions, LoadedKernel};
use crate::pvh::StartInfo;
use crate::zero_page::ZeroPage;
use crate::{e820, mptable, page_tables};

/// `struct setup_data`'s type for random bytes, and how many Linux takes in (BOOT_RNG_SEED).
const SETUP_RNG_SEED: u32 = 9;
const SEED: usize = 32;

/// A kernel as asked for: `PATH[,entry=linux64|pvh|unpack]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct KernelSpec {
    /// A bzImage or an uncompressed ELF vmlinux
    pub path: PathBuf,
    /// Where it is entered: auto, linux64, pvh, or unpack for a bzImage that unpacks itself
    #[serde(default)]
    #[arg(value_parser = kv::from_str::<EntryChoice>)]
    pub entry: EntryChoice,
}

/// Everything that goes into guest memory before the guest runs.
pub struct Sources<'a> {
    /// The kernel.
    pub kernel: &'a KernelSpec,
    /// The initial RAM disk or file system.
    pub initrd: Option<&'a Path>,
    /// The whole command line. The word `nokaslr` in it keeps the kernel at its own address.
    pub cmdline: &'a str,
    /// The machine's tables.
    pub acpi: &'a AcpiSpec,
    /// Where unpacked kernels are kept.
    pub cache: Option<&'a Cache>,
}

/// Where the first processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In long mode at this address, with the tables at [`layout::PAGE_TABLES`] and the zero page
    /// at [`layout::ZERO_PAGE`].
    Linux64(u64),
    /// In protected mode at this address, with [`layout::PVH_START_INFO`].
    Pvh(u64),
}

/// What cannot be booted, and why.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The initrd's file.
    #[error("the initrd {path} cannot be read ({source}): give --initrd a file that this user may read")]
    Initrd {
        /// As the user wrote it.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The initrd holds nothing.
    #[error("the initrd {0} is empty: give --initrd a cpio archive, or leave it out")]
    EmptyInitrd(PathBuf),
    /// The host gives no random numbers.
    #[error("this host gives no random numbers: {0}")]
    Random(io::Error),
    /// Guest memory ends below what every machine has.
    #[error("guest memory does not hold what every kernel is told: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Brings everything into `ram`, which is fresh.
///
/// # Errors
///
/// Where a file is not what it should be or does not fit; the message names it and the cure.
pub fn load(sources: &Sources<'_>, ram: &Ram) -> Result<Start, BootError> {
    let mut initrd = sources.initrd.map(Initrd::open).transpose()?;
    let initrd_len = initrd.as_ref().map_or(0, |initrd| initrd.length);
    let random = random_words()?;
    let kaslr = !cmdline::says_nokaslr(sources.cmdline);
    let options = LoadOptions {
        entry: sources.kernel.entry,
        kaslr: kaslr.then_some(KaslrSeed { physical: random[0], virtual_: random[1] }),
        cache: sources.cache,
        initrd_len,
    };
    let path = &sources.kernel.path;
    let kernel = image::load(path, &image::open(path)?, ram, &options)?;
    if let Some(initrd) = &mut initrd {
        initrd.read_into(ram, kernel.initrd.start)?;
    }
    let line = cmdline::bytes(sources.cmdline, kernel.cmdline_limit)?;
    ram.write_slice(&line, GuestAddress(layout::CMDLINE.start))?;
    ram.write_slice(&sources.acpi.bytes(), GuestAddress(layout::ACPI.start))?;
    ram.write_slice(&mptable::bytes(sources.acpi.vcpus), GuestAddress(layout::MP_TABLE.start))?;
    let placed = Placed { initrd: (kernel.initrd.start, initrd_len), cmdline: line.len() - 1, random };
    match kernel.entry {
        image::Entry::Linux64 { rip } => {
            placed.write_zero_page(&kernel, ram)?;
            ram.write_slice(&page_tables::identity(&kernel.extent), GuestAddress(layout::PAGE_TABLES.start))?;
            Ok(Start::Linux64(rip.0))
        }
        image::Entry::Pvh { eip } => {
            let info = StartInfo { initrd: placed.initrd, rsdp: layout::ACPI.start, e820: e820::map(ram) };
            ram.write_slice(&info.bytes(), GuestAddress(layout::PVH_START_INFO))?;
            Ok(Start::Pvh(eip.into()))
        }
    }
}

/// Where things lie that the zero page points to.
struct Placed {
    initrd: (u64, u64),
    cmdline: usize,
    random: [u64; 6],
}

impl Placed {
    fn write_zero_page(&self, kernel: &LoadedKernel, ram: &Ram) -> Result<(), BootError> {
        let page = ZeroPage {
            header: kernel.setup_header,
            kaslr: kernel.kaslr.is_some(),
            cmdline_length: self.cmdline,
            initrd: self.initrd,
            setup_data: layout::SETUP_DATA,
            rsdp: layout::ACPI.start,
            e820: e820::map(ram),
        };
        ram.write_slice(&page.bytes(), GuestAddress(layout::ZERO_PAGE))?;
        // `struct setup_data`: the next one (none), the type, the length, the bytes.
        let mut seed = Vec::from(0u64.to_le_bytes());
        seed.extend(SETUP_RNG_SEED.to_le_bytes());
        seed.extend(u32::try_from(SEED).expect("a few bytes").to_le_bytes());
        self.random[2..].iter().for_each(|word| seed.extend(word.to_le_bytes()));
        ram.write_slice(&seed, GuestAddress(layout::SETUP_DATA))?;
        Ok(())
    }
}

/// An initrd that was opened and measured before the kernel is placed.
struct Initrd<'a> {
    path: &'a Path,
    file: File,
    length: u64,
}

impl<'a> Initrd<'a> {
    fn open(path: &'a Path) -> Result<Self, BootError> {
        let failed = |source| BootError::Initrd { path: path.into(), source };
        // Opening a FIFO would wait for a writer.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        match (metadata.is_file(), metadata.len()) {
            (false, _) => Err(failed(io::Error::other("it is not a regular file"))),
            (true, 0) => Err(BootError::EmptyInitrd(path.into())),
            (true, length) => Ok(Self { path, file, length }),
        }
    }

    fn read_into(&mut self, ram: &Ram, at: u64) -> Result<(), BootError> {
        let length = usize::try_from(self.length).expect("it was given room in memory");
        ram.read_exact_volatile_from(GuestAddress(at), &mut self.file, length)
            .map_err(|error| BootError::Initrd { path: self.path.into(), source: io::Error::other(error) })
    }
}

/// Words from the host's random number generator: two for KASLR, four for the guest's seed.
fn random_words() -> Result<[u64; 6], BootError> {
    let mut bytes = [0; 48];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).map_err(BootError::Random)?;
    let mut words = [0; 6];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("chunks of eight"));
    }
    Ok(words)
}
