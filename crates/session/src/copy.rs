//! `vmm cp`: copies files and folders into a machine, or out of it.

use std::io::{BufReader, BufWriter, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use guest::copy::{self, Limits};
use guest::frame;
use guest::request::{Answer, Request};

use crate::agent;
use session::Machine;

/// What `vmm cp` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct CopyArgs {
    /// A file or folder; of a machine's, NAME:/PATH
    from: String,
    /// Where it goes: into a folder that is there, or else under this very name
    to: String,
}

impl CopyArgs {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let skipped = match (place(&self.from), place(&self.to)) {
            (None, Some((name, path))) => put(Path::new(&self.from), &Machine::running(name)?, path)?,
            (Some((name, path)), None) => get(&Machine::running(name)?, path, Path::new(&self.to))?,
            _ => bail!("say one path of a machine's, as NAME:/PATH, and one of this host's"),
        };
        if skipped > 0 {
            eprintln!("vmm cp: left out what is neither a file nor a folder nor a link: {skipped}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The machine and the path in it; none for a path of the host's, as which `./a:b` is meant.
fn place(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(name, _)| !name.is_empty() && !name.contains('/'))
}

fn put(from: &Path, machine: &Machine, path: &str) -> anyhow::Result<u64> {
    let mut stream = agent::connect(machine)?;
    frame::write_message(&mut stream, &Request::Put { path: path.to_owned() })?;
    let mut output = BufWriter::with_capacity(2 * frame::MOST_PAYLOAD, &stream);
    let sent = copy::send(from, &mut output).and_then(|skipped| output.flush().map(|()| skipped));
    drop(output);
    // The guest's reason is the better one, where it has one.
    if sent.is_err() {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let answer = frame::read_message(&mut stream);
    match (sent, answer) {
        (Ok(skipped), Ok(Answer::Done { .. })) => Ok(skipped),
        (Err(error), Ok(Answer::Failed { .. }) | Err(_)) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).with_context(|| format!("cannot copy {}", from.display()))
        }
        (_, Ok(Answer::Failed { message })) => bail!("{}: {}", machine.record.name, session::clean(&message)),
        (_, answer) => bail!("{} answers a copy with {answer:?}", machine.record.name),
    }
}

/// The guest says what the names are; [`copy::receive`] keeps them below `to`.
fn get(machine: &Machine, path: &str, to: &Path) -> anyhow::Result<u64> {
    let mut stream = agent::connect(machine)?;
    frame::write_message(&mut stream, &Request::Get { path: path.to_owned() })?;
    let mut input = BufReader::with_capacity(2 * frame::MOST_PAYLOAD, stream);
    // What it says can be the guest's words.
    let received = copy::receive(to, &mut input, Limits::NONE);
    received.map_err(|error| anyhow!("cannot copy {path}: {}", session::clean(&error.to_string())))?;
    match frame::read_message(&mut input)? {
        Answer::Done { skipped } => Ok(skipped),
        answer => bail!("{} answers a copy with {answer:?}", machine.record.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_s_path_has_its_name_and_a_colon_in_front() {
        assert_eq!(place("web:/etc/hosts"), Some(("web", "/etc/hosts")));
        for host in ["/etc/hosts", "hosts", "./a:b", "/a:b", ":/x"] {
            assert_eq!(place(host), None, "{host}");
        }
    }
}
