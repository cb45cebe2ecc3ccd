//! The process that starts the helpers of a confined machine, which cannot start anything by itself.
//!
//! ```text
//! vmm ── "start share data" ──▶ starter ──▶ virtiofsd, passt
//!  ▲                               │
//!  └──── two sockets, or why not ──┘
//! ```
//!
//! It is forked before the machine is built and has not been confined. What is asked of it is the name of a device of the
//! machine's configuration, as that was then, and nothing else: a machine that was taken over can start and end its own
//! helpers and no other program. It ends with the machine, and its helpers with it.
#![allow(unsafe_code, reason = "fork has no safe form")]

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, anyhow, bail, ensure};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::helper::{self, Words};
use crate::list::Devices;

/// No request and no answer is longer, in bytes.
const LONGEST: usize = 4096;
/// The first byte of a request, before the device's name, and of an answer, before its words.
const START: u8 = b's';
const END: u8 = b'e';
const FAILED: u8 = b'f';

/// The way to it. The machine's threads share it: a helper is started again by the thread of its device, and the lock keeps
/// each answer with its request.
#[derive(Clone)]
pub struct Starter(Arc<Mutex<OwnedFd>>);

/// How a device's helper is started.
pub(crate) enum Helper {
    /// By this process.
    Own(Box<dyn Fn() -> anyhow::Result<Launched> + Send>),
    /// By the starter, under the device's name.
    Starter(Starter, String),
}

/// A helper that has been started.
pub(crate) struct Launched {
    pub(crate) child: Child,
    /// What it is spoken to by.
    pub(crate) socket: UnixStream,
    pub(crate) words: Words,
}

/// A helper that runs.
pub(crate) struct Running {
    child: Handle,
    pub(crate) socket: Option<UnixStream>,
    pub(crate) words: Words,
}

enum Handle {
    Own(Child),
    Starter(Starter, String),
}

impl Helper {
    /// Starts it.
    pub(crate) fn start(&self) -> anyhow::Result<Running> {
        match self {
            Self::Own(launch) => {
                let Launched { child, socket, words } = launch()?;
                Ok(Running { child: Handle::Own(child), socket: Some(socket), words })
            }
            Self::Starter(starter, name) => {
                let (_, sockets) = starter.ask(START, name)?;
                let sockets: [OwnedFd; 2] =
                    sockets.try_into().map_err(|_| anyhow!("{name}: the starter gave no sockets"))?;
                let [socket, words] = sockets.map(UnixStream::from);
                let child = Handle::Starter(starter.clone(), name.clone());
                Ok(Running { child, socket: Some(socket), words: Words(words) })
            }
        }
    }
}

impl Running {
    /// Ends it, and says how it has ended. One that ended by itself is only waited for; either way this is short.
    pub(crate) fn end(&mut self) -> String {
        match &mut self.child {
            Handle::Own(child) => helper::end(child),
            Handle::Starter(starter, name) => {
                starter.ask(END, name).map_or_else(|error| error.to_string(), |(words, _)| words)
            }
        }
    }
}

impl Starter {
    /// Forks it off, where `devices` have helpers. The process has one thread yet.
    ///
    /// # Errors
    ///
    /// The host has no room for a process.
    pub fn fork(devices: &Devices) -> anyhow::Result<Option<Self>> {
        if devices.helpers().is_empty() {
            return Ok(None);
        }
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).context(CANNOT)?;
        // SAFETY: there is no other thread whose locks the child could find held.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).context(CANNOT),
            0 => {
                drop(ours);
                serve(&theirs, devices);
                // SAFETY: ends this process without what the other one does at its end.
                unsafe { libc::_exit(0) }
            }
            _ => Ok(Some(Self(Arc::new(Mutex::new(ours))))),
        }
    }

    fn ask(&self, what: u8, name: &str) -> anyhow::Result<(String, Vec<OwnedFd>)> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let request = [&[what], name.as_bytes()].concat();
        let gone = "the process that starts helpers has gone: start the machine again";
        rustix::net::send(&*socket, &request, SendFlags::NOSIGNAL).context(gone)?;
        let (answer, sockets) = receive(&socket).context(gone)?;
        let (kind, words) = answer.split_first().context(gone)?;
        let words = String::from_utf8_lossy(words).into_owned();
        ensure!(*kind != FAILED, "{words}");
        Ok((words, sockets))
    }
}

const CANNOT: &str = "Cannot fork the process that starts helpers";

/// The starter's life.
fn serve(socket: &OwnedFd, devices: &Devices) {
    log::set_max_level(log::LevelFilter::Off);
    if let Err(error) = leave(socket) {
        let _ = answer(socket, FAILED, &format!("{CANNOT}: {error}"), None);
        return;
    }
    let mut running = HashMap::new();
    while let Ok((request, _)) = receive(socket) {
        // Nothing at all: the machine has ended.
        let Some((what, name)) = request.split_first() else { break };
        let answered = match obey(*what, &String::from_utf8_lossy(name), devices, &mut running) {
            Ok((words, None)) => answer(socket, *what, &words, None),
            Ok((words, Some((data, said)))) => answer(socket, *what, &words, Some([data.as_fd(), said.as_fd()])),
            Err(error) => answer(socket, FAILED, &format!("{error:#}"), None),
        };
        if answered.is_err() {
            break;
        }
    }
    running.values_mut().for_each(|child| drop(helper::end(child)));
}

/// Lets go of what is the machine's: its descriptors, its terminal, and the signals that are sent to it from there.
fn leave(socket: &OwnedFd) -> io::Result<()> {
    rustix::process::setpgid(None, None)?;
    rustix::thread::set_name(c"vmm-helpers")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let kept = socket.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: it takes numbers; what is closed here is used by nobody in this process any more.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
    // It is closed already.
    std::mem::forget(null);
    Ok(())
}

type Sockets = (UnixStream, UnixStream);

fn obey(
    what: u8,
    name: &str,
    devices: &Devices,
    running: &mut HashMap<String, Child>,
) -> anyhow::Result<(String, Option<Sockets>)> {
    let ended = running.remove(name).map(|mut child| helper::end(&mut child));
    match what {
        START => {
            let helpers = devices.helpers();
            let (_, launch) = helpers.iter().find(|(known, _)| known == name).context("there is no such helper")?;
            let Launched { child, socket, words } = launch()?;
            running.insert(name.to_owned(), child);
            Ok((String::new(), Some((socket, words.0))))
        }
        END => Ok((ended.unwrap_or_default(), None)),
        _ => bail!("there is no such request"),
    }
}

fn answer(
    socket: &OwnedFd,
    kind: u8,
    words: &str,
    sockets: Option<[std::os::fd::BorrowedFd<'_>; 2]>,
) -> io::Result<()> {
    let words = &words.as_bytes()[..words.len().min(LONGEST - 1)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(sockets) = &sockets {
        control.push(SendAncillaryMessage::ScmRights(sockets));
    }
    sendmsg(socket, &[IoSlice::new(&[kind]), IoSlice::new(words)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// One message, which is empty at the end, and the descriptors that came with it.
fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    bytes.truncate(received.bytes);
    let sockets = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    Ok((bytes, sockets.flatten().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_of_a_starter_is_a_name_of_the_configuration_or_nothing() {
        let devices = Devices { net: vec![kv::from_str("user").unwrap()], ..Devices::default() };
        let starter = Starter::fork(&devices).unwrap().expect("there is a helper");
        for (what, name) in [(START, "sh"), (START, "/bin/sh"), (START, ""), (b'x', "user"), (0, "")] {
            let refusal = starter.ask(what, name).expect_err("it is refused").to_string();
            assert!(refusal.contains("there is no such"), "{refusal}");
        }
        assert_eq!(starter.ask(END, "user").unwrap().0, "", "it does not run");
        assert!(Starter::fork(&Devices::default()).unwrap().is_none());
    }
}
