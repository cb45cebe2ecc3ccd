//! Machines of `vmm run` by their names: what is known of them, and how they are talked to.
//!
//! Each has a folder that outlives the process that runs it. That process holds a lock there, so that nothing has to be
//! believed of process numbers: a folder whose lock is free and that says of no end is that of a machine whose process was
//! killed.
//!
//! The commands about machines (`vmm ps`, `logs`, `exec`, …) are the executable `vmm-session`, which `vmm` starts: what runs
//! guests is not to be larger for them.

mod folder;
mod output;
mod session;
mod signals;
mod terminal;
mod variable;

pub use folder::{End, Files, Folder, Machine, Record, State, now};
pub use output::{OutputLog, Reader};
pub use session::{NotStarted, OURS, Ready, Session, clean, code_of};
pub use signals::{PASSED_ON, Signals};
pub use terminal::size as terminal_size;
pub use variable::{Variable, environment};
