//! The client's side: one request after the other over one connection, each with a file where that is wanted.

use std::io::{self, ErrorKind, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::unix;
use httparse::Status;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use crate::http;

/// How long a machine has to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// More than any answer has.
const MOST: usize = 4 << 20;

/// A connection to a control socket.
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
}

/// What a machine has answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status: 200, 204, or the number of a fault.
    pub status: u16,
    /// The body, where there is one.
    pub body: Option<Value>,
}

impl Answer {
    /// What a machine says is wrong with a request.
    pub fn fault(&self) -> Option<&str> {
        let body = self.body.as_ref().filter(|_| self.status >= 400);
        body.map(|body| body.get("fault_message").and_then(Value::as_str).unwrap_or("it does not say why"))
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket, or this user may not use it.
    #[error("Cannot connect to {}: {cure}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What to do about it.
        cure: String,
    },
    /// Somebody else's socket.
    #[error("{} is no control socket of vmm: what it answers is not HTTP; name the one that --api-socket made", .0.display())]
    Stranger(PathBuf),
    /// No answer in time.
    #[error("{} does not answer within {PATIENCE:?}: is the process stopped?", .0.display())]
    Silent(PathBuf),
    /// The connection has come to its end.
    #[error("{} was closed before it answered: the machine has ended", .0.display())]
    Closed(PathBuf),
    /// The host is at fault.
    #[error("Cannot speak to {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`], or what the host refuses.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = unix::connect(path).map_err(|error| {
            let cure = match error.kind() {
                ErrorKind::NotFound => "it does not exist; start the machine with --api-socket PATH".into(),
                ErrorKind::ConnectionRefused => {
                    "nobody listens there: its machine has ended, or it is no socket".into()
                }
                ErrorKind::PermissionDenied => "it is another user's".into(),
                ErrorKind::WouldBlock => "too many others wait there, try again".into(),
                _ => error.to_string(),
            };
            ClientError::Connect { path: path.into(), cure }
        })?;
        let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(PATIENCE)));
        let ready = ready.and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        let client = Self { stream, path: path.into() };
        ready.map_err(|source| client.failed(source))?;
        Ok(client)
    }

    /// The path of a thing with a name: `under/NAME`, whatever the name holds.
    pub fn path_of(under: &str, name: &str) -> String {
        format!("{under}/{}", http::encode(name))
    }

    /// Sends one request, with `file` if it wants one, and waits for the answer.
    ///
    /// # Errors
    ///
    /// There is no answer. One that tells of a fault is an answer.
    pub fn ask(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&str>,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Answer, ClientError> {
        let body = body.unwrap_or_default();
        let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let text =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{length}\r\n{body}");
        self.send(text.as_bytes(), file).map_err(|error| self.failed(error))?;
        self.receive()
    }

    fn send(&mut self, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&files));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        self.stream.write_all(&bytes[sent..])
    }

    fn receive(&mut self) -> Result<Answer, ClientError> {
        let mut bytes = Vec::new();
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut head = httparse::Response::new(&mut headers);
            match head.parse(&bytes) {
                Ok(Status::Complete(length)) => {
                    let status = head.code.unwrap_or_default();
                    let body = length_of(head.headers).filter(|body| *body <= MOST);
                    let body = body.ok_or_else(|| ClientError::Stranger(self.path.clone()))?;
                    if bytes.len() >= length + body {
                        return self.read(status, &bytes[length..length + body]);
                    }
                }
                Ok(Status::Partial) if bytes.len() < MOST => {}
                _ => return Err(ClientError::Stranger(self.path.clone())),
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed(self.path.clone())),
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn read(&self, status: u16, body: &[u8]) -> Result<Answer, ClientError> {
        if body.is_empty() {
            return Ok(Answer { status, body: None });
        }
        let body = serde_json::from_slice(body).map_err(|_| ClientError::Stranger(self.path.clone()))?;
        Ok(Answer { status, body: Some(body) })
    }

    fn failed(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Silent(path),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ClientError::Closed(path),
            _ => ClientError::Io { path, source },
        }
    }
}

/// The length of an answer's body; none where its header makes no sense.
fn length_of(headers: &[httparse::Header<'_>]) -> Option<usize> {
    match headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length")) {
        Some(header) => str::from_utf8(header.value).ok()?.trim().parse().ok(),
        None => Some(0),
    }
}
