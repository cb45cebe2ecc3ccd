//! Whether a service in the guest answers.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use guest::request::{Check, Probe, Program};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;
use rustix::process::WaitStatus;

use super::program::prepare;
use super::reaper::Reaper;
use super::stream;

/// The most bytes of an answer that are looked at.
const MOST: usize = 1024;

/// The longest time that a probe takes, however long it may: an hour.
const LONGEST: Duration = Duration::from_secs(3600);

/// Probes once.
///
/// # Errors
///
/// A sentence that says in what way the service is not well.
pub(crate) fn run(reaper: &Reaper, probe: &Probe) -> Result<(), String> {
    let limit = Duration::from_millis(probe.timeout_ms).min(LONGEST);
    let end = Instant::now() + limit;
    match &probe.check {
        Check::Tcp { port } => connect(*port, end).map(drop),
        Check::Http { port, path } => http(*port, path, end),
        Check::Exec(program) => exec(reaper, program, end),
    }
}

/// What is left of the time, which for sockets must not be zero.
fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn connect(port: u16, end: Instant) -> Result<TcpStream, String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&address, left(end)).map_err(|error| format!("Nothing answers at port {port}: {error}"))
}

fn http(port: u16, path: &str, end: Instant) -> Result<(), String> {
    if !path.starts_with('/') || path.contains(|c: char| c.is_control() || c == ' ') {
        return Err(format!("{path:?} is no path for HTTP: it begins with a slash and has no white space"));
    }
    let stream = connect(port, end)?;
    let line = ask(&stream, path, end).map_err(|error| format!("No answer to GET {path} at port {port}: {error}"))?;
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(200..400) => Ok(()),
        Some(status) => Err(format!("GET {path} at port {port} was answered with {status}")),
        None => Err(format!("What answers at port {port} does not speak HTTP")),
    }
}

/// Asks, and returns the first line of the answer.
fn ask(mut stream: &TcpStream, path: &str, end: Instant) -> io::Result<String> {
    stream.set_write_timeout(Some(left(end)))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: vmm\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let (mut answer, mut buffer) = (Vec::new(), [0; MOST]);
    while !answer.contains(&b'\n') && answer.len() < MOST {
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left(end)))?;
        match stream.read(&mut buffer)? {
            0 => break,
            count => answer.extend_from_slice(&buffer[..count]),
        }
    }
    let line = answer.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}

fn exec(reaper: &Reaper, program: &Program, end: Instant) -> Result<(), String> {
    let mut prepared = prepare(program, false).map_err(|not_started| not_started.message)?;
    let pipe = || -> io::Result<(OwnedFd, OwnedFd, OwnedFd)> {
        let (ours, theirs) = io::pipe()?;
        Ok((ours.into(), theirs.try_clone()?.into(), theirs.into()))
    };
    let (output, out, err) = pipe().map_err(|error| format!("Cannot make a pipe: {error}"))?;
    prepared.command.stdin(std::process::Stdio::null()).stdout(out).stderr(err);
    let child = prepared.start(reaper).map_err(|not_started| not_started.message)?;
    let mut said = Said { output: Some(output), bytes: Vec::new() };
    loop {
        if let Some(status) = child.status() {
            said.take_rest();
            return verdict(status, &said.bytes);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            reaper.signal(&child, libc::SIGKILL);
            return Err("The probe has not ended in time".into());
        }
        let mut list = vec![PollFd::from_borrowed_fd(child.as_fd(), PollFlags::IN)];
        list.extend(said.output.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        // An error is a signal: there is another turn.
        let _ = poll(&mut list, Some(&stream::timespec(left)));
        if list.get(1).is_some_and(|found| !found.revents().is_empty()) {
            said.take();
        }
    }
}

/// What a program says.
struct Said {
    /// While there may be more.
    output: Option<OwnedFd>,
    /// The last of it, which says most.
    bytes: Vec<u8>,
}

impl Said {
    /// Takes some of what is there, or waits for it.
    fn take(&mut self) {
        let Some(fd) = &self.output else { return };
        let mut buffer = [0; MOST];
        match rustix::io::read(fd, &mut buffer) {
            Ok(count) if count > 0 => self.bytes.extend_from_slice(&buffer[..count]),
            _ => self.output = None,
        }
        self.bytes.drain(..self.bytes.len().saturating_sub(MOST));
    }

    /// Takes what the program had said when it ended; others may have its output still.
    fn take_rest(&mut self) {
        let there = self.output.as_ref().and_then(|fd| ioctl_fionread(fd).ok()).unwrap_or(0);
        for _ in 0..there.div_ceil(MOST as u64) {
            self.take();
        }
    }
}

fn verdict(status: WaitStatus, said: &[u8]) -> Result<(), String> {
    let how = match (status.exit_status(), status.terminating_signal()) {
        (Some(0), _) => return Ok(()),
        (Some(code), _) => format!("The probe exited with {code}"),
        (None, signal) => format!("Signal {} ended the probe", signal.unwrap_or(0)),
    };
    let said = String::from_utf8_lossy(said);
    let line = said.lines().rev().find(|line| !line.trim().is_empty());
    Err(line.map_or_else(|| how.clone(), |line| format!("{how}: {}", line.trim().replace(char::is_control, " "))))
}

#[cfg(test)]
mod tests;
