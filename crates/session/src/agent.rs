//! The way to the agent in a machine that runs, and to the process that runs it.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, bail};
use guest::request::{Answer, Request};
use guest::{GUEST_PORT, frame};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use session::Machine;

/// More than this is no answer of a vsock device's: `OK <port>`.
const LONGEST_LINE: usize = 32;

/// Connects to the machine's agent.
pub(crate) fn connect(machine: &Machine) -> anyhow::Result<UnixStream> {
    let name = &machine.record.name;
    let mut stream = socket(machine)?;
    stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes()).with_context(|| format!("{name} has ended"))?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < LONGEST_LINE {
        let mut byte = [0];
        if stream.read(&mut byte).with_context(|| format!("{name} has ended"))? == 0 {
            bail!(
                "{name} does not answer: it is still starting, or going down (`vmm logs --console {name}` shows which)"
            );
        }
        line.push(byte[0]);
    }
    Ok(stream)
}

/// Asks for something that has one answer.
pub(crate) fn ask(machine: &Machine, request: &Request) -> anyhow::Result<Answer> {
    let mut stream = connect(machine)?;
    frame::write_message(&mut stream, request)?;
    frame::read_message(&mut stream).with_context(|| format!("{} does not answer", machine.record.name))
}

/// The process that runs the machine: who listens at its socket (`SO_PEERCRED`, unix(7)), so that no number has to be
/// believed that was written down.
pub(crate) fn process(machine: &Machine) -> anyhow::Result<OwnedFd> {
    let pid = pid(machine)?;
    pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("cannot open the process of {}", machine.record.name))
}

/// Its number.
pub(crate) fn pid(machine: &Machine) -> anyhow::Result<Pid> {
    let peer = rustix::net::sockopt::socket_peercred(socket(machine)?);
    Ok(peer.with_context(|| format!("cannot tell the process of {}", machine.record.name))?.pid)
}

fn socket(machine: &Machine) -> anyhow::Result<UnixStream> {
    let path = machine.files().vsock();
    UnixStream::connect(&path).with_context(|| format!("cannot connect to {}", path.display()))
}
