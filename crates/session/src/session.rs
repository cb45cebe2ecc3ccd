//! A connection to the guest's agent: it sets the guest up if it is the first, runs the command, and moves its streams.
//!
//! The guest is the adversary on this connection: what it sends is bounded by the frames, and whatever it does not take
//! keeps nobody waiting but the thread that has it to give.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;

use anyhow::{Context as _, anyhow, bail, ensure};
use guest::HOST_PORT;
use guest::frame::{self, Frame, Kind};
use guest::request::{Answer, Control, Exec, Request, Setup, Trouble, WINDOW};
use rustix::net::SendFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::terminal::{self, Raw};
use crate::{Files, OutputLog};

/// The exit code for all that is ours and not the command's, as container tools have it.
pub const OURS: u8 = 125;

/// What a shell makes of a program that was ended by a signal.
const SIGNALLED: i32 = 128;
const SIGPIPE: i32 = 13;

/// The command as the main thread sees it.
pub struct Session {
    shared: Arc<Shared>,
    /// What the thread that talks to the agent begins with.
    start: Mutex<Option<Start>>,
    folder: Option<PathBuf>,
}

struct Start {
    way: Way,
    exec: Exec,
    output: Output,
}

/// How the agent is reached.
enum Way {
    /// It connects, and is to set the guest up.
    Listen(UnixListener, Setup),
    /// The guest is set up.
    Connected(UnixStream),
}

/// Where the command's output goes.
enum Output {
    /// To our own.
    Streams,
    /// Into a file. Somebody waits to hear that the command runs.
    Log(OutputLog, Option<Ready>),
}

/// The command did not come to run.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct NotStarted {
    /// The exit code for that, as shells and container tools have it.
    pub code: u8,
    message: String,
}

/// The exit code for a command that did not come to its end.
pub fn code_of(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<NotStarted>().map_or(OURS, |error| error.code)
}

/// What is to be done once the command runs.
pub type Ready = Box<dyn FnOnce() -> anyhow::Result<()> + Send>;

/// The main thread, the thread that talks to the agent, and the one that reads standard input have this.
struct Shared {
    state: Mutex<State>,
    /// There is more room in the window, or the command has ended.
    changed: Condvar,
    /// Written when the command has ended.
    ended: EventFd,
}

#[derive(Default)]
struct State {
    /// To the agent, while the command runs.
    agent: Option<UnixStream>,
    /// How many bytes of standard input the agent takes.
    window: usize,
    terminal: Option<Raw>,
    /// The command came to run.
    started: bool,
    /// The exit code, or why there is none.
    end: Option<anyhow::Result<u8>>,
}

impl Session {
    /// Listens for the agent of a guest that is about to start. With a log the command's output goes there, and `ready` is
    /// called when it runs.
    ///
    /// # Errors
    ///
    /// The machine's socket cannot be made.
    pub fn listen(files: Files<'_>, setup: Setup, exec: Exec, log: Option<(OutputLog, Ready)>) -> anyhow::Result<Self> {
        let path = files.guests_port(HOST_PORT);
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let output = log.map_or(Output::Streams, |(log, ready)| Output::Log(log, Some(ready)));
        let session = Self::new(Way::Listen(listener, setup), exec, output)?;
        Ok(Self { folder: Some(files.folder().to_owned()), ..session })
    }

    /// One more command, by a connection to the agent of a guest that runs.
    pub fn connected(agent: UnixStream, exec: Exec) -> anyhow::Result<Self> {
        Self::new(Way::Connected(agent), exec, Output::Streams)
    }

    fn new(way: Way, exec: Exec, output: Output) -> anyhow::Result<Self> {
        let ended = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("cannot make an eventfd")?;
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), ended };
        Ok(Self { shared: Arc::new(shared), start: Mutex::new(Some(Start { way, exec, output })), folder: None })
    }

    /// The folder of its machine, if that is this process's.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Readable when the command has ended.
    pub fn ended(&self) -> &EventFd {
        &self.shared.ended
    }

    /// Whether the command has ended, or cannot be run.
    pub fn has_ended(&self) -> bool {
        self.shared.lock().end.is_some()
    }

    /// Whether the command came to run.
    pub fn has_started(&self) -> bool {
        self.shared.lock().started
    }

    /// Begins to talk to the agent, on a thread that calls `at_start` first. The caller has blocked all signals that are not
    /// for that thread.
    pub fn start(&self, at_start: fn()) -> anyhow::Result<()> {
        let Some(start) = self.start.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let shared = Arc::clone(&self.shared);
        let talk = move || {
            at_start();
            let end = shared.talk(start);
            shared.end(end);
        };
        thread::Builder::new().name("session".into()).spawn(talk).context("cannot start a thread")?;
        Ok(())
    }

    /// Sends a signal to the command. Whether that was possible.
    pub fn signal(&self, signal: i32) -> bool {
        self.say(Control::Signal(signal))
    }

    /// Tells the command's terminal the size of ours.
    pub fn resize(&self) {
        if let Some(size) = terminal::size() {
            self.say(Control::Resize(size));
        }
    }

    /// Says something to the running command, if that takes no time.
    fn say(&self, control: Control) -> bool {
        let state = match self.shared.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            // Standard input is being sent to a guest that does not take it.
            Err(TryLockError::WouldBlock) => return false,
        };
        let Some(agent) = &state.agent else { return false };
        let mut bytes = Vec::new();
        let sent = frame::encode_message(&control, &mut bytes)
            .and_then(|()| Ok(rustix::net::send(agent, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?));
        sent.is_ok_and(|sent| sent == bytes.len())
    }

    /// The exit code, or why there is none; nothing if the command has not ended. The terminal is as it was.
    pub fn finish(&self) -> Option<anyhow::Result<u8>> {
        let mut state = self.shared.lock();
        state.terminal = None;
        state.agent = None;
        state.end.take()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: anyhow::Result<u8>) {
        let mut state = self.lock();
        state.terminal = None;
        // What is left of the command is to hear that nobody listens.
        state.agent = None;
        state.end = Some(end);
        drop(state);
        self.changed.notify_all();
        let _ = self.ended.write(1);
    }

    /// Runs the command to its end. Returns its exit code.
    fn talk(self: &Arc<Self>, start: Start) -> anyhow::Result<u8> {
        let Start { way, exec, mut output } = start;
        let mut agent = match way {
            Way::Listen(listener, setup) => set_up(&listener, &setup)?,
            Way::Connected(agent) => agent,
        };
        if exec.terminal.is_some() {
            self.lock().terminal = Some(Raw::enter()?);
        }
        let stdin = exec.stdin;
        frame::write_message(&mut agent, &Request::Exec(exec)).context("cannot run the command")?;
        let mut state = self.lock();
        state.agent = Some(agent.try_clone().context("cannot duplicate a socket")?);
        state.window = WINDOW;
        drop(state);
        if stdin {
            let shared = Arc::clone(self);
            let pass = move || shared.pass_input();
            thread::Builder::new().name("stdin".into()).spawn(pass).context("cannot start a thread")?;
        }
        self.pass_output(&mut agent, &mut output)
    }

    /// Passes the command's output on until it ends.
    fn pass_output(&self, agent: &mut UnixStream, output: &mut Output) -> anyhow::Result<u8> {
        loop {
            let frame = frame::read_frame(agent).context("the guest's agent is at fault")?;
            let frame = frame.ok_or_else(|| anyhow!("the guest's agent has gone"))?;
            let written = match frame.kind {
                Kind::Stdout | Kind::Stderr => output.write(&frame),
                Kind::Message => match frame.message()? {
                    Answer::Started => {
                        self.lock().started = true;
                        output.started()?;
                        Ok(())
                    }
                    Answer::Window { bytes } => {
                        let mut state = self.lock();
                        state.window = state.window.saturating_add(bytes as usize).min(WINDOW);
                        drop(state);
                        self.changed.notify_all();
                        Ok(())
                    }
                    Answer::Exited { code } => return Ok(code),
                    Answer::Killed { signal } => return Ok(signalled(signal)),
                    Answer::NotStarted { kind, message } => {
                        let code = match kind {
                            Trouble::NotFound => 127,
                            Trouble::NotExecutable => 126,
                            Trouble::Other => OURS,
                        };
                        bail!(NotStarted { code, message: clean(&message) });
                    }
                    Answer::Failed { message } => bail!("the guest cannot run the command: {}", clean(&message)),
                    answer => bail!("the guest answers a command with {answer:?}"),
                },
                kind => bail!("the guest answers a command with {kind:?}"),
            };
            match written {
                // As if the reader had been the command's own.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(signalled(SIGPIPE)),
                written => written.context("cannot write the command's output")?,
            }
        }
    }

    /// Passes standard input on until it or the command ends.
    fn pass_input(&self) {
        let mut buffer = vec![0; WINDOW];
        loop {
            let read = match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.unwrap_or(0),
            };
            if self.send_input(&buffer[..read]).is_err() || read == 0 {
                return;
            }
        }
    }

    /// Sends input as the window has room for it; nothing stands for its end.
    fn send_input(&self, mut input: &[u8]) -> anyhow::Result<()> {
        loop {
            let blocked = |state: &mut State| state.window == 0 && state.end.is_none() && !input.is_empty();
            let mut state = self.changed.wait_while(self.lock(), blocked).unwrap_or_else(PoisonError::into_inner);
            ensure!(state.end.is_none(), "the command has ended");
            let (now, later) = input.split_at(input.len().min(state.window));
            state.window -= now.len();
            let agent = state.agent.as_mut().context("the command has ended")?;
            frame::write_frame(agent, Kind::Stdin, now)?;
            input = later;
            if input.is_empty() {
                return Ok(());
            }
        }
    }
}

impl Output {
    fn write(&mut self, frame: &Frame) -> io::Result<()> {
        match (self, frame.kind) {
            (Self::Log(log, _), kind) => log.write(kind, &frame.payload),
            (Self::Streams, Kind::Stderr) => io::stderr().write_all(&frame.payload),
            (Self::Streams, _) => io::stdout().write_all(&frame.payload).and_then(|()| io::stdout().flush()),
        }
    }

    /// Tells who waits for it that the command runs.
    fn started(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Log(_, ready) => ready.take().map_or(Ok(()), |ready| ready()),
            Self::Streams => Ok(()),
        }
    }
}

/// Waits for the agent, and has it set the guest up.
fn set_up(listener: &UnixListener, setup: &Setup) -> anyhow::Result<UnixStream> {
    let (mut agent, _) = listener.accept().context("cannot accept the guest's connection")?;
    frame::write_message(&mut agent, setup).context("cannot set the guest up")?;
    match frame::read_message(&mut agent).context("cannot set the guest up")? {
        Answer::Ready => Ok(agent),
        Answer::Failed { message } => bail!("the guest cannot be set up: {}", clean(&message)),
        answer => bail!("the guest answers its set-up with {answer:?}"),
    }
}

fn signalled(signal: i32) -> u8 {
    u8::try_from(signal.clamp(0, u8::MAX.into()).saturating_add(SIGNALLED)).unwrap_or(u8::MAX)
}

/// A guest's words, in one line that does nothing to a terminal.
pub fn clean(message: &str) -> String {
    message.chars().take(500).collect::<String>().replace(char::is_control, " ")
}

#[cfg(test)]
mod tests;
