//! What is asked of devices while their machine lives, and the ways to them.
//!
//! A machine keeps the [`Controls`] that attaching its devices gave it and hands each [`DeviceRequest`] to them as it
//! came. What was changed is written into the description too, so that after a reboot the machine is what it was.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use kv::Size;
use virtio::transport::Handle;

use crate::balloon::{Balloon, BalloonHandler, BalloonSpec};
use crate::block::{Block, Opened};
use crate::list::Devices;

/// One request.
#[derive(Debug)]
pub enum DeviceRequest {
    /// Another medium for a drive; or, if it is the one that is in there, the size that it has now.
    ChangeDrive {
        /// The drive's name.
        id: String,
        /// The image. If `file` is there, only what it is called.
        path: PathBuf,
        /// The image, opened by who asks.
        file: Option<File>,
    },
    /// What the balloon is.
    Balloon,
    /// Another size for the balloon, which the guest inflates or deflates to as far as it can.
    ResizeBalloon(Size),
    /// What the guest says of its memory.
    BalloonStatistics,
    /// Seconds between two of these reports.
    BalloonInterval(u32),
}

/// What a request gives.
#[derive(Debug)]
pub enum DeviceReply {
    /// It is done.
    Done,
    /// The balloon as it is asked to be.
    Balloon(BalloonSpec),
    /// The balloon and the guest's memory.
    BalloonStatistics {
        /// What the balloon is to hold.
        target: Size,
        /// What it holds.
        actual: Size,
        /// What the guest says, by the names of VIRTIO 1.2, section 5.5.6.4.
        of_guest: Vec<(&'static str, u64)>,
    },
}

/// The ways to the devices of one machine, by their names, in the order of the description.
#[derive(Default)]
pub struct Controls {
    pub(crate) disks: Vec<(String, Handle<Block>)>,
    pub(crate) balloons: Vec<(String, Handle<Balloon>)>,
}

impl Controls {
    /// Does what is asked. `devices` is the description that the devices were made of.
    ///
    /// # Errors
    ///
    /// The one who asks is at fault: there is no such device, or it cannot do that. All is as it was.
    pub fn perform(&self, request: DeviceRequest, devices: &mut Devices) -> anyhow::Result<DeviceReply> {
        match request {
            DeviceRequest::ChangeDrive { id, path, file } => {
                let names = || self.disks.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>().join(", ");
                let at = self.disks.iter().position(|(other, _)| *other == id).with_context(|| match names() {
                    names if names.is_empty() => format!("There is no drive {id}, nor any other"),
                    names => format!("There is no drive {id}: the drives are {names}"),
                })?;
                let opened = file.map(|file| Opened(Arc::new(file)));
                let spec = self.disks[at].1.with(|block, handler| {
                    block.change(&path, opened, handler)?;
                    anyhow::Ok(block.spec().clone())
                })?;
                devices.disk[at] = spec;
                Ok(DeviceReply::Done)
            }
            DeviceRequest::Balloon => {
                Ok(DeviceReply::Balloon(self.balloon()?.with(|balloon, _| balloon.spec().clone())))
            }
            DeviceRequest::ResizeBalloon(size) => self.change_balloon(devices, |balloon, _| balloon.set_target(size)),
            DeviceRequest::BalloonStatistics => self.balloon()?.with(|balloon, handler| {
                if balloon.spec().stats_interval.is_none() {
                    bail!("The balloon keeps no statistics: start the machine with --balloon stats-interval=SECONDS");
                }
                let of_guest = handler.map(|handler| handler.statistics().iter().collect()).unwrap_or_default();
                let (target, actual) = (balloon.target(), balloon.actual());
                Ok(DeviceReply::BalloonStatistics { target, actual, of_guest })
            }),
            DeviceRequest::BalloonInterval(seconds) => {
                self.change_balloon(devices, |balloon, handler| balloon.set_interval(seconds, handler))
            }
        }
    }

    /// The machine's balloon: the first, where somebody asked for several.
    fn balloon(&self) -> anyhow::Result<&Handle<Balloon>> {
        let first = self.balloons.first().context("This machine has no balloon: start it with --balloon")?;
        Ok(&first.1)
    }

    fn change_balloon(
        &self,
        devices: &mut Devices,
        change: impl FnOnce(&mut Balloon, Option<&mut BalloonHandler>) -> anyhow::Result<()>,
    ) -> anyhow::Result<DeviceReply> {
        devices.balloon[0] = self.balloon()?.with(|balloon, handler| {
            change(balloon, handler)?;
            anyhow::Ok(balloon.spec().clone())
        })?;
        Ok(DeviceReply::Done)
    }
}
