//! The next step of each machine, from what is and what should be.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use fleet::plan::{Machine, arguments};
use fleet::rules::View;

use super::life::{Life, Start};
use super::replica::{Phase, Replica};
use super::{Watcher, say};
use crate::control::{self, Answer};
use crate::up::Word;

/// How long one that was asked to end, and then killed, may take for that.
const KILLED: Duration = Duration::from_secs(5);

impl Watcher {
    /// Does all that can be done now.
    pub(super) fn step(&mut self) -> anyhow::Result<()> {
        self.add_missing()?;
        self.stop_unwanted();
        self.replace_changed();
        self.kill_overdue();
        // A machine finds the rules and names of the others when it starts.
        self.update_network()?;
        self.start_due()?;
        self.answer_waiting()
    }

    /// Machines that should be there.
    fn add_missing(&mut self) -> anyhow::Result<()> {
        if self.ending {
            return Ok(());
        }
        for name in &self.order {
            let Some(service) = self.fleet.services.get(name) else { continue };
            for index in 1..=service.replicas {
                if self.replicas.contains_key(&(name.clone(), index)) {
                    continue;
                }
                let machine = self.addresses.machine(name, index);
                self.network.add(&machine)?;
                self.replicas.insert((name.clone(), index), Replica::new(machine, service.clone()));
            }
        }
        Ok(())
    }

    /// Machines that should not be there: all of them at the end, each after those that depend on it.
    fn stop_unwanted(&mut self) {
        let unwanted = |(name, index): &(String, u32)| match self.fleet.services.get(name) {
            Some(service) => self.ending || *index > service.replicas,
            None => true,
        };
        let needed = |name: &String| {
            self.replicas.keys().any(|(other, _)| {
                self.fleet.services.get(other).is_some_and(|service| service.depends_on.contains_key(name))
            })
        };
        let now: Vec<_> =
            self.replicas.keys().filter(|key| unwanted(key) && !(self.ending && needed(&key.0))).cloned().collect();
        for key in now {
            if self.replicas.get_mut(&key).is_some_and(|replica| !replica.stop()) {
                self.forget(&key);
            }
        }
    }

    /// Machines that are not as their service says now: one after the other, so that the others do the work.
    fn replace_changed(&mut self) {
        if let Some(key) = &self.replaced
            && self.replicas.get(key).is_some_and(|replica| !replica.is_settled())
        {
            return;
        }
        self.replaced = None;
        for (key, replica) in &mut self.replicas {
            let Some(service) = self.fleet.services.get(&key.0) else { continue };
            if replica.service.same_machine(service) {
                replica.service = service.clone();
            } else if !self.ending && self.replaced.is_none() {
                say(&format!("{}-{}", key.0, key.1), "its service has changed, it is made anew");
                if !replica.stop() {
                    replica.renew(service);
                }
                self.replaced = Some(key.clone());
            }
        }
    }

    fn kill_overdue(&mut self) {
        let now = Instant::now();
        for replica in self.replicas.values_mut() {
            if let Phase::Stopping { life, until } = &mut replica.phase
                && *until <= now
            {
                life.kill();
                *until = now + KILLED;
            }
        }
    }

    fn update_network(&mut self) -> anyhow::Result<()> {
        let machines = self.replicas.values().map(|replica| (&replica.machine, replica.is_healthy())).collect();
        self.network.update(&View { subnet: self.fleet.subnet, services: &self.fleet.services, machines })
    }

    /// Machines whose time has come, and who depend on nothing that is not there yet.
    fn start_due(&mut self) -> anyhow::Result<()> {
        if self.ending {
            return Ok(());
        }
        let now = Instant::now();
        let due = |replica: &Replica| matches!(replica.phase, Phase::Waiting(until) if until <= now);
        let ready = |replica: &Replica| {
            replica.service.depends_on.iter().all(|(name, condition)| {
                let all = self.replicas.iter().filter(|((other, _), _)| other == name);
                all.into_iter().all(|(_, replica)| replica.is(*condition))
            })
        };
        let now: Vec<(String, u32)> = self
            .replicas
            .iter()
            .filter(|(_, replica)| due(replica) && ready(replica))
            .map(|(key, _)| key.clone())
            .collect();
        for key in now {
            let Some(replica) = self.replicas.get(&key) else { continue };
            let life = self.start(&replica.machine, replica)?;
            self.lives += 1;
            if let Some(replica) = self.replicas.get_mut(&key) {
                replica.phase = Phase::Running { life, since: Instant::now(), up: false, healthy: false };
            }
        }
        Ok(())
    }

    fn start(&self, machine: &Machine, replica: &Replica) -> anyhow::Result<Life> {
        let start = Start {
            number: self.lives + 1,
            label: format!("{}-{}", machine.service, machine.index),
            name: machine.name(&self.fleet.name),
            vmm: &self.vmm,
            arguments: arguments(&self.fleet, &replica.service, machine, &self.places),
            runtime: self.runtime.clone(),
            log: self.places.log(machine),
            health: replica.service.health.clone(),
            events: self.events.clone(),
        };
        let name = start.name.clone();
        Life::start(start).with_context(|| format!("cannot start the machine {name}"))
    }

    /// Tells those who wait when there is nothing to wait for any more.
    fn answer_waiting(&mut self) -> anyhow::Result<()> {
        let settled = self.replaced.as_ref().is_none_or(|key| self.replicas.get(key).is_none_or(Replica::is_settled))
            && self.replicas.values().all(Replica::is_settled);
        let failed: Vec<String> = self
            .replicas
            .values()
            .filter(|replica| replica.is_given_up())
            .map(|replica| replica.machine.name(&self.fleet.name))
            .collect();
        if !settled && failed.is_empty() {
            return Ok(());
        }
        let error = (!failed.is_empty()).then(|| {
            format!(
                "given up: {}; `vmm services` shows what runs, and {} why",
                failed.join(", "),
                self.places.runtime.display()
            )
        });
        for stream in self.waiting.drain(..) {
            control::answer(&stream, &Answer { error: error.clone(), ..Answer::default() });
        }
        if settled && error.is_none() && !self.was_ready {
            self.was_ready = true;
            self.say_outer(&Word::Ready)?;
        }
        Ok(())
    }
}
