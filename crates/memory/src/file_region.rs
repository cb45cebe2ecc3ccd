//! A file in the guest's physical space, beside its RAM: what the guest writes there is the file's.
//!
//! Whoever else can write to the file can also make it shorter, and then there is nothing behind the end of the mapping.
//! Where the guest touches that, KVM_RUN fails with EFAULT, or does not come back: where KVM may fetch pages while the
//! processor waits, it fetches this one again and again. So the file is watched (inotify), and [`FileRegion::heal`] puts
//! zeros there: the guest loses the data that somebody took away, and not its life. This process never touches the
//! mapping itself. Left out on purpose: file systems of a network, whose other hosts inotify does not see.
#![allow(unsafe_code, reason = "the mapping goes with its owner")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, FromRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::mapping::{ALIGNMENT, READ_WRITE, map, reserve_aligned, unmap};

/// The smallest page of the host.
const PAGE: u64 = 4096;

/// A file that is mapped for the guest, and memory of zeros from its end to the next 2 MiB.
#[derive(Debug)]
pub struct FileRegion {
    address: usize,
    length: usize,
    readonly: bool,
    file: File,
    /// Readable when somebody has written to the file or changed its length, other than through the mapping.
    changes: File,
    /// For the log.
    name: String,
    /// How many bytes from the start have pages of the file behind them. Several processors may find out at once that
    /// there are fewer now, hence the lock.
    backed: Mutex<u64>,
    /// How often there were fewer.
    losses: AtomicU64,
}

impl FileRegion {
    /// Maps `file` as long as it is now. `name` is what the log calls it.
    ///
    /// # Errors
    ///
    /// The file cannot be mapped or watched, or is empty.
    pub fn new(file: File, name: String, readonly: bool) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let length = usize::try_from(size).ok().and_then(|size| size.checked_next_multiple_of(ALIGNMENT));
        let length = length.ok_or_else(too_long)?;
        let address = reserve_aligned(length)?;
        let (backed, losses) = (Mutex::new(pages(size)), AtomicU64::new(0));
        let changes = watch(&file).inspect_err(|_| unmap(address, length))?;
        let region = Self { address, length, readonly, file, changes, name, backed, losses };
        region.put_zeros(0, length)?;
        let backed = usize::try_from(pages(size)).map_err(|_| too_long())?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        map(address, backed, region.protection(), flags, region.file.as_raw_fd(), 0)?;
        Ok(region)
    }

    /// What the log calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mapped in this process, for KVM alone.
    pub fn host_address(&self) -> u64 {
        self.address as u64
    }

    /// Bytes of the region, a multiple of 2 MiB.
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// Whether the guest can write to it.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// What becomes readable when [`Self::changed`] is to be called.
    pub fn changes(&self) -> &impl AsRawFd {
        &self.changes
    }

    /// Looks whether what somebody has done to the file made it shorter.
    pub fn changed(&self) {
        // What happened does not matter. Where there is more than this, it stays readable.
        let mut events = [0; 4096];
        let _ = (&self.changes).read(&mut events);
        self.heal();
    }

    /// Puts zeros, for good, where the file has become shorter. Returns how often that has been necessary: the same
    /// number as the last time says that nothing was wrong with the region.
    pub fn heal(&self) -> u64 {
        let mut backed = self.backed.lock().unwrap_or_else(PoisonError::into_inner);
        // A file system that does not answer has taken nothing away.
        let now = self.file.metadata().map_or(*backed, |metadata| pages(metadata.len()));
        if now < *backed && self.put_zeros(now, usize::try_from(*backed - now).unwrap_or(usize::MAX)).is_ok() {
            *backed = now;
            // Once, however often it gets shorter.
            if self.losses.fetch_add(1, Ordering::AcqRel) == 0 {
                let name = &self.name;
                log::warn!(
                    "{name} has become shorter while a guest uses it: the guest goes on with zeros from {now:#x} on"
                );
            }
        }
        self.losses.load(Ordering::Acquire)
    }

    /// Has all that the guest wrote reach the host's disk.
    ///
    /// # Errors
    ///
    /// It does not, or the file has become shorter and some of it has nowhere to go.
    pub fn sync(&self) -> io::Result<()> {
        match self.heal() {
            0 => self.file.sync_data(),
            _ => Err(io::Error::other("it has become shorter while a guest uses it")),
        }
    }

    fn protection(&self) -> i32 {
        if self.readonly { libc::PROT_READ } else { READ_WRITE }
    }

    /// Puts memory of zeros in place of what is `length` bytes from `offset` on.
    fn put_zeros(&self, offset: u64, length: usize) -> io::Result<()> {
        let address = usize::try_from(offset).ok().and_then(|offset| self.address.checked_add(offset));
        let address = address.ok_or(io::ErrorKind::InvalidInput)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        map(address, length, self.protection(), flags, -1, 0).map(drop)
    }
}

impl Drop for FileRegion {
    fn drop(&mut self) {
        unmap(self.address, self.length);
    }
}

/// Says by a descriptor when a file is written to or becomes shorter. The file is named by its descriptor, since the
/// path may by now be another file's.
fn watch(file: &File) -> io::Result<File> {
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    // SAFETY: the call reads no memory.
    let descriptor = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    let changes = unsafe { File::from_raw_fd(descriptor) };
    // SAFETY: the path is a string with its terminating zero, which outlives the call.
    let watch = unsafe { libc::inotify_add_watch(changes.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) };
    if watch < 0 { Err(io::Error::last_os_error()) } else { Ok(changes) }
}

/// The end of the last page of a file, which reads as zeros from the file's end on.
fn pages(size: u64) -> u64 {
    size.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const MIB: usize = 1 << 20;

    /// The byte at `offset`, as the guest would read it.
    fn byte(region: &FileRegion, offset: usize) -> u8 {
        assert!(offset < region.length);
        // SAFETY: the address lies in the mapping, and the test has made sure that there is memory behind it.
        unsafe { std::ptr::read_volatile((region.address + offset) as *const u8) }
    }

    fn write(region: &FileRegion, offset: usize, byte: u8) {
        // SAFETY: as above, and the mapping can be written to.
        unsafe { std::ptr::write_volatile((region.address + offset) as *mut u8, byte) };
    }

    fn map_file(file: File, readonly: bool) -> io::Result<FileRegion> {
        FileRegion::new(file, "a file".into(), readonly)
    }

    fn file(size: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; size], 0).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_in_the_file_and_the_rest_of_2_mib_is_zeros() {
        let file = file(3 * MIB + 5);
        let region = map_file(file.try_clone().unwrap(), false).unwrap();
        assert_eq!((region.length(), region.host_address() % (2 << 20)), (4 << 20, 0));
        assert_eq!([3 * MIB + 4, 3 * MIB + 5, 4 * MIB - 1].map(|at| byte(&region, at)), [7, 0, 0]);
        write(&region, 9, 1);
        region.sync().unwrap();
        let mut found = [0; 2];
        file.read_exact_at(&mut found, 9).unwrap();
        assert_eq!(found, [1, 7]);
    }

    #[test]
    fn what_somebody_takes_away_is_zeros_and_no_longer_flushed() {
        let file = file(4 * MIB);
        let region = map_file(file.try_clone().unwrap(), false).unwrap();
        assert_eq!(region.heal(), 0);
        file.set_len(MIB as u64 + 1).unwrap();
        assert_eq!((region.heal(), region.heal()), (1, 1));
        assert_eq!([MIB, MIB + 1, MIB + 4096, 4 * MIB - 1].map(|at| byte(&region, at)), [7, 0, 0, 0]);
        write(&region, 2 * MIB, 1);
        assert_eq!(byte(&region, 2 * MIB), 1);
        assert!(region.sync().is_err());
        file.set_len(0).unwrap();
        assert_eq!((region.heal(), byte(&region, 0)), (2, 0));
    }

    #[test]
    fn it_is_told_when_the_file_becomes_shorter() {
        let file = file(4 * MIB);
        let region = map_file(file.try_clone().unwrap(), false).unwrap();
        write(&region, 0, 1);
        let events = |region: &FileRegion| (&region.changes).read(&mut [0; 64]).map_err(|error| error.kind());
        assert_eq!(events(&region), Err(io::ErrorKind::WouldBlock), "the guest's own writes do not count");
        file.set_len(MIB as u64).unwrap();
        region.changed();
        assert_eq!((byte(&region, 2 * MIB), region.losses.load(Ordering::Acquire)), (0, 1));
        assert_eq!(events(&region), Err(io::ErrorKind::WouldBlock));
    }

    #[test]
    fn a_file_that_can_only_be_read_is_mapped_so() {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), [7; 5000]).unwrap();
        let region = map_file(File::open(path.path()).unwrap(), true).unwrap();
        assert_eq!((byte(&region, 4999), byte(&region, 5000)), (7, 0));
        assert_eq!(map_file(File::open(path.path()).unwrap(), false).unwrap_err().raw_os_error(), Some(13));
    }

    #[test]
    fn an_empty_file_is_refused() {
        assert!(map_file(file(0), false).is_err());
    }
}
