//! Machines of `vmm run` by their names: what is known of them, and the commands that deal with them.
//!
//! Each has a folder that outlives the process that runs it. That process holds a lock there, so that nothing has to be
//! believed of process numbers: a folder whose lock is free and that says of no end is that of a machine whose process was
//! killed.

mod agent;
mod copy;
mod exec;
mod folder;
mod list;
mod logs;
mod output;
mod stats;
mod stop;

pub(crate) use copy::CopyArgs;
pub(crate) use exec::ExecArgs;
pub(crate) use folder::{Folder, Record};
pub(crate) use list::PsArgs;
pub(crate) use logs::LogsArgs;
pub(crate) use output::OutputLog;
pub(crate) use stats::StatsArgs;
pub(crate) use stop::{KillArgs, RmArgs, StopArgs, WaitArgs};

/// How long ago, or how long, for people.
fn for_people(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_told_in_the_unit_that_suits_it() {
        for (seconds, text) in
            [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_799, "47 h"), (172_800, "2 days")]
        {
            assert_eq!(for_people(seconds), text);
        }
    }
}
