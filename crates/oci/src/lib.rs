//! Container images as the roots of machines.
//!
//! ```text
//! reference ──▶ Source (folder, archive, registry) ──blobs──▶ layers ──headers──▶ Tree ──sqfstar──▶ Cache: HEX.squashfs
//! ```
//!
//! Layers are never unpacked into folders: what they hold is merged in memory, and written as one read-only file system
//! image. So owners, devices and attributes are right without any rights, and no name that an image chose is ever a name on
//! this host.
//!
//! | module | what it holds |
//! |---|---|
//! | [`reference`] | what images are called |
//! | [`blob`], [`manifest`] | digests, and what an image consists of |
//! | [`layer`], [`tree`] | tar archives, and their merging |
//! | [`squash`] | the file system image |
//! | [`cache`] | what is kept |
//! | [`image`] | all of it, one after the other |

pub mod blob;
pub mod cache;
pub mod image;
pub mod layer;
mod local;
mod login;
pub mod manifest;
pub mod reference;
mod registry;
mod source;
pub mod squash;
#[cfg(test)]
mod testing;
pub mod tree;

pub use registry::Patience;
