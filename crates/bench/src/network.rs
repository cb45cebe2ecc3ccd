//! The rounds that need a network: the workload's and iperf3's own, and a web server under load.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use indicatif::ProgressBar;

use crate::contender::Contender;
use crate::instance::{Fault, Instance, Launch, Until, ask};
use crate::launch::Work;
use crate::measure::Group;
use crate::netns::{INSIDE, Network, OUTSIDE};
use crate::run::{How, Kinds, Run};
use crate::tools::WRK;
use crate::work::{HTTP, VERB};

const IPERF3: &str = "iperf3";
/// What whoever serves says when it does.
pub(crate) const LISTENING: &[u8] = b"bench: listening";

/// Measures what there is a network for. Without one it is skipped, with the reason.
pub(crate) fn measure(run: &mut Run<'_>, groups: &[Group], progress: &ProgressBar) -> Result<(), Fault> {
    let network = match Network::make() {
        Ok(network) => network,
        Err(error) => {
            run.report.skip("network", format!("{error:#}"));
            return Ok(());
        }
    };
    let inside = network.inside_path();
    run.network = Some(network);
    let done = rounds(run, groups, &inside, progress);
    run.network = None;
    done
}

fn rounds(run: &mut Run<'_>, groups: &[Group], inside: &std::path::Path, progress: &ProgressBar) -> Result<(), Fault> {
    let _servers = match servers(run) {
        Ok(servers) => servers,
        Err(Fault::Interrupted) => return Err(Fault::Interrupted),
        Err(Fault::Other(why)) => {
            run.report.skip("network", why);
            return Ok(());
        }
    };
    let work = |group, has_tools| Work {
        groups: vec![group],
        millis: run.millis,
        has_tools,
        network: Some(inside.to_owned()),
        has_disk: false,
    };
    let mut kinds = Vec::new();
    if groups.contains(&Group::Network) {
        let work = work("network", run.has_tool(IPERF3));
        kinds.push(Kinds { title: "network", work, how: How::Work });
    }
    if groups.contains(&Group::Services) && run.has_tool("nginx") && run.has_tool(WRK) {
        kinds.push(Kinds { title: "nginx", work: work("nginx", true), how: How::Web });
    }
    kinds.iter().try_for_each(|kind| run.rounds(kind, progress))
}

/// The other side of all measures.
fn servers(run: &Run<'_>) -> Result<Vec<Instance>, Fault> {
    let start = |command| Instance::start(Launch { command, clean: None, cpu: None, limit: Duration::from_secs(30) });
    let mut own = Command::new(run.site.root().join("init"));
    own.arg(VERB).arg("groups=serve");
    let mut own = start(own)?;
    own.wait(Until::Text(LISTENING), run.interrupt)?;
    let mut servers = vec![own];
    if run.has_tool(IPERF3) {
        // It says much in an hour, which nobody reads: a pipe would be full.
        let log = run.site.own(IPERF3).map_err(|error| Fault::Other(error.to_string()))?.join("log");
        let mut command = Command::new(IPERF3);
        command.args(["--server", "--forceflush", "--bind", &OUTSIDE.to_string(), "--logfile"]).arg(&log);
        let server = start(command)?;
        while !fs::read_to_string(&log).is_ok_and(|text| text.contains("listening")) {
            if run.interrupt.has_come() {
                return Err(Fault::Interrupted);
            }
            if server.spawned.elapsed() > Duration::from_secs(30) {
                return Err(Fault::Other("iperf3 does not listen".to_owned()));
            }
            thread::sleep(Duration::from_millis(10));
        }
        servers.push(server);
    }
    Ok(servers)
}

/// Loads the web server that listens inside.
pub(crate) fn load(run: &mut Run<'_>, contender: &Contender, round: Option<u32>) -> Result<(), Fault> {
    let seconds = (run.millis / 100).max(1);
    let mut wrk = Command::new(WRK);
    wrk.args(["--threads", "1", "--connections", "16", "--latency", "--duration", &format!("{seconds}s")]);
    wrk.arg(format!("http://{INSIDE}:{HTTP}/index.html"));
    let (_, text) = ask(wrk, Duration::from_secs(seconds + 30), run.interrupt)?;
    let (rate, latency) = read(&text).map_err(|error| Fault::Other(format!("{error:#}")))?;
    run.sample(contender, "nginx", round, rate);
    run.sample(contender, "nginx-99", round, latency);
    Ok(())
}

/// Requests a second, and milliseconds that 99 of 100 take at most.
fn read(text: &str) -> anyhow::Result<(f64, f64)> {
    let value = |name: &str| text.lines().find_map(|line| Some(line.trim().strip_prefix(name)?.trim()));
    let rate = value("Requests/sec:").and_then(|rate| rate.parse().ok()).context("wrk says no rate")?;
    let latency = value("99%").and_then(|time| {
        let end = time.find(|c: char| c.is_ascii_alphabetic())?;
        let number: f64 = time[..end].parse().ok()?;
        let unit =
            [("us", 1e-3), ("ms", 1.0), ("s", 1e3), ("m", 6e4)].into_iter().find(|(unit, _)| time[end..] == **unit);
        Some(number * unit?.1)
    });
    anyhow::ensure!(!text.contains("Non-2xx"), "the web server answers with errors");
    Ok((rate, latency.context("wrk says no latency")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_says_is_understood() {
        let text = "  Latency Distribution\n     50%  120.00us\n     99%    1.25ms\n  9000 requests in 1.0s\nRequests/sec:   8950.12\n";
        assert_eq!(read(text).unwrap(), (8950.12, 1.25));
        assert_eq!(read(&text.replace("1.25ms", "250.00us")).unwrap().1, 0.25);
        assert!(read("unable to connect").is_err());
        assert!(read(&format!("{text}Non-2xx or 3xx responses: 3\n")).is_err());
    }
}
