//! One virtual machine: its configuration, its building, its threads and its end.
//!
//! [`VmConfig`] says what is asked for, [`Paused::build`] makes it, [`Live::perform`] does what is asked of it, such as
//! to go back and forth between [`Paused`] and [`Running`], and [`Live::finish`] says how it ended. The machine belongs
//! to one thread; only its processors have threads of their own.

mod config;
mod control;
mod counts;
mod cpus;
mod error;
mod machine;
mod outcome;
mod slots;
mod timer;
mod vcpu;

pub use config::{OnEnd, VmConfig};
pub use control::{ControlError, ControlReply, ControlRequest, Live, State};
pub use counts::ExitCounts;
pub use cpus::{CpusSpec, HostCpus};
pub use error::ConfigError;
pub use machine::{AtStart, Paused, Running, Surroundings};
pub use outcome::Outcome;
pub use timer::BootTimer;
