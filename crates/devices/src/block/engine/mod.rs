//! Who makes the host's system calls for a disk, and which of them is the fastest where.
//!
//! | engine | takes | chosen by itself for |
//! |---|---|---|
//! | inline | one system call a request, on the I/O thread | files in memory (tmpfs): nothing there ever waits |
//! | io-uring | one system call a batch | raw images on disks |
//! | threads | a hand-over to another thread and back, for each batch | qcow2, and hosts that forbid io_uring |

mod pool;
mod uring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use anyhow::Context as _;

use super::image::Image;
use super::job::Job;
use super::spec::{BlockSpec, EngineSpec};
use pool::Pool;
use uring::Uring;

/// Takes jobs and gives them back when they are done. On drop it waits for those that it still has, so the memory that
/// they point into must stay mapped until then.
#[derive(Debug)]
pub(super) enum Engine {
    Inline(Arc<Image>),
    Uring(Box<Uring>),
    Threads(Pool),
}

/// A job that has been done, as far as it went.
#[derive(Debug)]
pub(super) struct Done {
    /// The number that came with it.
    pub(super) tag: u32,
    pub(super) job: Job,
    /// The bytes that were read or written.
    pub(super) result: io::Result<u64>,
}

impl Engine {
    /// The engine that `spec` asks for, or the one that suits `image`. `depth` jobs at most will be in it.
    ///
    /// # Errors
    ///
    /// The host has no such engine.
    pub(super) fn new(spec: &BlockSpec, image: &Arc<Image>, depth: u32) -> anyhow::Result<Self> {
        let name = spec.path.display();
        let threads = || Pool::new(image, depth).map(Self::Threads).context("Cannot start threads for a disk");
        let in_memory = matches!(&**image, Image::Raw(raw) if raw.in_memory);
        match (spec.engine, &**image) {
            (EngineSpec::Inline, _) => Ok(Self::Inline(image.clone())),
            (EngineSpec::Auto, _) if in_memory => Ok(Self::Inline(image.clone())),
            (EngineSpec::Threads, _) | (EngineSpec::Auto, Image::Qcow2(_)) => threads(),
            (EngineSpec::IoUring, Image::Qcow2(_)) => {
                anyhow::bail!("{name}: engine=io-uring is for raw images: say engine=threads, or drop it")
            }
            (EngineSpec::IoUring, Image::Raw(_)) => Uring::new(image, depth)
                .map(|uring| Self::Uring(Box::new(uring)))
                .with_context(|| format!("{name}: this host has no io_uring for us: say engine=threads, or drop it")),
            (EngineSpec::Auto, Image::Raw(_)) => match Uring::new(image, depth) {
                Ok(uring) => Ok(Self::Uring(Box::new(uring))),
                Err(error) => {
                    log::info!("{name}: this host has no io_uring for us, threads take its place: {error}");
                    threads()
                }
            },
        }
    }

    /// Its name, as in the specification of a disk.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Inline(_) => "inline",
            Self::Uring(_) => "io-uring",
            Self::Threads(_) => "threads",
        }
    }

    /// Takes a job, and gives it back where it is done already. It is not sure to begin before [`Self::submit`].
    pub(super) fn start(&mut self, tag: u32, job: Job) -> Option<Done> {
        match self {
            Self::Inline(image) => Some(execute(image, tag, job)),
            Self::Uring(uring) => uring.start(tag, job),
            Self::Threads(pool) => {
                pool.start(tag, job);
                None
            }
        }
    }

    /// Has the host begin with what was started.
    pub(super) fn submit(&mut self) {
        match self {
            Self::Inline(_) => {}
            Self::Uring(uring) => uring.submit(0),
            Self::Threads(pool) => pool.submit(),
        }
    }

    /// A job that is done, if there is one.
    pub(super) fn finished(&mut self) -> Option<Done> {
        match self {
            Self::Inline(_) => None,
            Self::Uring(uring) => uring.finished(),
            Self::Threads(pool) => pool.finished(),
        }
    }

    /// Waits until [`Self::finished`] has something to give, unless there are no jobs at all.
    pub(super) fn wait(&mut self) {
        match self {
            Self::Inline(_) => {}
            Self::Uring(uring) => uring.wait(),
            Self::Threads(pool) => pool.wait(),
        }
    }

    /// The descriptor that is readable while jobs are done that nobody has taken.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Inline(_) => None,
            Self::Uring(uring) => Some(uring.descriptor()),
            Self::Threads(pool) => Some(pool.descriptor()),
        }
    }
}

fn execute(image: &Image, tag: u32, job: Job) -> Done {
    let result = image.execute(&job);
    Done { tag, job, result }
}

#[cfg(test)]
mod tests;
