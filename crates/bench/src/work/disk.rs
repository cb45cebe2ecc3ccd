//! The disk: random reads and writes of 4 KiB one at a time and 32 at a time, sequential ones, and a write that is
//! waited for until it is on the medium. Past the page cache (`O_DIRECT`) where the file system can.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::fs::OFlags;

use super::pages::Pages;
use super::{Settings, rate, say, skip, tools};

const BLOCK: usize = 4096;
/// One request of the sequential measures.
const LARGE: usize = 128 << 10;
/// Random requests of each thread at least, however slow the disk is.
const LEAST: u32 = 4;
/// Of a larger disk no more is used.
const MOST: u64 = 1 << 30;

pub(super) fn all(settings: &Settings) -> anyhow::Result<()> {
    let (path, time) = (settings.disk.as_deref().context("there is none")?, settings.time);
    let (disk, is_direct) = Disk::open(path)?;
    if settings.has_tools {
        return tools::fio(path, is_direct, time);
    }
    say("disk-read", disk.random(1, false, time)?);
    say("disk-read-32", disk.random(32, false, time)?);
    say("disk-write-32", disk.random(32, true, time)?);
    say("disk-read-seq", disk.sequential(false, time)?);
    say("disk-write-seq", disk.sequential(true, time)?);
    let mut block = aligned(BLOCK)?;
    let mut failed = None;
    let sync = || {
        let written = disk.file.write_all_at(block.bytes(), 0).and_then(|()| disk.file.sync_data());
        failed = written.err().or(failed.take());
    };
    let syncs = rate(time, 1.0, sync);
    failed.map_or(Ok(()), |error| Err(error).context("cannot write"))?;
    say("disk-sync", 1e6 / syncs);
    Ok(())
}

struct Disk {
    file: File,
    size: u64,
}

/// Memory as `O_DIRECT` wants it, and content that no layer below takes for zeros.
fn aligned(size: usize) -> anyhow::Result<Pages> {
    let mut pages = Pages::map(size, false).context("no memory")?;
    pages.bytes().fill(0xa5);
    Ok(pages)
}

impl Disk {
    /// Opens it; says whether the page cache is passed by.
    fn open(path: &Path) -> anyhow::Result<(Self, bool)> {
        let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let direct = i32::try_from(OFlags::DIRECT.bits()).context("a flag")?;
        let mut is_direct = true;
        let file = open(direct).or_else(|_| {
            is_direct = false;
            skip("disk-direct", "the file system cannot pass the page cache by: these are the cache's figures");
            open(0)
        });
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        // A block device has no length of its own in its metadata.
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).context("its size is not known")?.min(MOST);
        ensure!(size >= LARGE as u64, "the disk is smaller than one request");
        Ok((Self { file, size }, is_direct))
    }

    /// Requests a second, `depth` at a time.
    fn random(&self, depth: u32, write: bool, time: Duration) -> anyhow::Result<f64> {
        let requests = AtomicU64::new(0);
        let blocks = self.size / BLOCK as u64;
        let start = Instant::now();
        let one = |seed: u64| {
            let mut block = aligned(BLOCK)?;
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut own = 0;
            while start.elapsed() < time || own < LEAST {
                own += 1;
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) % blocks * BLOCK as u64;
                match write {
                    true => self.file.write_all_at(block.bytes(), at),
                    false => self.file.read_exact_at(block.bytes(), at),
                }
                .context("a request failed")?;
                requests.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        };
        thread::scope(|scope| {
            let one = &one;
            let all: Vec<_> = (1..=u64::from(depth)).map(|seed| scope.spawn(move || one(seed))).collect();
            all.into_iter().try_for_each(|one| one.join().expect("a request does not panic"))
        })?;
        Ok(requests.into_inner() as f64 / start.elapsed().as_secs_f64())
    }

    /// Megabytes a second.
    fn sequential(&self, write: bool, time: Duration) -> anyhow::Result<f64> {
        let mut buffer = aligned(LARGE)?;
        let mut at = 0;
        let mut failed = None;
        let step = || {
            if at + LARGE as u64 > self.size {
                at = 0;
            }
            let done = match write {
                true => self.file.write_all_at(buffer.bytes(), at),
                false => self.file.read_exact_at(buffer.bytes(), at),
            };
            failed = done.err().or(failed.take());
            at += LARGE as u64;
        };
        let rate = rate(time, LARGE as f64 / 1e6, step);
        failed.map_or(Ok(rate), |error| Err(error).context("a request failed"))
    }
}
