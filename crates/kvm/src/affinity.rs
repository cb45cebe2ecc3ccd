//! Keeps a processor's thread on one processor of the host.
#![allow(unsafe_code, reason = "sched_setaffinity has no safe form")]

use std::io;

/// Pins the calling thread to the host's processor `cpu`.
///
/// # Errors
///
/// Where the host has no such processor, or this process may not run on it.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: a set of processors is plain bits, and all zeroes is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number has been checked against the size of the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is valid for the call, and 0 names the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the host has a processor `cpu` on which this thread may run.
pub fn may_run_on(cpu: usize) -> bool {
    // SAFETY: a set of processors is plain bits, and all zeroes is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for the call, and 0 names the calling thread.
    let known = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } == 0;
    // SAFETY: the number is checked against the size of the set first.
    known && cpu < 8 * size_of::<libc::cpu_set_t>() && unsafe { libc::CPU_ISSET(cpu, &set) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_pinned_to_a_processor_that_exists_and_to_no_other() {
        std::thread::spawn(|| {
            let allowed = || {
                let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
                status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t").map(str::to_owned))
            };
            let first: usize = allowed().unwrap().split(['-', ',']).next().unwrap().parse().unwrap();
            assert!(may_run_on(first));
            pin_to(first).unwrap();
            assert_eq!(allowed().unwrap(), first.to_string());
            assert!(!may_run_on(1000) && !may_run_on(usize::MAX));
            assert!(pin_to(1000).is_err());
            assert!(pin_to(usize::MAX).is_err());
        })
        .join()
        .unwrap();
    }
}
