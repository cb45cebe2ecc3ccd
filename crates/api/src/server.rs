//! The thread `api`: lets clients in, reads their requests, hands them to the machine's thread, and writes what that
//! replies. It never blocks but where it waits for all of them together.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use devices::unix;
use machine::{ControlError, ControlReply, ControlRequest};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use crate::connection::Connection;
use crate::http::{Fault, Response};
use crate::route::{Render, Routed, respond, route};

/// Clients that can be connected at a time.
const MOST_CONNECTIONS: usize = 16;
/// Clients that wait to be let in.
const BACKLOG: i32 = 16;
/// How long nobody is let in after the host had no room for one.
const RECOVERY: Duration = Duration::from_secs(1);

/// What epoll reports. Larger numbers are connections.
const LISTENER: u64 = 0;
const WAKE: u64 = 1;

/// The control socket of one process. With it go its thread and its file.
pub struct Server {
    calls: Receiver<Call>,
    called: EventFd,
    mailbox: Mailbox,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    /// The file's device and inode, to know it again.
    file: Option<(u64, u64)>,
}

/// The way to the thread.
#[derive(Clone)]
struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

enum Message {
    Reply(u64, Response),
    End,
}

impl Mailbox {
    fn send(&self, message: Message) {
        // Either fails only when the thread has ended, or is awake anyway.
        let _ = self.sender.send(message);
        let _ = self.wake.write(1);
    }
}

/// A request that waits for the machine.
pub struct Call {
    request: ControlRequest,
    render: Render,
    connection: u64,
    mailbox: Mailbox,
}

impl Call {
    /// Has the machine do what is asked, and sends its reply back.
    pub fn answer(self, perform: impl FnOnce(ControlRequest) -> Result<ControlReply, ControlError>) {
        let response = respond(perform(self.request), self.render);
        self.mailbox.send(Message::Reply(self.connection, response));
    }
}

impl Server {
    /// Makes the socket, which only this user can connect to, and starts the thread, which calls
    /// `at_start` first.
    ///
    /// # Errors
    ///
    /// What is wrong with the path; or the host has no room for a thread and four descriptors.
    pub fn listen(path: &Path, at_start: fn()) -> anyhow::Result<Self> {
        let eventfd = |flags| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC | flags).context("Cannot make an eventfd");
        let (called, wake) = (eventfd(EFD_SEMAPHORE)?, Arc::new(eventfd(0)?));
        let (sender, messages) = channel();
        let mailbox = Mailbox { sender, wake };
        let (call, calls) = sync_channel(MOST_CONNECTIONS);
        let listener = unix::listen(path, BACKLOG, "--api-socket")?;
        let event_loop = Loop {
            epoll: Epoll::new().context("Cannot make an event loop")?,
            listener,
            closed_until: None,
            connections: BTreeMap::new(),
            next: WAKE + 1,
            call,
            called: called.try_clone().context("Cannot duplicate an eventfd")?,
            messages,
            mailbox: mailbox.clone(),
        };
        event_loop.watch(&event_loop.listener, LISTENER).context("Cannot watch the control socket")?;
        event_loop.watch(&*mailbox.wake, WAKE).context("Cannot watch an eventfd")?;
        let thread = Builder::new().name("api".into()).spawn(move || {
            at_start();
            event_loop.run();
        });
        let thread = Some(thread.context("Cannot start the control socket's thread")?);
        Ok(Self { calls, called, mailbox, thread, path: path.to_owned(), file: identity(path) })
    }

    /// Readable when there may be a call. Each read is for one, as with a semaphore.
    pub fn called(&self) -> &EventFd {
        &self.called
    }

    /// The next call, if there is one.
    pub fn next_call(&self) -> Option<Call> {
        self.calls.try_recv().ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.mailbox.send(Message::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Another VMM's, which has replaced ours, is left alone. At worst a dead socket stays, and the next VMM replaces it.
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

struct Loop {
    epoll: Epoll,
    listener: UnixListener,
    /// The host had no room for another client; until then nobody is let in.
    closed_until: Option<Instant>,
    /// By the numbers that epoll reports, which are never used again.
    connections: BTreeMap<u64, Client>,
    next: u64,
    call: SyncSender<Call>,
    called: EventFd,
    messages: Receiver<Message>,
    mailbox: Mailbox,
}

struct Client {
    connection: Connection,
    watched: EventSet,
}

impl Loop {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); MOST_CONNECTIONS + 2];
        loop {
            let count = match self.epoll.wait(self.timeout(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return log::error!("The control socket is closed, epoll refuses to wait: {error}"),
            };
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept(),
                    WAKE => {
                        if self.obey() {
                            return;
                        }
                    }
                    id => self.advance(id, event.event_set()),
                }
            }
            self.drop_stalled();
        }
    }

    /// Lets in who waits, as many as there are places: the rest have another turn.
    fn accept(&mut self) {
        for _ in 0..MOST_CONNECTIONS {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                Err(error) => {
                    log::warn!("The control socket lets nobody in for {RECOVERY:?}: {error}");
                    self.closed_until = Some(Instant::now() + RECOVERY);
                    self.rewatch(&self.listener, LISTENER, EventSet::empty());
                    return;
                }
            };
            // The end of the last handle closes it, which tells its client enough.
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let mut connection = Connection::new(stream);
            if self.connections.len() >= MOST_CONNECTIONS && !self.drop_idlest() {
                connection.fail(&Fault {
                    status: 503,
                    message: format!("{MOST_CONNECTIONS} other clients are connected and busy: try again"),
                });
                let _ = connection.send();
                continue;
            }
            if self.watch(&connection, self.next).is_ok() {
                self.connections.insert(self.next, Client { connection, watched: EventSet::IN });
                self.next += 1;
            }
        }
    }

    /// Drops the client that has said nothing for the longest time, and owes and is owed nothing.
    fn drop_idlest(&mut self) -> bool {
        let idle = self.connections.iter().filter(|(_, client)| client.connection.is_idle());
        let idlest = idle.min_by_key(|(_, client)| client.connection.since()).map(|(id, _)| *id);
        idlest.is_some_and(|id| self.connections.remove(&id).is_some())
    }

    /// Passes replies on. Whether the thread shall end.
    fn obey(&mut self) -> bool {
        let _ = self.mailbox.wake.read();
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Reply(id, response) => {
                    // A client that has gone does not miss it.
                    if let Some(client) = self.connections.get_mut(&id) {
                        client.connection.answer(&response);
                        self.advance(id, EventSet::empty());
                    }
                }
                Message::End => return true,
            }
        }
        false
    }

    /// Does for a connection what can be done now.
    fn advance(&mut self, id: u64, events: EventSet) {
        let Some(client) = self.connections.get_mut(&id) else { return };
        let connection = &mut client.connection;
        let pumped = if events.contains(EventSet::IN) { connection.receive() } else { Ok(()) };
        let pumped = pumped.and_then(|()| pump(connection, id, (&self.call, &self.called), &self.mailbox));
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone || pumped.is_err() || connection.is_over() {
            self.connections.remove(&id);
            return;
        }
        let input = if connection.wants_input() { EventSet::IN } else { EventSet::empty() };
        let output = if connection.wants_output() { EventSet::OUT } else { EventSet::empty() };
        let watched = input | output;
        if std::mem::replace(&mut client.watched, watched) != watched {
            let client = &self.connections[&id];
            self.rewatch(&client.connection, id, watched);
        }
    }

    /// Milliseconds until somebody has stalled for too long, or somebody may be let in again.
    fn timeout(&self) -> i32 {
        let deadlines = self.connections.values().filter_map(|client| client.connection.deadline());
        let Some(first) = deadlines.chain(self.closed_until).min() else { return -1 };
        let left = first.saturating_duration_since(Instant::now()).as_millis();
        i32::try_from(left).unwrap_or(i32::MAX).saturating_add(1)
    }

    fn drop_stalled(&mut self) {
        let now = Instant::now();
        self.connections.retain(|_, client| client.connection.deadline().is_none_or(|deadline| now < deadline));
        if self.closed_until.is_some_and(|until| until <= now) {
            self.closed_until = None;
            self.rewatch(&self.listener, LISTENER, EventSet::IN);
        }
    }

    fn watch(&self, descriptor: &impl AsRawFd, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, descriptor.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
    }

    fn rewatch(&self, descriptor: &impl AsRawFd, token: u64, events: EventSet) {
        let event = EpollEvent::new(events, token);
        let changed = self.epoll.ctl(ControlOperation::Modify, descriptor.as_raw_fd(), event);
        changed.expect("a descriptor that is watched can be watched for something else");
    }
}

/// Takes the requests that have come in, and writes the responses that are there.
fn pump(
    connection: &mut Connection,
    id: u64,
    (call, called): (&SyncSender<Call>, &EventFd),
    mailbox: &Mailbox,
) -> io::Result<()> {
    connection.send()?;
    while let Some((request, file)) = connection.next() {
        match route(&request, file) {
            Routed::Answer(response) => connection.answer(&response),
            Routed::Ask(request, render) => {
                // Clients that have gone leave their requests behind, with files in them: these have an end, too.
                match call.try_send(Call { request, render, connection: id, mailbox: mailbox.clone() }) {
                    Ok(()) => drop(called.write(1)),
                    Err(_) => connection.answer(&Response::fault(503, "The machine is busy: try again")),
                }
            }
        }
        connection.send()?;
    }
    connection.send()
}

#[cfg(test)]
mod tests;
