//! The control connection to the guest's agent: it sets the guest up, runs the command, and moves its streams.
//!
//! The guest is the adversary on this connection: what it sends is bounded by the frames, and whatever it does not take
//! keeps nobody waiting but the thread that has it to give.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;

use anyhow::{Context as _, anyhow, bail, ensure};
use guest::HOST_PORT;
use guest::frame::{self, Kind};
use guest::request::{Answer, Control, Exec, Request, Setup, Trouble, WINDOW};
use rustix::net::SendFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::OURS;
use super::plan::Plan;
use super::terminal::{self, Raw};

/// What a shell makes of a program that was ended by a signal.
const SIGNALLED: i32 = 128;
const SIGPIPE: i32 = 13;

/// The command as the main thread sees it.
pub(crate) struct Session {
    shared: Arc<Shared>,
    /// What the thread that talks to the agent begins with.
    start: Mutex<Option<Start>>,
}

struct Start {
    listener: UnixListener,
    setup: Setup,
    exec: Exec,
}

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
    /// The exit code, or why there is none.
    end: Option<anyhow::Result<u8>>,
}

impl Session {
    /// Listens for the guest's agent.
    pub(crate) fn listen(plan: &Plan) -> anyhow::Result<Self> {
        let path = plan.folder.guests_port(HOST_PORT);
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let ended = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("cannot make an eventfd")?;
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), ended };
        let start = Start { listener, setup: plan.setup.clone(), exec: plan.exec.clone() };
        Ok(Self { shared: Arc::new(shared), start: Mutex::new(Some(start)) })
    }

    /// Readable when the command has ended.
    pub(crate) fn ended(&self) -> &EventFd {
        &self.shared.ended
    }

    /// Whether the command has ended, or cannot be run.
    pub(crate) fn has_ended(&self) -> bool {
        self.shared.lock().end.is_some()
    }

    /// Begins to talk to the agent. The caller has blocked all signals that are not for that thread.
    pub(crate) fn start(&self) -> anyhow::Result<()> {
        let Some(start) = self.start.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let shared = Arc::clone(&self.shared);
        let talk = move || {
            let end = shared.talk(start);
            shared.end(end);
        };
        thread::Builder::new().name("session".into()).spawn(talk).context("cannot start a thread")?;
        Ok(())
    }

    /// Sends a signal to the command. Whether that was possible.
    pub(crate) fn signal(&self, signal: i32) -> bool {
        self.say(Control::Signal(signal))
    }

    /// Tells the command's terminal the size of ours.
    pub(crate) fn resize(&self) {
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
    pub(crate) fn finish(&self) -> Option<anyhow::Result<u8>> {
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
        state.end = Some(end);
        drop(state);
        self.changed.notify_all();
        let _ = self.ended.write(1);
    }

    /// Runs the command to its end. Returns its exit code.
    fn talk(self: &Arc<Self>, start: Start) -> anyhow::Result<u8> {
        let Start { listener, setup, exec } = start;
        let (mut agent, _) = listener.accept().context("cannot accept the guest's connection")?;
        drop(listener);
        frame::write_message(&mut agent, &setup).context("cannot set the guest up")?;
        match frame::read_message(&mut agent).context("cannot set the guest up")? {
            Answer::Ready => {}
            Answer::Failed { message } => bail!("the guest cannot be set up: {}", clean(&message)),
            answer => bail!("the guest answers its set-up with {answer:?}"),
        }
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
        self.pass_output(&mut agent)
    }

    /// Passes the command's output on until it ends.
    fn pass_output(&self, agent: &mut UnixStream) -> anyhow::Result<u8> {
        loop {
            let frame = frame::read_frame(agent).context("the guest's agent is at fault")?;
            let frame = frame.ok_or_else(|| anyhow!("the guest's agent has gone"))?;
            let written = match frame.kind {
                Kind::Stdout => io::stdout().write_all(&frame.payload).and_then(|()| io::stdout().flush()),
                Kind::Stderr => io::stderr().write_all(&frame.payload),
                Kind::Message => match frame.message()? {
                    Answer::Started => Ok(()),
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
                        eprintln!("vmm run: {}", clean(&message));
                        return Ok(match kind {
                            Trouble::NotFound => 127,
                            Trouble::NotExecutable => 126,
                            Trouble::Other => OURS,
                        });
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

fn signalled(signal: i32) -> u8 {
    u8::try_from(signal.clamp(0, u8::MAX.into()).saturating_add(SIGNALLED)).unwrap_or(u8::MAX)
}

/// A guest's words, in one line that does nothing to a terminal.
fn clean(message: &str) -> String {
    message.chars().take(500).collect::<String>().replace(char::is_control, " ")
}

#[cfg(test)]
mod tests;
