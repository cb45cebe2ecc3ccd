//! The host's side of a connection, for tests: the agent is at the other end of a pair of sockets.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use guest::frame::{self, Frame, Kind};
use guest::request::{Answer, Control, Exec, Program, Request};
use serde::Serialize;

use super::reaper::Reaper;
use super::serve::Agent;

/// The one of this process: two would take each other's children.
pub(crate) fn reaper() -> &'static Arc<Reaper> {
    static REAPER: OnceLock<Arc<Reaper>> = OnceLock::new();
    REAPER.get_or_init(|| Reaper::start().expect("there is room for a thread"))
}

pub(crate) fn agent() -> &'static Arc<Agent> {
    static AGENT: OnceLock<Arc<Agent>> = OnceLock::new();
    AGENT.get_or_init(|| Arc::new(Agent::new(Arc::clone(reaper()), false)))
}

/// A connection to the agent.
pub(crate) struct Host {
    pub(crate) stream: UnixStream,
}

/// All that a program had to say.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) out: Vec<u8>,
    pub(crate) err: Vec<u8>,
    /// Bytes that were given back to the window.
    pub(crate) window: usize,
    pub(crate) end: Option<Answer>,
}

impl Host {
    pub(crate) fn connect() -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        agent().accept(File::from(OwnedFd::from(theirs)));
        Self { stream }
    }

    pub(crate) fn ask(request: &Request) -> Self {
        let host = Self::connect();
        host.say(request);
        host
    }

    pub(crate) fn exec(exec: Exec) -> Self {
        Self::ask(&Request::Exec(exec))
    }

    pub(crate) fn say(&self, message: &impl Serialize) {
        frame::write_message(&mut &self.stream, message).unwrap();
    }

    pub(crate) fn control(&self, control: Control) {
        self.say(&control);
    }

    pub(crate) fn stdin(&self, bytes: &[u8]) {
        frame::write_frame(&mut &self.stream, Kind::Stdin, bytes).unwrap();
    }

    pub(crate) fn frame(&self) -> Option<Frame> {
        frame::read_frame(&mut &self.stream).unwrap()
    }

    pub(crate) fn answer(&self) -> Answer {
        self.frame().expect("an answer").message().unwrap()
    }

    /// Listens to a program until `enough`, or to its end.
    pub(crate) fn listen_until(&self, said: &mut Said, enough: impl Fn(&Said) -> bool) {
        while said.end.is_none() && !enough(said) {
            let frame = self.frame().expect("the program's end comes first");
            match frame.kind {
                Kind::Stdout => said.out.extend(frame.payload),
                Kind::Stderr => said.err.extend(frame.payload),
                _ => match frame.message().unwrap() {
                    Answer::Started => {}
                    Answer::Window { bytes } => said.window += bytes as usize,
                    end => said.end = Some(end),
                },
            }
        }
    }

    pub(crate) fn listen(&self) -> Said {
        let mut said = Said::default();
        self.listen_until(&mut said, |_| false);
        said
    }
}

pub(crate) fn program(argv: &[&str]) -> Program {
    Program { argv: argv.iter().map(ToString::to_string).collect(), ..Program::default() }
}

/// A line of shell.
pub(crate) fn shell(line: &str) -> Exec {
    Exec { program: program(&["sh", "-c", line]), ..Exec::default() }
}
