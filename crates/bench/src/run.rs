//! The rounds: each contender once a round, in an order that is drawn anew for each.

use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};

use crate::contender::{Contender, Kind};
use crate::instance::{Fault, Instance, Until};
use crate::interrupt::Interrupt;
use crate::launch::{Common, Work, launch};
use crate::measure::{self, Group};
use crate::netns::Network;
use crate::network;
use crate::phases::{self, BootTimer, Phases, Seen};
use crate::pss::Pss;
use crate::result::{self, Report};
use crate::site::Site;
use crate::stats::{Rng, Sample, spread};
use crate::tools::Tool;
use crate::work::{DONE, MARK, RESULT};

/// After so many faults in one kind of rounds a contender is left out of the rest of them; of all rounds, if nothing of it
/// ever was well.
const PATIENCE: usize = 2;

/// The groups that need a network.
const NETWORKED: [Group; 2] = [Group::Network, Group::Services];
/// The part of a start by which its phases may miss it.
const MOST_GAP: f64 = 0.02;

/// What a run has at hand.
pub(crate) struct Run<'a> {
    pub(crate) site: &'a Site,
    pub(crate) contenders: &'a [Contender],
    pub(crate) interrupt: &'a Interrupt,
    pub(crate) common: Common,
    /// For how long each measure goes on, in milliseconds.
    pub(crate) millis: u64,
    pub(crate) rng: Rng,
    pub(crate) report: Report,
    pub(crate) tools: Vec<Tool>,
    /// Where contenders meet the server, while that is measured.
    pub(crate) network: Option<Network>,
    starts: Vec<Phases>,
    noise: Vec<f64>,
    /// Which contenders have been seen to work. One that never has is not tried again and again.
    works: Vec<bool>,
    gone: Vec<bool>,
}

/// One kind of rounds.
#[derive(Clone, Debug)]
pub(crate) struct Kinds {
    pub(crate) title: &'static str,
    pub(crate) work: Work,
    pub(crate) how: How,
}

/// What is done with an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// From spawn to mark to end.
    Start,
    /// What an instance that idles has.
    Idle,
    /// What the workload says.
    Work,
    /// What a web server in it can take.
    Web,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        site: &'a Site,
        contenders: &'a [Contender],
        interrupt: &'a Interrupt,
        common: Common,
        millis: u64,
        report: Report,
    ) -> Self {
        let rng = Rng::new(report.seed);
        let (works, gone) = (vec![false; contenders.len()], vec![false; contenders.len()]);
        let (starts, noise) = (Vec::new(), Vec::new());
        let (tools, network) = (Vec::new(), None);
        Self { site, contenders, interrupt, common, millis, rng, report, tools, network, starts, noise, works, gone }
    }

    /// Measures these groups. Returns what came of it, a part of it after an interrupt.
    pub(crate) fn measure(mut self, groups: &[Group]) -> Report {
        let kinds = self.kinds(groups);
        let with_network = groups.iter().filter(|group| NETWORKED.contains(group)).count();
        let steps = (u64::from(self.report.rounds) + 1) * (self.contenders.len() * (kinds.len() + with_network)) as u64;
        let progress = ProgressBar::new(steps);
        let style = ProgressStyle::with_template("{msg:30} {wide_bar} {pos}/{len} {eta}");
        progress.set_style(style.expect("the template is well formed"));
        let mut result = Ok(());
        for kind in &kinds {
            result = result.and_then(|()| self.rounds(kind, &progress));
        }
        if result.is_ok() && with_network > 0 {
            result = network::measure(&mut self, groups, &progress);
        }
        if result.is_ok() && groups.contains(&Group::Density) {
            progress.set_message("density");
            result = crate::density::measure(&mut self);
        }
        progress.finish_and_clear();
        self.report.partial = result.err().map(|fault| fault.to_string());
        self.report.noise = spread(&self.noise);
        let typical = |contender: &Contender| {
            let own: Vec<Phases> =
                self.starts.iter().filter(|start| start.contender == contender.name).cloned().collect();
            Phases::typical(&own).cloned()
        };
        self.report.phases = self.contenders.iter().filter_map(typical).collect();
        for phases in self.report.phases.iter().filter(|phases| phases.gap() > MOST_GAP) {
            let what = format!("they add up to {:.1} ms of {:.1} ms", phases.sum(), phases.whole);
            let when = "phases of the start".to_owned();
            self.report.faults.push(result::Fault { contender: phases.contender.clone(), when, what });
        }
        self.report.estimate();
        self.report
    }

    /// Whether a contender has never worked.
    pub(crate) fn is_gone(&self, at: usize) -> bool {
        self.gone[at]
    }

    /// Whether a kept tool is here.
    pub(crate) fn has_tool(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name)
    }

    fn kinds(&self, groups: &[Group]) -> Vec<Kinds> {
        let work = |groups, has_disk| Work { groups, millis: self.millis, has_disk, ..Work::default() };
        let mut kinds = Vec::new();
        if groups.contains(&Group::Start) {
            kinds.push(Kinds { title: "start", work: work(Vec::new(), false), how: How::Start });
        }
        if groups.contains(&Group::Memory) {
            kinds.push(Kinds { title: "memory", work: work(vec!["idle"], false), how: How::Idle });
        }
        // What needs nothing but a processor and memory is measured in one instance: each would cost a start.
        let has_fio = self.has_tool("fio");
        let light = [Group::Cpu, Group::Ram, Group::System, Group::Disk];
        let is_light = |group: &&Group| groups.contains(group) && !(has_fio && **group == Group::Disk);
        let names: Vec<&str> = light.iter().filter(is_light).map(|group| group.name()).collect();
        if !names.is_empty() {
            let has_disk = names.contains(&Group::Disk.name());
            kinds.push(Kinds { title: "processor, memory, system, disk", work: work(names, has_disk), how: How::Work });
        }
        if has_fio && groups.contains(&Group::Disk) {
            let work = Work { has_tools: true, ..work(vec![Group::Disk.name()], true) };
            kinds.push(Kinds { title: "disk", work, how: How::Work });
        }
        kinds
    }

    /// A round that does not count, and those that do.
    pub(crate) fn rounds(&mut self, kind: &Kinds, progress: &ProgressBar) -> Result<(), Fault> {
        let mut faults = vec![0; self.contenders.len()];
        let mut order: Vec<usize> = (0..self.contenders.len()).collect();
        progress.set_message(kind.title);
        // What an instance has does not depend on what is in caches.
        let first = u32::from(kind.how == How::Idle);
        for round in first..=self.report.rounds {
            self.rng.shuffle(&mut order);
            self.noise()?;
            for at in order.iter().copied() {
                progress.inc(1);
                if faults[at] >= PATIENCE || self.gone[at] {
                    continue;
                }
                let contender = &self.contenders[at];
                match self.one(contender, kind, round.checked_sub(1)) {
                    Ok(()) => self.works[at] = true,
                    Err(Fault::Interrupted) => return Err(Fault::Interrupted),
                    Err(Fault::Other(what)) => {
                        faults[at] += 1;
                        self.gone[at] = faults[at] == PATIENCE && !self.works[at];
                        let when = if round == 0 { "warm-up".to_owned() } else { format!("round {round}") };
                        self.fault(contender, &format!("{}, {when}", kind.title), what, faults[at] == PATIENCE);
                    }
                }
            }
        }
        Ok(())
    }

    /// Notes that something went wrong.
    pub(crate) fn fault(&mut self, contender: &Contender, when: &str, what: String, is_last: bool) {
        let what = if is_last { format!("{what} (left out from here on)") } else { what };
        let fault = result::Fault { contender: contender.name.clone(), when: when.to_owned(), what };
        self.report.faults.push(fault);
    }

    /// Starts an instance.
    pub(crate) fn start(&self, contender: &Contender, work: &Work) -> Result<Instance, Fault> {
        let other = |error: anyhow::Error| Fault::Other(format!("{error:#}"));
        let launch = launch(contender, self.site, work, self.common).map_err(other)?;
        let Some(network) = self.network.as_ref().filter(|_| work.network.is_some()) else {
            return Instance::start(launch);
        };
        network.forget_neighbours().map_err(other)?;
        if contender.kind != Kind::Process {
            return Instance::start(launch);
        }
        network.enter_inside().map_err(other)?;
        let started = Instance::start(launch);
        network.leave_inside().map_err(other)?;
        started
    }

    /// One instance. Without a round its figures do not count.
    fn one(&mut self, contender: &Contender, kind: &Kinds, round: Option<u32>) -> Result<(), Fault> {
        let mut instance = self.start(contender, &kind.work)?;
        let spawn_clock = phases::clock_at(instance.spawned);
        let marked = instance.wait(Until::Text(&[MARK]), self.interrupt)?;
        if kind.how == How::Idle {
            let ram = contender.kind.is_machine().then_some(self.common.memory << 20);
            let pss = Pss::settled(instance.id(), ram).map_err(|error| Fault::Other(format!("{error:#}")))?;
            self.sample(contender, "memory-outside", round, pss.outside as f64);
            if ram.is_some() {
                self.sample(contender, "memory-guest", round, pss.guest as f64);
            }
            self.sample(contender, "memory-whole", round, (pss.outside + pss.guest) as f64);
            return Ok(());
        }
        if kind.how == How::Web {
            instance.wait(Until::Text(network::LISTENING), self.interrupt)?;
            return network::load(self, contender, round);
        }
        let exited = instance.wait(Until::Exit, self.interrupt)?;
        if !instance.status().is_some_and(|status| status.success()) {
            let status = instance.status().map(|status| status.to_string()).unwrap_or_default();
            return Err(instance.fault(&format!("ended otherwise than it should ({status})")));
        }
        let said = Said::read(&instance.output()).map_err(|what| instance.fault(&what))?;
        let whole = marked - instance.spawned;
        match kind.how {
            How::Start => {
                self.sample(contender, "start", round, whole.as_secs_f64() * 1e3);
                self.sample(contender, "start-exit", round, (exited - instance.spawned).as_secs_f64() * 1e3);
                let timer = BootTimer::read(&instance.errors()).filter(|_| contender.kind == Kind::Vmm);
                let arrival = instance.error_arrival(phases::LAST).map(|at| at - instance.spawned);
                let seen = Seen {
                    contender: &contender.name,
                    spawn_clock,
                    whole,
                    begun: said.time("begun-ns"),
                    marked: said.time("marked-ns"),
                    timer: timer.zip(arrival),
                    shares_kernel: !contender.kind.is_machine(),
                };
                self.starts.extend(seen.phases().filter(|_| round.is_some()));
            }
            How::Work => {
                for (what, why) in &said.skipped {
                    self.report.skip(format!("{what} of {}", contender.name), why);
                }
                for (name, value) in &said.results {
                    self.sample(contender, name, round, *value);
                }
            }
            How::Idle | How::Web => {}
        }
        Ok(())
    }

    /// Takes a sample of a measure that there is.
    pub(crate) fn sample(&mut self, contender: &Contender, name: &str, round: Option<u32>, value: f64) {
        if let (Some(measure), Some(round)) = (measure::named(name), round) {
            self.report.add(&contender.name, measure, Sample { round, value });
        }
    }

    /// The same work by the same program, always: what its time varies by is the machine's.
    fn noise(&mut self) -> Result<(), Fault> {
        let work = Work { groups: vec!["noise"], millis: self.millis, ..Work::default() };
        let own = self.contenders.iter().find(|contender| contender.kind == Kind::Process);
        let Some(own) = own else { return Ok(()) };
        let measured = self.start(own, &work).and_then(|mut instance| {
            instance.wait(Until::Exit, self.interrupt)?;
            Said::read(&instance.output()).map_err(Fault::Other)
        });
        match measured {
            Ok(said) => {
                let values = said.results.into_iter().filter(|(name, _)| name == "noise");
                self.noise.extend(values.map(|(_, value)| value));
            }
            Err(Fault::Interrupted) => return Err(Fault::Interrupted),
            // The rounds themselves will say so, too.
            Err(Fault::Other(_)) => {}
        }
        Ok(())
    }
}

/// What a workload has said.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Said {
    pub(crate) results: Vec<(String, f64)>,
    pub(crate) skipped: Vec<(String, String)>,
}

impl Said {
    /// Reads its lines, between which a kernel's may stand.
    pub(crate) fn read(output: &str) -> Result<Self, String> {
        let mut said = Self::default();
        for line in output.lines().filter_map(|line| Some(line.split_once(RESULT)?.1.trim_end())) {
            let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
            match (name, rest.parse::<f64>()) {
                ("skip", _) => {
                    let (what, why) = rest.split_once(' ').unwrap_or((rest, "it says not why"));
                    said.skipped.push((printable(what), printable(why)));
                }
                (_, Ok(value)) if value.is_finite() && value >= 0.0 => said.results.push((printable(name), value)),
                _ => return Err(format!("said nonsense: {}", printable(line))),
            }
        }
        if said.results.iter().any(|(name, _)| name == DONE) {
            Ok(said)
        } else {
            Err("ended before all was measured".to_owned())
        }
    }

    fn time(&self, name: &str) -> Duration {
        let nanoseconds = self.results.iter().find(|(other, _)| other == name).map_or(0.0, |(_, value)| *value);
        Duration::try_from_secs_f64(nanoseconds / 1e9).unwrap_or_default()
    }
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// A seed that differs from run to run.
pub(crate) fn seed() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes).context("no random numbers")?;
    // Short enough to be typed again, and exact in JSON wherever that is read.
    Ok(u64::from_le_bytes(bytes) >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_between_a_kernels_lines() {
        let output = "\u{2}[ 0.1] a kernel's line\nbench: cpu-float 12.5\r\njunk bench: skip disk there is none\nbench: done 1\n";
        let said = Said::read(output).unwrap();
        assert_eq!(said.results[0], ("cpu-float".to_owned(), 12.5));
        assert_eq!(said.skipped, [("disk".to_owned(), "there is none".to_owned())]);
    }

    #[test]
    fn a_workload_that_stops_half_way_or_says_nonsense_is_a_fault() {
        assert_eq!(Said::read("bench: cpu-float 1\n").unwrap_err(), "ended before all was measured");
        for nonsense in ["bench: cpu-float NaN\n", "bench: x -1\n", "bench: x inf\n", "bench: x\n"] {
            assert!(Said::read(nonsense).unwrap_err().starts_with("said nonsense"), "{nonsense}");
        }
    }
}
