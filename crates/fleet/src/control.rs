//! The control socket of a running fleet: one JSON line a request, one a reply. Only its owner can open it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::place::Place;
use crate::watch::Event;

/// The longest request: a fleet's file, and how JSON writes it.
const LONGEST: u64 = 4 << 20;
/// Who connects has something to say.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is asked of a fleet.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// What its machines are doing.
    Status,
    /// Answered when all services are started, and healthy where they say how.
    Ready,
    /// Other numbers of machines.
    Scale(BTreeMap<String, u32>),
    /// Become what this file says.
    Apply {
        /// Where it stands.
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// End.
    Down,
}

/// What is answered.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Why it was not done.
    pub(crate) error: Option<String>,
    /// What its machines are doing.
    #[serde(default)]
    pub(crate) machines: Vec<Status>,
}

/// What a machine is doing.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    /// By this name, `vmm logs` and the others know it.
    pub(crate) name: String,
    pub(crate) service: String,
    pub(crate) address: String,
    pub(crate) state: String,
    /// How often it was started again.
    pub(crate) restarts: u32,
}

/// Asks a running fleet, and waits for its answer for as long as that takes.
pub(crate) fn ask(place: &Place, request: &Request) -> anyhow::Result<Answer> {
    let path = place.socket();
    let mut stream = UnixStream::connect(&path)
        .with_context(|| format!("the fleet does not run: `vmm up` starts it (no answer at {})", path.display()))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("the fleet does not listen")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("the fleet does not answer")?;
    let answer: Answer = serde_json::from_str(&answer).context("the fleet has ended")?;
    match answer.error {
        Some(error) => bail!("{error}"),
        None => Ok(answer),
    }
}

/// Passes requests on to the watcher, each with the stream that its answer goes to.
pub(crate) fn listen(place: &Place, events: &Sender<Event>) -> anyhow::Result<()> {
    let path = place.socket();
    let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
    let events = events.clone();
    let accept = move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            // One after the other: who says nothing is not waited for, and nobody but the owner is here.
            if let Some(request) = receive(&stream)
                && events.send(Event::Request(request, stream)).is_err()
            {
                return;
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(accept).context("cannot start a thread")?;
    Ok(())
}

fn receive(stream: &UnixStream) -> Option<Request> {
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    let mut line = String::new();
    BufReader::new(stream).take(LONGEST).read_line(&mut line).ok()?;
    match serde_json::from_str(&line) {
        Ok(request) => Some(request),
        Err(error) => {
            answer(
                stream,
                &Answer { error: Some(format!("the request is not understood: {error}")), ..Answer::default() },
            );
            None
        }
    }
}

/// Answers. Who has gone does not want to know.
pub(crate) fn answer(mut stream: &UnixStream, answer: &Answer) {
    if let Ok(mut line) = serde_json::to_string(answer) {
        line.push('\n');
        let _ = stream.write_all(line.as_bytes());
    }
}
