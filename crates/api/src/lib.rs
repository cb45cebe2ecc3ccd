//! The control socket: HTTP/1.1 over a Unix socket, with the core of the Firecracker API's schema, so that its clients
//! can drive a machine of ours.
//!
//! ```text
//! client ─▶ connection ─▶ http ─▶ route ─▶ ControlRequest ─▶ the machine's thread
//!                                   ◀──── Result<ControlReply, ControlError> ◀──┘
//! ```
//!
//! [`Server`] has a thread of its own, which waits for nobody: neither for a client nor for the machine. A file that is
//! named in a request can come with it as a descriptor (`SCM_RIGHTS`), so that the VMM needs no right to open it.
//!
//! Left out on purpose: what a machine is made of before its start (it comes from the command line or a file), chunked
//! bodies, and everything of HTTP that a local client does not need.

mod client;
mod connection;
mod http;
mod route;
mod schema;
mod server;

pub use client::{Answer, Client, ClientError};
pub use server::{Call, Server};
