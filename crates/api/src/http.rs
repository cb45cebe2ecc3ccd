//! Requests as they come over the socket, and responses (RFC 9112). The peer is an adversary.
//!
//! Left out on purpose: chunked and other transfer codings, trailers, and the obsolete folding of lines.

use std::fmt::Write;

use httparse::{Error, Status};

/// The longest request line with its headers, in bytes.
pub(crate) const MOST_HEAD: usize = 8 << 10;
/// The longest body, in bytes: that of the Firecracker API.
pub(crate) const MOST_BODY: usize = 51_200;
/// The most headers of one request.
const MOST_HEADERS: usize = 64;

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// The path, without a query.
    pub(crate) path: String,
    pub(crate) body: Vec<u8>,
    /// Whether the connection stays for another.
    pub(crate) keep_alive: bool,
}

/// What bytes come to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// There is no whole request before there are so many bytes.
    Incomplete {
        needed: usize,
        /// The client waits for a word before it sends the body.
        expects_continue: bool,
    },
    /// A request, and how many bytes it was.
    Complete(Request, usize),
}

/// What is wrong with a request, after which nothing that follows it can be understood.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) status: u16,
    pub(crate) message: String,
}

fn malformed(message: impl Into<String>) -> Fault {
    Fault { status: 400, message: message.into() }
}

/// Reads the first request of `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let too_long = || malformed(format!("The head of a request has {MOST_HEAD} bytes at most"));
    let length = match head.parse(&bytes[..bytes.len().min(MOST_HEAD)]) {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) if bytes.len() >= MOST_HEAD => return Err(too_long()),
        Ok(Status::Partial) => return Ok(Parsed::Incomplete { needed: bytes.len() + 1, expects_continue: false }),
        Err(Error::TooManyHeaders) => {
            return Err(malformed(format!("A request has {MOST_HEADERS} headers at most")));
        }
        Err(error) => return Err(malformed(format!("That is no HTTP/1.1 request: {error}"))),
    };
    let body = body_length(head.headers)?;
    let end = length + body;
    if bytes.len() < end {
        let expects_continue = has_word(head.headers, "expect", "100-continue");
        return Ok(Parsed::Incomplete { needed: end, expects_continue });
    }
    let is_old = head.version == Some(0);
    let keep_alive = match is_old {
        true => has_word(head.headers, "connection", "keep-alive"),
        false => !has_word(head.headers, "connection", "close"),
    };
    let request = Request {
        method: head.method.unwrap_or_default().to_owned(),
        path: path_of(head.path.unwrap_or_default())?,
        body: bytes[length..end].to_vec(),
        keep_alive,
    };
    Ok(Parsed::Complete(request, end))
}

/// The length of the body that follows the head (RFC 9112, section 6.3).
fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, Fault> {
    if values(headers, "transfer-encoding").next().is_some() {
        return Err(malformed("A body comes in one piece, with its Content-Length: Transfer-Encoding is not possible"));
    }
    let mut lengths = values(headers, "content-length");
    let Some(length) = lengths.next() else { return Ok(0) };
    if lengths.next().is_some() || length.is_empty() || !length.iter().all(u8::is_ascii_digit) {
        return Err(malformed("Content-Length is one number"));
    }
    // What no usize holds is too large, too.
    let length = str::from_utf8(length).ok().and_then(|length| length.parse().ok()).unwrap_or(usize::MAX);
    match length {
        0..=MOST_BODY => Ok(length),
        _ => Err(Fault { status: 413, message: format!("A body has {MOST_BODY} bytes at most") }),
    }
}

fn values<'a>(headers: &'a [httparse::Header<'_>], name: &str) -> impl Iterator<Item = &'a [u8]> {
    headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

/// Whether a header's list of words has this one.
fn has_word(headers: &[httparse::Header<'_>], name: &str, word: &str) -> bool {
    let mut words = values(headers, name).flat_map(|value| value.split(|byte| *byte == b','));
    words.any(|value| value.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
}

/// The path of a request's target, with or without `http://HOST` before it (RFC 9112, section 3.2), and without its
/// percent signs' disguise.
fn path_of(target: &str) -> Result<String, Fault> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let wrong = || malformed(format!("The path of the request is wrong: {target}"));
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|digit| char::from(digit).to_digit(16));
                let (high, low) = (digit().ok_or_else(wrong)?, digit().ok_or_else(wrong)?);
                u8::try_from(high << 4 | low).map_err(|_| wrong())?
            }
            byte => byte,
        });
    }
    String::from_utf8(decoded).map_err(|_| wrong())
}

/// The path of a thing with any name, as [`parse`] reads it.
pub(crate) fn encode(name: &str) -> String {
    name.bytes().fold(String::new(), |mut path, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => path.push(byte.into()),
            byte => write!(path, "%{byte:02X}").expect("a string takes every write"),
        }
        path
    })
}

/// One response: a status, and JSON unless it is 204.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) body: Option<serde_json::Value>,
}

impl Response {
    /// It is done, and there is nothing to say.
    pub(crate) const DONE: Self = Self { status: 204, body: None };

    pub(crate) fn ok(body: serde_json::Value) -> Self {
        Self { status: 200, body: Some(body) }
    }

    pub(crate) fn fault(status: u16, message: &str) -> Self {
        Self { status, body: Some(serde_json::json!({ "fault_message": message })) }
    }

    /// The bytes that go over the socket.
    pub(crate) fn write(&self, output: &mut Vec<u8>, keep_alive: bool) {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            413 => "Payload Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let mut head = format!("HTTP/1.1 {} {reason}\r\nConnection: {connection}\r\n", self.status);
        let body = self.body.as_ref().map(ToString::to_string);
        if let Some(body) = &body {
            head.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        output.extend_from_slice(head.as_bytes());
        output.extend_from_slice(b"\r\n");
        output.extend_from_slice(body.unwrap_or_default().as_bytes());
    }
}

#[cfg(test)]
mod tests;
