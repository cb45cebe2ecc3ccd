//! What an instance adds to the host's memory: the proportional set size of all its processes (a page that N processes
//! share counts as an Nth in each), of guest RAM and of all else.
//!
//! Left out: what the kernel has for them (page tables, KVM's own, sockets), which no file tells by process. `density`
//! sees that, too.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pss {
    pub(crate) outside: u64,
    pub(crate) guest: u64,
}

impl Pss {
    /// Of a process and all that it has started. `ram`: bytes of guest RAM, for machines.
    pub(crate) fn of(process: u32, ram: Option<u64>) -> anyhow::Result<Self> {
        let mut whole = Self::default();
        for id in family(process) {
            // One that ends meanwhile has no memory.
            let Ok(text) = fs::read_to_string(format!("/proc/{id}/smaps")) else { continue };
            let one = Self::read(&text, ram);
            whole.outside += one.outside;
            whole.guest += one.guest;
        }
        anyhow::ensure!(whole.outside + whole.guest > 0, "no right to read /proc/{process}/smaps");
        Ok(whole)
    }

    /// The same once it changes no more: what has just started still frees what only the start needed.
    pub(crate) fn settled(process: u32, ram: Option<u64>) -> anyhow::Result<Self> {
        const STEP: Duration = Duration::from_millis(100);
        const PATIENCE: Duration = Duration::from_secs(3);
        let start = Instant::now();
        let mut before = Self::of(process, ram)?;
        let mut same = 0;
        while same < 2 && start.elapsed() < PATIENCE {
            std::thread::sleep(STEP);
            let now = Self::of(process, ram)?;
            let sum = |pss: Self| pss.outside + pss.guest;
            same = if sum(now).abs_diff(sum(before)) * 200 <= sum(now) { same + 1 } else { 0 };
            before = now;
        }
        Ok(before)
    }

    /// Reads /proc/PID/smaps: a line `START-END MODE …` begins a mapping, `Pss: N kB` stands below it. Guest RAM is what is
    /// mapped readable and writable in one piece of half its size or more, and is no file of a file system.
    fn read(text: &str, ram: Option<u64>) -> Self {
        let mut pss = Self::default();
        let mut is_guest = false;
        for line in text.lines() {
            if let Some((range, rest)) = line.split_once(' ').filter(|(range, _)| range.contains('-')) {
                is_guest = ram.is_some_and(|ram| is_ram(range, rest, ram));
            } else if let Some(size) = line.strip_prefix("Pss:") {
                let size = size.split_whitespace().next().and_then(|size| size.parse().ok()).unwrap_or(0_u64);
                *(if is_guest { &mut pss.guest } else { &mut pss.outside }) += size;
            }
        }
        pss
    }
}

fn is_ram(range: &str, rest: &str, ram: u64) -> bool {
    let number = |text| u64::from_str_radix(text, 16).ok();
    let size = range.split_once('-').and_then(|(start, end)| number(end)?.checked_sub(number(start)?));
    let words: Vec<&str> = rest.split_whitespace().collect();
    let name = words.get(4).copied().unwrap_or_default();
    let is_file = name.starts_with('/') && !name.starts_with("/memfd:") && !name.starts_with("/dev/");
    words.first().is_some_and(|mode| mode.starts_with("rw")) && !is_file && size.is_some_and(|size| size >= ram / 2)
}

/// A process and all below it.
fn family(process: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Ok(parent) = parent(id) {
            children.entry(parent).or_default().push(id);
        }
    }
    let mut family = vec![process];
    let mut at = 0;
    while let Some(id) = family.get(at) {
        // Each process has one parent, so none comes twice.
        family.extend(children.remove(id).unwrap_or_default());
        at += 1;
    }
    family
}

fn parent(id: u32) -> anyhow::Result<u32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
    // `ID (NAME) STATE PARENT …`, and a name may have anything in it.
    let rest = stat.rsplit(')').next().context("a process has a name")?;
    rest.split_whitespace().nth(1).context("a process has a parent")?.parse().context("it is a number")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let text = "7f0000000000-7f0008000000 rw-s 00000000 00:01 5 /memfd:ram (deleted)\nSize: 131072 kB\nPss:  40000 kB\n\
                    7f0010000000-7f0018000000 r--p 00000000 fe:01 5 /big/file\nPss: 11 kB\n\
                    7f0020000000-7f0020001000 rw-p 00000000 00:00 0 [heap]\nPss: 4 kB\nPss_Dirty: 4 kB\n";
        assert_eq!(Pss::read(text, Some(128 << 20)), Pss { outside: 15, guest: 40000 });
        assert_eq!(Pss::read(text, None), Pss { outside: 40015, guest: 0 });
    }

    #[test]
    fn what_a_process_has_started_counts_too() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo $!; read -r line; kill $!"]);
        let mut shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let out = shell.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
        let all = family(shell.id());
        assert!(all.contains(&line.trim().parse().unwrap()), "{all:?}");
        assert!(Pss::of(shell.id(), None).unwrap().outside > 0);
        drop(shell.stdin.take());
        shell.wait().unwrap();
    }
}
