//! Saving a device and loading what was saved: the status machine and the queues of any device, which the transport adds
//! its own registers to and the device what only it knows.
//!
//! ```text
//!  running ──save──▶ stopped, saved ──resume──▶ running
//!  new     ──load──▶ stopped        ──resume──▶ running
//! ```
//!
//! The guest stands still from before the save until after the resume. A state comes from a file, so it is checked as
//! what a guest writes to the registers is: one that no driver could have brought a device into is refused, and rings
//! that lie anywhere are a fault of the guest's once the device runs.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Core, Ordering, Reg, Registers, status};
use crate::device::{VirtioDevice, features};
use crate::io_thread::downcast;
use crate::queue::VirtQueue;

/// A device as its driver knows it, without its configuration and the machine's memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoreState {
    /// Device type (section 5).
    kind: u8,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: u8,
    needs_reset: bool,
    generation: u32,
    queues: Vec<QueueState>,
    /// What [`VirtioDevice::save`] gave.
    device: Value,
}

/// A queue's registers, and how far both sides are: between them, nothing is outstanding.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    position: u16,
}

/// What a driver can have set, in the order in which it must.
const STEPS: [u8; 4] = [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];

impl<D: VirtioDevice> Core<D> {
    /// Stops the device, where it runs, when its requests in flight are done. What has not been asked of it yet stays in
    /// its queues. [`resume`](Self::resume) goes on from there.
    ///
    /// # Errors
    ///
    /// The device has what cannot be saved, or holds on to a request; it goes on.
    pub fn save(&mut self) -> Result<CoreState> {
        let device = self.quiesce().with_context(|| format!("Cannot save the device {}", self.wiring.name))?;
        let queue = |registers: &Registers| QueueState {
            size: registers.size,
            enabled: registers.enabled,
            descriptors: registers.descriptors,
            driver: registers.driver,
            device: registers.device,
            position: registers.position,
        };
        Ok(CoreState {
            kind: self.kind() as u8,
            accepted: self.accepted,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            status: self.status,
            needs_reset: self.needs_reset(),
            generation: self.read(Reg::ConfigGeneration),
            queues: self.queues.iter().map(|slot| queue(&slot.registers)).collect(),
            device,
        })
    }

    /// Brings a device after reset into a state that was saved. It runs from [`resume`](Self::resume) on.
    ///
    /// # Errors
    ///
    /// It is no state of such a device. Nothing has changed then.
    pub fn load(&mut self, state: CoreState) -> Result<()> {
        ensure!(self.status == 0, "the device {} is in use", self.wiring.name);
        self.check(&state)
            .and_then(|()| self.device.load(state.device))
            .with_context(|| format!("The state of the device {} is not one that it can have", self.wiring.name))?;
        self.accepted = state.accepted;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.status = state.status;
        self.fault.happened.store(state.needs_reset, Ordering::Release);
        self.generation.store(state.generation, Ordering::Release);
        for (slot, queue) in self.queues.iter_mut().zip(state.queues) {
            let QueueState { size, enabled, descriptors, driver, device, position } = queue;
            slot.registers = Registers { size, enabled, descriptors, driver, device, position };
        }
        Ok(())
    }

    /// Starts the device again after [`save`](Self::save) or [`load`](Self::load), if it is one that runs.
    pub fn resume(&mut self) {
        if self.running.is_none() && self.status & status::DRIVER_OK != 0 && !self.needs_reset() {
            self.start();
        }
    }

    fn check(&self, state: &CoreState) -> Result<()> {
        let kind = self.kind() as u8;
        ensure!(state.kind == kind, "it is of a device of type {}, and this is {}", state.kind, self.kind());
        let strange = state.accepted & !self.offered;
        let agreed = state.status & status::FEATURES_OK != 0;
        // Until they have agreed, a driver can have written anything.
        ensure!(!agreed || strange == 0, "its driver uses the features {strange:#x}, which are not offered");
        ensure!(!agreed || state.accepted & features::VERSION_1 != 0, "its driver has agreed to a legacy device");
        let set = STEPS.iter().take_while(|step| state.status & **step != 0).fold(0, |set, step| set | step);
        ensure!(state.status & !status::FAILED == set, "its status is {:#x}", state.status);
        let count = self.queues.len();
        ensure!(state.queues.len() == count, "it has {} queues, and this has {count}", state.queues.len());
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.fault.happened.load(Ordering::Acquire)
    }

    /// Stops the device and keeps how far its queues are. Returns what the device itself has to say.
    fn quiesce(&mut self) -> Result<Value> {
        let Some(ticket) = self.running else { return self.device.save(None) };
        let handler = self.wiring.io_thread.remove(ticket);
        let any: &dyn std::any::Any = &*handler;
        let state = match self.device.save(any.downcast_ref()) {
            Ok(state) => state,
            Err(error) => {
                self.hand_over(handler, ticket);
                return Err(error);
            }
        };
        self.running = None;
        let queues = self.device.stop(downcast(handler));
        if self.needs_reset() {
            // Where its queues are is of no interest: all that it can do is to be reset.
            return Ok(state);
        }
        let held = queues.iter().find_map(|queue| self.keep_position(queue).err());
        if let Some(error) = held {
            self.start();
            return Err(error);
        }
        Ok(state)
    }

    fn keep_position(&mut self, queue: &VirtQueue) -> Result<()> {
        let Some(slot) = self.queues.get_mut(usize::from(queue.index())) else { bail!("it has a queue too many") };
        let (taken, given_back) = queue.positions();
        slot.registers.position = given_back;
        ensure!(taken == given_back, "it holds {} requests of queue {}", taken.wrapping_sub(given_back), queue.index());
        Ok(())
    }
}
