//! How many idle instances an amount of memory holds: they are started until so much less is available than before.

use crate::instance::{Fault, Until};
use crate::launch::Work;
use crate::run::Run;
use crate::work::MARK;

/// The memory to use, in KiB; less where a machine has less to spare.
const BUDGET: u64 = 512 << 10;
/// Instances at most.
const MOST: usize = 128;
/// Each contender is filled up so often: what it takes long for hardly varies.
const TIMES: u32 = 3;

pub(crate) fn measure(run: &mut Run<'_>) -> Result<(), Fault> {
    let work = Work { groups: vec!["idle"], ..Work::default() };
    for round in 0..TIMES {
        for (at, contender) in run.contenders.iter().enumerate() {
            if run.is_gone(at) {
                continue;
            }
            let before = available().map_err(Fault::Other)?;
            let budget = BUDGET.min(before / 2);
            let mut instances = Vec::new();
            let mut used = 0;
            while used < budget && instances.len() < MOST {
                let started = run.start(contender, &work).and_then(|mut instance| {
                    instance.wait(Until::Text(&[MARK]), run.interrupt)?;
                    Ok(instance)
                });
                match started {
                    Ok(instance) => instances.push(instance),
                    Err(Fault::Interrupted) => return Err(Fault::Interrupted),
                    Err(Fault::Other(what)) => {
                        run.fault(contender, &format!("density, instance {}", instances.len() + 1), what, false);
                        break;
                    }
                }
                used = before.saturating_sub(available().map_err(Fault::Other)?);
            }
            // Of a few instances nothing can be said that the machine's own changes do not drown.
            if instances.len() >= 4 && used > 0 {
                let value = instances.len() as f64 / (used as f64 / f64::from(1 << 20));
                run.sample(contender, "density", Some(round), value);
            }
        }
    }
    Ok(())
}

/// KiB that new programs could have, by the kernel's estimate.
fn available() -> Result<u64, String> {
    let text =
        std::fs::read_to_string("/proc/meminfo").map_err(|error| format!("cannot read /proc/meminfo: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let size = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    size.ok_or_else(|| "/proc/meminfo does not say what is available".to_owned())
}
