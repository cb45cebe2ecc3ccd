//! `vmm stats`: what machines use, from the host's own accounts of their processes (proc(5)).

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use crate::list::table;
use crate::{agent, for_people};
use session::{Machine, State, now};

/// What `vmm stats` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct StatsArgs {
    /// The machines; all that run unless said
    names: Vec<String>,
    /// In Prometheus' text format: once, or for whoever asks for http://ADDRESS:PORT/metrics
    #[arg(long, value_name = "ADDRESS:PORT", require_equals = true)]
    #[expect(clippy::option_option, reason = "the address may be left out")]
    prometheus: Option<Option<SocketAddr>>,
}

/// Fields of /proc/PID/stat behind the name.
const UTIME: usize = 11;
const STIME: usize = 12;
/// Milliseconds of a tick there.
const TICK: u64 = 10;
/// Bytes of a page on this architecture.
const PAGE: u64 = 4096;
/// How long a client may take for each of its bytes, and how many it may send.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
const MOST_HEAD: u64 = 8 << 10;

/// What one machine has used since its start.
struct Stats {
    name: String,
    /// Seconds.
    uptime: u64,
    /// Milliseconds, of its processors and its devices; helpers such as passt have their own.
    processor: u64,
    /// Bytes in the host's memory now, guest RAM included.
    resident: u64,
    /// Bytes that came from disks, and went there.
    read: u64,
    written: u64,
}

impl StatsArgs {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        if let Some(Some(address)) = self.prometheus {
            return serve(address, &self.names);
        }
        let all = all(&self.names)?;
        let mut output = io::stdout().lock();
        if self.prometheus.is_some() {
            output.write_all(prometheus(&all).as_bytes())?;
            return Ok(ExitCode::SUCCESS);
        }
        let row = |stats: &Stats| {
            vec![
                stats.name.clone(),
                for_people(stats.uptime),
                format!("{}.{:02} s", stats.processor / 1000, stats.processor % 1000 / 10),
                format!("{} MiB", stats.resident >> 20),
                format!("{} MiB", stats.read >> 20),
                format!("{} MiB", stats.written >> 20),
            ]
        };
        let rows: Vec<_> = all.iter().map(row).collect();
        table(&mut output, &["NAME", "UP", "PROCESSOR", "MEMORY", "READ", "WRITTEN"], &rows)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn all(names: &[String]) -> anyhow::Result<Vec<Stats>> {
    let machines = match names.is_empty() {
        true => Machine::all()?.into_iter().filter(|machine| machine.state == State::Running).collect(),
        false => names.iter().map(|name| Machine::running(name)).collect::<anyhow::Result<Vec<_>>>()?,
    };
    // One that ends meanwhile has none.
    Ok(machines.iter().filter_map(|machine| Stats::of(machine).ok()).collect())
}

impl Stats {
    fn of(machine: &Machine) -> anyhow::Result<Self> {
        let pid = agent::pid(machine)?.as_raw_nonzero();
        let file = |name| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        // What is in front of the last bracket is the process' name.
        let stat = file("stat")?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        let pages = file("statm")?.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        let io = file("io").unwrap_or_default();
        let bytes = |name| {
            let value = io.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        Ok(Self {
            name: machine.record.name.clone(),
            uptime: now().saturating_sub(machine.record.started),
            processor: (ticks(UTIME) + ticks(STIME)).saturating_mul(TICK),
            resident: pages.saturating_mul(PAGE),
            read: bytes("read_bytes"),
            written: bytes("write_bytes"),
        })
    }
}

/// Its name, its kind, and how it is written.
type Measure = (&'static str, &'static str, fn(&Stats) -> String);

/// The text format of Prometheus: for each measure its kind, then a line for each machine.
fn prometheus(all: &[Stats]) -> String {
    let measures: [Measure; 5] = [
        ("uptime_seconds", "gauge", |stats| stats.uptime.to_string()),
        ("processor_seconds_total", "counter", |stats| {
            format!("{}.{:03}", stats.processor / 1000, stats.processor % 1000)
        }),
        ("resident_bytes", "gauge", |stats| stats.resident.to_string()),
        ("disk_read_bytes_total", "counter", |stats| stats.read.to_string()),
        ("disk_written_bytes_total", "counter", |stats| stats.written.to_string()),
    ];
    let mut text = String::new();
    for (name, kind, value) in measures {
        text.push_str(&format!("# TYPE vmm_{name} {kind}\n"));
        for stats in all {
            text.push_str(&format!("vmm_{name}{{machine=\"{}\"}} {}\n", stats.name, value(stats)));
        }
    }
    text
}

/// Answers every request with the text of the moment, one client after the other.
fn serve(address: SocketAddr, names: &[String]) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
    eprintln!("vmm stats: http://{}/metrics", listener.local_addr().context("cannot tell the address")?);
    for client in listener.incoming().flatten() {
        // A client that goes, or says nothing, has lost its own turn only.
        let _ = answer(&client, names);
    }
    Ok(ExitCode::SUCCESS)
}

fn answer(mut client: &TcpStream, names: &[String]) -> anyhow::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut head = Vec::new();
    for line in BufReader::new(client.take(MOST_HEAD)).split(b'\n') {
        let line = line?;
        if line.trim_ascii().is_empty() {
            break;
        }
        head.extend_from_slice(&line);
    }
    let known = head.starts_with(b"GET /metrics ");
    let (status, body) = match known {
        true => ("200 OK", prometheus(&all(names)?)),
        false => ("404 Not Found", String::from("GET /metrics is what there is\n")),
    };
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    client.write_all(answer.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_measure_has_a_kind_and_a_line_for_each_machine() {
        let stats =
            |name: &str| Stats { name: name.into(), uptime: 3, processor: 1250, resident: 4096, read: 0, written: 7 };
        let text = prometheus(&[stats("a"), stats("b")]);
        assert!(text.contains(
            "# TYPE vmm_processor_seconds_total counter\nvmm_processor_seconds_total{machine=\"a\"} 1.250\n"
        ));
        assert_eq!(text.lines().count(), 15);
    }
}
