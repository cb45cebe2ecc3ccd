//! Asks the agent in a machine, over the machine's vsock, whether its service does its work.
//!
//! The guest is the adversary: what it answers is one short line and one frame, and it has so long for each.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest::GUEST_PORT;
use guest::frame;
use guest::request::{Answer, Check, Probe, Request};

/// How long a machine has to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// `OK` and a port.
const LONGEST_LINE: usize = 32;

/// The socket by which the machine with this name is reached.
pub(crate) fn socket(runtime: &Path, name: &str) -> PathBuf {
    runtime.join("vmm").join(name).join("vsock")
}

/// Whether the agent is there.
pub(crate) fn is_up(socket: &Path) -> bool {
    connect(socket).is_ok()
}

/// Whether the service does its work.
pub(crate) fn is_healthy(socket: &Path, check: &Check, timeout: Duration) -> io::Result<bool> {
    let mut stream = connect(socket)?;
    stream.set_read_timeout(Some(timeout + CONNECT))?;
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    frame::write_message(&mut stream, &Request::Probe(Probe { check: check.clone(), timeout_ms }))?;
    Ok(frame::read_message::<Answer>(&mut stream)? == Answer::Healthy)
}

/// Connects to the agent, as Firecracker's protocol has it.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.set_write_timeout(Some(CONNECT))?;
    stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        if line.len() == LONGEST_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}
