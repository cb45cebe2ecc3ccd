//! Connections of the host: each brings one request, has a thread, and ends with the answer.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use guest::copy::{self, Limits};
use guest::frame;
use guest::request::{Answer, Program, Request};
use rustix::event::PollFlags;

use super::reaper::Reaper;
use super::{STACK, exec, log, power, probe, program, stream, sys};

/// The most connections at once.
const MOST: usize = 256;
/// How long the host may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to hang up after the answer.
const GOODBYE: Duration = Duration::from_secs(10);
/// How long the other connections may take to give their last answers when the machine goes down.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// The only one who may ask for anything. From within a guest, anybody can connect to its vsock ports.
const HOST: u32 = 2;

/// The agent at work.
pub(crate) struct Agent {
    reaper: Arc<Reaper>,
    /// It is the machine's init, and so its end; otherwise a service that has an init above it.
    is_init: bool,
    /// How many requests are being answered.
    busy: Mutex<usize>,
    changed: Condvar,
}

impl Agent {
    pub(crate) fn new(reaper: Arc<Reaper>, is_init: bool) -> Self {
        Self { reaper, is_init, busy: Mutex::new(0), changed: Condvar::new() }
    }

    /// Answers connections for ever.
    pub(crate) fn listen(self: &Arc<Self>, listener: &OwnedFd) -> ! {
        loop {
            match sys::accept_vsock(std::os::fd::AsFd::as_fd(listener)) {
                Ok((socket, HOST)) => self.accept(socket.into()),
                Ok((_, cid)) => log(&format!("Refused a connection from CID {cid}")),
                // There is no descriptor or memory left; what is there now may end.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Answers a connection on a thread of its own.
    pub(crate) fn accept(self: &Arc<Self>, stream: File) {
        if !self.begin() {
            let message = format!("The agent has {MOST} connections, which are the most: end one of them");
            let _ = frame::write_message(&mut &stream, &Answer::Failed { message });
            return;
        }
        let agent = Arc::clone(self);
        let serve = move || {
            if stream::wait_for(&stream, PollFlags::IN, PATIENCE) {
                agent.serve(&stream, || ());
            }
            agent.end();
            stream::finish(&stream, GOODBYE);
        };
        // Without a thread the connection ends, which is all that there is to say.
        if thread::Builder::new().stack_size(STACK).spawn(serve).is_err() {
            self.end();
        }
    }

    /// Answers the one request of the control connection, and hears the host out. `Ready` has been said.
    pub(crate) fn serve_main(&self, stream: &File) {
        self.begin();
        self.serve(stream, rustix::fs::sync);
        self.end();
        stream::finish(stream, GOODBYE);
    }

    /// Answers the request of a connection.
    fn serve(&self, stream: &File, before_report: fn()) {
        let answer = match frame::read_frame(&mut &*stream) {
            Ok(Some(frame)) => frame.message().and_then(|request| self.answer(stream, request, before_report)),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let answer = answer.unwrap_or_else(|error| Some(Answer::Failed { message: error.to_string() }));
        if let Some(answer) = answer {
            // If the host has gone, nobody wants to know.
            let _ = frame::write_message(&mut &*stream, &answer);
        }
    }

    /// What is left to be said after the request was dealt with.
    fn answer(&self, stream: &File, request: Request, before_report: fn()) -> io::Result<Option<Answer>> {
        match request {
            Request::Exec(exec) => {
                // Its own answers are all that there are; after an error there is nobody left to hear of it.
                let _ = exec::run(&self.reaper, stream, &exec, before_report);
                Ok(None)
            }
            Request::Put { path } => {
                copy::receive(absolute(&path)?, &mut BufReader::new(stream), Limits::NONE)?;
                Ok(Some(Answer::Done { skipped: 0 }))
            }
            Request::Get { path } => {
                let mut output = BufWriter::with_capacity(2 * frame::MOST_PAYLOAD, stream);
                let skipped = copy::send(absolute(&path)?, &mut output)?;
                output.flush()?;
                Ok(Some(Answer::Done { skipped }))
            }
            Request::Probe(wanted) => Ok(Some(match probe::run(&self.reaper, &wanted) {
                Ok(()) => Answer::Healthy,
                Err(message) => Answer::Unhealthy { message },
            })),
            Request::Shutdown { grace_ms } => self.shut_down(stream, Duration::from_millis(grace_ms)),
        }
    }

    fn shut_down(&self, stream: &File, grace: Duration) -> io::Result<Option<Answer>> {
        if !self.is_init {
            let poweroff = Program { argv: vec!["poweroff".into()], ..Program::default() };
            let prepared = program::prepare(&poweroff, false);
            let started = prepared.and_then(|prepared| prepared.start(&self.reaper));
            return started.map(|_| Some(Answer::Done { skipped: 0 })).map_err(|error| io::Error::other(error.message));
        }
        frame::write_message(&mut &*stream, &Answer::Done { skipped: 0 })?;
        power::end_processes(&self.reaper, grace);
        // Those that have just ended are still to be reported.
        let end = Instant::now() + LAST_ANSWERS;
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        while *busy > 1 {
            let Some(left) = end.checked_duration_since(Instant::now()) else { break };
            busy = self.changed.wait_timeout(busy, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        power::off()
    }

    /// Counts a connection, if there is room for it.
    fn begin(&self) -> bool {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let room = *busy < MOST;
        *busy += usize::from(room);
        room
    }

    fn end(&self) {
        *self.busy.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.changed.notify_all();
    }
}

fn absolute(path: &str) -> io::Result<&Path> {
    let path = Path::new(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(io::Error::other(format!(
        "{} does not begin with a slash: in the guest there is no folder to begin in",
        path.display()
    )))
}

#[cfg(test)]
mod tests;
