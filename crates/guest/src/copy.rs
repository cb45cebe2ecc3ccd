//! Files and folders on their way between host and guest, in both directions.
//!
//! A copy is a frame for each [`Entry`], a folder's before those in it, each file's followed by its bytes, and an end.
//! The paths of all entries begin with the name of the one thing that is copied, which the receiver may give another.
//!
//! The sender is an adversary: it can name any path and any number of bytes. The receiver makes things below its
//! destination only: no path leads upwards, and none through a symbolic link, whoever made it.
//!
//! Left out on purpose: owners, times, extended attributes, holes, hard links (each is a file), set-user-ID bits, and
//! what is neither file nor folder nor link.

mod entry;
mod receive;
mod send;

pub use entry::{Entry, Kind};
pub use receive::{Limits, receive};
pub use send::send;

#[cfg(test)]
mod tests;
