//! What the host and the agent in the guest say to each other, over vsock: both sides use this library.
//!
//! | module | what it holds |
//! |---|---|
//! | [`frame`] | kind, length and payload: how anything is said |
//! | [`request`] | what the host asks for and what the guest answers, as JSON |
//! | [`copy`] | files and folders, in both directions |
//! | [`initramfs`] | the archive that the agent comes in |
//!
//! The agent connects to [`HOST_PORT`] of the host: that is the control connection. On it the host sends a
//! [`Setup`](request::Setup), which the agent answers with [`Answer::Ready`](request::Answer::Ready) or a failure, and
//! later one request, the machine's main command, whose end is the machine's end. Every other request has a connection
//! of its own, which the host makes to [`GUEST_PORT`] of the guest.
//!
//! A connection lasts for as long as both sides keep it open. The host must not close its half early: the end of what
//! it says is the end of a command that still runs.
//!
//! Neither side trusts the other's bytes: what cannot be parsed is an error and never a panic, and nothing that a peer
//! says has memory set aside for it before it has come.

pub mod copy;
pub mod frame;
pub mod initramfs;
pub mod request;

/// The vsock port of the host (CID 2) that the agent connects to.
pub const HOST_PORT: u32 = 1024;

/// The vsock port of the guest that the agent listens at.
pub const GUEST_PORT: u32 = 1024;
