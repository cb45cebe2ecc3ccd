//! Unpacked kernels, kept from one boot to the next in `$XDG_CACHE_HOME/vmm/kernels` (or `~/.cache/vmm/kernels`).
//!
//! An entry, `HASH.elf`, is what a bzImage's payload unpacks to, and a trailer; HASH is the SHA-256 of the payload, so
//! copies of a kernel share an entry, and a changed kernel has another. To hash 10 MB at every boot would cost more
//! than all else that the VMM does, though. Therefore a symbolic link, whose name is made of the file's device, inode,
//! size and times, leads to the entry: as long as a file is the same and unchanged by what the file system says, its
//! payload is not even read. No user can set the time of change (ctime); but writes within one tick of the clock leave
//! it the same, and so a file that was changed in the last two seconds gets no link yet (Git calls that racily clean).
//!
//! The directory is the user's own and nobody else's, or it is not used. Still entries are not trusted: the trailer
//! must fit, and the ELF file in them is checked like any other. Nothing here fails a boot.
#![allow(unsafe_code, reason = "asking for the user id is a libc call")]

use std::fmt::{self, Write as _};
use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, SystemTime};
use std::{env, process};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The most entries, and the most bytes in them; the least recently used go.
const MAX_ENTRIES: usize = 8;
const MAX_BYTES: u64 = 1 << 30;
/// The most links. Those that lead nowhere go anyway.
const MAX_LINKS: usize = 64;
/// A file's ctime has to be so old that a later write cannot leave it the same.
const RACY: Duration = Duration::from_secs(2);
/// Use is noted so often, and a temporary file that nobody finished is removed after so long.
const HOUR: Duration = Duration::from_secs(3600);

/// Blocks of zeros so large are not written.
const BLOCK: usize = 64 << 10;

const MAGIC: [u8; 8] = *b"vmmkrnl1";

/// What stands behind the ELF file of an entry; a file that was cut off lacks it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Trailer {
    magic: [u8; 8],
    len: U64,
    key: [u8; 32],
}

/// A directory of unpacked kernels.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// The SHA-256 of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key([u8; 32]);

/// A file and its state, as far as the file system tells it.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    name: String,
    changed: SystemTime,
    seen: SystemTime,
}

/// An unpacked kernel in the cache.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The file, opened for reading.
    pub(crate) file: File,
    /// How many of its first bytes are the kernel.
    pub(crate) len: u64,
    path: PathBuf,
}

impl Cache {
    /// The user's own cache. Without one there is a line in the log, and kernels are unpacked at every boot.
    pub fn of_user() -> Option<Self> {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        let cache =
            base.context("neither XDG_CACHE_HOME nor HOME is set").and_then(|base| Self::at(base.join("vmm/kernels")));
        cache.inspect_err(|error| log::warn!("Unpacked kernels are not cached: {error:#}")).ok()
    }

    /// The cache in `dir`, which is made if it is missing, and has to be private.
    pub fn at(dir: PathBuf) -> anyhow::Result<Self> {
        let shown = dir.display();
        let metadata = match fs::symlink_metadata(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
                made.and_then(|()| fs::symlink_metadata(&dir))
            }
            result => result,
        };
        let metadata = metadata.with_context(|| format!("Cannot use the directory {shown}"))?;
        ensure!(metadata.is_dir(), "{shown} is not a directory");
        // SAFETY: geteuid has no arguments and cannot fail.
        let user = unsafe { libc::geteuid() };
        ensure!(metadata.uid() == user, "{shown} belongs to user {}, not to user {user}", metadata.uid());
        if metadata.permissions().mode() & 0o077 != 0 {
            bail!("{shown} is open to other users; say chmod 700 {shown}");
        }
        Ok(Self { dir })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// The entry of a file that has not changed since [`Cache::remember`].
    pub(crate) fn find_file(&self, identity: &Identity) -> Option<Entry> {
        let target = fs::read_link(self.dir.join(&identity.name)).ok()?;
        self.open(Key::parse(target.to_str()?)?)
    }

    /// The entry of a payload.
    pub(crate) fn find(&self, key: Key) -> Option<Entry> {
        self.open(key)
    }

    /// Notes that `identity` is a file with the payload of `key`.
    pub(crate) fn remember(&self, identity: &Identity, key: Key) {
        if identity.is_racy() {
            return;
        }
        let temporary = self.temporary();
        let result =
            symlink(key.file_name(), &temporary).and_then(|()| fs::rename(&temporary, self.dir.join(&identity.name)));
        self.finish(result, &temporary);
    }

    /// Keeps an unpacked kernel.
    pub(crate) fn store(&self, key: Key, kernel: &[u8]) {
        let temporary = self.temporary();
        let result =
            write_entry(&temporary, key, kernel).and_then(|()| fs::rename(&temporary, self.dir.join(key.file_name())));
        self.finish(result, &temporary);
    }

    /// Removes an entry that turned out to be damaged.
    pub(crate) fn discard(&self, entry: &Entry, reason: impl fmt::Display) {
        log::warn!("The cached kernel {} is damaged ({reason}); it is unpacked again", entry.path.display());
        self.warn(fs::remove_file(&entry.path));
    }

    fn open(&self, key: Key) -> Option<Entry> {
        let path = self.dir.join(key.file_name());
        let file = match File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            result => self.warn(result)?,
        };
        let metadata = self.warn(file.metadata())?;
        let mut trailer = Trailer::new_zeroed();
        let len = metadata.len().saturating_sub(size_of::<Trailer>() as u64);
        let read = file.read_exact_at(trailer.as_mut_bytes(), len);
        let entry = Entry { file, len, path };
        if read.is_err() || trailer.magic != MAGIC || trailer.len != len || trailer.key != key.0 {
            self.discard(&entry, "its trailer does not fit");
            return None;
        }
        let now = SystemTime::now();
        if metadata.modified().is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age > HOUR)) {
            self.warn(entry.file.set_modified(now));
        }
        Some(entry)
    }

    fn temporary(&self) -> PathBuf {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.dir.join(format!("{}-{}.tmp", process::id(), now.as_nanos()))
    }

    fn finish(&self, result: io::Result<()>, temporary: &Path) {
        if self.warn(result).is_none() {
            // It may never have been made.
            let _ = fs::remove_file(temporary);
        }
        self.warn(self.prune());
    }

    /// Keeps to the bounds: the least recently used entries go, and links that lead nowhere or are too many.
    fn prune(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let (mut entries, mut links) = (Vec::new(), Vec::new());
        for item in fs::read_dir(&self.dir)? {
            let path = item?.path();
            // Another process may be pruning too.
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            let used = metadata.modified()?;
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("elf") => entries.push((used, metadata.len(), path)),
                Some("tmp") if now.duration_since(used).is_ok_and(|age| age > HOUR) => fs::remove_file(path)?,
                Some("link") => links.push((used, path)),
                _ => {}
            }
        }
        entries.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
        let mut bytes = 0_u64;
        for (count, (_, len, path)) in entries.iter().enumerate() {
            bytes = bytes.saturating_add(*len);
            if count >= MAX_ENTRIES || bytes > MAX_BYTES {
                remove(path)?;
            }
        }
        links.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        for (count, (_, path)) in links.iter().enumerate() {
            if count >= MAX_LINKS || !path.exists() {
                remove(path)?;
            }
        }
        Ok(())
    }

    /// Trouble with the cache is told once, and is no more than that.
    fn warn<T>(&self, result: io::Result<T>) -> Option<T> {
        static ONCE: Once = Once::new();
        result
            .inspect_err(|error| {
                ONCE.call_once(|| log::warn!("The kernel cache {} cannot be used: {error}", self.dir.display()));
            })
            .ok()
    }
}

impl Key {
    /// Hashes a payload.
    pub(crate) fn of(payload: &[u8]) -> Self {
        Self(Sha256::digest(payload).into())
    }

    fn file_name(self) -> String {
        let mut name = self.0.iter().fold(String::new(), |mut name, byte| {
            let _ = write!(name, "{byte:02x}");
            name
        });
        name.push_str(".elf");
        name
    }

    fn parse(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".elf")?.as_bytes();
        let mut key = [0; 32];
        if digits.len() != 2 * key.len() {
            return None;
        }
        for (byte, digits) in key.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(key))
    }
}

impl Identity {
    /// Taken before the file is read, so that whatever changes it later also changes its identity.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let seconds = Duration::from_secs(metadata.ctime().try_into().unwrap_or(0));
        Self {
            name: format!(
                "{:x}-{:x}-{:x}-{}.{:09}-{}.{:09}.link",
                metadata.dev(),
                metadata.ino(),
                metadata.size(),
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.ctime(),
                metadata.ctime_nsec(),
            ),
            changed: SystemTime::UNIX_EPOCH + seconds,
            seen: SystemTime::now(),
        }
    }

    fn is_racy(&self) -> bool {
        // Whole seconds: a second more does no harm. A change in the future is as racy as one just now.
        !self.seen.duration_since(self.changed).is_ok_and(|age| age > RACY)
    }
}

/// Writes an entry. It is on the disk before it gets its name: a crash must not leave one with holes in it.
fn write_entry(path: &Path, key: Key, kernel: &[u8]) -> io::Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let mut offset = 0;
    for block in kernel.chunks(BLOCK) {
        // Zeros become a hole, which is neither kept nor copied.
        if block.iter().any(|&byte| byte != 0) {
            file.write_all_at(block, offset)?;
        }
        offset += block.len() as u64;
    }
    let trailer = Trailer { magic: MAGIC, len: offset.into(), key: key.0 };
    file.write_all_at(trailer.as_bytes(), offset)?;
    file.sync_data()
}

/// Removes a file, which another process may have done already.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("vmm/kernels")).unwrap();
        (dir, cache)
    }

    /// A file that has not been touched for a minute.
    fn settled(dir: &Path, name: &str) -> (PathBuf, Identity) {
        let path = dir.join(name);
        fs::write(&path, name).unwrap();
        let mut identity = Identity::of(&fs::metadata(&path).unwrap());
        identity.seen += Duration::from_secs(60);
        (path, identity)
    }

    fn kernel_of(entry: &Entry) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(entry.len).unwrap()];
        entry.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_is_stored_is_found_by_content_and_by_file() {
        let (dir, cache) = cache();
        let (_, identity) = settled(dir.path(), "vmlinuz");
        let key = Key::of(b"payload");
        assert!(cache.find(key).is_none());
        assert!(cache.find_file(&identity).is_none());

        cache.store(key, b"kernel");
        cache.remember(&identity, key);
        assert_eq!(kernel_of(&cache.find(key).unwrap()), b"kernel");
        assert_eq!(kernel_of(&cache.find_file(&identity).unwrap()), b"kernel");
    }

    #[test]
    fn zeros_in_a_kernel_are_no_bytes_on_the_disk_and_come_back() {
        let (_dir, cache) = cache();
        let mut kernel = vec![0; 40 * BLOCK + 5];
        kernel[20 * BLOCK + 7] = 1;
        let key = Key::of(b"payload");
        cache.store(key, &kernel);
        let entry = cache.find(key).unwrap();
        assert_eq!(kernel_of(&entry), kernel);
        assert!(entry.file.metadata().unwrap().blocks() * 512 < 4 * BLOCK as u64);
    }

    #[test]
    fn a_file_that_was_just_changed_gets_no_link() {
        let (dir, cache) = cache();
        let path = dir.path().join("vmlinuz");
        fs::write(&path, "new").unwrap();
        let identity = Identity::of(&fs::metadata(&path).unwrap());
        let key = Key::of(b"payload");
        cache.store(key, b"kernel");
        cache.remember(&identity, key);
        assert!(cache.find_file(&identity).is_none());
    }

    #[test]
    fn a_changed_file_has_another_identity() {
        let (dir, _cache) = cache();
        let (path, before) = settled(dir.path(), "vmlinuz");
        // Even with the same size and the same time of modification.
        let file = File::options().write(true).open(&path).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        let ctime = file.metadata().unwrap().ctime_nsec();
        while file.metadata().unwrap().ctime_nsec() == ctime {
            file.write_all_at(b"VMLINUZ", 0).unwrap();
        }
        file.set_modified(modified).unwrap();
        assert_ne!(Identity::of(&file.metadata().unwrap()).name, before.name);
    }

    #[test]
    fn directory_and_entries_are_private() {
        let (_dir, cache) = cache();
        cache.store(Key::of(b"payload"), b"kernel");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&cache.dir), 0o700);
        let entry = fs::read_dir(&cache.dir).unwrap().next().unwrap().unwrap().path();
        assert_eq!(mode(&entry), 0o600);
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let error = Cache::at(dir.path().into()).unwrap_err().to_string();
        assert!(error.contains("chmod 700"), "{error}");
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink(dir.path(), &link).unwrap();
        assert!(Cache::at(link).is_err());
    }

    #[test]
    fn an_entry_that_was_cut_off_is_removed() {
        let (_dir, cache) = cache();
        let key = Key::of(b"payload");
        cache.store(key, b"kernel");
        let path = cache.dir.join(key.file_name());
        File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
        assert!(cache.find(key).is_none());
        assert!(!path.exists());
    }

    #[test]
    fn an_entry_under_another_name_is_removed() {
        let (_dir, cache) = cache();
        cache.store(Key::of(b"one"), b"kernel");
        let other = Key::of(b"two");
        fs::rename(cache.dir.join(Key::of(b"one").file_name()), cache.dir.join(other.file_name())).unwrap();
        assert!(cache.find(other).is_none());
    }

    #[test]
    fn the_least_recently_used_entries_go_and_their_links_too() {
        let (dir, cache) = cache();
        let count = MAX_ENTRIES + 3;
        for number in 0..count {
            let key = Key::of(&[u8::try_from(number).unwrap()]);
            cache.store(key, b"kernel");
            cache.remember(&settled(dir.path(), &number.to_string()).1, key);
            // As if each were stored an hour after the one before.
            let age = HOUR * u32::try_from(count - number).unwrap();
            let entry = File::options().write(true).open(cache.dir.join(key.file_name())).unwrap();
            entry.set_modified(SystemTime::now() - age).unwrap();
        }
        cache.prune().unwrap();
        assert!(cache.find(Key::of(&[0])).is_none());
        assert!(cache.find(Key::of(&[u8::try_from(count - 1).unwrap()])).is_some());
        assert_eq!(fs::read_dir(&cache.dir).unwrap().count(), 2 * MAX_ENTRIES);
    }

    #[test]
    fn use_makes_an_old_entry_young() {
        let (_dir, cache) = cache();
        let key = Key::of(b"payload");
        cache.store(key, b"kernel");
        let path = cache.dir.join(key.file_name());
        let old = SystemTime::now() - 2 * HOUR;
        File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        assert!(cache.find(key).is_some());
        assert!(fs::metadata(&path).unwrap().modified().unwrap() > old + HOUR);
    }

    #[test]
    fn a_name_that_is_no_hash_leads_nowhere() {
        let (dir, cache) = cache();
        let (_, identity) = settled(dir.path(), "vmlinuz");
        symlink("../../../etc/passwd", cache.dir.join(&identity.name)).unwrap();
        assert!(cache.find_file(&identity).is_none());
    }
}
