//! What is behind a disk: a raw image, or a qcow2 one.

use std::io;

use super::job::Job;
use super::qcow2::Qcow2;
use super::raw::Raw;
use super::spec::{BlockSpec, Format};

/// An open image. Several threads may use it at once.
#[derive(Debug)]
pub(super) enum Image {
    Raw(Raw),
    Qcow2(Qcow2),
}

impl Image {
    /// Opens what `spec` names, which has been validated.
    pub(super) fn open(spec: &BlockSpec) -> anyhow::Result<Self> {
        if spec.overlay.is_some() || spec.format == Some(Format::Qcow2) {
            return Qcow2::open(spec).map(Self::Qcow2);
        }
        Raw::open(spec).map(Self::Raw)
    }

    /// Bytes that the guest can reach.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size,
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    /// Whether ranges can be given back to the host.
    pub(super) fn can_punch(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.can_punch,
            Self::Qcow2(qcow2) => qcow2.is_writable(),
        }
    }

    /// Does `job` at once, as far as it goes. Returns the bytes that were read or written.
    pub(super) fn execute(&self, job: &Job) -> io::Result<u64> {
        match self {
            Self::Raw(raw) => raw.execute(job),
            Self::Qcow2(qcow2) => qcow2.execute(job),
        }
    }
}
